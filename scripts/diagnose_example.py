"""What `diagnose` says of a multi-head model of 7 billion parameters that serves 16 texts of 4,096 tokens on an H100.

    python scripts/diagnose_example.py      # half a minute of one core; no weights are loaded

Writes `recipes/results/diagnose/seven_billion.json`, which the README quotes, and `seven_billion.txt`, the page itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

import hf_attnpatch as ap

OUT = Path(__file__).resolve().parents[1] / "recipes/results/diagnose"
WORK = {"context": 4096, "batch": 16, "hardware": "h100", "training": False}


def summary(found: ap.Diagnosis) -> dict[str, Any]:
    """The figures that a page may quote."""
    step, memory = found.work.phases["decode"], found.work.memory["decode"]
    answers = [(p, setting) for p in found.prescriptions for setting in p.settings if setting.lifts]
    return {
        "model": "Llama, 32 layers of 4,096, 32 heads, bfloat16",
        **WORK,
        "weight_bytes": memory.weights,
        "cache_bytes": memory.cache,
        "decode_seconds": step.seconds,
        "cache_share": (step.parts["cache"] + step.parts["attention"]) / step.seconds,
        "lacks": [lack.what for lack in found.lacks],
        "answers": [{"spec": setting.spec, "gains": setting.gains} for _, setting in answers],
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }


def main() -> None:
    """Diagnose and write."""
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=4096, dtype="bfloat16")).to(torch.bfloat16).eval()
    found = ap.diagnose(model, **WORK)
    (OUT / "seven_billion.json").write_text(json.dumps(summary(found), indent=1) + "\n", "utf-8")
    (OUT / "seven_billion.txt").write_text(f"{found}\n", "utf-8")
    print(found)


if __name__ == "__main__":
    main()
