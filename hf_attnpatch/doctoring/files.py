"""Reads the files of a checkpoint folder: no weights are loaded, no code runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import AttnPatchError
from ..schema import from_json, text_of

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Files:
    """The contents of a checkpoint folder.

    Attributes:
        folder: where it is.
        config: of ``config.json``.
        generation: of ``generation_config.json``; None where there is none.
        tokenizer: of ``tokenizer_config.json``; None where there is none.
        weights: dtype as safetensors calls it (``BF16``, ``F32`` ...) -> numbers stored in it; empty without weights.
    """

    folder: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    tokenizer: Mapping[str, Any] | None
    weights: Mapping[str, int]

    @property
    def name(self) -> str:
        """The folder's name without its path: a report may be published."""
        return self.folder.resolve().name

    @property
    def text(self) -> Mapping[str, Any]:
        """The config of the language model: ``text_config``, if there is one, over the outer config."""
        inner = self.config.get("text_config")
        return {**self.config, **inner} if isinstance(inner, Mapping) else self.config

    @property
    def model_type(self) -> str:
        """Transformers' name of the language model's family."""
        return str(self.text.get("model_type", ""))


def read(folder: Path) -> Files:
    """Read a checkpoint folder.

    Raises:
        AttnPatchError: no folder, no ``config.json``, a file that is no JSON mapping, a damaged header of weights.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "is not there"
        raise AttnPatchError(f"{folder}: {found}; wanted the folder of a checkpoint, with a {CONFIG}.")
    if not (folder / CONFIG).is_file():
        raise AttnPatchError(f"{folder}: holds no {CONFIG}; wanted the folder of a checkpoint.")
    config = read_json(folder / CONFIG)
    others = [read_json(folder / name) if (folder / name).is_file() else None for name in (GENERATION, TOKENIZER)]
    return Files(folder, config, others[0], others[1], _weights(folder))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON mapping.

    Raises:
        AttnPatchError: not UTF-8, not JSON, not a mapping, or a key that stands there twice.
    """
    found = from_json(text_of(file), str(file), finite=False, unique=True)
    if not isinstance(found, dict):
        raise AttnPatchError(f"{file}: found a {type(found).__name__}; wanted a JSON mapping.")
    return found


def _weights(folder: Path) -> dict[str, int]:
    found: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    size = 1
                    for length in part.get_shape():
                        size *= length
                    found[part.get_dtype()] += size
        except SafetensorError as error:
            raise AttnPatchError(f"{file}: its header cannot be read ({error}); copy the file again.") from error
    return dict(found)
