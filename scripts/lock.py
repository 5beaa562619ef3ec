"""Writes constraints.txt, the lock: every package that `make demo` and `make test` install, pinned.

    make lock      # pins what is new in pyproject.toml, leaves the other pins as they are
    make newest    # --upgrade: the newest of everything, and what that changes for this package

uv resolves from metadata alone, for each of `PYTHONS` and every platform, and downloads no torch. CUDA's packages are
left out: a CPU build of torch does not need them, and a CUDA build pins its own. hf_attnpatch/tested.py is told which
release of transformers is locked: it is the newest that the whole suite ran on.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
TESTED = ROOT / "hf_attnpatch" / "tested.py"
PYTHONS = ("3.11", "3.12", "3.13")  # installed on each; the newest transformers wants 3.11 at least
BUILDING = "wheel\neditables"  # pip builds with them what comes as source, and this package
CUDA = re.compile(r"(nvidia|cuda|triton)\b")
HEADER = """\
# Every package that `make demo` and `make test` install, pinned. `make lock` writes this, `make newest` refreshes it.
# for Python {pythons}
"""


def pins(text: str) -> dict[str, str]:
    """What a lock pins: package -> version, or versions with their markers where they depend on Python."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            found.setdefault(name, []).append(version)
    return {name: ", ".join(versions) for name, versions in found.items()}


def as_lock(resolved: str) -> str:
    """What uv resolved, without the packages that only a CUDA build of torch needs, under our header."""
    kept = [line for line in resolved.splitlines() if line and not line.startswith("#") and not CUDA.match(line)]
    return HEADER.format(pythons=" ".join(PYTHONS)) + "".join(f"{line}\n" for line in kept)


def resolve(torch: str, upgrade: bool) -> str:
    """Has uv resolve pyproject.toml with its extra `dev`; pins of the lock that is there stay where they can.

    Args:
        torch: torch's requirement, such as `torch==2.13.0`.
        upgrade: take the newest of everything instead.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "-", "--extra", "dev", "--universal"]
    command += ["--python-version", PYTHONS[0], "--no-annotate", "--no-emit-index-url", "--quiet", "-o", LOCK.name]
    command += ["--upgrade"] if upgrade else []
    wanted = f"{torch}\n{BUILDING}\n"
    done = subprocess.run(command, cwd=ROOT, input=wanted, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lock: uv found no packages that fit together; constraints.txt is as it was.\n{done.stderr}")
    return as_lock(LOCK.read_text("utf-8"))


def with_newest(text: str, version: str) -> str:
    """The text of hf_attnpatch/tested.py with another newest release."""
    return re.sub(r'^NEWEST = ".*?"', f'NEWEST = "{version}"', text, flags=re.MULTILINE)


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """A line for each package whose pin is another one."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"  {name}: {before.get(name, '-')} -> {after.get(name, '-')}" for name in names]


def main(arguments: Sequence[str] | None = None) -> None:
    """Resolves, writes the lock and the tested release, and says which pins changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="its requirement, such as torch==2.13.0")
    parser.add_argument("--upgrade", action="store_true", help="the newest of everything")
    given = parser.parse_args(arguments)
    before = pins(LOCK.read_text("utf-8")) if LOCK.is_file() else {}
    text = resolve(given.torch, given.upgrade)
    after = pins(text)
    LOCK.write_text(text, "utf-8")
    TESTED.write_text(with_newest(TESTED.read_text("utf-8"), after["transformers"]), "utf-8")
    found = changes(before, after)
    print(
        f"constraints.txt: {len(after)} packages for Python {', '.join(PYTHONS)}; {len(found)} changed",
        *found,
        sep="\n",
    )


if __name__ == "__main__":
    main()
