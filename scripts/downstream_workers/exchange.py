"""What every worker reads and writes; the standard library alone, for the environments have little in common.

A request: `checkpoint`, `prompts` (token ids, a list for each), `new_tokens`, `top` (how many log-probabilities a
step), `threads`, `scratch` (a folder), and `forced`: continuations to be scored, or null for the worker's own.
An answer: `continuations` (`new_tokens` ids for each prompt, past any end of text), `logprobs` (for each step of the
scored continuations a map from token id to natural log-probability, the `top` largest), `kv_heads` (as the runtime
has it), `versions`, `settings`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def serve(answer: Callable[[Json], Json]) -> None:
    """Answers the request in the file named first into the file named second."""
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    found = answer(request)
    lengths = {len(tokens) for tokens in found["continuations"]}
    assert lengths == {request["new_tokens"]}, f"continuations of {lengths} tokens, not {request['new_tokens']}"
    Path(sys.argv[2]).write_text(json.dumps(found), "utf-8")


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages, and Python's."""
    return {**{name: version(name) for name in packages}, "python": sys.version.split()[0]}


def largest(logprobs: Iterable[tuple[int, float]], top: int) -> dict[int, float]:
    """The `top` largest log-probabilities by token id, the largest first."""
    return dict(sorted(logprobs, key=lambda pair: (-pair[1], pair[0]))[:top])
