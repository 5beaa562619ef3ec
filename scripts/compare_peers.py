"""Compares this project with its peers on equal work, as far as they run without a GPU, each in its own environment.

    python scripts/compare_peers.py                  # half an hour on two cores, 5 GB below --environments
    python scripts/compare_peers.py --only survive
    python scripts/compare_peers.py --only cache --models embedded --methods mean,calibrated

Two questions. `survive`: does each install beside the newest transformers, import, patch a tiny Llama here, give the
same logits, leave other models of the process alone, and undo itself? `cache`: what does a cache of the same size cost,
by dropping tokens (kvpress) and by sharing heads, in nats of the same targets? Finished answers are kept in --out, and
a further run goes on (`--again` asks anew). Writes peers.json, README.md and peers.png into --out, and the project
README's table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers_report
import readme
from environments import InstallFailed, Runtime, RuntimeFailed, install, is_installed, run
from peers import CACHE, PEERS, ROOT, provide
from rich.console import Console
from transformers import AutoTokenizer

from hf_attnpatch import embedded

OUT = ROOT / "recipes/results/peers"
# folder, tokens of prefix and of targets, documents, and heads to convert to
MODELS: dict[str, dict[str, Any]] = {
    "embedded, 8 -> 4": {"folder": embedded.path(), "prefix": 384, "targets": 127, "documents": 24, "kv_heads": 4},
    "embedded, 8 -> 2": {"folder": embedded.path(), "prefix": 384, "targets": 127, "documents": 24, "kv_heads": 2},
    "SmolLM2-135M, 3 -> 1": {
        **{"folder": ROOT / "data/smollm2", "prefix": 768, "targets": 255, "documents": 16, "kv_heads": 1}
    },
}
CALIBRATION = {"sequences": 64, "length": 512}
ROUNDS = 16
console = Console(stderr=True)
Row = dict[str, Any]


def texts(part: int) -> list[str]:
    """Held-out documents in turn from all domains; part 0 is measured on, part 1 calibrated on."""
    domains = [embedded.heldout(domain) for domain in embedded.DOMAINS]
    mixed = [text for row in zip(*domains, strict=False) for text in row]
    return mixed[part::2]


def tokens(folder: Path, part: int, count: int, length: int) -> list[list[int]]:
    """Pieces of documents in tokens: the first of each, then the second of each, and so on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = []
    for text in texts(part):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append([ids[at : at + length] for at in range(0, len(ids) - length + 1, length)])
    found = [piece for row in itertools.zip_longest(*pieces) for piece in row if piece is not None]
    if len(found) < count:
        raise SystemExit(f"compare_peers: {len(found)} of {count} pieces of {length} tokens in the held-out text.")
    return found[:count]


def ask(runtime: Runtime, request: Row, given: argparse.Namespace) -> Row:
    """One worker, one answer."""
    with tempfile.TemporaryDirectory() as scratch:
        log = given.logs / f"{runtime.name}.log"
        request = {**request, "scratch": scratch, "threads": given.threads}
        return run(runtime, given.environments, request, log)


def survive(name: str, given: argparse.Namespace) -> Row:
    """What comes of one peer, from installing it on."""
    try:
        runtime, refused = provide(PEERS[name], given.environments)
    except InstallFailed as failure:
        asked = PEERS[name].steps[-1][-1]
        return {"steps": [{"step": peers_report.STEPS[0], "ok": False, "detail": str(failure)}], "asked": asked}
    beside = {"step": peers_report.STEPS[0], "ok": refused is None, "detail": refused or ""}
    try:
        found = ask(runtime, {"peer": name}, given)
    except RuntimeFailed as failure:
        said = peers_report.plain(str(failure))
        return {"steps": [beside, {"step": "imports", "ok": False, "detail": said}]}
    return {"steps": [beside, *found["steps"]], "versions": found["versions"]}


def cache(name: str, given: argparse.Namespace) -> Row:
    """One model at one size of cache."""
    if not is_installed(CACHE, given.environments):
        install(CACHE, given.environments)
    work = MODELS[name]
    length = work["prefix"] + work["targets"] + 1
    request = {
        **{key: work[key] for key in ("prefix", "targets", "kv_heads")},
        "model": str(work["folder"]),
        "documents": tokens(work["folder"], 0, work["documents"], length),
        "calibration": tokens(work["folder"], 1, CALIBRATION["sequences"], CALIBRATION["length"]),
        "methods": given.methods.split(","),
        "rounds": ROUNDS,
    }
    found = ask(CACHE, request, given)
    kept = {key: work[key] for key in ("prefix", "targets", "documents", "kv_heads")}
    return {**kept, "rows": found["rows"], "versions": found["versions"], "seconds": found["seconds"]}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("survive", "cache"))
    parser.add_argument("--models", default="", help="of `cache`: those whose name begins so")
    parser.add_argument("--methods", default="mean,principal,calibrated,refined", help="of grouped query")
    parser.add_argument("--again", action="store_true", help="ask what is answered already")
    parser.add_argument("--render", action="store_true", help="only write tables and figure of what is there")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv/peers")
    parser.add_argument("--logs", type=Path, default=ROOT / "outputs/peers", help="what the workers said")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    given.environments, given.logs = given.environments.resolve(), given.logs.resolve()
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask what is not answered yet, then write."""
    given = parsed(arguments)
    given.logs.mkdir(parents=True, exist_ok=True)
    given.out.mkdir(parents=True, exist_ok=True)
    store = given.out / "peers.json"
    found = json.loads(store.read_text("utf-8")) if store.is_file() else {"survive": {}, "cache": {}}
    asked = [("survive", name, survive) for name in PEERS]
    asked += [("cache", name, cache) for name in MODELS if name.startswith(given.models)]
    for kind, name, answer in [] if given.render else asked:
        if given.only not in (None, kind) or (name in found[kind] and not given.again):
            continue
        console.print(f"{kind}: {name} ...")
        found[kind][name] = answer(name, given)
        store.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    written = peers_report.markdown(found)
    (given.out / "README.md").write_text(peers_report.page(written), "utf-8")
    peers_report.figure(found["cache"], given.out / "peers.png")
    if given.out == OUT:
        readme.write("peers", written)
    console.print(f"{given.out}/README.md")


if __name__ == "__main__":
    main()
