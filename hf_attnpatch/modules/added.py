"""Positions that are added to what the token embedding gives, in models that have no table of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..errors import AttnPatchError
from ..functional.turning import sinusoid
from ..upstream import words
from ..upstream.caches import length as cached
from ..upstream.partitioned import shape_of
from ..upstream.roles import Arguments, Roles
from .still import NoPositions

CHILD = "added_positions"  # of the language model; what a trainable table's key in a checkpoint ends with


class SinusoidalPositions(nn.Module):
    """The sinusoid of Attention Is All You Need, computed for whatever positions come: no length, no tensor.

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
    """A trainable table.

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
        if beyond:  # on other devices the lookup itself complains: asking first would stop their queue
            raise AttnPatchError(f"a token at position {int(places.max())}; the position table has {rows} rows.")
        return embeddings + F.embedding(places, self.weight)

    def extra_repr(self) -> str:
        """Show the size."""
        length, width = shape_of(self.weight)
        return f"length={length}, width={width}"


def _beyond(places: Tensor, rows: int) -> bool:
    """Whether a position is in no row; a program that is compiled or exported has no positions yet."""
    return not torch.compiler.is_compiling() and int(places.max()) >= rows


class AddPositions:
    """Forward pre-hook of the language model: embeds the tokens and adds what its child ``added_positions`` says.

    Args:
        roles: of the arguments of the model's forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand over embeddings with positions in the place of ids."""
        added = module.get_submodule(CHILD)
        if isinstance(added, NoPositions):  # taken out again by a later patch
            return None
        given = self.roles.bind(args, kwargs)
        embeddings, tokens = given.get(words.EMBEDDINGS), given.get(words.TOKENS)
        if embeddings is None:
            if tokens is None:
                return None  # the model complains better
            embeddings = module.get_input_embeddings()(tokens)  # type: ignore[operator]  # of transformers
        given.put(words.EMBEDDINGS, added(embeddings, positions(given, embeddings)))
        given.put(words.TOKENS, None)
        return given.back()


class AnyLength:
    """Forward pre-hook of an encoder that keeps position and segment ids in buffers as long as its table was.

    Without a table there is no such length: both are handed over where the caller gives none.

    Args:
        roles: of the arguments of its forward.
        segments: whether it keeps segment ids; one that keeps none may take their absence for something else.
    """

    def __init__(self, roles: Roles, segments: bool):
        self.roles, self.segments = roles, segments and roles.takes(words.SEGMENTS)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Count tokens, and put them into the first segment."""
        given = self.roles.bind(args, kwargs)
        like, embeddings = given.get(words.TOKENS), given.get(words.EMBEDDINGS)
        if like is None:
            if embeddings is None:
                return None  # the model complains better
            like = embeddings[..., 0].long()
        if self.segments and given.get(words.SEGMENTS) is None:
            given.put(words.SEGMENTS, torch.zeros_like(like))
        if self.roles.takes(words.POSITIONS) and given.get(words.POSITIONS) is None:
            given.put(words.POSITIONS, positions(given, like).expand_as(like))
        return given.back()


class CountedOnly:
    """Forward pre-hook of a language model that rotates but hands no positions on: refuses those it would ignore.

    Args:
        roles: of the arguments of its forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Compare what is passed with what is counted, and change nothing."""
        given = self.roles.bind(args, kwargs)
        told, like = given.get(words.POSITIONS), given.get(words.TOKENS)
        like = given.get(words.EMBEDDINGS) if like is None else like
        if told is None or like is None:
            return
        given.put(words.POSITIONS, None)
        mask, counted = given.get(words.MASK), positions(given, like)
        seen = (
            mask[:, -like.shape[1] :].bool()
            if isinstance(mask, Tensor) and mask.dim() == 2
            else torch.ones_like(told) > 0
        )
        if bool(((told != counted) & seen).any()):
            raise AttnPatchError(
                f"{type(module).__name__} hands positions to its position table only, which rotary positions "
                "replaced; they can only count the tokens from 0. Leave them out."
            )


def positions(given: Arguments, embeddings: Tensor) -> Tensor:
    """Return where tokens stand, (batch or 1, length): as told, else counted by the mask, else behind the cache.

    Args:
        given: arguments of the language model's forward.
        embeddings: of the tokens, (batch, length, width); or the ids.

    Raises:
        AttnPatchError: positions that are not one number for each token.
    """
    told, length = given.get(words.POSITIONS), embeddings.shape[1]
    if told is not None:
        if told.dim() != 2:
            raise AttnPatchError(
                f"position_ids of shape {tuple(told.shape)}; one row of positions for each row of tokens."
            )
        found: Tensor = told.clamp(min=0)  # padding may stand at -1
        return found
    past, mask = cached(given.get(words.CACHE)), given.get(words.MASK)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= past + length:
        count = mask[:, : past + length].long().cumsum(-1) - 1
        return count.clamp(min=0)[:, past:]
    return torch.arange(past, past + length, device=embeddings.device)[None]
