"""Removes a model's positions, its own and those that this package added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.alibi import AlibiBias, NoBias
from ..attention.relative import CHILD as TERMS
from ..attention.relative import Relative
from ..attention.rotation import Rotation
from ..attention.wrapper import AddWrapper, RemoveWrapper
from ..edits import AddPreHook, Edit, ReplaceModule
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..few import on_few_layers
from ..modules.added import CHILD, AnyLength, CountedOnly
from ..modules.still import NoPositions, StillAngles, ZeroAngles
from ..probe import Inputs, codebooks, default_inputs, disagreement, logits_under, tokens_of
from ..sites import in_tower
from ..upstream import words
from ..upstream.roles import roles_of
from .fusing import unbiased

# what a patch may replace by itself
BIAS, ROTATION, ADDED, RELATIVE = AlibiBias.name, Rotation.name, "added", Relative.name


def removal(model: PreTrainedModel, anatomy: Anatomy, own: str = "") -> tuple[Edit, ...]:
    """Return the edits that remove all positions; a causal mask still tells the order of tokens.

    Args:
        model: any model.
        anatomy: the model's anatomy.
        own: what the calling patch replaces itself: ``BIAS``, ``ROTATION``, ``RELATIVE`` or ``ADDED``.

    Raises:
        UnsupportedArchitecture: some positions cannot be removed.
    """
    edits = [*_unturned(model, anatomy), *_emptied(model, anatomy)]
    if anatomy.alibi and not anatomy.biased and own != BIAS:
        edits += _unbiased(model, anatomy)
    if own != BIAS:
        edits += [AddWrapper(path, NoBias()) for path in anatomy.biased]
    if own != ROTATION:
        edits += [RemoveWrapper(path, ROTATION) for path in anatomy.turned]
    if own != RELATIVE:
        edits += [ReplaceModule(f"{path}.{TERMS}", _nothing, "no position terms") for path in anatomy.relative]
        edits += [RemoveWrapper(path, RELATIVE) for path in anatomy.relative]
    if anatomy.added and own != ADDED:
        edits.append(ReplaceModule(f"{anatomy.base}.{CHILD}".lstrip("."), _nothing, "no positions"))
    return tuple(edits)


def removed(anatomy: Anatomy) -> Iterator[str]:
    """Yield a note on each kind of position that is removed."""
    rotary = [r.path for r in anatomy.rotary if not in_tower(r.path)]
    tables = [f"{path} ({rows} rows)" for path, rows in anatomy.tables.items() if not in_tower(path)]
    found = {
        "rotary angles taken out": ", ".join([*rotary, *anatomy.inner]),
        "position tables taken out": ", ".join(tables),
        "bias by distance taken out": "of every head" if anatomy.alibi else "",
        "rotary positions of this package taken out": "of every head" if anatomy.turned else "",
        "Transformer-XL's terms taken out": "of every head" if anatomy.relative else "",
        "added positions taken out": anatomy.added,
    }
    yield from (f"{what}: {where}" for what, where in found.items() if where)


def none_there(unproved: str) -> str:
    """Return a note that there were no positions to remove, and how far that was checked.

    Args:
        unproved: the result of :func:`check_blind`.
    """
    if unproved:
        return f"no positions were found to take out; whether there are none was not tried: {unproved}"
    return "no positions were there to take out: equal tokens, and tokens farther apart, gave the same logits"


def check_blind(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit]) -> str:
    """Refuse a model that still distinguishes positions: equal tokens must give equal logits.

    A bias or a rotation of keys has no effect on equal tokens, because it weighs equal values. It shows when tokens
    stand further apart, with a masked token between them. Modules with a state and attention sinks count tokens anyway,
    so the question does not arise for them.

    Args:
        model: any model.
        anatomy: the model's anatomy.
        edits: that remove the positions, or replace them.

    Returns:
        Why the model was not checked; empty if it was.

    Raises:
        UnsupportedArchitecture: the model still distinguishes positions.
    """
    if any("state" in why or "convolution" in why for why in anatomy.other.values()):
        return "a module with a state of its own counts tokens"
    blind = removal(model, anatomy)
    if model.config.is_encoder_decoder:
        _check_order(model, anatomy, blind)
        return ""

    def ask(cut: tuple[Edit, ...]) -> None:
        _check_equal(model, anatomy, (*edits, *cut))
        _check_order(model, anatomy, (*blind, *cut))

    on_few_layers(model, anatomy.attending, ask)
    return ""


def _check_equal(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit]) -> None:
    """Refuse a model whose logits differ between positions although all tokens are equal."""
    ids = tokens_of(model, default_inputs(model))
    same = roles_of(model).call(**{words.TOKENS: torch.full_like(ids, int(ids[0, 0]))})
    logits = _logits_without(model, anatomy, edits, same)
    problem = disagreement(logits[:, :1].expand_as(logits), logits) if logits.dim() == 3 else None
    if problem is not None and not _counts(model):
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: tells positions apart by something that was not recognised (equal tokens, and "
            f"{problem}), which would stay beside the new positions."
        )


def _check_order(model: PreTrainedModel, anatomy: Anatomy, blind: Sequence[Edit]) -> None:
    """Refuse a model that, without its positions, notices whether tokens stand further apart."""
    roles = roles_of(model)
    if roles.names.get(words.TOKENS) in (None, roles.names.get(words.DECODER_TOKENS)):
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: reads {model.main_input_name} and no tokens; positions are exchanged in "
            "models of text."
        )
    ids = tokens_of(model, default_inputs(model))
    if not roles.takes(words.MASK):
        return
    row = ids[:1, :4].flatten()
    close, apart = torch.stack([row, row[[0, 3, 1, 2]]]), [0, 2, 3]
    seen = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], device=ids.device)
    close = close.repeat_interleave(codebooks(model), dim=0)
    given = {words.TOKENS: close, words.MASK: seen, words.DECODER_TOKENS: close}
    counted = any(isinstance(h, CountedOnly) for m in model.modules() for h in m._forward_pre_hooks.values())
    if not counted:
        given[words.POSITIONS] = torch.arange(4, device=ids.device).expand(2, -1)
    inputs = roles.call(**given)
    if words.DECODER_TOKENS in roles.names and words.DECODER_MASK in roles.parameters:
        inputs[words.DECODER_MASK] = seen
    with_gap = _logits_without(model, anatomy, blind, inputs, padded=True)
    problem = disagreement(with_gap[0, :3], with_gap[1, apart]) if with_gap.dim() == 3 and len(with_gap) == 2 else None
    if problem is not None:
        where = anatomy.distances
        what = f"a learned bias by distance ({where[0]})" if where else "something that was not recognised"
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: tells positions apart by {what}, which cannot be taken out (tokens one farther "
            f"from another, and {problem})."
        )


def _logits_without(
    model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit], inputs: Inputs, padded: bool = False
) -> Tensor:
    """Return logits without the model's positions, or refuse a model that does not run without them."""
    try:
        return logits_under(model, edits, inputs, padded=padded)
    except AttnPatchError as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: does not run without the positions that it has ({cause}): they are used in a way "
            "that was not recognised."
        ) from error


def check_effect(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit]) -> None:
    """Refuse new positions that have no effect, or that would be added to unrecognised ones.

    Raises:
        UnsupportedArchitecture: the new positions do not change the logits, or unrecognised positions remain.
    """
    inputs, blind = default_inputs(model), removal(model, anatomy)
    check_blind(model, anatomy, blind)

    def ask(cut: tuple[Edit, ...]) -> None:
        without = logits_under(model, (*blind, *cut), inputs)
        if disagreement(without, logits_under(model, (*edits, *cut), inputs)) is None:
            raise UnsupportedArchitecture(f"{anatomy.architecture}: the new positions have no effect on its logits.")

    on_few_layers(model, anatomy.attending, ask)


def check_followed(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit]) -> None:
    """Refuse a model whose attention the fused kernel inside its forward cannot reproduce.

    Raises:
        UnsupportedArchitecture: names the operation on lazy states that is not supported.
    """
    inputs = default_inputs(model)
    try:
        on_few_layers(model, anatomy.attending, lambda cut: logits_under(model, (*edits, *cut), inputs))
    except AttnPatchError as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: its own way to compute attention cannot be followed: {cause}."
        ) from error


def _counts(model: PreTrainedModel) -> bool:
    """Return whether the model has attention sinks, whose share shrinks with length and so reveals position."""
    return any(name.endswith(("sinks", "attention_sink_bias")) for name, _ in model.named_parameters())


def _unturned(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Edit]:
    """Yield hooks that fix rotary modules, and attention modules that rotate themselves, at position 0."""
    for rotary in anatomy.rotary:
        if in_tower(rotary.path):
            continue
        roles = roles_of(model.get_submodule(rotary.path))
        if not roles.takes(words.POSITIONS):
            raise UnsupportedArchitecture(
                f"{rotary.path}: {rotary.kind} takes no positions, so that its angles cannot be taken out."
            )
        yield AddPreHook(rotary.path, ZeroAngles(roles), "every token at position 0")
    for path in anatomy.inner:
        yield AddPreHook(path, StillAngles(roles_of(model.get_submodule(path))), "every token at position 0")


def _emptied(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Edit]:
    """Yield edits that remove tables, and the length limit of the buffers that belong to them."""
    tables = [path for path in anatomy.tables if not in_tower(path)]
    yield from (ReplaceModule(path, _nothing, "no positions") for path in tables)
    owners = [model.get_submodule(path.rpartition(".")[0]) for path in tables]
    if anatomy.base is not None and any(map(_counts_in_buffers, owners)):
        roles = roles_of(model.get_submodule(anatomy.base))
        segments = any(name in owner._buffers for owner in owners for name in words.ARGUMENTS[words.SEGMENTS])
        yield AddPreHook(anatomy.base, AnyLength(roles, segments), "position and segment ids of any length")


def _counts_in_buffers(owner: nn.Module) -> bool:
    """Return whether a module keeps position or segment ids, (1, length) of integers, as long as its table was."""
    return any(
        b.dim() == 2 and b.shape[0] == 1 and not b.is_floating_point() for b in owner._buffers.values() if b is not None
    )


def _nothing(_: nn.Module) -> nn.Module:
    return NoPositions()


def _unbiased(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Edit, ...]:
    found = unbiased(model, anatomy)
    if isinstance(found, str):
        raise UnsupportedArchitecture(f"{anatomy.architecture}: its bias by distance cannot be left out: {found}.")
    return found
