"""Fuzz every parser of files that strangers write: which inputs were read, refused, or met an undocumented error.

    python scripts/fuzz.py --inputs 100000 --out recipes/results/fuzz

Inputs are mutations of the valid ones in tests/fuzz_targets.py, the same for the same seed; a fault is kept beside the
table, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import collections
import csv
import logging
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from fuzz_targets import TARGETS, mutated, outcome  # noqa: E402 - found by the path above

HEAD = ("parser", "inputs", "read", "refused", "undocumented", "slowest_ms")


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Give a parser so many inputs; return its row and the faults."""
    chance, counts, faults, slowest = random.Random(f"{seed} {name}"), collections.Counter[str](), [], 0.0
    for _ in range(inputs):
        content = mutated(chance.choice(TARGETS[name][1]), chance)
        begin = time.monotonic()
        found = outcome(name, content, folder)
        slowest = max(slowest, time.monotonic() - begin)
        known = found in ("read", "refused")
        counts[found if known else "undocumented"] += 1
        if not known:
            faults.append(f"{name}\t{found[:300]!r}\t{content[:2000]!r}")
    return {
        "parser": name,
        "inputs": inputs,
        **{key: counts[key] for key in ("read", "refused", "undocumented")},
        "slowest_ms": round(slowest * 1e3),
    }, faults


def _page(rows: list[dict[str, Any]], inputs: int, seed: int, peak: str) -> str:
    head = f"| {' | '.join(HEAD)} |\n| --- |{' ---: |' * (len(HEAD) - 1)}\n"
    body = "".join(f"| {' | '.join(str(row[key]) for key in HEAD)} |\n" for row in rows)
    return (
        "# Fuzzing of every parser\n\n"
        f"`python scripts/fuzz.py --inputs {inputs} --seed {seed}`, as `make fuzz` calls it: mutations of the valid\n"
        "inputs in `tests/fuzz_targets.py` (words and characters, and the values of JSON), through each "
        "parser of files\n"
        "that strangers write. *Refused* is a short error of the family that is documented; *undocumented* is "
        "anything\n"
        "else, a message of 3,000 characters included, and fails the run. No corpus is kept: a seed makes the same\n"
        f"inputs. Peak memory of the process, torch and transformers included: {peak}. `counts.csv` has the table.\n\n"
        f"{head}{body}"
    )


def main() -> None:
    """Fuzz, and write the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--inputs", type=int, default=100_000, help="over all parsers")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=ROOT / "recipes" / "results" / "fuzz")
    chosen = options.parse_args()
    logging.disable(logging.WARNING)  # of huggingface_hub, about each card
    each, rows, faults = -(-chosen.inputs // len(TARGETS)), [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in TARGETS:
            row, found = fuzz(name, each, chosen.seed, Path(folder))
            rows.append(row)
            faults += found
            print(*row.values(), flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    total = {"parser": "all", **{key: sum(row[key] for row in rows) for key in HEAD[1:5]}}
    total["slowest_ms"] = max(row["slowest_ms"] for row in rows)
    with open(chosen.out / "counts.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, HEAD, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, total])
    peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    (chosen.out / "README.md").write_text(_page([*rows, total], chosen.inputs, chosen.seed, peak), "utf-8")
    kept = chosen.out / "faults.txt"
    kept.write_text("\n".join(faults), "utf-8") if faults else kept.unlink(missing_ok=True)
    print(*total.values(), f"peak {peak}")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
