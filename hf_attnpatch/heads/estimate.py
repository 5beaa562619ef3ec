"""Finds the symmetries of each module, and the second moments for a merge: measured, or from the weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import AttnPatchError, UnsupportedArchitecture
from ..probe import check_in_memory, codebooks, quiet, reads_tokens
from ..sites import Site
from ..upstream.roles import frequencies
from . import calibration as cal
from . import calibration_text
from .calibration import Moments
from .calibration_text import Batch
from .frames import Symmetries, read_frames
from .replay import Call, Streams, Taps
from .weights import HeadWeights, read_weights

PROBE = (4, 64)  # sequences and length of the random tokens for data-free methods


def find_frames(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Symmetries]:
    """Find the symmetries of each module; see :mod:`frames`.

    Raises:
        AttnPatchError: a module does not run on the probe.
    """
    calls: dict[str, Call] = {}
    cal.stream(model, sites, [brief(model)], lambda s, c, _: calls.setdefault(s.path, c), "")
    silent = next((s.path for s in sites if s.path not in calls), None)
    if silent is not None:
        raise AttnPatchError(f"{silent}: did not run on a probe, so its heads cannot be aligned; use method='mean'.")
    rotated = tuple({*_rotated(model)})
    with torch.no_grad():
        return {s.path: read_frames(Taps(model, s), calls[s.path], rotated) for s in sites}


def brief(model: PreTrainedModel) -> Batch:
    """Return a few random tokens."""
    return {"input_ids": random_ids(model, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}


def unaligned(model: PreTrainedModel, sites: Sequence[Site]) -> str | None:
    """Return why heads of these modules cannot be aligned, judged by the first, or None."""
    blind = next((s for s in sites if not s.output), None)
    if blind is not None:
        return f"{blind.path}: {blind.kind} has no output projection"
    check_in_memory(model)  # else a missing weight would be reported as a failed alignment
    try:
        with quiet(model):
            find_frames(model, sites[:1])
    except UnsupportedArchitecture:
        raise
    except AttnPatchError as error:
        return str(error)
    return None


def _rotated(model: PreTrainedModel) -> Iterator[int]:
    """Yield the number of rotated dimensions of each rotary or attention module that declares one."""
    for module in model.modules():
        yield from (2 * len(buffer) for buffer in frequencies(module).values())
        size = getattr(module, "rotary_dim", None)
        if isinstance(size, int):
            yield size


def estimate(
    model: PreTrainedModel,
    sites: Sequence[Site],
    text: Sequence[Batch] | None,
    frames: Mapping[str, Symmetries],
    sizes: Mapping[str, Tensor] | None = None,
    feed: cal.Feed | None = None,
) -> dict[str, Moments]:
    """Return second moments in the frames' scale: measured on text, or from weights and the size of random inputs.

    Args:
        model: to run.
        sites: of these modules.
        text: to measure on; None for the weights.
        frames: what each module allows.
        sizes: what :func:`input_sizes` found, where it was asked before.
        feed: which layers run; None for all.
    """
    if text is None:
        sizes = input_sizes(model, sites) if sizes is None else sizes
        found = {site.path: _assumed(site, read_weights(model, site), sizes[site.path]) for site in sites}
    else:
        offsets = {s.path: _offset(model, s, frames[s.path]) for s in sites}
        found = cal.measure(model, sites, calibration_text.split(text, sites), offsets, feed)
    return {path: _scaled(each, frames[path]) for path, each in found.items()}


def _offset(model: PreTrainedModel, site: Site, frames: Symmetries) -> Tensor:
    """Return the value bias that will move behind the output projection, (num_kv_heads, v_head_dim)."""
    weights = read_weights(model, site)
    bias = weights.value[..., -1]
    return bias if frames.folds and weights.output_bias is not None else torch.zeros_like(bias)


def _scaled(m: Moments, frames: Symmetries) -> Moments:
    k, q = frames.key_scale, frames.query_scale
    key = m.key * k[:, :, None, None] * k[None, None]
    return replace(m, key=key, mean=m.mean * k, query=m.query * q[:, :, None] * q[:, None, :])


def input_sizes(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return the root mean square of each input of some modules on random tokens, (in_features,) by path."""
    sizes: dict[str, Tensor] = {}

    def see(site: Site, call: Call, _: Streams) -> None:
        hidden = (call.args[0] if call.args else next(iter(call.kwargs.values()))).detach().double().cpu()
        sizes[site.path] = hidden.flatten(0, -2).square().mean(0).sqrt()

    cal.stream(model, sites, [{"input_ids": random_ids(model, PROBE)}], see, "")
    return sizes


def _assumed(site: Site, weights: HeadWeights, size: Tensor) -> Moments:
    q, k = sized(weights.query, size), sized(weights.key, size)
    wide = sized(weights.value, size)[..., :-1].flatten(0, 1)
    return Moments(
        query=q @ q.transpose(1, 2),
        key=torch.einsum("iax,jbx->iajb", k, k),
        mean=weights.key[..., -1],
        value=wide @ wide.t(),
        tokens=0,
    )


def sized(rows: Tensor, size: Tensor) -> Tensor:
    """Return rows times the sizes of their inputs, the constant one of biases last; MobileBERT's values have others."""
    inputs = size if len(size) == rows.shape[-1] - 1 else size.new_ones(rows.shape[-1] - 1)
    return rows * torch.cat([inputs, inputs.new_ones(1)])


def random_ids(model: PreTrainedModel, shape: tuple[int, int]) -> Tensor:
    """Return token ids that depend on the vocabulary only; (sequences, length), or one row per codebook.

    Raises:
        UnsupportedArchitecture: the model reads no tokens.
    """
    if not reads_tokens(model):
        raise UnsupportedArchitecture(
            f"{type(model).__name__}: reads {model.main_input_name} and no tokens, so that heads cannot be weighed by "
            "text; choose method='mean', 'mean_rescaled' or 'first'."
        )
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return ids.repeat_interleave(codebooks(model), dim=0)
