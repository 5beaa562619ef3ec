"""Checks that checkpoints written on one release of transformers give equal logits on another, or are refused.

    python scripts/check_releases.py write FOLDER     # tiny patched models, and what they answer
    OTHER/bin/python scripts/check_releases.py read FOLDER

`make check-releases` writes on the locked release and reads on the lowest, and the other way round. Exit status 1:
other logits, or an error that is not this package's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging

import hf_attnpatch as ap

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from architectures import tiny_model

_MEMORY = ap.SegmentRecurrence(segment_length=8, memory_length=6)
PATCHES: dict[str, ap.Patch] = {
    "grouped": ap.GroupedQuery(num_kv_heads=2, method="mean"),
    "alibi": ap.Alibi(),
    "rotary": ap.Rotary(theta=500.0),
    "relative_xl": ap.RelativeXl(),
    "sinusoidal": ap.Sinusoidal(),
    "table": ap.PositionTable(length=64),
    "none": ap.NoPosition(),
    "some": ap.NoPosition(layers=[1]),
    "temperature": ap.ScoreTemperature(slope=0.3, step=8),
    "windows": ap.Windowed(window=8),
    "latent": ap.Latent(home="deepseek_v3"),  # youtu came after 5.0
    "self_extend": ap.SelfExtend(window=6, group=3, trained=10),
    "sinks": ap.AttentionSinks(num_sinks=2, window=6, trained=16),
    "recurrence": _MEMORY,
    "request": ap.RopeScaling(kind="yarn", factor=4.0, per_request=True),
}
FAMILIES = ("llama", "gpt2", "gptj", "bloom", "opt")
IDS = torch.arange(5, 45).view(2, 20)


@torch.no_grad()
def answers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits of a forward, and greedy tokens, which go through a cache."""
    written = model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {"logits": model(IDS, use_cache=False).logits.contiguous(), "tokens": written.contiguous()}


def write(folder: Path) -> None:
    """Save every patch that each family takes."""
    for family in FAMILIES:
        for name, patch in PATCHES.items():
            model = tiny_model(family)
            try:
                ap.apply(model, patch)
            except ap.AttnPatchError:
                continue
            place = folder / f"{family}-{name}"
            model.save_pretrained(place)
            save_file(answers(model), place / "answers.st")


def read(folder: Path) -> list[str]:
    """Load every checkpoint and return what is wrong; a refusal by this package is printed, and not wrong."""
    wrong, places = [], sorted(path.parent for path in folder.glob("*/answers.st"))
    if not places:
        return [f"{folder}: no checkpoints; write them first"]
    equal = 0
    for place in places:
        wanted = load_file(place / "answers.st")
        try:
            found = answers(ap.load(str(place)).eval())
        except ap.AttnPatchError as error:
            print(f"refused  {place.name}: {' '.join(str(error).split())[:150]}")
            continue
        same = torch.equal(found["tokens"], wanted["tokens"])
        apart = float((found["logits"] - wanted["logits"]).abs().max() / wanted["logits"].abs().max())
        equal += same and apart < 1e-5
        if not same or apart >= 1e-5:
            wrong.append(
                f"{place.name}: logits differ by {apart:.2g} of the largest; tokens {'equal' if same else 'differ'}"
            )
    print(f"{equal} of {len(places)} checkpoints answer the same on transformers {transformers.__version__}")
    return wrong if equal else [*wrong, "no checkpoint answered the same"]


def main() -> None:
    """Writes or reads, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if chosen.what == "write":
        write(chosen.folder)
        return
    wrong = read(chosen.folder)
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
