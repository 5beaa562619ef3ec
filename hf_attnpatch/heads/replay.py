"""Reruns one attention module with other queries, keys or values, through temporary hooks.

Attention is linear in its values and depends on hidden states only through its projections. A conversion can therefore
measure and try everything by rewriting the projections' outputs: no forward is copied, no weight is touched, and it
works wherever the model runs (any kernel, ``device_map``, Accelerate's offload).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import AttnPatchError
from ..interruption import removing
from ..sites import Site
from .projections import query_rows

_STATES = ("query", "key", "value")
Rewrite = Callable[[Tensor, Tensor], Tensor]  # (inputs of the projection, states (..., heads, dim)) -> states


@dataclass(frozen=True)
class Call:
    """The arguments of one call of an attention module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tokens: Tensor | None  # (batch, length) bool: which are no padding; None where all count


@dataclass
class Streams:
    """The states of one call: queries, keys and values before RoPE, and the heads' output.

    Attributes:
        query: (tokens, num_heads, head_dim).
        key: (tokens, num_kv_heads, head_dim).
        value: (tokens, num_kv_heads, v_head_dim).
        heads: (tokens, num_heads, v_head_dim), the input of the output projection.
        probabilities: (batch, num_heads, length, length) if the module returns them (eager), else None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    heads: Tensor
    probabilities: Tensor | None


Observer = Callable[[Site, Call, Streams], object]


@dataclass(frozen=True)
class Taps:
    """Reads and rewrites the projections of one attention module."""

    model: nn.Module
    site: Site

    @property
    def module(self) -> nn.Module:
        """The attention module."""
        return self.model.get_submodule(self.site.path)

    @property
    def inside(self) -> bool:
        """Whether the output projection is inside the module (in BERT it belongs to a sibling)."""
        return self.site.output.startswith(f"{self.site.path}.")

    def run(self, call: Call, **rewrites: Rewrite) -> Streams:
        """Run the module on a recorded call.

        Args:
            call: recorded by :func:`recording`.
            rewrites: ``query``, ``key``, ``value``: functions of the projection's input and of these states, both and
                the result (batch, length, heads, dim).

        Raises:
            AttnPatchError: the module keeps state between calls.
        """
        found: dict[str, Tensor] = {}
        with removing() as handles:
            try:
                handles += self.taps(found, rewrites)
                output = self.module(*call.args, **call.kwargs)
            except (RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
                raise AttnPatchError(
                    f"{self.site.path}: {self.site.kind} cannot be run twice on the same inputs, which aligning "
                    f"its heads takes ({type(error).__name__}: {error}); use method='mean' without calibration."
                ) from error
        return self.streams(found, output, call)

    def streams(self, found: Mapping[str, Tensor], output: object, call: Call) -> Streams:
        """Assemble what the hooks found during a call and what it returned."""
        first = output[0] if isinstance(output, tuple) else output
        heads = found["heads"] if self.inside else first
        assert isinstance(heads, Tensor)
        heads = heads.view(*heads.shape[:-1], self.site.num_heads, self.site.v_head_dim)
        query, key, value, heads = (_counted(s, call.tokens) for s in (*(found[n] for n in _STATES), heads))
        return Streams(query, key, value, heads, _probabilities(output))

    def taps(self, found: dict[str, Tensor], rewrites: Mapping[str, Rewrite]) -> list[RemovableHandle]:
        """Hook the projections: states go to ``found``, rewritten on request."""
        layout, handles = self.site.layout, []
        for child in dict.fromkeys((layout.query, layout.key, layout.value)):
            names = [n for n in _STATES if getattr(layout, n) == child]
            hook = _Tap(self.site, names, found, rewrites)
            handles.append(self.module.get_submodule(child).register_forward_hook(hook))
        if self.inside:
            handles.append(self.model.get_submodule(self.site.output).register_forward_pre_hook(_Keep(found)))
        return handles


@dataclass(frozen=True)
class _Tap:
    """Forward hook of a projection: keeps the states of its heads, rewritten on request."""

    site: Site
    names: Sequence[str]
    found: dict[str, Tensor]
    rewrites: Mapping[str, Rewrite]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for name in self.names:
            index = query_rows(self.site, output.shape[-1]) if name == "query" else getattr(self.site.rows(), name)
            index = index.to(output.device)
            states = output[..., index]  # batch, length, heads, dim
            if name in self.rewrites:
                states = self.rewrites[name](args[0], states)
                output = output.index_copy(-1, index.flatten(), states.flatten(-2))
            self.found[name] = states
        return output


@dataclass(frozen=True)
class _Keep:
    """Forward pre-hook of the output projection: keeps its input."""

    found: dict[str, Tensor]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.found["heads"] = args[0]


@contextlib.contextmanager
def recording(model: nn.Module, sites: Sequence[Site], see: Observer) -> Iterator[Callable[..., None]]:
    """Pass every call of these modules to ``see``, right after it; replays inside ``see`` are not passed on.

    Yields:
        A function that receives the token masks of the next forward: ``(attention_mask, decoder_attention_mask)``.
    """
    masks: list[Tensor | None] = [None, None]

    def tell(mask: Tensor | None, decoder_mask: Tensor | None = None) -> None:
        masks[:] = [mask, decoder_mask]

    with removing() as handles:
        for site in sites:
            watch = _Watch(Taps(model, site), see, masks, {}, [])
            handles += watch.socket.taps(watch.found, {})
            handles.append(watch.socket.module.register_forward_hook(watch, with_kwargs=True))
        yield tell


@dataclass(frozen=True)
class _Watch:
    socket: Taps
    see: Observer
    masks: list[Tensor | None]
    found: dict[str, Tensor]
    busy: list[bool]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if self.busy:
            return
        self.busy.append(True)
        try:
            hidden = args[0] if args else next(iter(kwargs.values()))
            call = Call(args, kwargs, self._tokens(hidden))
            self.see(self.socket.site, call, self.socket.streams(self.found, output, call))
        finally:
            self.busy.clear()
            self.found.clear()

    def _tokens(self, hidden: Tensor) -> Tensor | None:
        mask = self.masks["decoder" in self.socket.site.path and self.masks[1] is not None]
        return mask.bool() if mask is not None and mask.shape == hidden.shape[:2] else None


def _counted(states: Tensor, tokens: Tensor | None) -> Tensor:
    """(batch, length, heads, dim) -> (tokens, heads, dim) without padding."""
    return states[tokens] if tokens is not None else states.flatten(0, -3)


def _probabilities(output: object) -> Tensor | None:
    """Return the attention weights among a module's outputs: rows that sum to one."""
    for part in output[1:] if isinstance(output, tuple) else ():
        if isinstance(part, Tensor) and part.dim() == 4 and part.is_floating_point():
            return part
    return None
