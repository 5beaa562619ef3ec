"""The checkpoints for other runtimes, checks of them, and the prompts that all of them get."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONG = "The ship had been at sea for eleven days when the wind failed, and nobody on board would say what all of them "
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at 100 degrees Celsius because",
    "1, 2, 4, 8, 16, 32,",
    "Q: What is the largest planet of the solar system?\nA:",
    "Zürich, Reykjavík and København – 東京 –",
    LONG + "knew. " + LONG + "feared. " + "The captain counted the barrels again, and wrote in his book: " * 6,
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that stock transformers loads; a control is one that no patch has touched."""

    folder: Path
    control: bool
    config: dict[str, Any]

    @property
    def label(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def patches(self) -> str:
        """The patches that the checkpoint itself records."""
        return "; ".join(map(_shown, self.config.get("attnpatch", {}).get("patches", ()))) or "none"


def _shown(spec: dict[str, Any]) -> str:
    fields = (f"{key}={value}" for key, value in spec.items() if key not in ("patch", "stock") and value is not None)
    return f"{spec['patch']}({', '.join(fields)})"


def refused(folder: Path, found: str, wanted: str) -> SystemExit:
    """One line that says where, what was found and what was wanted."""
    return SystemExit(f"check_downstream: {folder}: {found}; wanted {wanted}.")


def checkpoint(folder: Path, control: bool = False) -> Checkpoint:
    """Reads what a checkpoint is.

    Raises:
        SystemExit: if it is no checkpoint, not a stock one, one that the prompts cannot tell from its original, or has
            no tokenizer.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise refused(folder, "no config.json", "a checkpoint folder, such as `attnpatch apply MODEL OUT ...` writes")
    config = json.loads(file.read_text("utf-8"))
    if config.get("model_type") == "hf_attnpatch" or "auto_map" in config:
        found = f"model type {config.get('model_type')!r}, which needs code that the other runtimes do not have"
        raise refused(folder, found, "a checkpoint of which `attnpatch apply` says: stock transformers loads it, yes")
    if '"rope_type": "dynamic"' in json.dumps(config):
        found = "dynamic rope, which acts beyond its window alone, and llama.cpp's converter drops it without a word"
        raise refused(folder, found, "a kind that short prompts show: linear, yarn, llama3")
    if not (folder / "tokenizer.json").is_file():
        raise refused(
            folder, "no tokenizer.json", "the tokenizer beside the weights: tokenizer.save_pretrained(folder)"
        )
    return Checkpoint(folder.resolve(), control, config)


def checkpoints(folders: Sequence[Path], controls: Sequence[Path]) -> list[Checkpoint]:
    """All of them, the controls last; their names tell them apart."""
    found = [*(checkpoint(folder) for folder in folders), *(checkpoint(folder, control=True) for folder in controls)]
    labels = [one.label for one in found]
    for one in found:
        if labels.count(one.label) > 1:
            raise refused(one.folder, f"another checkpoint is called {one.label!r} too", "folders of different names")
    return found


def encoded(one: Checkpoint, tokenizer: Any, new_tokens: int) -> list[list[int]]:
    """The prompts in a checkpoint's own tokens.

    Raises:
        SystemExit: if a prompt and its continuation do not fit into the checkpoint's window.
    """
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    length, window = max(map(len, prompts)) + new_tokens, one.config.get("max_position_embeddings", 0)
    if window < length:
        found = f"max_position_embeddings is {window}"
        raise refused(one.folder, found, f"{length} positions at least, or fewer new tokens (--new-tokens)")
    return prompts
