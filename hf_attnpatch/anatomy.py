"""What a model is, read from its modules and weights: never written, never guessed from the config alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .errors import UnsupportedArchitecture
from .layouts import LAYOUTS, Layout, Rows, is_projection, weight_rows

# What a module's own children and parameters are called where it keeps something else than keys and values.
_OTHER = {
    "latent attention caches a compressed vector, which has no heads to share": ("kv_a_proj", "kv_b_proj", "kv_lora"),
    "one key-value head serves all query heads already": ("kv_proj",),
    "keys pass a convolution of their own for each head, which shared heads cannot": ("k_sconv",),
    "linear attention keeps a state, not keys and values": ("A_log", "dt_bias", "slope_rate", "conv1d", "receptance"),
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
        output: path of the output projection, empty where none was recognised.
        causal: whether it looks back only; ``None`` where the module does not say.
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
        """Whether it belongs to an image or audio tower beside the language model."""
        return any(word in self.config for word in _TOWERS)

    def rows(self, num_kv_heads: int | None = None) -> Rows:
        """Return which output rows belong to which head, for this or another number of key-value heads."""
        kv = self.num_kv_heads if num_kv_heads is None else num_kv_heads
        return self.layout.packing(self.num_heads, kv, self.head_dim, self.v_head_dim)


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
        unread: paths of modules that look like attention but match no layout, with the reason.
        rotary: modules computing rotary angles.
        tables: learned or fixed position tables: path and number of rows.
        alibi: whether scores are biased by distance.
        max_positions: the context length that the config declares, in tokens.
    """

    model_type: str
    architecture: str
    sites: tuple[Site, ...]
    unread: Mapping[str, str]
    rotary: tuple[Rotary, ...]
    tables: Mapping[str, int]
    alibi: bool
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
    sites, unread = _sites(model)
    return Anatomy(
        model_type=str(text.model_type),
        architecture=type(model).__name__,
        sites=sites,
        unread=unread,
        rotary=tuple(_rotary(model)),
        tables=dict(_tables(model)),
        alibi=_alibi(model),
        max_positions=getattr(text, "max_position_embeddings", None),
    )


def _wrapper_message(model: Any) -> str:
    kind = type(model).__name__
    remedy = "pass a transformers PreTrainedModel"
    if hasattr(model, "get_base_model"):
        remedy = "patch before get_peft_model, or merge_and_unload() the adapter first"
    elif hasattr(model, "module"):
        remedy = "patch model.module before wrapping it for distributed training"
    elif hasattr(model, "_orig_mod"):
        remedy = "patch before torch.compile"
    return f"{kind} is not a transformers model but a wrapper or something else; {remedy}."


def _sites(model: PreTrainedModel) -> tuple[tuple[Site, ...], dict[str, str]]:
    sites: list[Site] = []
    unread: dict[str, str] = {}
    for path, module in model.named_modules():
        other = _other_state(module)
        layout = None if other else next((row for row in LAYOUTS if row.matches(module)), None)
        if layout is None:
            if other or _looks_like_attention(module):
                unread[path] = f"{type(module).__name__}: {other or 'matches no row of hf_attnpatch/layouts.py'}"
            continue
        site = _site(model, path, module, layout)
        if isinstance(site, str):
            unread[path] = site
        else:
            sites.append(site)
    inner = {s.path for s in sites}  # a wrapper whose child was read is no second place
    return tuple(sites), {p: why for p, why in unread.items() if not any(i.startswith(p + ".") for i in inner)}


def _other_state(module: nn.Module) -> str | None:
    """Say what a module keeps instead of keys and values, or None."""
    names = [*module._modules, *module._parameters, *module._buffers]
    return next((why for why, words in _OTHER.items() if any(w in n for n in names for w in words)), None)


def _looks_like_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and any(True for _ in module.parameters())


def _site(model: PreTrainedModel, path: str, module: nn.Module, layout: Layout) -> Site | str:
    """Read one attention module, or say in a sentence why it cannot be read."""
    config = getattr(module, "config", None) or model.config.get_text_config(decoder=True)
    heads = _first_int(module, _HEADS) or _first_int(config, ("num_attention_heads",))
    outs = [weight_rows(module.get_submodule(p)).shape[0] for p in (layout.query, layout.key, layout.value)]
    head_dim = _first_int(module, _HEAD_DIM) or (heads and not layout.fused and outs[0] // heads) or None
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
        causal=getattr(module, "is_causal", None),
        cross=_is_cross(path, module),
        dispatches=_dispatches(type(module)),
        config=_owner(model, module),
    )


def _is_cross(path: str, module: nn.Module) -> bool:
    named = path.rpartition(".")[2].lower() in _CROSS or "Cross" in type(module).__name__
    return named or bool(getattr(module, "is_cross_attention", False))


def _owner(model: PreTrainedModel, module: nn.Module) -> str:
    """Return the path of the config that built a module; the language model's where the module does not say."""
    path = config_path(model, getattr(module, "config", None))
    return path if path is not None else config_path(model, model.config.get_text_config(decoder=True)) or ""


def config_path(model: PreTrainedModel, config: object) -> str | None:
    """Return the dotted path of a config object below the model's, empty for the model's own, None if not there."""
    todo: list[tuple[str, Any]] = [("", model.config)]
    while todo:
        path, found = todo.pop()
        if found is config:
            return path
        todo += [(f"{path}.{k}".lstrip("."), v) for k, v in vars(found).items() if isinstance(v, PretrainedConfig)]
    return None


def _counts(module: nn.Module, heads: int, head_dim: int, outs: list[int]) -> tuple[int, int] | str:
    kv, rest = divmod(outs[1], head_dim)
    if rest or not kv or heads % kv or outs[2] % kv:
        return f"{outs[1]} key and {outs[2]} value rows are not whole heads of {head_dim} shared by {heads} query heads"
    if outs[0] % (heads * head_dim):
        return f"{outs[0]} query rows are not a multiple of {heads} heads of {head_dim}"
    return kv, outs[2] // kv


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


def _dispatches(kind: type[nn.Module]) -> bool:
    """Whether the forward goes through transformers' attention registry (the interface of its own classes)."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(kind.forward).__code__.co_names


def _rotary(model: PreTrainedModel) -> Iterator[Rotary]:
    for path, module in model.named_modules():
        names = {n for n, _ in module.named_buffers(recurse=False)}
        if any(n.endswith("inv_freq") for n in names):
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
