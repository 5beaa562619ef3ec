"""Collects the second moments of queries, keys and attended values that a conversion needs; never activations.

One pass over the text serves as many attention modules as fit into `MEMORY`; a deeper model takes more passes, not more
memory. Forwards are the model's own, observed through hooks, so that kernels, ``device_map`` and offloading work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import AttnPatchError, CalibrationError
from ..functional.finite import all_finite
from ..probe import input_device
from ..progress import track
from ..sites import Site
from ..upstream import words
from ..upstream.roles import columns, roles_of
from .calibration_text import Batch
from .replay import Call, Observer, Streams, Taps, recording

MEMORY = 400_000_000  # bytes of statistics in memory at a time
VALUE_TOKENS = 8192  # enough for values, whose merge loses little; each costs one attention per key-value head


@dataclass
class Moments:
    """Sums over tokens, float64, on the CPU; divide by ``tokens``.

    Attributes:
        query: q q^T, (num_heads, head_dim, head_dim), before RoPE.
        key: k k^T, (num_kv_heads, head_dim, num_kv_heads, head_dim), before RoPE.
        mean: k, (num_kv_heads, head_dim).
        value: y y^T of all values averaged by each head's attention, (num_kv_heads * v_head_dim,) twice, over all
            heads.
        tokens: their number.
        attended: number of tokens whose values were seen; second moments of values need fewer.
    """

    query: Tensor
    key: Tensor
    mean: Tensor
    value: Tensor
    tokens: int = 0
    attended: int = 0

    @classmethod
    def zeros(cls, site: Site) -> Moments:
        """Return the sums over no tokens."""
        h, kv, d, wide = site.num_heads, site.num_kv_heads, site.head_dim, site.num_kv_heads * site.v_head_dim
        return cls(_zeros(h, d, d), _zeros(kv, d, kv, d), _zeros(kv, d), _zeros(wide, wide))

    def add(self, query: Tensor, key: Tensor, attended: Tensor | None) -> None:
        """Add tokens: (tokens, num_heads, head_dim), (tokens, num_kv_heads, head_dim), (tokens * num_heads, wide)."""
        flat = key.flatten(1).float()
        self.key += (flat.t() @ flat).view(self.key.shape).to(self.key)
        self.mean += key.double().sum(0).to(self.mean)
        per_head = query.float().transpose(0, 1)
        self.query += (per_head.transpose(1, 2) @ per_head).to(self.query)
        self.tokens += len(key)
        if attended is not None:
            self.value += (attended.float().t() @ attended.float()).to(self.value)
            self.attended += len(key)

    def normalised(self) -> Moments:
        """Return the means."""
        n, seen = self.tokens, max(1, self.attended) * len(self.query)
        return Moments(self.query / n, self.key / n, self.mean / n, self.value / seen, n, self.attended)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


def chunks(sites: Sequence[Site], size: Callable[[Site], int]) -> Iterator[list[Site]]:
    """Yield groups of attention modules whose statistics fit into memory together; at least one module each."""
    run: list[Site] = []
    for site in sites:
        if run and sum(map(size, (*run, site))) > MEMORY:
            yield run
            run = []
        run.append(site)
    yield run


def moments_size(site: Site) -> int:
    """Return the bytes of a module's :class:`Moments`."""
    wide, keys = site.num_kv_heads * site.v_head_dim, site.num_kv_heads * site.head_dim
    return 8 * (wide**2 + keys**2 + site.num_heads * site.head_dim**2)


Feed = AbstractContextManager[Callable[[int], None]]  # which layers run; is told the number of each batch


def stream(
    model: PreTrainedModel,
    sites: Sequence[Site],
    text: Sequence[Batch],
    see: Observer,
    what: str,
    feed: Feed | None = None,
) -> None:
    """Run the model over a text and show every call of these modules.

    Args:
        model: to run.
        sites: whose calls are shown.
        text: batches of its inputs.
        see: is shown them.
        what: is done, for the progress.
        feed: which layers run, as :meth:`.layerwise.Layers.running` gives it; None for all.
    """
    runner = _runner(model, sites)
    device = input_device(model)
    with torch.no_grad(), recording(model, sites, see) as tell, feed or nullcontext(_all_layers) as begin:
        for number, batch in enumerate(track(text, what)):
            begin(number)
            inputs = columns(model, {name: tensor.to(device) for name, tensor in batch.items()})
            tell(inputs.get(roles_of(model).names.get(words.MASK, "")), inputs.get(words.DECODER_MASK))
            try:
                runner(**inputs)
            except (TypeError, RuntimeError, IndexError, AttributeError, KeyError) as error:
                given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
                raise AttnPatchError(
                    f"{type(model).__name__} does not run, or its attention cannot be run again, on {given}: "
                    f"{type(error).__name__}: {error}; method='mean' without calibration needs no run."
                ) from error


def _all_layers(_: int) -> None:
    """Let all run."""


def _runner(model: PreTrainedModel, sites: Sequence[Site]) -> Callable[..., Any]:
    """Return the forward without the vocabulary head, if all modules are below it."""
    base = model.base_model
    prefix = next((f"{name}." for name, child in model.named_children() if child is base), None)
    inner = base if prefix and all(s.path.startswith(prefix) for s in sites) else model

    roles = roles_of(model)
    keyword = roles.names.get(words.USE_CACHE)
    without = (
        {}
        if keyword is None or not (keyword in roles_of(inner).parameters or roles_of(inner).open)
        else {keyword: False}
    )

    def run(**inputs: Tensor) -> None:
        if model.config.is_encoder_decoder and roles.name(words.DECODER_TOKENS) not in inputs:
            inputs = {**inputs, roles.name(words.DECODER_TOKENS): inputs[roles.name(words.TOKENS)]}
        inner(**inputs, **without)

    return run


def measure(
    model: PreTrainedModel,
    sites: Sequence[Site],
    text: Sequence[Batch],
    offsets: Mapping[str, Tensor],
    feed: Feed | None = None,
) -> dict[str, Moments]:
    """Collect the moments of some attention modules in one pass.

    Args:
        model: to run.
        sites: its modules.
        text: batches of its inputs.
        offsets: constants taken off the values, (num_kv_heads, v_head_dim) for each module.
        feed: which layers run; None for all.

    Raises:
        AttnPatchError: a module never ran, or its states are not finite.
    """
    sums = {site.path: Moments.zeros(site) for site in sites}

    def see(site: Site, call: Call, own: Streams) -> None:
        found = sums[site.path]
        attended = (
            _attended(Taps(model, site), call, own, offsets[site.path]) if found.attended < VALUE_TOKENS else None
        )
        if not all(all_finite(part) for part in (own.key, own.query, own.value)):
            raise CalibrationError(
                f"{site.path}: activations on the calibration text are not finite; check the weights and the dtype."
            )
        found.add(own.query, own.key, attended)

    stream(model, sites, text, see, "measuring heads", feed)
    silent = next((path for path, found in sums.items() if not found.tokens), None)
    if silent is not None:
        raise AttnPatchError(f"{silent}: did not run on the calibration text, or on padding only.")
    return {path: found.normalised() for path, found in sums.items()}


def _rolled(shift: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda _, states: states.roll(-shift, dims=-2)


def _attended(socket: Taps, call: Call, own: Streams, offset: Tensor) -> Tensor:
    """Return all heads' values averaged by every query head's attention, (tokens * num_heads, num_kv_heads * dim).

    Attention is linear in its values: the module is run again with values moved by one head, two heads and so on.
    """
    site, kv = socket.site, socket.site.num_kv_heads
    offset = offset.to(own.heads)
    seen = [own.heads, *(socket.run(call, value=_rolled(shift)).heads for shift in range(1, kv))]
    attended = torch.stack(seen, dim=2)  # tokens, heads, shifts, dim: with shift s a head saw the value of own + s
    first = torch.arange(site.num_heads) // (site.num_heads // kv)
    shift = ((torch.arange(kv)[None] - first[:, None]) % kv).to(attended.device)  # heads, kv
    by_head = attended[:, torch.arange(site.num_heads)[:, None], shift]  # tokens, heads, kv, dim
    return (by_head - offset).flatten(2).flatten(0, 1)
