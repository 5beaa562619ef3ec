"""Finds the files of a repository that belong to the replaced model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# Weights under another name would be loaded in the place of the new ones (transformers looks for model.safetensors
# before an index), an adapter on top of them; a loader of our own would say what is no longer so.
_OWNED = re.compile(
    r"(model|pytorch_model|adapter_model)[^/]*\.(safetensors|bin)(\.index\.json)?"
    r"|adapter_config\.json|modeling_hf_attnpatch\.py|attnpatch/.*"
)


def stale_files(there: Sequence[str], folder: Path) -> list[str]:
    """Return the files of a repository that must be deleted when a folder replaces its content."""
    return [name for name in there if _OWNED.fullmatch(name) and not (folder / name).is_file()]
