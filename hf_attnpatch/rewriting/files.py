"""The weights of a checkpoint as stored in its files: every tensor by name, in its stored dtype."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from ..errors import AttnPatchError
from ..schema import from_json, text_of
from .stored import header_of

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FORMS = ((ONE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))  # in the order of transformers
LARGEST_INDEX = 256 << 20  # bytes of an index: a few million names
_BYTES = 1 << 26  # that are hashed at once
_SAMPLE = 256  # numbers of a tensor


@dataclass(frozen=True)
class Weights:
    """Files of weights, opened one tensor at a time.

    Attributes:
        files: name of a tensor -> the file that holds it.
    """

    files: Mapping[str, Path]

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, on the CPU."""
        return _read(self.files[name], name)

    def __len__(self) -> int:
        return len(self.files)


def weights_of(name: str | os.PathLike[str], **where: Any) -> Weights:
    """Find the weights of a checkpoint that has been loaded already, so that all its files are here.

    Args:
        name: folder or hub repository.
        where: options that say which revision and the like.

    Raises:
        AttnPatchError: a file, or the index of its shards, is damaged or incomplete; says which.
    """
    for one, index in _FORMS:
        found = _here(name, one, where)
        if found is not None:
            return Weights(dict.fromkeys(names_in(found), found))
        listed = _here(name, index, where)
        if listed is not None:
            shards = _shards(listed)
            paths = {shard: _here(name, shard, where) for shard in set(shards.values())}
            return Weights({key: path for key, shard in shards.items() if (path := paths[shard]) is not None})
    return Weights({})


def _shards(index: Path) -> Mapping[str, str]:
    """Return which file each tensor is in."""
    found = from_json(text_of(index, LARGEST_INDEX), str(index), finite=False)
    shards = found.get("weight_map") if isinstance(found, Mapping) else None
    if not isinstance(shards, Mapping) or not all(isinstance(shard, str) for shard in shards.values()):
        raise AttnPatchError(f"{index}: has no weight_map that says which file each tensor is in; get it anew.")
    return shards


def names_in(file: Path) -> list[str]:
    """Return the names of the tensors in a file.

    Raises:
        AttnPatchError: it is damaged or incomplete.
    """
    if file.suffix == ".bin":
        return [key for key, value in _loaded(file).items() if isinstance(value, Tensor)]
    return list(header_of(file).pieces)


def digest(tensor: Tensor) -> tuple[torch.Size, bytes]:
    """Return a fingerprint of a tensor's shape and bytes, among tensors of its dtype."""
    flat, seen = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8), hashlib.blake2b(digest_size=16)
    for start in range(0, len(flat), _BYTES):
        seen.update(flat[start : start + _BYTES].numpy())  # type: ignore[arg-type]  # an array is a buffer
    return tensor.shape, seen.digest()


def sample(tensor: Tensor) -> Tensor:
    """Return some numbers of a tensor, the same places for all of a shape: what tells whether it was read right.

    Whoever reads a tensor wrong (scaled, turned, in another order) does so with all of it.
    """
    if tensor.numel() <= _SAMPLE:
        return tensor.detach().cpu().reshape(-1)
    places = torch.randint(tensor.numel(), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
    whole = tensor.detach()
    return (whole.view(-1)[places.to(whole.device)] if whole.is_contiguous() else whole.take(places)).cpu()


def alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and bytes; nan equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))


def _here(name: str | os.PathLike[str], file: str, where: Mapping[str, Any]) -> Path | None:
    options = {**where, "_raise_exceptions_for_missing_entries": False}
    found = cached_file(name, file, **options)
    return None if found is None else Path(found)


def _read(file: Path, name: str) -> Tensor:
    if file.suffix == ".bin":
        found: Tensor = _loaded(file)[name]
        return found
    with safe_open(file, "pt") as opened:
        read: Tensor = opened.get_tensor(name)
        return read


def _loaded(file: Path) -> Mapping[str, Any]:
    """Open an old file as transformers does: tensors only, no code, memory-mapped."""
    found: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    return found


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"
