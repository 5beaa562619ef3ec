"""Fuzz every parser of files that strangers write by coverage: atheris keeps the inputs that reach new lines.

    python scripts/fuzz_atheris.py --seconds 600 --out outputs/fuzz_atheris

Begins with the valid inputs of tests/fuzz_targets.py, and changes them as that file does or as atheris does. The first
undocumented error ends the run with a traceback and is kept beside the corpus; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

with atheris.instrument_imports(include=["hf_attnpatch"]):
    from fuzz_targets import TARGETS, mutated, outcome

NAMES = sorted(TARGETS)
LONGEST = 100_000  # bytes of an input


def seeds() -> dict[str, bytes]:
    """Return the valid inputs: a byte that says which parser, and what it reads."""
    inputs = ((number, valid) for number, name in enumerate(NAMES) for valid in TARGETS[name][1])
    return {f"seed-{place}": packed(number, valid) for place, (number, valid) in enumerate(inputs)}


def packed(number: int, content: str) -> bytes:
    """Return one input as bytes; lone surrogates are kept."""
    return bytes([number]) + content.encode("utf-8", "surrogatepass")


def unpacked(data: bytes) -> tuple[str, str]:
    """Return the parser and the text that bytes stand for, any bytes."""
    name = NAMES[data[0] % len(NAMES)] if data else NAMES[0]
    return name, data[1:].decode("utf-8", "replace")


def changed(data: bytes, most: int, seed: int) -> bytes:
    """Change an input: its values and words, or its bytes as coverage suggests."""
    chance = random.Random(seed)
    name, content = unpacked(data)
    if content and chance.random() < 0.5:
        try:
            return packed(NAMES.index(name), mutated(content, chance))[:most]
        except (ValueError, TypeError, RecursionError):  # no JSON any more, so that its values cannot be changed
            pass
    return bytes(atheris.Mutate(data, most))


def main() -> None:
    """Fuzz until the time is over or something undocumented is met."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=int, default=600)
    options.add_argument("--out", type=Path, default=ROOT / "outputs" / "fuzz_atheris")
    chosen = options.parse_args()
    corpus = chosen.out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, content in seeds().items():
        (corpus / name).write_bytes(content)
    logging.disable(logging.WARNING)  # of huggingface_hub, about each card

    def one(data: bytes) -> None:
        name, content = unpacked(data)
        with tempfile.TemporaryDirectory() as folder:
            found = outcome(name, content, Path(folder))
        if found not in ("read", "refused"):
            raise AssertionError(f"{name}: {found}")

    limits = [f"-max_total_time={chosen.seconds}", f"-max_len={LONGEST}", "-timeout=60", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={chosen.out}/", str(corpus)], one, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
