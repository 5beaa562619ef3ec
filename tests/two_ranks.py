"""torchrun --nproc_per_node 2 two_ranks.py FOLDER: what only real processes show; rank 0 writes FOLDER/found.json."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from architectures import tiny_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import hf_attnpatch as ap

PATCHES = (ap.Alibi(), ap.RelativeXl(), ap.GroupedQuery(num_kv_heads=2), ap.AttentionSinks(num_sinks=2, window=8))


def sharded(folder: Path, patch: ap.Patch) -> float:
    """Return how far the logits of a checkpoint loaded with ``tp_plan`` are from those of one process."""
    ids, model = torch.arange(5, 53).view(2, 24), tiny_model("llama").eval()
    ap.apply(model, patch)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").eval()
    with torch.no_grad():
        found, wanted = again(input_ids=ids).logits, model(input_ids=ids).logits
    found = found.full_tensor() if hasattr(found, "full_tensor") else found
    return float((found - wanted).abs().max())


def refusal(function) -> str:
    """Return what a call is refused with."""
    try:
        function()
    except ap.AttnPatchError as error:
        return str(error)
    return "accepted"


def trained_while_sharded(folder: Path) -> str:
    """Return what training position terms under tensor parallelism ends with."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").train()
    return refusal(lambda: model(input_ids=torch.arange(5, 29)[None]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    root = Path(sys.argv[1])
    results = {patch.name: sharded(root / patch.name, patch) for patch in PATCHES}
    results["trained"] = trained_while_sharded(root / "relative_xl")
    wrapped = DistributedDataParallel(tiny_model("llama").train())
    results["inside"] = refusal(lambda: ap.patch_relative_xl(wrapped.module))
    if dist.get_rank() == 0:
        (root / "found.json").write_text(json.dumps(results))
    dist.destroy_process_group()
