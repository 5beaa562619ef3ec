"""Finds a model's attention modules, their layouts and head counts, from modules and weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .configs import config_path
from .errors import UnsupportedArchitecture
from .layouts import LAYOUTS, Layout, Rows, is_projection, weight_rows
from .upstream import words
from .upstream.calls import says_causal
from .upstream.dispatching import dispatches

_CONVOLVED = "keys pass a convolution of their own for each head, which shared heads cannot"
# Names of children and parameters that show that a module caches something other than keys and values.
_OTHER = {
    "latent attention caches a compressed vector, which has no heads to share": r"kv_[ab]_proj.*|kv_lora.*",
    "one projection gives keys and values, spread over heads in the module's own way": r"kv_proj",
    _CONVOLVED: r"k_sconv",
    "linear attention keeps a state, not keys and values": r"A_log|dt_bias|slope_rate|.*conv1d.*|receptance",
}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_q_heads", "n_head")
_HEAD_DIM = ("head_dim", "dim_head", "attention_head_size", "qk_head_dim", "head_size")
_CROSS = ("crossattention", "cross_attn", "encoder_attn", "cross_attention")
_TOWERS = ("vision", "audio", "image", "speech")


@dataclass(frozen=True)
class Site:
    """One attention module.

    Attributes:
        path: as in ``named_modules``.
        kind: class name.
        layout: naming and packing of its projections.
        num_heads: query heads.
        num_kv_heads: key-value heads, read from the weight.
        head_dim: of queries and keys.
        v_head_dim: of values.
        output: path of the output projection, empty if none was recognised.
        causal: whether attention is causal; ``None`` if the module does not say.
        cross: whether keys and values come from another sequence.
        dispatches: whether it calls the attention function registered under the model's implementation.
        config: dotted path of the sub-config that built it, empty for the model's own.
    """

    path: str
    kind: str
    layout: Layout
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    output: str
    causal: bool | None
    cross: bool
    dispatches: bool
    config: str

    @property
    def tower(self) -> bool:
        """Whether it belongs to an image or audio tower next to the language model."""
        return any(word in self.config for word in _TOWERS)

    def rows(self, num_kv_heads: int | None = None) -> Rows:
        """Return the output rows of each head, for this or another number of key-value heads."""
        kv = self.num_kv_heads if num_kv_heads is None else num_kv_heads
        return self.layout.packing(self.num_heads, kv, self.head_dim, self.v_head_dim)


@dataclass(frozen=True)
class Place:
    """A self-attention module that dispatches its attention, whatever its projections.

    Attributes:
        path: as in ``named_modules``.
        num_heads: query heads; None if unknown.
        causal: whether attention is causal; None if the module does not say.
        config: dotted path of the config whose attention implementation it reads.
    """

    path: str
    num_heads: int | None
    causal: bool | None
    config: str


def dispatching(
    model: PreTrainedModel, sites: Iterable[Site], other: Mapping[str, str], unread: Mapping[str, str]
) -> list[Place]:
    """Return every self-attention module of the language model that dispatches.

    Raises:
        UnsupportedArchitecture: one does not dispatch, or a dispatching one was not read.
    """
    places = []
    for site in sites:
        if site.cross or site.tower:
            continue
        if not site.dispatches:
            raise UnsupportedArchitecture(
                f"{site.path}: {site.kind} computes its scores by itself and dispatches to no attention function."
            )
        places.append(Place(site.path, site.num_heads, site.causal, site.config))
    for path in [*other, *unread]:
        module = model.get_submodule(path)
        if dispatches(model, module) and not in_tower(path):
            if path in unread:
                raise UnsupportedArchitecture(f"{path}: {unread[path]}")
            places.append(Place(path, None, says_causal(module), _owner(model, module)))
    if not places:
        raise UnsupportedArchitecture(f"{type(model).__name__}: no self-attention module was read.")
    return places


def read_sites(model: PreTrainedModel) -> tuple[tuple[Site, ...], dict[str, str], dict[str, str]]:
    """Return the attention modules, those that cache something other than keys and values, and those not read."""
    sites: list[Site] = []
    other: dict[str, str] = {}
    unread: dict[str, str] = {}
    for path, module in model.named_modules():
        kind, state = type(module).__name__, _other_state(module)
        if state:
            other[path] = f"{kind}: {state}"
            continue
        layout = next((row for row in LAYOUTS if row.matches(module)), None)
        if layout is None:
            if _looks_like_attention(module) and not in_tower(path):
                unread[path] = f"{kind}: {_no_row(module)}"
            continue
        if _convolved(module, layout):
            other[path] = f"{kind}: {_CONVOLVED}"
            continue
        site = _site(model, path, module, layout)
        if isinstance(site, str):
            unread[path] = site
        else:
            sites.append(site)
    return tuple(sites), _outermost(other, []), _outermost(unread, [s.path for s in sites] + list(other))


def _no_row(module: nn.Module) -> str:
    """Describe which projections a module has, and which names were tried."""
    there = [path for path, _ in module.named_modules() if path and is_projection(module, path)]
    wanted = dict.fromkeys(row.query for row in LAYOUTS)
    return (
        f"matches no row of hf_attnpatch/layouts.py (its projections are {', '.join(there) or 'none'}; queries were "
        f"looked for in {', '.join(wanted)})"
    )


def _outermost(found: dict[str, str], inner: list[str]) -> dict[str, str]:
    """Drop modules that contain attention modules which were read, and modules inside others."""
    outer = {p: why for p, why in found.items() if not any(i.startswith(p + ".") for i in inner)}
    return {p: why for p, why in outer.items() if not any(p.startswith(o + ".") for o in outer)}


def _other_state(module: nn.Module) -> str | None:
    """Return what a module caches instead of keys and values, or None."""
    names = [*module._modules, *module._parameters, *module._buffers]
    if "q_proj" in names and "k_proj" not in names:
        return "takes keys and values from an earlier layer"
    return next((why for why, pattern in _OTHER.items() if any(re.fullmatch(pattern, n) for n in names)), None)


def _convolved(module: nn.Module, layout: Layout) -> bool:
    """Return whether the key projection is inside a module with other weights, so its rows are not yet the keys."""
    wrapper, _, name = layout.key.rpartition(".")
    inner = module.get_submodule(wrapper).named_parameters() if wrapper else ()
    return any(not path.startswith(f"{name}.") for path, _ in inner)


def in_tower(path: str) -> bool:
    """Return whether a path is in an image or audio tower next to the language model."""
    return any(word in path.lower() for word in (*_TOWERS, "visual"))


def bias_tables(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of embeddings with one number for each head: learned relative biases, as in T5."""
    config = model.config.get_text_config(decoder=True)
    heads = {n for owner in (config, *model.modules()) if (n := _first_int(owner, _HEADS))}
    tables = ((p, m) for p, m in model.named_modules() if isinstance(m, nn.Embedding) and m.embedding_dim in heads)
    return tuple(path for path, _ in tables)


def _looks_like_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and any(True for _ in module.parameters())


def _site(model: PreTrainedModel, path: str, module: nn.Module, layout: Layout) -> Site | str:
    """Read one attention module, or return a sentence why it cannot be read."""
    config = getattr(module, "config", None) or model.config.get_text_config(decoder=True)
    heads = _first_int(module, _HEADS) or _first_int(config, ("num_attention_heads",))
    outs = [weight_rows(module.get_submodule(p)).shape[0] for p in (layout.query, layout.key, layout.value)]
    head_dim = _first_int(module, _HEAD_DIM) or _derived_head_dim(config, layout, heads, outs[0])
    if not heads or not head_dim:
        return f"{type(module).__name__}: neither the module nor its config says how many heads there are"
    counts = _fused_counts(layout, outs[0], heads, head_dim) if layout.fused else _counts(module, heads, head_dim, outs)
    if isinstance(counts, str):
        return f"{type(module).__name__}: {counts}"
    kv, v_dim = counts
    return Site(
        path=path,
        kind=type(module).__name__,
        layout=layout,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        v_head_dim=v_dim,
        output=_output(path, model, module, layout),
        causal=says_causal(module),
        cross=_is_cross(path, module),
        dispatches=dispatches(model, module),
        config=_owner(model, module),
    )


def _is_cross(path: str, module: nn.Module) -> bool:
    named = path.rpartition(".")[2].lower() in _CROSS or "Cross" in type(module).__name__
    return named or any(bool(getattr(module, name, False)) for name in words.CROSS_ATTENTION)


def _owner(model: PreTrainedModel, module: nn.Module) -> str:
    """Return the path of the config that built a module; the language model's if the module does not say."""
    path = config_path(model, getattr(module, "config", None))
    return path if path is not None else config_path(model, model.config.get_text_config(decoder=True)) or ""


def _counts(module: nn.Module, heads: int, head_dim: int, outs: list[int]) -> tuple[int, int] | str:
    kv, rest = divmod(outs[1], head_dim)
    if rest or not kv or heads % kv or outs[2] % kv:
        return f"{outs[1]} key and {outs[2]} value rows are not whole heads of {head_dim} shared by {heads} query heads"
    if outs[0] % (heads * head_dim):
        return f"{outs[0]} query rows are not a multiple of {heads} heads of {head_dim}"
    return kv, outs[2] // kv


def _derived_head_dim(config: object, layout: Layout, heads: int | None, query_rows: int) -> int | None:
    """Return the head size of a module without a field for it: its query rows, or the hidden size, over the heads."""
    width = (_first_int(config, ("hidden_size",)) or 0) if layout.fused else query_rows
    return width // heads or None if heads else None


def _fused_counts(layout: Layout, out: int, heads: int, head_dim: int) -> tuple[int, int] | str:
    kv, rest = divmod(out - heads * head_dim, 2 * head_dim)
    if rest or kv < 1 or heads % kv:
        return f"{out} fused rows are not {heads} query heads of {head_dim} and whole key-value heads"
    return kv, head_dim


def _first_int(owner: object, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = vars(owner).get(name) if isinstance(owner, nn.Module) else getattr(owner, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _output(path: str, model: PreTrainedModel, module: nn.Module, layout: Layout) -> str:
    parent = path.rpartition(".")[0]
    for name in layout.output:
        base = parent if name.startswith("..") else path
        owner = model.get_submodule(parent) if name.startswith("..") else module
        if is_projection(owner, name.removeprefix("..")):
            return f"{base}.{name.removeprefix('..')}"
    return ""
