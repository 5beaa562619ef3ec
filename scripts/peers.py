"""Projects that also patch models of transformers, as they install from the package index."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from environments import TORCH, InstallFailed, Runtime, install, is_installed

WORKERS = Path(__file__).resolve().parent / "peer_workers"
ROOT = Path(__file__).resolve().parents[1]
NEWEST = "transformers==5.23.0"  # what this project is tested on


def _peer(name: str, *packages: str) -> Runtime:
    return Runtime(name, "survive.py", (("install", TORCH), ("install", TORCH, *packages)), WORKERS)


PEERS = {
    peer.name: peer
    for peer in (
        _peer("kvpress", "kvpress==0.5.5"),
        _peer("liger-kernel", "liger-kernel==0.8.5"),
        _peer("optimum", "optimum==2.3.0"),
        _peer("unsloth", "unsloth==2026.10.9"),
        _peer("hf_attnpatch", "--editable", str(ROOT)),
    )
}
# both in one environment and one process, so that nothing differs but the method
CACHE = Runtime(
    "cache",
    "cache.py",
    (("install", TORCH), ("install", TORCH, "kvpress==0.5.5", "--editable", str(ROOT))),
    WORKERS,
)


def provide(peer: Runtime, environments: Path) -> tuple[Runtime, str | None]:
    """Make the environment of a peer, with the newest transformers if it allows that.

    Returns:
        What was installed, and why it was not beside the newest transformers, or None if it was.

    Raises:
        InstallFailed: not without that wish either.
    """
    newest = replace(peer, steps=(peer.steps[0], (*peer.steps[1], NEWEST)))
    if is_installed(newest, environments):
        return newest, None
    reason = environments / f"{peer.name}.refused"
    if is_installed(peer, environments) and reason.is_file():
        return peer, reason.read_text("utf-8")
    try:
        install(newest, environments)
    except InstallFailed as failure:
        said = conflict(str(failure))
        try:
            install(peer, environments)
        except InstallFailed as second:
            raise InstallFailed(f"{said}; with an older transformers: {conflict(str(second))}") from None
        reason.write_text(said, "utf-8")
        return peer, said
    return newest, None


def conflict(said: str) -> str:
    """What pip names as the cause, in a line; its last words if it names none."""
    wants = re.findall(r"\|\s+(\S+ \S+ depends on transformers\S*.*)", said)
    last = [line.strip(" |") for line in said.splitlines() if "ERROR" in line and "Ignored" not in line]
    return (wants or last or [said.splitlines()[-1]])[0].strip()
