"""Loads a checkpoint in its own process and compares its logits with those before it was saved.

    python recipes/reload.py FOLDER PROBE [--import hf_attnpatch]

FOLDER is what `save_pretrained` wrote; PROBE is a safetensors file with `input_ids` and `logits`. Without `--import`
this is stock transformers: nothing of this project is imported, and that is checked. Prints JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

PACKAGE = "hf_attnpatch"


def compare(folder: str, probe: str, attention: str | None) -> float:
    """Returns the largest difference of a logit."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(probe)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=attention, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        logits = model(input_ids=tensors["input_ids"], use_cache=False).logits
    if logits.shape != tensors["logits"].shape or logits.dtype != tensors["logits"].dtype:
        raise SystemExit(f"logits are {logits.dtype} {tuple(logits.shape)}, they were another shape or type when saved")
    return float((logits.double() - tensors["logits"].double()).abs().max())


def main() -> None:
    """Compares, and says whether the package took part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("probe")
    parser.add_argument("--import", dest="package", default=None)
    parser.add_argument("--path", default=None, help="where the package lies, if it is not installed")
    parser.add_argument("--attention", default=None)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent  # its `data`, `log` ... must not stand in for other packages' modules
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != here]
    if arguments.package:
        sys.path += [arguments.path] if arguments.path else []
        importlib.import_module(arguments.package)
    import torch

    torch.set_num_threads(arguments.threads)
    difference = compare(arguments.folder, arguments.probe, arguments.attention)
    imported = any(name.split(".")[0] == PACKAGE for name in sys.modules)
    print(json.dumps({"max_difference": difference, "stock": not imported}))


if __name__ == "__main__":
    main()
