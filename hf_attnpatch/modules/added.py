"""Positions added to the token embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..errors import AttnPatchError
from ..functional.turning import sinusoid
from ..upstream import words
from ..upstream.caches import length as cached
from ..upstream.partitioned import shape_of
from ..upstream.roles import ArgumentHook, Arguments, Roles
from .still import NoPositions

CHILD = "added_positions"  # child of the language model, so part of a trainable table's name in a checkpoint


class SinusoidalPositions(nn.Module):
    """The sinusoid of Attention Is All You Need, computed for any position: no length limit, no tensor.

    Args:
        theta: base of the wavelengths.
        amplitude: factor on the sinusoid.
        embedding_scale: factor on the embeddings; None for the root of their width, as in the paper.
    """

    def __init__(self, theta: float, amplitude: float, embedding_scale: float | None):
        super().__init__()
        self.theta, self.amplitude, self.embedding_scale = theta, amplitude, embedding_scale

    def forward(self, embeddings: Tensor, places: Tensor) -> Tensor:
        """(batch, length, width) and (batch or 1, length) -> (batch, length, width)."""
        width = embeddings.shape[-1]
        scale = math.sqrt(width) if self.embedding_scale is None else self.embedding_scale
        scaled = embeddings if scale == 1 else embeddings * scale
        return scaled + (self.amplitude * sinusoid(places, width, self.theta)).to(embeddings.dtype)

    def extra_repr(self) -> str:
        """Show the numbers."""
        return f"theta={self.theta:g}, amplitude={self.amplitude:g}, embedding_scale={self.embedding_scale}"


class LearnedPositions(nn.Module):
    """A trainable position table.

    Args:
        weight: (length, width).
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, embeddings: Tensor, places: Tensor) -> Tensor:
        """(batch, length, width) and (batch or 1, length) -> (batch, length, width).

        Raises:
            AttnPatchError: a position beyond the table.
        """
        rows = self.weight.shape[0]
        beyond = places.shape[-1] > rows or (places.device.type == "cpu" and _beyond(places, rows))
        if beyond:  # elsewhere the lookup itself raises; checking first would stall a GPU's queue
            raise AttnPatchError(f"position {int(places.max())} is beyond the position table, which has {rows} rows.")
        return embeddings + F.embedding(places, self.weight)

    def extra_repr(self) -> str:
        """Show the size."""
        length, width = shape_of(self.weight)
        return f"length={length}, width={width}"


def _beyond(places: Tensor, rows: int) -> bool:
    """Return whether a position is beyond the table; False while a program is compiled or exported."""
    return not torch.compiler.is_compiling() and int(places.max()) >= rows


class AddPositions(ArgumentHook):
    """Forward pre-hook of the language model: embeds the tokens and adds the positions of its child."""

    def edit(self, module: nn.Module, given: Arguments) -> bool | None:
        """Replace the token ids by embeddings with positions."""
        added = module.get_submodule(CHILD)
        if isinstance(added, NoPositions):  # removed by a later patch
            return False
        embeddings, tokens = given.get(words.EMBEDDINGS), given.get(words.TOKENS)
        if embeddings is None:
            if tokens is None:
                return False  # the model's own error is clearer
            embeddings = module.get_input_embeddings()(tokens)  # type: ignore[operator]  # of transformers
        given.put(words.EMBEDDINGS, added(embeddings, positions(given, embeddings)))
        given.put(words.TOKENS, None)
        return None


class AnyLength(ArgumentHook):
    """Forward pre-hook of an encoder whose position and segment ids are buffers as long as its removed table.

    Without a table there is no such limit: the hook passes both ids if the caller passes none.

    Args:
        roles: argument roles of its forward.
        segments: whether the encoder keeps segment ids; others may interpret passed ones differently.
    """

    def __init__(self, roles: Roles, segments: bool):
        super().__init__(roles)
        self.segments = segments and roles.takes(words.SEGMENTS)

    def edit(self, module: nn.Module, given: Arguments) -> bool | None:
        """Pass positions that count the tokens, and the first segment for all of them."""
        like, embeddings = given.get(words.TOKENS), given.get(words.EMBEDDINGS)
        if like is None:
            if embeddings is None:
                return False  # the model's own error is clearer
            like = embeddings[..., 0].long()
        if self.segments and given.get(words.SEGMENTS) is None:
            given.put(words.SEGMENTS, torch.zeros_like(like))
        if self.roles.takes(words.POSITIONS) and given.get(words.POSITIONS) is None:
            given.put(words.POSITIONS, positions(given, like).expand_as(like))
        return None


class CountedOnly(ArgumentHook):
    """Forward pre-hook of a language model without positions in attention: refuses positions it would ignore."""

    def edit(self, module: nn.Module, given: Arguments) -> bool:
        """Compare the passed positions with the counted ones; change nothing."""
        told, like = given.get(words.POSITIONS), given.get(words.TOKENS)
        like = given.get(words.EMBEDDINGS) if like is None else like
        if told is None or like is None:
            return False
        given.put(words.POSITIONS, None)
        mask, counted = given.get(words.MASK), positions(given, like)
        seen = (
            mask[:, -like.shape[1] :].bool()
            if isinstance(mask, Tensor) and mask.dim() == 2
            else torch.ones_like(told) > 0
        )
        if bool(((told != counted) & seen).any()):
            raise AttnPatchError(
                f"{type(module).__name__} passes positions to its position table only, which rotary positions "
                "replaced; they can only count the tokens from 0. Leave position_ids out."
            )
        return False


def positions(given: Arguments, embeddings: Tensor) -> Tensor:
    """Return the tokens' positions, (batch or 1, length): as passed, else counted from the mask, else from the cache.

    Args:
        given: arguments of the language model's forward.
        embeddings: token embeddings, (batch, length, width), or token ids.

    Raises:
        AttnPatchError: the positions are not one number for each token.
    """
    told, length = given.get(words.POSITIONS), embeddings.shape[1]
    if told is not None:
        if told.dim() != 2:
            raise AttnPatchError(
                f"position_ids has shape {tuple(told.shape)}; pass one row of positions for each row of tokens."
            )
        found: Tensor = told.clamp(min=0)  # padding may have position -1
        return found
    past, mask = cached(given.get(words.CACHE)), given.get(words.MASK)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= past + length:
        count = mask[:, : past + length].long().cumsum(-1) - 1
        return count.clamp(min=0)[:, past:]
    return torch.arange(past, past + length, device=embeddings.device)[None]
