"""Writes the config keys that readers made for transformers 4 need, beside those of version 5.

Version 5 keeps all of RoPE in ``rope_parameters``; a reader that knows only ``rope_theta`` and ``rope_scaling`` takes
its defaults instead, without a word (vllm 42624, 44158; Megatron-Bridge 3077; DeepSpeed 8345). Version 5 reads the old
keys, too, and ``rope_scaling`` before ``rope_parameters``; so what it computes is compared before anything is written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AttnPatchError
from ..foreign import MODEL_TYPE
from ..showing import Shown
from ..writing import write
from .asking import ask, computed, fields, first_difference, without
from .files import CONFIG, Files

# Names in families that had their own in version 4 (tried on 4.57.6); all others say rope_theta, partial_rotary_factor.
_NAMES: Mapping[str, Mapping[str, str]] = dict.fromkeys(
    ("gpt_neox", "gpt_neox_japanese"), {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
)
OLD_NAMES = {old: new for names in _NAMES.values() for new, old in names.items()}
# Where angles differ by type of layer: layer type -> name of its base.
_BASES: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(
        ("gemma3_text", "gemma3n_text"), {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    ),
    # not modernbert-decoder, whose version 4 uses one base for all layers
    "modernbert": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
}
_SCALED = {"gemma3_text": "full_attention", "gemma3n_text": "full_attention"}  # the type that rope_scaling is for
# Keys of rope_scaling in families that took no others; none at all where they knew no scaling.
_EXACTLY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("phi3", "phi4_multimodal"), ("type", "short_factor", "long_factor")),
    **dict.fromkeys(("chameleon", "fuyu", "olmo", "olmo2"), ("type", "factor")),
    "nemotron": (),
}
_OUTSIDE = "original_max_position_embeddings"  # version 4 reads it beside rope_scaling where that is longrope
_PERHAPS_IDLE = ("partial_rotary_factor", "truncate")
_ABSENT = object()


@dataclass(frozen=True)
class LegacyKeys(Shown):
    """The keys written into a config; printing it lists them.

    Attributes:
        name: of the folder.
        written: dotted name -> value of each key that was not there.
        present: dotted names of those that were there already.
        compared: how many things that a model takes from its config were compared, before and after, bit by bit.
    """

    name: str
    written: Mapping[str, Any]
    present: tuple[str, ...]
    compared: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "folder": self.name,
            "written": dict(self.written),
            "present": list(self.present),
            "compared": self.compared,
        }

    def __str__(self) -> str:
        if not self.written:
            there = f" ({', '.join(self.present)} stand there)" if self.present else ""
            return f"{self.name}: nothing to write{there}"
        keys = ", ".join(f"{key} = {json.dumps(value):.80}" for key, value in self.written.items())
        return f"{self.name}: wrote {keys}; transformers computes the same from it ({self.compared} things compared)"


def write_keys(files: Files) -> LegacyKeys:
    """Write into ``config.json`` the keys of version 4 that are missing, all at once or not at all.

    Raises:
        AttnPatchError: one is there with another value, these angles have no such keys, transformers would compute
            something else afterwards, or readers of version 4 can do nothing with this family anyway.
    """
    where = f"{files.name}/{CONFIG}"
    if files.config.get("model_type") == MODEL_TYPE:
        raise AttnPatchError(f"{where}: model type {MODEL_TYPE} needs this package, which needs transformers 5.")
    before = computed(files.config, where)
    missing, present = _missing(files.config, where)
    if not missing:
        return LegacyKeys(files.name, {}, present, 0)
    new = copy.deepcopy(dict(files.config))
    for key, value in missing.items():
        _put(new, key, value)
    other = first_difference(before, computed(new, where))
    if other is not None:
        raise AttnPatchError(
            f"{where}: with {', '.join(missing)} transformers would compute another {other}; nothing was written."
        )
    write(files.folder / CONFIG, json.dumps(new, indent=2, ensure_ascii=False) + "\n")
    return LegacyKeys(files.name, missing, present, len(before))


def legacy_keys(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the config in version 4's form: dotted name -> value, whether it is present or not.

    Raises:
        AttnPatchError: version 4 has no words for these angles.
    """
    found: dict[str, Any] = {}
    for prefix, inner in _configs(config):
        kind = str(inner.get("model_type") or config.get("model_type"))
        if isinstance(inner.get("dtype"), str):
            found[f"{prefix}torch_dtype"] = inner["dtype"]
        rope = inner.get("rope_parameters")
        if isinstance(rope, Mapping) and rope:
            found |= {f"{prefix}{key}": value for key, value in _keys(kind, rope, where).items()}
    return found


def old_keys_stand(config: Mapping[str, Any]) -> bool:
    """Return whether a config says in version 4's keys, too, what its ``rope_parameters`` say."""
    less = config
    for field in _perhaps_idle(config):
        less = without(less, field)
    for told in (config, less):
        try:
            keys = legacy_keys(told, "")
        except AttnPatchError:
            return False
        rope = {key: value for key, value in keys.items() if not key.endswith("torch_dtype")}
        if rope and all(_stands(_at(config, key), value) for key, value in rope.items()):
            return True
    return False


def _missing(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the keys to write, and those that are present with the same value.

    Raises:
        AttnPatchError: one stands there with another.
    """
    missing, present = {}, []
    for key, value in legacy_keys(_without_idle(config, where), where).items():
        there = _at(config, key)
        if there is _ABSENT:
            missing[key] = value
        elif _stands(there, value):
            present.append(key)
        else:
            raise AttnPatchError(
                f"{where}: {key} is {json.dumps(there):.80} and rope_parameters or dtype say {json.dumps(value):.80}; "
                "one of the two is wrong: mend it by hand. Nothing was written."
            )
    return missing, tuple(present)


def _without_idle(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a config without keys that version 5 ignores and version 4 would read."""
    perhaps = _perhaps_idle(config)
    answer = ask(config, where) if perhaps else None
    for field in perhaps:
        config = config if answer is not None and answer.reader_of(field) else without(config, field)
    return config


def _perhaps_idle(config: Mapping[str, Any]) -> list[str]:
    return [f for f in fields(config) if f.rpartition(".")[2] in _PERHAPS_IDLE and "rope_parameters." in f]


def _configs(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a config and its nested ones, each with the prefix of its keys."""
    yield prefix, config
    for name, value in config.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            yield from _configs(value, f"{prefix}{name}.")


def _keys(kind: str, rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    nested = {key: value for key, value in rope.items() if isinstance(value, Mapping)}
    if not nested:
        return _flat_keys(kind, rope, where)
    if kind in _BASES:
        return _keys_by_type(kind, nested, where)
    if len({json.dumps(value, sort_keys=True) for value in nested.values()}) == 1:  # the same for every layer
        return _flat_keys(kind, next(iter(nested.values())), where)
    raise AttnPatchError(
        f"{where}: rope_parameters differ by type of layer ({', '.join(nested)}), for which readers of version 4 have "
        f"no keys in model type {kind!r}; nothing was written."
    )


def _flat_keys(kind: str, rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = _NAMES.get(kind, {})
    found = {names.get(n, n): rope[n] for n in ("rope_theta", "partial_rotary_factor") if rope.get(n) is not None}
    return found | _scaling(kind, rope, where)


def _keys_by_type(kind: str, nested: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    bases, found = _BASES[kind], {}
    for layer_type, rope in nested.items():
        scaling = _scaling(kind, rope, where)
        scaled = scaling.get("rope_scaling") is not None
        if layer_type not in bases or (scaled and _SCALED.get(kind) != layer_type):
            raise AttnPatchError(
                f"{where}: readers of version 4 have no key for the scaling of {layer_type} layers in model type "
                f"{kind!r}; nothing was written."
            )
        if rope.get("rope_theta") is not None:
            found[bases[layer_type]] = rope["rope_theta"]
        found |= scaling if _SCALED.get(kind) == layer_type else {}
    return found


def _scaling(kind: str, rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return ``rope_scaling``, with both names of its type, and its neighbours; null if nothing is scaled.

    Null is written, too: some classes of version 4 (GPT-OSS, Apertus) scale by default.

    Raises:
        AttnPatchError: readers of version 4 take no such scaling in this family.
    """
    rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor", "rope_type", "type")}
    name = rope.get("rope_type", rope.get("type", "default"))
    if name == "default" and not rest:
        return {} if _EXACTLY.get(kind) == () else {"rope_scaling": None}
    whole = {"rope_type": name, "type": name, **rest}
    taken = _EXACTLY.get(kind)
    if taken is not None:
        kept = (*taken, "rope_type", *((_OUTSIDE,) if name == "longrope" else ()))
        lost = [key for key in whole if key not in kept]
        if lost or not taken:
            raise AttnPatchError(
                f"{where}: readers of version 4 take {' and '.join(taken) or 'no scaling'} in model type {kind!r}, not "
                f"{', '.join(lost or whole)}; nothing was written."
            )
        whole = {key: whole[key] for key in taken if key in whole}
    beside = {_OUTSIDE: rope[_OUTSIDE]} if name == "longrope" and rope.get(_OUTSIDE) is not None else {}
    return {"rope_scaling": whole, **beside}


def _stands(there: Any, value: Any) -> bool:
    """Return whether a key is present with this value; a ``rope_scaling`` may have either name of its type."""
    if there == value:
        return True
    if not (isinstance(there, Mapping) and isinstance(value, Mapping)):
        return False
    plain = [{k: v for k, v in x.items() if k not in ("type", "rope_type")} for x in (there, value)]
    types = [{x[k] for k in ("type", "rope_type") if k in x} for x in (there, value)]
    return plain[0] == plain[1] and bool(types[0]) and types[0] == types[1]


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    config[last] = value
