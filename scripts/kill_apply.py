"""SIGKILL at random moments of `attnpatch apply`: the same command then gives the same bytes, whatever was left.

    python scripts/kill_apply.py                   # 20 moments of each conversion; some minutes of one core
    python scripts/kill_apply.py --moments 3 --out /tmp/killed

Every run is a fork of this process, so that none of its time goes into imports, and a moment falls anywhere in the
work: loading, converting, writing, reading again, the swap. After a kill OUT must not be there, or be whole. Then the
same command runs, is killed once more in every third trial, and ends; what it wrote is compared, file by file, with
what an undisturbed run writes. Writes `killed.json` and `killed.md` into `--out`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic_llama
import torch
import transformers

from hf_attnpatch import cli, embedded

OUT = Path(__file__).resolve().parents[1] / "recipes/results/scale"
HEADS = "grouped_query:num_kv_heads=2"
TEXT = ("--sequences", "12", "--length", "64")
KINDS = {
    "config only": ("-p", "rope_scaling:kind=yarn,factor=2"),
    "mean": ("-p", f"{HEADS},method=mean"),
    "principal": ("-p", f"{HEADS},method=principal"),
    "refined": ("-p", f"{HEADS},method=refined,refine_steps=8", "--calibration", "text.txt", *TEXT),
}
STAGES = ("nothing was begun", "nothing was written", "modules converted", "files written")


def started(arguments: list[str], log: Path) -> int:
    """Run a command in a fork; return its process id."""
    child = os.fork()
    if child:
        return child
    with open(log, "ab", buffering=0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    try:
        cli.app(arguments, standalone_mode=False)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def ended(child: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """Return what tells each file of a checkpoint from others."""
    return {path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def left(place: Path) -> str:
    """Say how far a run was that was killed."""
    hidden = [path for path in place.iterdir() if path.name.startswith(".out.attnpatch-")]
    if not hidden:
        return STAGES[0]
    if any((path / "new").is_dir() and any((path / "new").glob("*.safetensors")) for path in hidden):
        return STAGES[3]
    return STAGES[2] if any(list(path.glob("aside/heads-*/*.safetensors")) for path in hidden) else STAGES[1]


def trials(kind: str, source: Path, work: Path, moments: int, seed: int) -> dict[str, Any]:
    """Kill one conversion at some moments, and compare what comes of it."""
    place = work / kind.replace(" ", "-")
    place.mkdir()
    command = ["apply", str(source), str(place / "out"), *KINDS[kind]]
    log, begin = place / "log", time.monotonic()
    assert ended(started(command, log)) == 0, log.read_text()
    whole = time.monotonic() - begin
    wanted, chance = digests(place / "out"), random.Random(seed)
    shutil.rmtree(place / "out")
    stages: dict[str, int] = dict.fromkeys(STAGES, 0)
    found = {"kind": kind, "seconds": whole, "moments": 0, "too late": 0, "same bytes": 0, "left": 0}
    while found["moments"] < moments:
        log.unlink(missing_ok=True)
        kills = 2 if found["moments"] % 3 == 2 else 1
        for _ in range(kills):
            child = started(command, log)
            time.sleep(chance.uniform(0, whole))
            os.kill(child, signal.SIGKILL)
            if ended(child) != -signal.SIGKILL:
                break  # it had ended
            assert not (place / "out").exists() or digests(place / "out") == wanted  # half of one is never there
        if (place / "out").exists():
            found["too late"] += 1
        else:
            stages[left(place)] += 1
            assert ended(started(command, log)) == 0, log.read_text()
            found["moments"] += 1
            found["same bytes"] += digests(place / "out") == wanted
        found["left"] += len([path for path in place.iterdir() if path.name.startswith(".")])
        shutil.rmtree(place / "out")
    return {**found, "stages": stages}


def page(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """Return the table."""
    lines = [
        "| conversion | killed | same bytes | hidden folders left | when: " + " | ".join(STAGES) + " |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * len(STAGES),
    ]
    for row in rows:
        cells = [row["kind"], row["moments"], row["same bytes"], row["left"], *row["stages"].values()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(
        (
            "# Killed while converting",
            "",
            "`python scripts/kill_apply.py`: SIGKILL at random moments of `attnpatch apply`, then the same command",
            "again. Every third moment kills twice. The last columns say what a killed run had left behind.",
            "",
            *lines,
            "",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            "",
        )
    )


def main() -> None:
    """Kill, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="killed-", dir=".") as folder:
        work = Path(folder).resolve()
        synthetic_llama.write(work / "source", 256, 6, 2 << 20)
        (work / "text.txt").write_text("\n".join(embedded.heldout("prose")[:4]))
        os.chdir(work)
        for kind in arguments.kinds:
            rows.append(trials(kind, work / "source", work, arguments.moments, arguments.seed))
            print(rows[-1], flush=True)
        os.chdir("..")
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "killed.json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    (arguments.out / "killed.md").write_text(page(rows, versions))


if __name__ == "__main__":
    main()
