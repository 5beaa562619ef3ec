"""Converted modules that lie in files, so that they take no memory, and a conversion that was killed goes on.

Beside each lies what was found on the way. A file is there whole or not at all, and its digest is that of its tensors:
one that does not fit, or was made from other weights, for another recipe or of another text, is made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..aside import place, written
from ..layouts import weight_rows
from ..sites import Site
from .calibration_text import Batch
from .damage import LayerDamage
from .outcome import Conversion, Recipe
from .refine import Gap
from .weights import HeadWeights

_PARTS = ("query", "key", "value", "output", "output_bias")


@dataclass(frozen=True)
class Kept:
    """Where converted modules are kept.

    Attributes:
        folder: of one conversion; None keeps them in memory.
    """

    folder: Path | None

    def store(self, model: nn.Module, site: Site, done: Conversion) -> None:
        """Keep a module that is done: in the dtype of the model, which is what will be written, and in a file."""
        weights = narrowed(model, site, done.weights[site.path])
        done.weights[site.path] = weights
        if self.folder is None:
            return
        tensors = {name: t.contiguous() for name in _PARTS if (t := getattr(weights, name)) is not None}
        said = json.dumps({"groups": weights.groups, "layer": asdict(done.layers[site.path])})
        file, part = self._file(site), self._file(site).with_suffix(".part")
        with written():
            try:
                save_file(tensors, part, {"said": said, "digest": _digest(tensors, said)})
                with open(part, "rb") as opened:
                    os.fsync(opened.fileno())
                part.replace(file)
            except SafetensorError as error:  # a full disk, as the library tells of it
                raise OSError(str(error)) from error
        done.weights[site.path] = _opened(file)[0]

    def recall(self, site: Site, done: Conversion) -> bool:
        """Take up a module that an earlier run has kept; return whether there was one."""
        if self.folder is None or not self._file(site).is_file():
            return False
        try:
            weights, layer = _opened(self._file(site), check=True)
        except (SafetensorError, ValueError, KeyError, TypeError):  # not what was written: made again
            return False
        done.weights[site.path], done.layers[site.path] = weights, layer
        return True

    def _file(self, site: Site) -> Path:
        assert self.folder is not None
        return self.folder / f"{site.path}.safetensors"


def kept(recipe: Recipe, sites: Sequence[Site], text: Sequence[Batch] | None) -> Kept:
    """Return where the modules of a conversion are kept: in memory, where there is no place for files.

    Args:
        recipe: how they are converted.
        sites: which.
        text: that they are converted by.
    """
    where = place()
    if where is None:
        return Kept(None)
    seen = hashlib.blake2b(digest_size=16)
    versions = [torch.__version__, transformers.__version__, torch.get_num_threads()]
    seen.update(json.dumps([where.source, asdict(recipe), [site.path for site in sites], versions]).encode())
    for batch in text or ():
        for name, tensor in sorted(batch.items()):
            seen.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            seen.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    folder = where.folder / f"heads-{seen.hexdigest()}"
    with written():
        folder.mkdir(exist_ok=True)
    return Kept(folder)


def narrowed(model: nn.Module, site: Site, weights: HeadWeights) -> HeadWeights:
    """Return weights in the dtype in which they will stand in the model, as far as a bias has it, too."""
    attention = model.get_submodule(site.path)
    owners = {name: attention.get_submodule(getattr(site.layout, name)) for name in ("query", "key", "value")}
    owners["output"] = model.get_submodule(site.output)
    made: dict[str, Any] = {}
    for name, owner in owners.items():
        dtypes = {weight_rows(owner).dtype, *(p.dtype for p in owner.parameters(recurse=False))}
        if len(dtypes) == 1:
            dtype = dtypes.pop()
            made[name] = getattr(weights, name).to(dtype)
            if name == "output" and weights.output_bias is not None:
                made["output_bias"] = weights.output_bias.to(dtype)
    return dataclasses.replace(weights, **made)


def _digest(tensors: Mapping[str, Tensor], said: str) -> str:
    seen = hashlib.blake2b(said.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        seen.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        seen.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return seen.hexdigest()


def _opened(file: Path, *, check: bool = False) -> tuple[HeadWeights, LayerDamage]:
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        metadata = opened.metadata()
    if check and _digest(tensors, metadata["said"]) != metadata["digest"]:
        raise ValueError(f"{file}: is not what was written")
    said = json.loads(metadata["said"])
    layer = said["layer"]
    gaps = {stage: Gap(**gap) for stage, gap in layer["gaps"].items()}
    groups = tuple(map(tuple, said["groups"]))
    found = LayerDamage(**{**layer, "groups": tuple(map(tuple, layer["groups"])), "gaps": gaps})
    parts = {name: tensors.get(name) for name in _PARTS}
    return HeadWeights(**parts, groups=groups), found  # type: ignore[arg-type]  # five tensors by name


__all__ = ["Kept", "kept", "narrowed"]
