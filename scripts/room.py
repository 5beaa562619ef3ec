"""Counts what the attention room is about: lines, files, names in transformers' tables, import circles, a trip.

python scripts/room.py            # of this tree, as JSON
"""

from __future__ import annotations

import ast
import json
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "hf_attnpatch"
ROOMS = ("attention", "backends.py", "fused", "positions", "spans", "recurrence")  # what attention is patched by


def files() -> list[Path]:
    """Return the package's files."""
    return sorted(PACKAGE.rglob("*.py"))


def sizes() -> dict[str, Any]:
    """Count files and lines, of all and of the rooms of attention."""
    every = files()
    mine = [f for f in every if f.relative_to(PACKAGE).parts[0] in ROOMS]
    return {
        "files": len(every),
        "lines": sum(len(f.read_text().splitlines()) for f in every),
        "files of attention": len(mine),
        "lines of attention": sum(len(f.read_text().splitlines()) for f in mine),
    }


def imported(path: Path) -> set[str]:
    """Return the first names, relative to the package, of what a file imports from it, also within functions.

    What a type checker alone reads is left out.
    """
    depth, found, tree = len(path.relative_to(PACKAGE).parts), set[str](), ast.parse(path.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    unread = {id(inner) for node in typing for part in node.body for inner in ast.walk(part)}
    for node in (node for node in ast.walk(tree) if id(node) not in unread):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def circles() -> list[str]:
    """Return the pairs of rooms that import each other."""
    arrows = set[tuple[str, str]]()
    for path in files():
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        arrows |= {(room, other) for other in imported(path) if other != room and room != "__init__"}
    return sorted(f"{a} <-> {b}" for a, b in arrows if a < b and (b, a) in arrows)


def registered() -> int:
    """Count names that every patch of attention leaves in transformers' tables."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    tables = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = {name for table in tables for name in table}
    trip(everything=True)
    return len({name for table in tables for name in table} - before)


def trip(everything: bool = False) -> tuple[int, int]:
    """Patch with ALiBi, save, load and run; return how many files and functions of the package that passed through."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import hf_attnpatch as ap

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64}

    def fresh() -> LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()

    if everything:
        memory, far = ap.SegmentRecurrence(segment_length=8, memory_length=8), ap.SelfExtend(trained=16)
        for patch in (ap.Alibi(), ap.RelativeXl(), memory, far):
            ap.apply(fresh(), patch)
        from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

        ap.apply(GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=64)).eval(), ap.Rotary())
        ap.apply(BloomForCausalLM(BloomConfig(hidden_size=32, n_head=4, n_layer=1, vocab_size=64)).eval(), ap.Flash())
        return 0, 0
    seen = set[tuple[str, str]]()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            seen.add((frame.f_code.co_filename, frame.f_code.co_qualname))

    model = fresh()
    with TemporaryDirectory() as folder:
        sys.setprofile(note)
        threading.setprofile(note)
        try:
            ap.patch_alibi(model)
            model.save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(folder)(torch.arange(8)[None])
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return len({name for name, _ in seen}), len(seen)


def main() -> None:
    """Print the counts."""
    touched = trip()
    found = {**sizes(), "circles": circles(), "names registered": registered()}
    found["from patch_alibi to reload"] = {"files": touched[0], "functions": touched[1]}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
