"""Copies tensors that no patch has touched from the old checkpoint into the new one, byte for byte.

transformers loads in one dtype, drops what its class does not know, and writes what it has in memory. So what it wrote
is held against what the old files hold. A tensor that is the old one, rounded, is put back as it was; one that no class
knows is carried over; one that a patch has replaced stays as written; any other difference is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .. import record
from ..errors import AttnPatchError
from .files import INDEX, ONE, Weights, alike, digest, names_in, weights_of

_EXTRA = "model-carried.safetensors"  # beside shards; a single file takes them in
_MOVED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # buffers that transformers no longer keeps in files


class Kept:
    """The tensors of a loaded model, which tell those that patches replace.

    Args:
        model: before any patch.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.before: dict[str, Tensor] = _state(model)

    def replaced(self, model: PreTrainedModel) -> list[Tensor]:
        """Return those that the model no longer holds."""
        held = {id(tensor) for tensor in _state(model).values()}
        return [tensor for tensor in self.before.values() if id(tensor) not in held]

    def still(self, model: PreTrainedModel) -> list[str]:
        """Return the names under which the model holds what it held before."""
        return [name for name, tensor in _state(model).items() if self.before.get(name) is tensor]


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor) and not t.is_meta}


def strange_in(model: PreTrainedModel, weights: Weights, unexpected: Iterable[str]) -> set[str]:
    """Return the names in a checkpoint's files that a model's class does not load.

    Args:
        model: as it was loaded.
        weights: of the checkpoint.
        unexpected: names that transformers said it could not place; it passes over more without a word.
    """
    state = model.state_dict()
    known = {*state, *(name.removeprefix(f"{model.base_model_prefix}.") for name in state)}
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_MOVED]
    left = (name for name in weights.files if name not in known)
    return {name for name in left if any(re.search(pattern, name) for pattern in patterns)} | set(unexpected)


def carry_read(model: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """Add to a saved checkpoint what the one read by ``load`` holds and nobody has changed since.

    What was cast as a whole stays cast. Any tensor may have been patched or trained: those are left as they are.

    Args:
        model: that was saved; one that did not come from ``load`` is left alone.
        folder: that it was saved into.

    Returns:
        Sentences on what was carried over.
    """
    read = vars(model).get(record.READ)
    old = weights_of(read["name"], **{**read["where"], "local_files_only": True}) if read else Weights({})
    if not old.files:
        return ()
    main, now = _main_dtype(old), _main_dtype(weights_of(folder))
    asked = "auto" if main == now else _named(now)
    return carry(old, folder, None, strange_in(model, old, read["unexpected"]), read["name"], asked=asked)


def _main_dtype(weights: Weights) -> torch.dtype:
    """Return the most frequent dtype of a checkpoint's numbers."""
    sizes = Counter[torch.dtype]()
    for key in weights.files:
        sizes[weights[key].dtype] += weights[key].numel()
    return sizes.most_common(1)[0][0]


@dataclass
class _Comparison:
    """The tensors that the old files hold and the new ones do not.

    Attributes:
        put_back: name in the new files -> name in the old ones, of the same numbers in another dtype.
        unknown: names that the class does not load.
        turned: names of tensors that a patch has replaced by another dtype -> the two dtypes.
        laid_out: names whose numbers stand under other names, or in other pieces.
    """

    put_back: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    turned: dict[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    laid_out: list[str] = field(default_factory=list)


def carry(
    old: Weights, folder: Path, replaced: list[Tensor] | None, strange: set[str], name: str, *, asked: str = "auto"
) -> tuple[str, ...]:
    """Add to a saved checkpoint what the old one holds and no patch has touched.

    Args:
        old: the checkpoint that was patched.
        folder: the new one, as ``save_pretrained`` wrote it; rewritten where something was lost.
        replaced: tensors of the loaded model that patches have replaced; None where any may be another.
        strange: names in the old files that the model's class does not load.
        name: of the old checkpoint, for errors.
        asked: dtype that the user asked for, in which everything stays then; ``auto`` for the checkpoint's own.

    Returns:
        Sentences on what was carried over, and on what is in another dtype or layout than before.

    Raises:
        AttnPatchError: a tensor was read or written as something else, though no patch has touched it.
    """
    new = weights_of(folder)
    found = _compared(old, new, _ANY if replaced is None else _Known(replaced), strange, name, asked == "auto")
    extra = {n: n for n in found.unknown}
    if found.put_back or extra:
        _rewrite(old, new, folder, found.put_back, extra)
    return tuple(_said(old, new, found, asked))


class _Known:
    """Tensors by content, in every dtype among them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.dtypes = {tensor.dtype for tensor in tensors}
        self.digests = {(tensor.dtype, digest(tensor)) for tensor in tensors}

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and any(
            (dtype, digest(tensor.to(dtype))) in self.digests for dtype in self.dtypes
        )


class _Any:
    """A set that contains every tensor."""

    def __contains__(self, tensor: object) -> bool:
        return True


_ANY = _Any()


def _compared(
    old: Weights, new: Weights, replaced: Container[Tensor], strange: set[str], name: str, own: bool
) -> _Comparison:
    found, missing = _Comparison(), []
    for key in old.files:
        if key not in new.files:
            missing.append(key)
            continue
        was, is_ = old[key], new[key]
        if alike(was, is_):
            continue
        if was.shape == is_.shape and alike(was.to(is_.dtype), is_):
            found.put_back.update({key: key} if own else {})
        elif was not in replaced:
            raise AttnPatchError(
                f"{name}: {key} is {_about(was)} there and was written as {_about(is_)} of other numbers, though no "
                "patch has touched it: this transformers reads or writes it wrong. Load it with the release that the "
                "checkpoint was made for, save it in full precision, and patch that."
            )
        elif was.dtype != is_.dtype:
            found.turned[key] = was.dtype, is_.dtype
    _match(old, new, missing, replaced, strange, found, own, name)
    return found


def _match(
    old: Weights,
    new: Weights,
    missing: list[str],
    replaced: Container[Tensor],
    strange: set[str],
    found: _Comparison,
    own: bool,
    name: str,
) -> None:
    """Find tensors by their bytes if names differ: renamed, tied, removed by a patch, or unknown to the class."""
    if not missing:
        return
    shapes = {old[key].shape for key in missing if key not in strange}
    fresh = [key for key in new.files if key not in old.files]
    fitting = [key for key in (*new.files, *fresh) if new[key].shape in shapes]  # new names take the last word
    held = {(new[key].dtype, digest(new[key])): key for key in fitting}
    dtypes, coarse = {new[key].dtype for key in new.files}, set[torch.dtype]()
    for key in missing:
        was = old[key]
        if key in strange:
            found.unknown.append(key)
            continue
        same = next(filter(None, (held.get((dtype, digest(was.to(dtype)))) for dtype in dtypes)), None)
        if same is not None:
            if own and same in fresh and new[same].dtype != was.dtype:
                found.put_back[same] = key
        elif was not in replaced:
            found.laid_out.append(key)
            coarse |= {was.dtype} - dtypes
    if coarse and own:
        raise AttnPatchError(
            f"{name}: {found.laid_out[0]} and {len(found.laid_out) - 1} more lie there in {_named(*coarse)}, in other "
            f"pieces than {_named(*dtypes)} was written in, so they cannot be carried over as they are; add --dtype "
            "to ask for one dtype."
        )


def _rewrite(old: Weights, new: Weights, folder: Path, put_back: Mapping[str, str], extra: Mapping[str, str]) -> None:
    """Rewrite the files that change, and add the extra tensors to the only file or to a new one."""
    single = set(new.files.values()) == {folder / ONE}
    for file in sorted(set(new.files.values())):
        here = {key: was for key, was in put_back.items() if new.files[key] == file}
        here |= extra if single else {}
        if here:
            _write(file, {**load_file(file), **{key: old[was] for key, was in here.items()}}, _metadata(file))
    if extra and not single:
        _write(folder / _EXTRA, {key: old[was] for key, was in extra.items()}, {"format": "pt"})
    if not single:
        _index(folder)


def _write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    part = file.with_suffix(".part")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part, dict(metadata))
    part.replace(file)


def _metadata(file: Path) -> Mapping[str, str]:
    with safe_open(file, "pt") as opened:
        found: Mapping[str, str] = opened.metadata() or {}
        return found


def _index(folder: Path) -> None:
    """Update the list of shards."""
    file = folder / INDEX
    index = json.loads(file.read_text("utf-8"))
    shards = sorted({*index["weight_map"].values(), *(path.name for path in folder.glob(_EXTRA))})
    index["weight_map"] = {key: shard for shard in shards for key in names_in(folder / shard)}
    weights = Weights({key: folder / shard for key, shard in index["weight_map"].items()})
    index["metadata"]["total_size"] = sum(weights[key].nbytes for key in weights.files)
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _said(old: Weights, new: Weights, found: _Comparison, asked: str) -> Iterator[str]:
    if found.put_back and asked == "auto":
        dtypes = {old[key].dtype for key in found.put_back.values()}
        yield f"carried over as they were: {_few(found.put_back)}, in {_named(*dtypes)}"
    if found.unknown:
        yield f"carried over, though the model's class does not load them: {_few(found.unknown)}"
    if found.turned:
        was, is_ = next(iter(found.turned.values()))
        yield f"written in another dtype by the patch: {_few(found.turned)}, from {_named(was)} to {_named(is_)}"
    if found.laid_out:
        yield f"written under other names or in other pieces than before: {_few(found.laid_out)}"
    if asked != "auto":
        changed = [key for key in old.files if key in new.files and old[key].dtype != new[key].dtype]
        if changed:
            yield f"written in {asked}, as asked: {_few(changed)}"


def _few(names: Mapping[str, object] | list[str]) -> str:
    first = next(iter(names))
    return f"{first}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def _about(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} in {_named(tensor.dtype)}"


def _named(*dtypes: torch.dtype) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
