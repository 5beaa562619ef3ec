"""Taking out whatever a model knows positions by, its own or what an earlier patch of this package gave it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..backends import kernel_of
from ..edits import AddPreHook, Edit, ReplaceModule, SetAttention, SetAttribute
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..fused.deferring import StillAngles, unbiased
from ..probe import default_inputs, disagreement, logits_under, tokens_of
from ..upstream import words
from ..upstream.roles import roles_of
from .added import CHILD, AnyLength
from .modules import NoBias, NoPositions, ZeroAngles
from .relative import CHILD as TERMS

_TOWERS = ("vision", "visual", "audio", "image", "speech")
# what a patch may put in the place of the old by itself
BIAS, ROTATION, ADDED, RELATIVE = "alibi", "rotation", "added", "relative"


def in_tower(path: str) -> bool:
    """Whether a path lies in an image or audio tower beside the language model."""
    return any(word in path.lower() for word in _TOWERS)


def removal(model: PreTrainedModel, anatomy: Anatomy, own: str = "") -> tuple[Edit, ...]:
    """Return the edits after which a model knows no positions, beyond what attention to the past alone tells.

    Args:
        model: any model.
        anatomy: its.
        own: what the patch that asks writes itself, ``BIAS``, ``ROTATION``, ``RELATIVE`` or ``ADDED``; the attention
            function goes with all but the last.

    Raises:
        UnsupportedArchitecture: something is there that cannot be taken out.
    """
    edits = [*_unturned(model, anatomy), *_emptied(model, anatomy)]
    if anatomy.alibi and not anatomy.biased and own != BIAS:
        edits += _unbiased(model, anatomy)
    if own != BIAS:
        edits += [SetAttribute(path, "alibi", NoBias()) for path in anatomy.biased]
    if own != ROTATION:
        edits += [SetAttribute(path, "rotation", None) for path in anatomy.turned]
    if own != RELATIVE:
        edits += [ReplaceModule(f"{path}.{TERMS}", _nothing, "no position terms") for path in anatomy.relative]
    if anatomy.added and own != ADDED:
        edits.append(ReplaceModule(f"{anatomy.base}.{CHILD}".lstrip("."), _nothing, "no positions"))
    kernel = kernel_of(model.config._attn_implementation)
    if own not in (BIAS, ROTATION, RELATIVE) and kernel != model.config._attn_implementation:
        edits.append(SetAttention("", kernel))
    return tuple(edits)


def removed(anatomy: Anatomy) -> Iterator[str]:
    """Say what is taken out."""
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
    if not any(found.values()):
        yield "no positions were there to take out"


def check_blind(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit]) -> None:
    """Refuse a model that still tells positions apart: where all tokens are the same, so must their logits be.

    Neither a bias nor a rotation of keys changes anything there: they weigh what is the same everywhere. Modules with a
    state and attention sinks do count tokens, so that the question does not arise where those are.

    Raises:
        UnsupportedArchitecture: it does.
    """
    ids = tokens_of(model, default_inputs(model))
    if any("state" in why or "convolution" in why for why in anatomy.other.values()) or model.config.is_encoder_decoder:
        return
    same = roles_of(model).call(**{words.TOKENS: torch.full_like(ids, int(ids[0, 0]))})
    try:
        logits = logits_under(model, edits, same)
    except AttnPatchError as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: does not run without the positions that it has ({cause}): they are used in a way "
            "that was not recognised."
        ) from error
    problem = disagreement(logits[:, :1].expand_as(logits), logits) if logits.dim() == 3 else None
    if problem is not None and not _counts(model):
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: tells positions apart by something that was not recognised (equal tokens, and "
            f"{problem}), which would stay beside the new positions."
        )


def check_effect(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit]) -> None:
    """Refuse new positions that change nothing beside none, or that would stay beside something unrecognised.

    Raises:
        UnsupportedArchitecture: so.
    """
    inputs, blind = default_inputs(model), removal(model, anatomy)
    check_blind(model, anatomy, blind)
    if disagreement(logits_under(model, blind, inputs), logits_under(model, edits, inputs)) is None:
        raise UnsupportedArchitecture(f"{anatomy.architecture}: the new positions have no effect on its logits.")


def check_followed(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit]) -> None:
    """Refuse a model that computes attention in a way which the fused kernel inside its forward cannot follow.

    Raises:
        UnsupportedArchitecture: with what it asked of scores that are never made.
    """
    try:
        logits_under(model, edits, default_inputs(model))
    except AttnPatchError as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: its own way to compute attention cannot be followed: {cause}."
        ) from error


def _counts(model: PreTrainedModel) -> bool:
    """Whether a sink takes its share of attention, the smaller the more tokens there are."""
    return any(name.endswith(("sinks", "attention_sink_bias")) for name, _ in model.named_parameters())


def _unturned(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Edit]:
    """Ask rotary modules, and attention modules that rotate by themselves, for position 0."""
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
    """Take tables out, and with them the length of the buffers that went with them."""
    tables = [path for path in anatomy.tables if not in_tower(path)]
    yield from (ReplaceModule(path, _nothing, "no positions") for path in tables)
    owners = [model.get_submodule(path.rpartition(".")[0]) for path in tables]
    if anatomy.base is not None and any(map(_counts_in_buffers, owners)):
        roles = roles_of(model.get_submodule(anatomy.base))
        yield AddPreHook(anatomy.base, AnyLength(roles), "position and segment ids of any length")


def _counts_in_buffers(owner: nn.Module) -> bool:
    """Whether a module keeps position or segment ids, (1, length) of integers, as long as its table was."""
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
