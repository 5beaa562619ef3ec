"""A patched checkpoint is made from the files of the old one, where their names are those of the model's class.

A file none of whose tensors a patch has replaced is copied as it is. One with replaced tensors is written with these in
their place and the others byte for byte. So names, metadata, dtypes, and tensors that no class knows stay without being
looked at, and no more than one part of one tensor is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import AttnPatchError
from ..progress import track
from ..schema import from_json, text_of
from . import stored
from .files import INDEX, LARGEST_INDEX, ONE, Weights, alike, sample
from .stored import Header, Piece, Source


@dataclass(frozen=True)
class Shards:
    """The files of a checkpoint, and what of a loaded model each of their tensors is.

    Attributes:
        headers: file -> what it says of itself, in the order of the index.
        names: name of a tensor in the files -> its name in the model; strange ones are not among them.
        strange: names in the files that the model's class does not load.
        index: what the list of shards says beside their names; None for a single file.
        before: name in the model -> tensor as it was loaded.
        source: name of the checkpoint, for errors.
    """

    headers: Mapping[Path, Header]
    names: Mapping[str, str]
    strange: frozenset[str]
    index: Mapping[str, Any] | None
    before: Mapping[str, Tensor]
    source: str

    def write(self, model: PreTrainedModel, folder: Path, max_shard_size: str | None) -> tuple[str, ...]:
        """Write the tensors of a model as it is now.

        Args:
            model: as it was loaded, with patches on it since.
            folder: where to. Files there that are what would be written stay.
            max_shard_size: of a file; None keeps the files of the old checkpoint.

        Returns:
            Sentences on what was carried over, and on what is in another dtype than before.

        Raises:
            AttnPatchError: a tensor that a patch has replaced was read as something else than lies in the files.
            OSError: it cannot be written.
        """
        change = self._changed(model)
        self._check_read(change)
        files = self._files(change) if max_shard_size is None else self._anew(change, max_shard_size)
        for stale in (path for path in folder.glob("*.safetensors") if path.name not in files):
            stale.unlink()
        there = 0
        for name, (tensors, metadata) in track([*files.items()], "writing weights"):
            there += self._write(folder / name, tensors, metadata)
        if self.index is not None or len(files) > 1:
            self._write_index(folder, {name: tensors for name, (tensors, _) in files.items()})
        gone_on = [f"{there} of {len(files)} files were there from a run that was killed, and are what they should be"]
        return (*self._said(change), *(gone_on if there else ()))

    def _changed(self, model: PreTrainedModel) -> _Change:
        """Find out what has become of each tensor, by the identity of the objects: edits write into none."""
        now, change = _state(model), _Change()
        lies = {id(self.before[name]): key for key, name in self.names.items()}
        for key, name in self.names.items():
            found = now.get(name)
            if found is None:
                change.gone.add(key)
            elif found is not self.before[name]:
                change.replaced[key] = self._source(found, lies)
        there = {*self.names.values()}
        held = {id(now[name]) for name in there if name in now}
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        for name, tensor in now.items():
            known = name in there or id(tensor) in held or self.before.get(name) is tensor
            if not known and name not in ignored:
                key, beside = self._named(name)
                change.added.setdefault(self._file_of(beside), {})[key] = self._source(tensor, lies)
        return change

    def _source(self, tensor: Tensor, lies: Mapping[int, str]) -> Source:
        """Return what a tensor is written from: the old file where it lies there under whatever name."""
        key = lies.get(id(tensor))
        return tensor if key is None else self._pieces[key]

    @cached_property
    def _pieces(self) -> dict[str, Piece]:
        return {key: piece for header in self.headers.values() for key, piece in header.pieces.items()}

    def _file_of(self, key: str) -> Path:
        return self._pieces[key].file

    def _named(self, name: str) -> tuple[str, str]:
        """Return what a new tensor is called in the files, as its nearest neighbour is, and that neighbour."""
        parts = name.split(".")

        def nearness(pair: tuple[str, str]) -> int:
            same = (a == b for a, b in zip(parts, pair[1].split("."), strict=False))
            return next((n for n, equal in enumerate([*same, False]) if not equal), 0)

        key, neighbour = max(self.names.items(), key=nearness)
        if key == neighbour:
            return name, key
        if neighbour.endswith(f".{key}"):
            return name.removeprefix(neighbour.removesuffix(key)), key
        return f"{key.removesuffix(neighbour)}{name}", key

    def _check_read(self, change: _Change) -> None:
        """Hold what replaced tensors were made from, in full, to what lies in the files; the others were sampled."""
        for key in (*change.replaced, *change.gone):
            file = self._file_of(key)
            with safe_open(file, "pt") as opened:
                _check_same(self.source, key, opened.get_tensor(key), self.before[self.names[key]], whole=True)

    def _tensors(self, file: Path, change: _Change) -> dict[str, Source]:
        pieces = self.headers[file].pieces
        kept = {key: change.replaced.get(key, piece) for key, piece in pieces.items() if key not in change.gone}
        return kept | change.added.get(file, {})

    def _files(self, change: _Change) -> dict[str, tuple[dict[str, Source], Mapping[str, str]]]:
        found = {file.name: (self._tensors(file, change), header.metadata) for file, header in self.headers.items()}
        return {name: (tensors, metadata) for name, (tensors, metadata) in found.items() if tensors}

    def _anew(self, change: _Change, size: str) -> dict[str, tuple[dict[str, Source], Mapping[str, str]]]:
        """Deal all tensors out to files of at most a size, in their old order."""
        every = {key: s for file in self.headers for key, s in self._tensors(file, change).items()}
        metadata = {k: v for header in self.headers.values() for k, v in header.metadata.items()}
        dealt = split_state_dict_into_shards_factory(
            every,
            get_storage_size=lambda source: source.nbytes,
            get_storage_id=lambda _: None,
            filename_pattern=ONE.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=size,
        )
        return {name: ({key: every[key] for key in keys}, metadata) for name, keys in dealt.filename_to_tensors.items()}

    def _write(self, target: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> bool:
        """Write one file; return whether it was there, whole and right, already."""
        old = next((file for file, header in self.headers.items() if header.pieces == tensors), None)
        if old is not None and metadata == self.headers[old].metadata:
            if stored.same_file(old, target):
                return True
            stored.copy(old, target)
        elif stored.holds(target, tensors, metadata):
            return True
        else:
            stored.write(target, tensors, metadata)
        return False

    def _write_index(self, folder: Path, files: Mapping[str, Mapping[str, Source]]) -> None:
        pieces = [source for tensors in files.values() for source in tensors.values()]
        found = dict(self.index or {})
        metadata = {**found.pop("metadata", {}), "total_size": sum(source.nbytes for source in pieces)}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(source.shape) for source in pieces)
        names = {key: name for name, tensors in files.items() for key in tensors}
        text = json.dumps({**found, "metadata": metadata, "weight_map": names}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text + "\n", "utf-8")

    def _said(self, change: _Change) -> Iterable[str]:
        pieces = self._pieces
        other = [
            key
            for key, name in self.names.items()
            if key not in change.replaced and key not in change.gone and pieces[key].dtype != self.before[name].dtype
        ]
        if other:
            kinds = sorted({_named(pieces[key].dtype) for key in other})
            yield f"carried over as they were: {_few(other)}, in {', '.join(kinds)}"
        if self.strange:
            yield f"carried over, though the model's class does not load them: {_few(sorted(self.strange))}"
        turned = [key for key, source in change.replaced.items() if source.dtype != pieces[key].dtype]
        if turned:
            was, is_ = pieces[turned[0]].dtype, change.replaced[turned[0]].dtype
            yield f"written in another dtype by the patch: {_few(turned)}, from {_named(was)} to {_named(is_)}"


@dataclass
class _Change:
    """What patches have made of the tensors in the files.

    Attributes:
        replaced: name in the files -> what takes the tensor's place.
        gone: names in the files that the model does not have any more.
        added: file -> name in the files -> tensor that was not there.
    """

    replaced: dict[str, Source] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    added: dict[Path, dict[str, Source]] = field(default_factory=dict)


def shards_of(model: PreTrainedModel, weights: Weights, strange: set[str], source: str) -> Shards | str:
    """Return the files of a checkpoint by what its model was loaded from, or a sentence saying why they do not tell.

    Args:
        model: as it was loaded, in the checkpoint's own dtype, with no patch on it yet.
        weights: of the checkpoint.
        strange: names in its files that the model's class does not load.
        source: name of the checkpoint, for errors.

    Raises:
        AttnPatchError: a file is damaged, or a tensor was read as something else than lies there.
    """
    files = list(dict.fromkeys(weights.files.values()))
    if not files or any(file.suffix != ".safetensors" for file in files):
        return "its weights are in no safetensors files"
    before, prefix = _state(model), f"{model.base_model_prefix}."
    headers = {file: stored.header_of(file) for file in files}
    lacking = next((key for key, file in weights.files.items() if key not in headers[file].pieces), None)
    if lacking is not None:
        where = weights.files[lacking].name
        raise AttnPatchError(f"{source}: {where} lacks {lacking[:100]}, which the index says is there; get it anew.")
    names: dict[str, str] = {}
    for key in weights.files:
        if key in strange:
            continue
        own = next((n for n in (key, f"{prefix}{key}", key.removeprefix(prefix)) if n in before), None)
        if own is None:
            return f"{key} in its files has another name, or other pieces, than {type(model).__name__} has"
        names[key] = own
    if len(set(names.values())) < len(names):
        return "its files hold tensors twice, under a name with and without a prefix"
    for file, header in headers.items():
        if any(weights.files.get(key) != file for key in header.pieces):
            return f"{file.name} holds tensors that the index of its shards does not name there"
        known = [key for key in header.pieces if key in names]
        odd = next((key for key in known if not _fits(header.pieces[key], before[names[key]])), None)
        if odd is not None:
            return f"{odd} in its files has another shape than {type(model).__name__} has"
        with safe_open(file, "pt") as opened:
            for key in known:
                _check_same(source, key, opened.get_tensor(key), before[names[key]], whole=False)
    return Shards(headers, names, frozenset(strange & {*weights.files}), _index_of(files[0]), before, source)


def check_files(weights: Weights) -> None:
    """Hold every safetensors file of a checkpoint to what its header says of it.

    Raises:
        AttnPatchError: one is damaged or incomplete; says which.
    """
    for file in dict.fromkeys(weights.files.values()):
        if file.suffix == ".safetensors":
            stored.header_of(file)


def _fits(piece: Piece, tensor: Tensor) -> bool:
    return piece.shape == tuple(tensor.shape) and piece.dtype is not None


def _index_of(file: Path) -> Mapping[str, Any] | None:
    """Return what the list of shards beside a file says, but for where each tensor is; None where there is no list."""
    listed = file.parent / INDEX
    if file.name == ONE or not listed.is_file():
        return None
    found: Mapping[str, Any] = from_json(text_of(listed, LARGEST_INDEX), str(listed), finite=False)
    return {key: value for key, value in found.items() if key != "weight_map"}


def _check_same(source: str, key: str, lies: Tensor, read: Tensor, *, whole: bool) -> None:
    """Hold a tensor as it was loaded to what lies in the files.

    Raises:
        AttnPatchError: it is something else.
    """
    read = read.detach()
    one, other = (lies, read.cpu()) if whole else (sample(lies), sample(read))
    if not alike(one.to(other.dtype), other):
        raise AttnPatchError(
            f"{source}: {key}, {tuple(lies.shape)} in {_named(lies.dtype)}, was read as other numbers than lie there, "
            "though no patch has touched it: this transformers reads it wrong. Load it with the release that the "
            "checkpoint was made for, save it in full precision, and patch that."
        )


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor) and not t.is_meta}


def _few(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def _named(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
