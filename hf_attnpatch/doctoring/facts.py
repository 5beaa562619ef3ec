"""The facts in a checkpoint's config that readers may miss, under one name each, however the file spells them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..foreign import MODEL_TYPE
from ..record import FIELD
from .files import Files
from .legacy import old_keys_stand

_PLAIN = (
    *("max_position_embeddings", "num_key_value_heads", "head_dim", "attn_logit_softcapping"),
    *("dtype", "torch_dtype"),
)
# Bases of version 4 that are not 10,000, by family: defaults of its config classes (4.57.6).
_BASES_OF_4: Mapping[str, float] = {
    **{"apertus": 12e6, "bitnet": 5e5, "blt": 5e5, "csm": 5e5, "ernie4_5": 5e5, "ernie4_5_moe": 5e5, "evolla": 5e5},
    **{"falcon_h1": 1e5, "flex_olmo": 5e5, "fuyu": 25e3, "gemma3_text": 1e6, "gemma3n_text": 1e6, "gpt_oss": 15e4},
    **{"helium": 1e5, "kyutai_speech_to_text": 1e5, "lfm2": 1e6, "llama4_text": 5e5, "longcat_flash": 1e7},
    **{"minimax": 1e6, "mixtral": 1e6, "persimmon": 25e3, "phimoe": 1e6, "qwen2_5_vl_text": 1e6, "qwen2_vl_text": 1e6},
    **{"qwen3_vl_moe_text": 5e6, "qwen3_vl_text": 5e6, "smollm3": 2e6},
}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Fact:
    """A fact in a checkpoint's config.

    Attributes:
        name: a key of the table of readers.
        value: as text, short.
        fields: dotted names of the fields of ``config.json`` that say it; empty where another file does.
    """

    name: str
    value: str
    fields: tuple[str, ...] = ()


def facts(files: Files) -> tuple[Fact, ...]:
    """Return the facts of a checkpoint, in the order of a report."""
    prefix = "text_config." if isinstance(files.config.get("text_config"), Mapping) else ""
    found = [*_family(files), *_rope(files.text, prefix), *_layers(files.text, prefix), *_others(files, prefix)]
    return tuple(found)


def rope_of(text: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the field with the scaling of angles, and its value for layers that attend to the whole text."""
    for field in ("rope_parameters", "rope_scaling"):
        found = text.get(field)
        if isinstance(found, Mapping) and found:
            inner = found.get("full_attention")
            if isinstance(inner, Mapping):
                return f"{field}.full_attention", inner
            if not any(isinstance(value, Mapping) for value in found.values()):
                return field, found
            first = next(key for key, value in found.items() if isinstance(value, Mapping))
            return f"{field}.{first}", found[first]
    return "", {}


def kind_of(text: Mapping[str, Any]) -> str:
    """Return the kind of a rope scaling, ``default`` if there is none."""
    rope = rope_of(text)[1]
    return str(rope.get("rope_type", rope.get("type", "default")))


def _family(files: Files) -> Iterator[Fact]:
    kind = files.config.get("model_type")
    if kind == MODEL_TYPE:
        yield Fact(f"model_type {MODEL_TYPE}", MODEL_TYPE, ("model_type",))
    elif files.config.get("auto_map"):
        yield Fact("auto_map", ", ".join(files.config["auto_map"]), ("auto_map",))
    if files.config.get(FIELD) is not None:
        yield Fact(FIELD, "a record of patches", (FIELD,))


def _rope(text: Mapping[str, Any], prefix: str) -> Iterator[Fact]:
    new = text.get("rope_parameters")
    if isinstance(new, Mapping) and new:
        nested = any(isinstance(value, Mapping) for value in new.values())
        name = "rope_parameters by layer type" if nested else "rope_parameters"
        yield Fact(name, _short(new), (f"{prefix}rope_parameters",))
    for name in ("rope_theta", "rope_scaling"):
        if text.get(name) is not None:
            yield Fact(name, _short(text[name]), (f"{prefix}{name}",))
    field, rope = rope_of(text)
    kind = kind_of(text)
    if "type" in rope:
        yield Fact("type, for rope_type", str(rope["type"]), (f"{prefix}{field}.type",))
    if kind != "default":
        spelled = "rope_type" if "rope_type" in rope else "type"
        yield Fact(f"rope_type {kind}", _short(rope.get("factor", "")), (f"{prefix}{field}.{spelled}",))
    for name, kinds in (("attention_factor", ("yarn", "longrope")), ("truncate", ("yarn",))):
        if kind in kinds and rope.get(name) is not None:
            yield Fact(f"{name} of {kind}", _short(rope[name]), (f"{prefix}{field}.{name}",))
    outside, inside = text.get("partial_rotary_factor"), rope.get("partial_rotary_factor")
    for where, share in (("", outside), (f"{field}.", inside)):
        if share is not None and share != 1:
            name = "partial_rotary_factor" if not where else "partial_rotary_factor in rope_parameters"
            yield Fact(name, _short(share), (f"{prefix}{where}partial_rotary_factor",))


def _layers(text: Mapping[str, Any], prefix: str) -> Iterator[Fact]:
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        yield Fact("layer_types", counts, (f"{prefix}layer_types",))
    if text.get("sliding_window") is not None and text.get("use_sliding_window", True):
        yield Fact("sliding_window", _short(text["sliding_window"]), (f"{prefix}sliding_window",))
    for name in _PLAIN:
        if text.get(name) is not None:
            yield Fact(name, _short(text[name]), (f"{prefix}{name}",))


def _others(files: Files, prefix: str) -> Iterator[Fact]:
    stored = [_DTYPES.get(name, name) for name in files.weights]
    said = files.text.get("dtype", files.text.get("torch_dtype"))
    if said is not None and stored and said not in stored:
        yield Fact("dtype of the weights", f"{', '.join(stored)}, and the config says {said}")
    length, tokens = files.text.get("max_position_embeddings"), (files.tokenizer or {}).get("model_max_length")
    if isinstance(tokens, (int, float)) and isinstance(length, int) and tokens != length and tokens < 1e12:
        yield Fact("model_max_length of the tokenizer", f"{tokens:.0f}, and the config says {length}")
    generation = sorted(
        set(files.config) & {"temperature", "top_p", "top_k", "max_length", "max_new_tokens", "do_sample"}
    )
    if generation:
        yield Fact("generation settings in config.json", ", ".join(generation), tuple(generation))


Condition = Callable[[Files], bool]


def _base_of_4(files: Files) -> bool:
    rope = rope_of(files.text)[1]
    usual = _BASES_OF_4.get(files.model_type, 1e4)
    scaled = kind_of(files.text) != "default" or files.model_type in ("gpt_oss", "apertus")  # which scale by default
    return not scaled and rope.get("rope_theta", usual) == usual and rope.get("partial_rotary_factor") is None


def _only_full_layers_scaled(files: Files) -> bool:
    rope = files.text.get("rope_parameters") or {}
    others = [v for k, v in rope.items() if k != "full_attention" and isinstance(v, Mapping)]
    return "full_attention" in rope and all(v.get("rope_type", "default") == "default" for v in others)


# Names that rows of the table of readers use -> what must hold of a checkpoint.
CONDITIONS: Mapping[str, tuple[Condition, str]] = {
    "old keys agree": (lambda f: old_keys_stand(f.config), "the keys of version 4 stand beside it and say the same"),
    "base of version 4": (_base_of_4, "it says what is the default there"),
    "base 10000": (
        lambda f: rope_of(f.text)[1].get("rope_theta", f.text.get("rope_theta", 1e4)) == 1e4,
        "it is 10,000",
    ),
    "only full layers scaled": (_only_full_layers_scaled, "only layers that see the whole text are scaled"),
    "regular layers": (lambda f: len(set(f.text.get("layer_types") or ())) < 2, "all layers are alike"),
    "all layers full": (
        lambda f: set(f.text.get("layer_types") or ()) <= {"full_attention"} and not f.text.get("sliding_window"),
        "every layer sees the whole text",
    ),
    "no longer": (
        lambda f: (f.tokenizer or {}).get("model_max_length", 0) >= f.text.get("max_position_embeddings", 0),
        "it is the larger of the two",
    ),
    "stock": (lambda f: f.config.get(FIELD, {}).get("stock") is True, "its other fields say all of it"),
}


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 70 else f"{text[:67]}..."
