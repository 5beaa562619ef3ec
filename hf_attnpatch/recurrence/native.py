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
from .attention import joined, key, met, turned
from .call import Call, no_weights
from .forms import corner
from .modules import Recurrent, recurrent_of

_PUBLISHED = AlibiBias(None, None, True, 1.0)


class Remembering(Deferring):
    """Forward pre-hook of an attention module: its cache hands it the memory.

    Args:
        names: of the parameters of the module's forward, in order.
        cache: the one that takes the cache.
        config: whose attention implementation decides what masks look like.
        kernel: the implementation without a memory: ``eager``, or this package's fused one.
        bias: the parameter that takes a bias by distance, or None.
    """

    def __init__(self, names: tuple[str, ...], cache: str, config: Any, kernel: str, bias: str | None):
        super().__init__(names, cache, config, key(kernel), None)
        self.kernel, self.bias = kernel, bias

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over a cache that notes what is new, or one that knows what was before."""
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        handed, found = met(module, named.get("attention_mask")), recurrent_of(module)
        assert found is not None
        named["attention_mask"] = handed.own
        if handed.call.plain:
            if self.kernel == FUSED:
                _, named = super().__call__(module, (), named)
            named[self.cache] = Noting(named.get(self.cache), functools.partial(handed.call.write, found.number))
            return (), named
        if named.get("output_attentions"):
            raise no_weights(module)
        columns = named["hidden_states"].shape[1]
        named[self.cache] = Recalled(handed.call, found, self._distance(module, named))
        bias = named.get(self.bias) if self.bias else None
        if isinstance(bias, Tensor):  # of the new tokens alone, where it does not end with a table
            named[str(self.bias)] = bias.new_zeros(()).expand(*bias.shape[:-1], columns)
        return (), named

    def _distance(self, module: nn.Module, named: Mapping[str, Any]) -> Distances:
        given = relative_of(module) or alibi_of(module)
        if given is not None:
            return given
        own = bool(self.bias) and named.get(str(self.bias)) is not None and not bias_left_out(module)
        return _PUBLISHED if own else NoBias()


class Noting:
    """What an attention module takes for its cache: the cache, if there is one, and somebody who is told.

    Args:
        cache: or None.
        told: of new keys and values, each (batch, kv heads, new, d).
    """

    def __init__(self, cache: Any, told: Callable[[Tensor, Tensor], None]):
        self._cache, self._told = cache, told

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Tell, and do what the cache does."""
        self._told(key, value)
        return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)

    def get_seq_length(self, *args: Any) -> int:
        """As the cache; none has seen nothing."""
        return 0 if self._cache is None else self._cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Overhearing:
    """Forward pre-hook of an attention module: somebody is told of its keys and values while a model is read.

    Args:
        names: of the parameters of the module's forward, in order.
        cache: the one that takes the cache.
        told: see :class:`Noting`.
    """

    def __init__(self, names: tuple[str, ...], cache: str, told: Callable[[Tensor, Tensor], None]):
        self.names, self.cache, self.told = names, cache, told

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over a cache that tells."""
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        named[self.cache] = Noting(named.get(self.cache), self.told)
        return (), named


class Recalled:
    """The same in a call that meets a memory, or is longer than a segment: hands out notes.

    Args:
        call: the forward.
        found: the module's part in it.
        distance: what biases the scores.
    """

    def __init__(self, call: Call, found: Recurrent, distance: Distances):
        self._call, self._found, self._distance = call, found, distance

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Keys, Values]:
        """Return notes of what is new."""
        sight = Sight(True)  # until it is known, of each piece
        keys = Keys(key, key.to("meta"), sight, self._distance, None, self._attend)
        return keys, Values(value, value.to("meta"))

    def get_seq_length(self, *_: Any) -> int:
        """Nothing: what is before is not the module's to see."""
        return 0

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
