"""A memory for attention modules that compute their scores by themselves (BLOOM, MPT, GPT-J): it comes as their cache.

What is one plain segment runs as it did, and the cache only notes what is to be remembered. In longer calls the cache
hands out notes (:mod:`..fused.deferred`), and when the forward asks for the outcome, its pieces attend through torch's
kernel, each with the keys before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import FUSED
from ..errors import AttnPatchError
from ..functional.biased import UNSEEN, Sight, hiding
from ..functional.segments import Piece
from ..fused.deferred import Distances, Keys, Values, Weights, attended
from ..fused.deferring import Deferring
from ..positions.modules import PREFIX as ALIBI
from ..positions.modules import AlibiBias, NoBias, alibi_of, bias_left_out
from ..positions.relative import relative_of
from ..upstream import words
from ..upstream.caches import CacheView, Storing
from ..upstream.roles import Arguments, Roles
from .attention import joined, key, met, turned
from .call import Call, no_weights
from .forms import corner
from .modules import Recurrent, recurrent_of

_PUBLISHED = AlibiBias(None, None, True, 1.0)


class Remembering(Deferring):
    """Forward pre-hook of an attention module: its cache hands it the memory.

    Args:
        roles: of the arguments of the module's forward.
        config: whose attention implementation decides what masks look like.
        kernel: the implementation without a memory: ``eager``, or this package's fused one.
    """

    def __init__(self, roles: Roles, config: Any, kernel: str):
        super().__init__(roles, config, key(kernel), False)
        self.kernel = kernel

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over a cache that notes what is new, or one that knows what was before."""
        given = self.roles.bind(args, kwargs)
        handed, found = met(module, given.get(words.MASK)), recurrent_of(module)
        assert found is not None
        given.put(words.MASK, handed.own)
        if handed.call.plain:
            if self.kernel == FUSED:
                given = self.roles.bind(*super().__call__(module, (), given.named))
            noting = Noting(functools.partial(handed.call.write, found.number))
            given.put(words.CACHE, CacheView(given.get(words.CACHE), noting.stored))
            return given.back()
        if given.get(words.WEIGHTS):
            raise no_weights(module)
        columns = given.get(words.STATES).shape[1]
        recalled = Recalled(handed.call, found, self._distance(module, given))
        given.put(words.CACHE, CacheView(None, recalled.stored))
        bias = given.get(words.BIAS)
        if isinstance(bias, Tensor):  # of the new tokens alone, where it does not end with a table
            given.put(words.BIAS, bias.new_zeros(()).expand(*bias.shape[:-1], columns))
        return given.back()

    def _distance(self, module: nn.Module, given: Arguments) -> Distances:
        ours = relative_of(module) or alibi_of(module)
        if ours is not None:
            return ours
        return _PUBLISHED if given.get(words.BIAS) is not None and not bias_left_out(module) else NoBias()


class Noting:
    """What a module's cache does while somebody is told of what it stores.

    Args:
        told: of new keys and values, each (batch, kv heads, new, d).
    """

    def __init__(self, told: Callable[[Tensor, Tensor], None]):
        self._told = told

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> Any:
        """Tell, and do what the cache does."""
        self._told(key, value)
        return storing.store(key, value)


class Overhearing:
    """Forward pre-hook of an attention module: somebody is told of its keys and values while a model is read.

    Args:
        roles: of the arguments of the module's forward.
        told: see :class:`Noting`.
    """

    def __init__(self, roles: Roles, told: Callable[[Tensor, Tensor], None]):
        self.roles, self.told = roles, told

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over a cache that tells."""
        given = self.roles.bind(args, kwargs)
        given.put(words.CACHE, CacheView(given.get(words.CACHE), Noting(self.told).stored))
        return given.back()


class Recalled:
    """The same in a call that meets a memory, or is longer than a segment: hands out notes.

    Args:
        call: the forward.
        found: the module's part in it.
        distance: what biases the scores.
    """

    def __init__(self, call: Call, found: Recurrent, distance: Distances):
        self._call, self._found, self._distance = call, found, distance

    def stored(self, _: Storing, key: Tensor, value: Tensor) -> tuple[Keys, Values]:
        """Return notes of what is new."""
        sight = Sight(True)  # until it is known, of each piece
        keys = Keys(key, key.to("meta"), sight, self._distance, None, self._attend)
        return keys, Values(value, value.to("meta"))

    def _attend(self, weights: Weights, values: Values) -> Tensor:
        key, own = weights.scores.keys.data, weights.scores.mask
        if own is not None and not _plainly_causal(own):
            raise AttnPatchError(
                "the module hides more from its queries than what comes after them (a window, say), of which a memory "
                "knows nothing."
            )
        out = [self._piece(piece, weights, values) for piece in self._call.pieces()]
        self._call.write(self._found.number, key, values.data)
        return torch.cat(out, 2)

    def _piece(self, piece: Piece, weights: Weights, values: Values) -> Tensor:
        scores, layer = weights.scores, self._found.number
        key, value = (
            joined(self._call, piece, layer, side, new) for side, new in enumerate((scores.keys.data, values.data))
        )
        query = scores.query.reshape(key.shape[0], -1, *scores.query.shape[-2:])[:, :, piece.start : piece.stop]
        query, key = turned(self._call, piece, self._found, query, key)
        masks_of = "sdpa" if isinstance(self._distance, NoBias) else ALIBI + "sdpa"
        sight = Sight(True, mask=self._call.mask(piece, masks_of, query))
        keys = replace(scores.keys, data=key, sight=sight)
        part = replace(scores, query=query, keys=keys, bias=None, mask=None)
        return attended(replace(weights, scores=part), replace(values, data=value))


def window_of(module: nn.Module) -> str | None:
    """Return the buffer by which a module hides more than what comes later (GPT-Neo's local layers), or None."""
    for name, buffer in module.named_buffers(recurse=False):
        square = buffer.dtype == torch.bool and buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2]
        if square and not buffer.is_meta and not bool((buffer == corner(*buffer.shape[-2:]).to(buffer.device)).all()):
            return name
    return None


def _plainly_causal(mask: Tensor) -> bool:
    """Whether what a forward added, (.., q, q), hides what comes later, and nothing else."""
    seen = hiding(mask) > UNSEEN
    return bool((seen == corner(*mask.shape[-2:]).to(mask.device)).all())
