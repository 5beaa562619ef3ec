"""The homes: for each, the fields that say what its layers do, and who reads such a checkpoint.

Sources: the configuration and modeling files of transformers 5.24; for llama.cpp its ``src/models/smollm3.cpp``, which
takes every fourth layer for unrotated whatever the file says, and its pull request 25505 (``granite_swa``); for vLLM
its pull request 52706 and its list of models. Of other engines that is what their sources say; none was run here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from ..layers import SLOPE, STEP, Layers

Fields = dict[str, Any]


@dataclass(frozen=True)
class LatentHome:
    """A stock model type whose attention keeps a latent and a rotary key that all heads share.

    Attributes:
        model_type: transformers' name for it.
        since: the first release of transformers that has it.
        fields: the config fields, beside those of the attention, that leave the rest of a model as it is.
        keeps_padding: whether loading a checkpoint leaves the embedding of the padding token what it is in the file.
    """

    model_type: str
    since: str
    fields: Callable[[PretrainedConfig], Fields]
    keeps_padding: bool = True


@dataclass(frozen=True)
class Home:
    """A stock model type.

    Attributes:
        model_type: transformers' name for it.
        since: the first release of transformers that has it.
        fields: the config fields that say what layers do, or a sentence saying what this type cannot say.
        readers: which engines read such a checkpoint, beside transformers.
        fills: values of parameters that the home has and the source has not, by the last part of their name.
        eager: whether transformers computes its attention eagerly only.
    """

    model_type: str
    since: str
    fields: Callable[[PretrainedConfig, Layers], Fields | str]
    readers: Callable[[Layers], Iterator[str]]
    fills: Mapping[str, float] = field(default_factory=dict)
    eager: bool = False


def _rope(config: PretrainedConfig, layers: Layers) -> Fields:
    """Return the rotary parameters of a config with the layers' base and temperature."""
    old = {key: value for key, value in config.rope_parameters.items() if key != SLOPE}
    base = layers.base
    rope = old if base is None else {**old, "rope_theta": base}
    if layers.temperature is not None:
        rope |= {SLOPE: layers.temperature.slope, STEP: layers.temperature.step}
    return {"rope_parameters": rope}


def _cannot(layers: Layers, *, unrotated: bool = False, windows: bool = True, mixed: bool = True) -> str | None:
    """Say the first thing that a home cannot say.

    Args:
        layers: what is wanted.
        unrotated: whether it can leave single layers without rotation.
        windows: whether it can give layers a window.
        mixed: whether layers with a window may stand beside layers without.
    """
    found = {base for base in layers.bases if base is not None}
    if len(found) > 1:
        return "has one rotary base for all layers"
    if None in layers.bases and not unrotated:
        return "rotates in every layer"
    seen = {window for window in layers.windows if window is not None}
    if seen and not windows:
        return "has no windows"
    if len(seen) > 1:
        return "has one width for all windows"
    if seen and None in layers.windows and not mixed:
        return "has a window in every layer or in none"
    return "has no temperature that grows with the position" if layers.temperature is not None else None


def _smollm3(config: PretrainedConfig, layers: Layers) -> Fields | str:
    why = _cannot(layers, unrotated=True)
    return why or {
        **_rope(config, layers),
        "no_rope_layers": [int(base is not None) for base in layers.bases],
        "use_sliding_window": layers.window is not None,
        "sliding_window": layers.window,
        "layer_types": layers.kinds,
    }


def _by_kind(config: PretrainedConfig, layers: Layers) -> Fields | str:
    why = _cannot(layers)
    return why or {**_rope(config, layers), "sliding_window": _width(config, layers), "layer_types": layers.kinds}


def _width(config: PretrainedConfig, layers: Layers) -> int:
    """Return the window, or the context where no layer has one: some forwards make such a mask all the same."""
    return layers.window or int(config.max_position_embeddings)


def _qwen(config: PretrainedConfig, layers: Layers) -> Fields | str:
    found = _by_kind(config, layers)
    windowed = layers.window is not None
    return (
        found if isinstance(found, str) else {**found, "sliding_window": layers.window, "use_sliding_window": windowed}
    )


def _mistral(config: PretrainedConfig, layers: Layers) -> Fields | str:
    why = _cannot(layers, mixed=False)
    return why or {**_rope(config, layers), "sliding_window": layers.window}


def _ministral3(config: PretrainedConfig, layers: Layers) -> Fields | str:
    scale = layers.temperature
    why = _cannot(Layers(layers.bases, layers.windows), mixed=False)
    step = config.rope_parameters.get(STEP)
    if why is None and scale is not None and step not in (None, scale.step):
        why = f"has one length for the temperature and for the rotary scaling, which is {step} here"
    if scale is None:  # transformers reads both, whatever they are
        length = step or getattr(config, "max_position_embeddings", 1)
        extra = {SLOPE: 0.0, STEP: int(length)}
    else:
        extra = {}
    return why or {
        "rope_parameters": {**_rope(config, layers)["rope_parameters"], **extra},
        "sliding_window": layers.window,
    }


_GRANITE = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}  # change nothing


def _granite_swa(config: PretrainedConfig, layers: Layers) -> Fields | str:
    why = _cannot(Layers((None,), layers.windows, layers.temperature), unrotated=True)
    if why is not None:
        return why
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        **_rope(config, layers),
        "layer_rope_theta": [base or 0 for base in layers.bases],
        "sliding_window": _width(config, layers),
        "layer_types": layers.kinds,
        **{
            name: getattr(config, name, value)
            for name, value in {**_GRANITE, "attention_multiplier": width**-0.5}.items()
        },
    }


def _smollm3_readers(layers: Layers) -> Iterator[str]:
    yield "vLLM"
    if all((base is None) == ((n + 1) % 4 == 0) for n, base in enumerate(layers.bases)):
        yield "llama.cpp"


def _granite_readers(layers: Layers) -> Iterator[str]:
    yield "vLLM"
    if len({base for base in layers.bases if base is not None}) < 2:
        yield "llama.cpp"


def _all_readers(_: Layers) -> Iterator[str]:
    yield from ("vLLM", "llama.cpp")


def _vllm(_: Layers) -> Iterator[str]:
    yield "vLLM"


# in the order in which they are preferred: those that dispatch to every kernel before the one that runs eagerly
HOMES = (
    Home("qwen2", "5.0", _qwen, _vllm),
    Home("qwen3", "5.0", _qwen, _vllm),
    Home("mistral", "5.0", _mistral, _all_readers),
    Home("ministral", "5.0", _by_kind, _vllm),
    Home("cwm", "5.0", _by_kind, _vllm),
    Home("smollm3", "5.0", _smollm3, _smollm3_readers),
    Home("ministral3", "5.0", _ministral3, _all_readers),
    Home("granite_swa", "5.15", _granite_swa, _granite_readers, {"sinks": -1e4}, eager=True),
)


def own_home(config: PretrainedConfig) -> tuple[Home, ...]:
    """Return the row of a model's own type, which is no home of others, where its config has kinds of layers."""
    if getattr(config, "layer_types", None) is None or not hasattr(config, "sliding_window"):
        return ()
    return (Home(config.model_type, "5.0", _own, _nobody),)


def _own(config: PretrainedConfig, layers: Layers) -> Fields | str:
    why = _cannot(layers, unrotated=True)
    flag = {"use_sliding_window": layers.window is not None} if hasattr(config, "use_sliding_window") else {}
    return why or {"sliding_window": _width(config, layers), "layer_types": layers.kinds, **flag}


def _nobody(_: Layers) -> Iterator[str]:
    yield from ()


def _no_experts(config: PretrainedConfig) -> Fields:
    """Every layer is dense; what its type asks of experts besides is as small as it may be."""
    few = dict.fromkeys(
        ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size"), 1
    )
    return {**few, "first_k_dense_replace": config.num_hidden_layers, "num_mtp_layers": 0}


LATENT_HOMES = (
    LatentHome("youtu", "5.1", lambda config: {}, keeps_padding=False),  # its _init_weights empties it, loaded or not
    LatentHome("deepseek_v3", "5.0", _no_experts),
)
