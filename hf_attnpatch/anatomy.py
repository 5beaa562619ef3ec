"""Describes a model: attention modules and positions, read from modules and weights, not from the config alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention.alibi import AlibiBias, NoBias, bias_left_out
from .attention.relative import Relative
from .attention.rotation import Rotation
from .attention.wrapper import wrappers_of
from .configs import config_path, declared
from .errors import UnsupportedArchitecture
from .layers import unrotated
from .modules.added import CHILD, LearnedPositions, SinusoidalPositions
from .modules.still import turns_nothing
from .showing import Shown
from .sites import Site, bias_tables, in_tower, read_sites
from .upstream import words
from .upstream.roles import frequencies, learn, makes_angles, position_tables, roles_of

_TABLES = ("position_embeddings", "embed_positions", "wpe", "position_embedding")


@dataclass(frozen=True)
class RotaryModule:
    """One module that computes rotary angles.

    Attributes:
        path: as in ``named_modules``.
        kind: class name.
        rope_type: transformers' name of its frequencies, by layer type if nested.
        config: dotted path of the config that built it, None if something else did.
    """

    path: str
    kind: str
    rope_type: str | Mapping[str, str]
    config: str | None


@dataclass(frozen=True)
class Anatomy(Shown):
    """The description of a model on which patches work.

    Attributes:
        model_type: of the config that holds the attention fields.
        architecture: class name of the model.
        sites: attention modules, in order.
        other: paths of modules that mix tokens without their own keys and values, with what they do instead.
        unread: paths of modules that look like attention but match no layout, with the reason.
        rotary: modules computing rotary angles.
        tables: learned or fixed position tables: path and number of rows.
        alibi: whether scores have an ALiBi bias.
        max_positions: the context length that the config declares, in tokens.
        stilled: rotary modules that this package fixed at position 0, or that no layer uses.
        inner: paths of modules that gather angles from their own table, whose rows limit the length: attention modules
            that rotate in this way, or the module that makes the angles for them.
        wrappers: path of an attention module -> names of this package's wrappers around it, outermost first.
        added: what this package adds to the embeddings: ``sinusoidal``, ``table``, or an empty string for nothing.
        distances: paths of the tables of a learned relative bias, one number for each head (T5).
        base: path of the language model, which receives token ids and contains all attention; None if not found.
    """

    model_type: str
    architecture: str
    sites: tuple[Site, ...]
    other: Mapping[str, str]
    unread: Mapping[str, str]
    rotary: tuple[RotaryModule, ...]
    tables: Mapping[str, int]
    alibi: bool
    max_positions: int | None
    stilled: tuple[RotaryModule, ...] = ()
    inner: tuple[str, ...] = ()
    wrappers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    added: str = ""
    base: str | None = None
    distances: tuple[str, ...] = ()

    @property
    def biased(self) -> tuple[str, ...]:
        """Paths of the modules to which this package added an ALiBi bias."""
        return self.wrapped_by(AlibiBias.name)

    @property
    def turned(self) -> tuple[str, ...]:
        """Paths of the modules to which this package added rotation."""
        return self.wrapped_by(Rotation.name)

    @property
    def relative(self) -> tuple[str, ...]:
        """Paths of the modules to which this package added Transformer-XL's position terms."""
        return self.wrapped_by(Relative.name)

    def wrapped_by(self, name: str) -> tuple[str, ...]:
        """Return the paths of the modules that have a wrapper of this name."""
        return tuple(path for path, names in self.wrappers.items() if name in names)

    @property
    def attending(self) -> tuple[str, ...]:
        """Paths of the language model's self-attention modules; of all other modules if none was read."""
        read = tuple(s.path for s in self.sites if not s.cross and not s.tower)
        return read or tuple(path for path in (*self.other, *self.unread) if not in_tower(path))

    @property
    def dispatching(self) -> tuple[str, ...]:
        """Paths of the attention modules that ask transformers' registry for their attention function."""
        return tuple(site.path for site in self.sites if site.dispatches)

    @property
    def native(self) -> bool:
        """Whether attention modules compute their own scores instead of calling an attention function."""
        return bool(self.sites) and not any(site.dispatches for site in self.sites)

    @property
    def positions(self) -> str:
        """The position scheme in a word or two."""
        found = [
            *(("rotary", self.rotary or self.turned), ("rotary by a table", self.inner)),
            *(("table", self.tables or self.added == "table"), ("sinusoidal", self.added == "sinusoidal")),
            *(
                ("learned bias by distance", self.distances),
                ("alibi", self.alibi),
                ("relative (Transformer-XL)", self.relative),
            ),
        ]
        return " + ".join(name for name, there in found if there) or "none or inside the attention module"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with layouts by name."""
        sites = [
            {**{f.name: getattr(s, f.name) for f in dataclasses.fields(s)}, "layout": s.layout.name} for s in self.sites
        ]
        rotary = [dataclasses.asdict(module) for module in self.rotary]
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "sites": sites, "rotary": rotary}

    def _in_short(self) -> str:
        found = len(self.sites) + len(self.other) + len(self.unread)
        length = "no declared context" if self.max_positions is None else f"context {self.max_positions}"
        return f"{self.architecture} ({self.model_type}), {found} attention modules, {self.positions}, {length}"

    def __str__(self) -> str:
        from .tables import render_anatomy  # takes a while to import

        return render_anatomy(self)


def describe(model: PreTrainedModel) -> Anatomy:
    """Describe where a model attends and how it encodes positions. The model is only read.

    Args:
        model: any transformers model with its weights in place.

    Raises:
        UnsupportedArchitecture: not a ``PreTrainedModel`` (a PEFT, DDP, FSDP or compiled wrapper, say).
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedArchitecture(_wrapper_message(model))
    learn(model)
    text = model.config.get_text_config(decoder=True)
    sites, other, unread = read_sites(model)
    still = unrotated(model)
    held = {path: wrappers_of(module) for path, module in model.named_modules() if wrappers_of(module)}
    wrappers = {path: tuple(w.name for w in each if not isinstance(w, NoBias)) for path, each in held.items()}
    rotary, base = list(_rotary(model)), _base(model, [*(s.path for s in sites if not s.tower), *other, *unread])
    return Anatomy(
        model_type=str(text.model_type),
        architecture=type(model).__name__,
        sites=sites,
        other=other,
        unread=unread,
        rotary=tuple(found for found, turns in rotary if turns and not still),
        tables=dict(_tables(model)),
        alibi=any(AlibiBias.name in names for names in wrappers.values()) or _alibi(model),
        max_positions=getattr(text, "max_position_embeddings", None),
        stilled=tuple(found for found, turns in rotary if not turns or still),
        inner=tuple(p for p, module in model.named_modules() if angle_table(module) and not turns_nothing(module)),
        wrappers=wrappers,
        added="" if base is None else _added(model.get_submodule(base)),
        base=base,
        distances=bias_tables(model),
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


def _rotary(model: PreTrainedModel) -> Iterator[tuple[RotaryModule, bool]]:
    for path, module in model.named_modules():
        if frequencies(module):
            kind: Any = getattr(module, "rope_type", "default")
            types = dict(kind) if isinstance(kind, Mapping) else str(kind)
            config = config_path(model, getattr(module, "config", None))
            yield RotaryModule(path, type(module).__name__, types, config), not turns_nothing(module)


def _tables(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Yield the path and the rows of each position table, found by its name or because positions are passed to it."""
    named = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in _TABLES]
    for paths in (named, sorted(position_tables(model))):
        found = {path: weight for path in paths if (weight := _table(model.get_submodule(path))) is not None}
        yield from ((path, weight.shape[0]) for path, weight in found.items())
        if found:
            return


def _table(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    weights = getattr(module, "weights", weight)  # sinusoidal modules of the fairseq family
    return weights if isinstance(weights, Tensor) and weights.dim() == 2 else None


def angle_table(module: nn.Module) -> str | None:
    """Return the name of the table from which a module gathers angles, (positions, width); None if there is none."""
    if not roles_of(module).takes(words.POSITIONS) or not (hasattr(module, "rotary_dim") or makes_angles(module)):
        return None
    held = {**vars(module), **module._buffers}
    return next(
        (name for name, t in held.items() if isinstance(t, Tensor) and t.dim() == 2 and t.is_floating_point()), None
    )


def _base(model: PreTrainedModel, attention: list[str]) -> str | None:
    """Return the path of the innermost model that takes token ids or embeddings and contains all attention."""
    found = None
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and attention:
            prefix = f"{path}." if path else ""
            takes = roles_of(module).takes(words.TOKENS, words.EMBEDDINGS)
            if takes and all(each.startswith(prefix) for each in attention):
                found = path
    return found


def _added(base: nn.Module) -> str:
    child = base._modules.get(CHILD)
    kinds = {SinusoidalPositions: "sinusoidal", LearnedPositions: "table"}
    return next((name for kind, name in kinds.items() if isinstance(child, kind)), "")


def _alibi(model: PreTrainedModel) -> bool:
    if any(map(bias_left_out, model.modules())):
        return False
    config = model.config.get_text_config(decoder=True)
    said = declared(config, "alibi") or getattr(declared(config, "attn_config"), "alibi", False)
    return bool(said) or any(
        hasattr(m, n) for m in model.modules() for n in ("build_alibi_tensor", "build_mpt_alibi_tensor")
    )


__all__ = ["Anatomy", "RotaryModule", "Site", "angle_table", "describe"]
