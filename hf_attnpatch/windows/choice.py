"""Which layers lose least by a window: the divergence of the logits with a window on one layer at a time.

Layers before the one that sees a window give what they gave, so that they are not run again: L layers cost about half
of L forwards. The choice is by layer, and adds up what was measured one by one (as the KL-guided choice of layers for
hybrids does, 2512.20569, section 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention.registry import set_kernel
from ..attention.wrapper import AddWrapper
from ..edits import Edit, ReplaceModule, tried
from ..errors import AttnPatchError, CalibrationError
from ..evaluation.logits import positions_at_once, span_logits
from ..heads.calibration_text import Batch
from ..probe import input_device, quiet
from ..progress import track
from .attention import Narrowed


def rows_of(text: Sequence[Batch], window: int) -> list[Tensor]:
    """Return the rows that are longer than a window, without their padding, (length,).

    Raises:
        CalibrationError: fewer than 32 tokens stand beyond the window, so that a window could not show.
    """
    rows = []
    for batch in text:
        keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows += [ids[mask].cpu() for ids, mask in zip(batch["input_ids"], keep, strict=True)]
    beyond = sum(max(0, len(row) - window) for row in rows)
    if beyond < 32:
        longest = max(map(len, rows), default=0)
        raise CalibrationError(
            f"calibration: its longest row has {longest} tokens, and a window of {window} shows in what comes after; "
            f"pass rows of {2 * window} tokens or more."
        )
    return [row for row in rows if len(row) > window + 1]


def costs(model: PreTrainedModel, paths: Sequence[str], window: int, rows: Sequence[Tensor]) -> list[float]:
    """Return what a window on each layer alone costs, KL(model || windowed) in nats a token beyond the window.

    Args:
        model: left as it was.
        paths: of its attention modules, by layer.
        window: in tokens.
        rows: of :func:`rows_of`.
    """
    summed, count = [0.0] * len(paths), 0
    with quiet(model), torch.no_grad():
        for row in track(rows, "measuring layers"):
            ids = row[None].to(input_device(model))
            with tried(model, [set_kernel("sdpa")]), _outputs(model, paths) as kept:
                wanted = _log_probabilities(model, ids, window)
            count += len(row) - window
            for n, path in enumerate(paths):
                edits: list[Edit] = [AddWrapper(path, Narrowed(window)), set_kernel("sdpa")]
                edits += [ReplaceModule(layer, _Known.of(kept[layer]), "what it gave") for layer in list(kept)[:n]]
                with tried(model, edits):
                    summed[n] += _divergence(wanted, _log_probabilities(model, ids, window))
    return [each / count for each in summed]


def chosen(costs: Sequence[float | None], window: int, context: int, target: float) -> tuple[int, ...]:
    """Return the layers to give a window: those that lose least, as few as the budget takes.

    Args:
        costs: of each layer; None for one that has no cache of its own to shrink.
        window: in tokens.
        context: tokens of a text for which the cache is counted.
        target: the share of the present cache that is to be left.

    Raises:
        AttnPatchError: windows in all layers leave more than that.
    """
    order = sorted((n for n, cost in enumerate(costs) if cost is not None), key=lambda n: (costs[n], n))
    saved = 1 - window / context
    for count in range(1, len(order) + 1):
        if 1 - count * saved / len(order) <= target + 1e-9:
            return tuple(sorted(order[:count]))
    raise AttnPatchError(
        f"cache_target={target!r}: windows of {window} tokens in all layers leave {1 - saved:.3g} of the cache of "
        f"{context} tokens; choose a shorter window, or a target of at least that."
    )


def _log_probabilities(model: PreTrainedModel, ids: Tensor, window: int) -> Tensor:
    """(positions, vocabulary), float32, of the positions from the window on."""
    step = positions_at_once(model, 1)
    parts = [part[0].float().log_softmax(-1) for part in span_logits(model, ids, window, ids.shape[1], step)]
    return torch.cat(parts[::-1])


def _divergence(wanted: Tensor, found: Tensor) -> float:
    apart = wanted.exp() * (wanted - found)
    return float(apart.masked_fill(wanted.isneginf(), 0.0).double().sum())


@contextlib.contextmanager
def _outputs(model: PreTrainedModel, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Keep what each layer gives; nothing where modules are in no list of layers, so that all are run each time."""
    kept: dict[str, Any] = {}
    layers = [_layer(path) for path in paths]
    hooks = []
    try:
        for layer in layers if all(layers) and len({*layers}) == len(layers) else []:
            module = model.get_submodule(layer)
            hooks.append(module.register_forward_hook(lambda _, __, out, at=layer: kept.setdefault(at, out)))
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _layer(path: str) -> str:
    """Return the path of the layer that a module is in, by its number; empty if there is none."""
    parts = path.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])


class _Known(nn.Module):
    """Stands for a layer whose output is known; whatever else it is asked for, the layer itself answers."""

    def __init__(self, old: nn.Module, output: Any):
        super().__init__()
        self.__dict__["held"] = old, output

    @classmethod
    def of(cls, output: Any) -> Any:
        """Return what makes it of a layer."""
        return lambda old: cls(old, output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["held"][0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        """Give what is known."""
        return self.__dict__["held"][1]
