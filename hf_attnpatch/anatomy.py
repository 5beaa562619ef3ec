"""What a model is, read from its modules and weights: never written, never guessed from the config alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .configs import config_path
from .errors import UnsupportedArchitecture
from .position_modules import alibi_of, turns_nothing
from .sites import Site, read_sites


@dataclass(frozen=True)
class Rotary:
    """One module that computes rotary angles.

    Attributes:
        path: as in ``named_modules``.
        kind: class name.
        rope_type: transformers' name for its frequencies, by layer type where nested.
        config: dotted path of the config that built it, None where it was built from something else.
    """

    path: str
    kind: str
    rope_type: str | Mapping[str, str]
    config: str | None


@dataclass(frozen=True)
class Anatomy:
    """A model as patches see it.

    Attributes:
        model_type: of the config that holds the attention fields.
        architecture: class name of the model.
        sites: attention modules, in order.
        other: paths of modules that mix tokens but keep no keys and values of their own, with what they do instead.
        unread: paths of modules that look like attention but match no layout, with the reason.
        rotary: modules computing rotary angles.
        tables: learned or fixed position tables: path and number of rows.
        alibi: whether scores are biased by distance.
        biased: paths of the modules that this package gave such a bias.
        max_positions: the context length that the config declares, in tokens.
    """

    model_type: str
    architecture: str
    sites: tuple[Site, ...]
    other: Mapping[str, str]
    unread: Mapping[str, str]
    rotary: tuple[Rotary, ...]
    tables: Mapping[str, int]
    alibi: bool
    biased: tuple[str, ...]
    max_positions: int | None

    @property
    def positions(self) -> str:
        """The position scheme in a word or two."""
        found = [("rotary", self.rotary), ("table", self.tables), ("alibi", self.alibi)]
        return " + ".join(name for name, there in found if there) or "none or inside the attention module"

    def __str__(self) -> str:
        from .report import render_anatomy

        return render_anatomy(self)


def describe(model: PreTrainedModel) -> Anatomy:
    """Read where a model attends and how it knows positions.

    Args:
        model: any transformers model with its weights in place.

    Raises:
        UnsupportedArchitecture: not a ``PreTrainedModel`` (a PEFT, DDP, FSDP or compiled wrapper, say).
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedArchitecture(_wrapper_message(model))
    text = model.config.get_text_config(decoder=True)
    sites, other, unread = read_sites(model)
    biased = tuple(path for path, module in model.named_modules() if alibi_of(module) is not None)
    return Anatomy(
        model_type=str(text.model_type),
        architecture=type(model).__name__,
        sites=sites,
        other=other,
        unread=unread,
        rotary=tuple(_rotary(model)),
        tables=dict(_tables(model)),
        alibi=bool(biased) or _alibi(model),
        biased=biased,
        max_positions=getattr(text, "max_position_embeddings", None),
    )


def _wrapper_message(model: Any) -> str:
    kind = type(model).__name__
    remedy = "pass a transformers PreTrainedModel"
    if isinstance(model, type):
        example = f"{model.__name__}.from_pretrained(...)"
        return f"model is the class {model.__name__}, not a transformers model; {remedy}, such as {example} gives."
    if isinstance(model, (str, os.PathLike)):
        example = f"hf_attnpatch.load({str(model)!r})"
        return f"model is {model!r}, not a transformers model; {remedy}, such as {example} gives."
    if not isinstance(model, nn.Module):
        return f"model is a {kind}, not a transformers model; {remedy}."
    if hasattr(model, "get_base_model"):
        remedy = "patch before get_peft_model, or merge_and_unload() the adapter first"
    elif hasattr(model, "module"):
        remedy = "patch model.module before wrapping it for distributed training"
    elif hasattr(model, "_orig_mod"):
        remedy = "patch before torch.compile"
    return f"{kind} is not a transformers model but a wrapper or something else; {remedy}."


def _rotary(model: PreTrainedModel) -> Iterator[Rotary]:
    for path, module in model.named_modules():
        names = {n for n, _ in module.named_buffers(recurse=False)}
        if any(n.endswith("inv_freq") for n in names) and not turns_nothing(module):
            kind: Any = getattr(module, "rope_type", "default")
            types = dict(kind) if isinstance(kind, Mapping) else str(kind)
            yield Rotary(path, type(module).__name__, types, config_path(model, getattr(module, "config", None)))


def _tables(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    names = ("position_embeddings", "embed_positions", "wpe", "position_embedding")
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in names:
            weight = getattr(module, "weight", None)
            weights = getattr(module, "weights", weight)  # sinusoidal modules of the fairseq family
            if isinstance(weights, Tensor) and weights.dim() == 2:
                yield path, weights.shape[0]


def _alibi(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    declared = getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
    return bool(declared) or any(
        hasattr(m, n) for m in model.modules() for n in ("build_alibi_tensor", "build_mpt_alibi_tensor")
    )


__all__ = ["Anatomy", "Rotary", "Site", "describe"]
