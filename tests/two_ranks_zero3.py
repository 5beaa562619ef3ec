"""torchrun --nproc_per_node 2 two_ranks_zero3.py FOLDER: checkpoints loaded under ZeRO-3; rank 0 writes found.json."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from architectures import tiny_model
from patches import CASES
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import hf_attnpatch as ap

PATCHES = [case.patch for case in {case.kind: case for case in reversed(CASES)}.values() if case.patch.recorded]
OTHERS = [ap.GroupedQuery(num_kv_heads=2), ap.Alibi(), ap.RelativeXl(), ap.PositionTable(length=200)]
JOBS = [*(("llama", p) for p in PATCHES), *(("gpt2", p) for p in OTHERS), *(("bloom", p) for p in OTHERS[:2])]
STAGE_3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def loaded(folder: Path, model_type: str, patch: ap.Patch) -> str:
    """Return what loading a patched checkpoint under ZeRO-3 gives."""
    model = tiny_model(model_type)
    ap.apply(model, patch)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    config = HfDeepSpeedConfig(STAGE_3)  # in force as long as it lives
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    repr(again)
    del config
    wanted = model.state_dict()
    if not all(hasattr(p, "ds_shape") for p in again.parameters()):
        return "not partitioned"
    with deepspeed.zero.GatheredParameters(list(again.parameters())):
        found = again.state_dict()
        equal = found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    return "all tensors equal, all partitioned" if equal else "other tensors"


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    root = Path(sys.argv[1])
    results = {f"{t} {p.name}": loaded(root / f"{t}_{p.name}", t, p) for t, p in JOBS}
    if dist.get_rank() == 0:
        (root / "found.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
