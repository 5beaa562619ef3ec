"""ALiBi: adds a bias linear in distance to the scores, in the way that each kernel supports."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttnPatchError
from ..functional.alibi import columns, extended, slopes
from ..functional.biased import Distance, Sight, attend, bias_rows, positions
from ..upstream import words
from ..upstream.find import find
from .call import AttentionCall, Output
from .heads import sharding, share
from .masks import AttentionMask, mask_of
from .wrapper import Term, Wrapper, wrapper_of


class AlibiBias(Term):
    """The ALiBi bias of a model, shared by all of its attention modules.

    Neither a module nor a buffer: the slopes follow from the config, stay exact when the model is cast, and exist when
    the model is built on the meta device.

    Args:
        given: slopes of the query heads, or None for the paper's.
        clip: larger distances count as this one; None does not clip.
        exact: whether slope times position is exact; False rounds it to the model's dtype, as BLOOM does.
        strength: factor on the slopes, in [0, 1], used while a model is warmed up.
        heads: query heads of the whole module, of which a tensor-parallel rank holds a part; None if unknown.
    """

    name, what = "alibi", "ALiBi"

    def __init__(
        self, given: tuple[float, ...] | None, clip: int | None, exact: bool, strength: float, heads: int | None = None
    ):
        self.given, self.clip, self.exact, self.strength = given, clip, exact, strength
        self.heads = heads if given is None else len(given)

    def __repr__(self) -> str:
        return "the paper's slopes" if self.given is None else f"{len(self.given)} given slopes"

    def distance(self, heads: int, dtype: torch.dtype, module: nn.Module | None = None) -> Distance:
        """Return the slopes of these heads: of all heads of a module, or of those on this tensor-parallel rank.

        Raises:
            AttnPatchError: heads are missing, and no tensor parallelism explains which.
        """
        whole = heads if self.heads is None else self.heads
        if self.heads is None and module is not None and sharding(module) is not None:
            raise AttnPatchError(
                f"{type(module).__name__} is sharded over devices and its total number of heads is unknown, so the "
                f"slopes of "
                "these heads cannot be determined. Load the model without tp_plan."
            )
        slope = slopes(whole) if self.given is None else torch.tensor(self.given, dtype=torch.float64)
        slope = slope[share(module, heads, whole)]
        return Distance(slope * self.strength, self.clip, None if self.exact else dtype)

    def _of(self, call: AttentionCall) -> Distance:
        return self.distance(call.query.shape[1], call.query.dtype, call.module)

    def attend(self, call: AttentionCall, sight: Sight) -> Tensor:
        """Attend by torch's kernels, with the bias as extra dimensions of queries and keys."""
        made, states, sinks = mask_of(call.mask), (call.query, call.key, call.value), call.given.get(words.SINKS)
        if made is None:
            return attend(*states, self._of(call), sight, call.scale, call.dropout, sinks=sinks)
        distance = made.once((self, call.query.shape[1], call.query.dtype), lambda: self._of(call))
        once = functools.partial(_shared, made, self)
        return attend(*states, distance, sight, call.scale, call.dropout, once, sinks)

    def dense(self, call: AttentionCall, sight: Sight) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the bias as a matrix."""
        exact = torch.promote_types(call.query.dtype, torch.float32)
        rows = bias_rows(self._of(call), positions(call.query, call.key, sight), call.key, sight)
        return call.query.to(exact), call.key.to(exact), rows.to(exact)

    def flex(self, call: AttentionCall) -> Output:
        """Attend by flex attention, with the bias as a ``score_mod``."""
        call.refuse(self.what, words.SINKS, words.SCORE_BIAS, words.CACHE, words.DROPOUT)
        if not self.exact:
            raise AttnPatchError(
                f"{type(call.module).__name__}: flex_attention computes the exact bias only; pass exact=True."
            )
        slope = self._of(call).slope.to(call.query.device, torch.float32)
        offset = getattr(call.mask, "query_offset", call.key.shape[2] - call.query.shape[2])
        causal, clip, softcap = call.causal, self.clip, call.given.get(words.SOFTCAP)

        def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            gap = (q + offset - k) if causal else (q + offset - k).abs()
            return score - slope[head] * (gap if clip is None else gap.clamp(max=clip))

        kernel = find("compile_friendly_flex_attention", "integrations.flex_attention", "ALiBi through flex attention")
        out = kernel(
            call.query,
            call.key,
            call.value,
            training=call.module.training,
            score_mod=score_mod,
            block_mask=call.mask,
            enable_gqa=call.query.shape[1] != call.key.shape[1],
            scale=call.given.get(words.SCALING),
        )
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).contiguous(), None

    def flash(self, call: AttentionCall, packed: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Pass ``alibi_slopes`` where the library supports them; otherwise return states with extra dimensions."""
        self._refuse_on_flash(call)
        query, key = call.query, call.key
        if call.kernel == "flash_attention_2" and call.mask is None and not packed:
            return self._by_slopes(call)
        here = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)[None]
        slope = self._of(call).slope.to(query.device)
        return extended(query, key, call.value, columns(slope, call.scale, here, key.shape[2], query.dtype))

    def _by_slopes(self, call: AttentionCall) -> Tensor:
        """Call FlashAttention 2, which adds -slope |i + k - q - j| in fp32, also for bidirectional attention."""
        library, window = importlib.import_module("flash_attn"), call.given.get(words.WINDOW)
        reach = (-1, -1) if window is None or call.key.shape[2] <= window else (window - 1, window - 1)
        out: Tensor = library.flash_attn_func(
            *(t.transpose(1, 2) for t in (call.query, call.key, call.value)),
            dropout_p=call.dropout,
            softmax_scale=call.scale,
            causal=call.causal,
            window_size=reach,
            softcap=call.given.get(words.SOFTCAP) or 0.0,
            alibi_slopes=self._of(call).slope.to(call.query.device, torch.float32),
        )
        return out

    def _refuse_on_flash(self, call: AttentionCall) -> None:
        slopes = call.kernel == "flash_attention_2" and call.mask is None
        problems = {
            "distances are clipped": self.clip is not None,
            "the bias is rounded (exact=False)": not self.exact,
            "attention sinks": call.given.get(words.SINKS) is not None,
            "soft-capped scores": call.given.get(words.SOFTCAP) is not None and not slopes,
            "attention is bidirectional": not call.causal and not slopes,
        }
        problem = next((said for said, there in problems.items() if there), None)
        if problem is not None:
            raise AttnPatchError(
                f"{type(call.module).__name__}: {problem}, which {call.kernel} cannot compute together with ALiBi"
                f"{' and padding' if call.mask is not None else ''}; choose backend='flex_attention' or 'sdpa'."
            )


def _shared(mask: AttentionMask, bias: AlibiBias, form: Hashable, make: Callable[[], Any]) -> Any:
    """Compute a form of the bias once for all layers that share the bias and the mask."""
    return mask.once((bias, form), make)


class NoBias(Wrapper):
    """Marks an attention module whose own ALiBi bias is left out."""

    name, order = "alibi", Term.order

    def __repr__(self) -> str:
        return "no bias"


def bias_left_out(module: nn.Module) -> bool:
    """Return whether the module's own ALiBi bias was removed."""
    return wrapper_of(module, NoBias) is not None


def alibi_of(module: nn.Module) -> AlibiBias | None:
    """Return the ALiBi bias that this package gave an attention module, or None."""
    return wrapper_of(module, AlibiBias)
