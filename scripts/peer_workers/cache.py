"""A cache of the same size by dropping tokens (kvpress) and by sharing heads (hf_attnpatch): what each loses.

Every method reads the same prefix, keeps the same bytes of it (the nearest number of whole tokens), and predicts the
same targets from what it kept. Request and answer are files, named in this order; the request:
`model` (folder), `prefix`, `targets` (tokens), `documents` and `calibration` (token ids), `kv_heads`, `methods`,
`rounds`, `threads`.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch.evaluation.memory import held_bytes
from hf_attnpatch.evaluation.timing import Work, in_turns
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.roles import run

PRESSES = ("Random", "StreamingLLM", "Knorm", "TOVA", "SnapKV", "ExpectedAttention", "KeyDiff")
Press = Callable[[PreTrainedModel], AbstractContextManager[Any]]


class Contender:
    """A model, and what drops tokens of its cache after the prefix, if anything."""

    def __init__(self, model: PreTrainedModel, press: Press | None = None):
        self.model, self.press = model, press

    def read(self, ids: torch.Tensor) -> DynamicCache:
        """Read a prefix, (1, length)."""
        cache = DynamicCache()
        with self.press(self.model) if self.press else nullcontext():
            run(self.model.model, {words.TOKENS: ids, words.CACHE: cache})
        return cache

    def logits(self, ids: torch.Tensor, cache: DynamicCache, start: int) -> torch.Tensor:
        """Logits of further tokens, at their true positions."""
        here = torch.arange(start, start + ids.shape[1])[None]
        given = {words.TOKENS: ids, words.CACHE: cache, words.POSITIONS: here}
        found: torch.Tensor = run(self.model, given).logits
        return found


def contenders(model: PreTrainedModel, request: dict[str, Any]) -> dict[str, Contender]:
    """All of them by name, the whole cache first."""
    full = ap.describe(model).sites[0].num_kv_heads
    dropped = 1 - request["kv_heads"] / full
    found = {"whole cache": Contender(model)}
    for name in PRESSES:
        found[f"kvpress {name}"] = Contender(model, getattr(kvpress, f"{name}Press")(compression_ratio=dropped))
    for method in request["methods"]:
        shared = copy.deepcopy(model)
        text = torch.tensor(request["calibration"]) if method in ("calibrated", "refined") else None
        ap.patch_grouped_query(shared, num_kv_heads=request["kv_heads"], method=method, calibration=text)
        found[f"grouped query, {method}"] = Contender(shared)
    return found


def measured(one: Contender, ids: torch.Tensor, prefix: int, targets: int) -> tuple[float, int, int]:
    """Mean nats of the targets, bytes of the cache after the prefix, and after the targets."""
    cache = one.read(ids[:, :prefix])
    kept = held_bytes(cache)
    # what follows the first new token is predicted from what was kept of the prefix
    logits = one.logits(ids[:, prefix : prefix + targets], cache, prefix)
    wanted = ids[0, prefix + 1 : prefix + targets + 1]
    return float(F.cross_entropy(logits[0].float(), wanted)), kept, held_bytes(cache)


def decoding(found: dict[str, Contender], ids: torch.Tensor, prefix: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one further token, all in turns; each keeps its own cache."""
    caches = {name: one.read(ids[:, :prefix]) for name, one in found.items()}
    token = ids[:, prefix : prefix + 1]

    def step(name: str) -> Callable[[], object]:
        return lambda: found[name].logits(token, caches[name], prefix)

    return in_turns({name: Work(step(name)) for name in found}, rounds)


@torch.no_grad()
def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measure all methods on all documents."""
    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    with torch.enable_grad():  # refinement trains
        found = contenders(model, request)
    prefix, targets = request["prefix"], request["targets"]
    rows: dict[str, Any] = {name: {"nats": []} for name in found}
    torch.manual_seed(0)  # one press draws at random
    for number, document in enumerate(request["documents"]):
        print(f"document {number + 1} of {len(request['documents'])}", flush=True)
        for name, one in found.items():
            nats, kept, grown = measured(one, torch.tensor(document)[None], prefix, targets)
            rows[name]["nats"].append(nats)
            rows[name] |= {"bytes": kept, "bytes after": grown}
    times = decoding(found, torch.tensor(request["documents"][0])[None], prefix, request["rounds"])
    for name, row in rows.items():
        row["ms"] = times[name]
    packages = ("kvpress", "hf_attnpatch", "transformers", "torch")
    return {"rows": rows, "versions": {name: version(name) for name in packages}}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text("utf-8")))), "utf-8")
