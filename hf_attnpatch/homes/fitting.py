"""A model built again as another class around the very same parameters, and whether it computes the same bits."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .. import foreign, record
from ..configs import building
from ..edits import BecomeModel
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..interruption import inside
from ..layers import STEP, Layers, read_layers
from ..probe import Inputs, check_in_memory, default_inputs, quiet, valid
from ..upstream.roles import learn
from .rows import HOMES, Home, LatentHome, own_home

_EAGER = "eager"
_NONE = "{}: no stock type can say this"
_NEAR = 2  # tokens: the probe is longer
BUILDING = (  # what constructors of transformers raise where a config does not suit them
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)


class Unfit(AttnPatchError):
    """A home does not hold this model; says why."""


@dataclass(frozen=True)
class Found:
    """A home that holds a model.

    Attributes:
        home: the row.
        edit: by which the model becomes one of that type.
        notes: for the report.
    """

    home: Home
    edit: BecomeModel
    notes: tuple[str, ...]


def current(model: PreTrainedModel) -> Layers:
    """Return what the layers of a model do, where a home could say it.

    Raises:
        UnsupportedArchitecture: no home could.
    """
    away = next((path for path, module in model.named_modules() if has_offloaded_params(module)), None)
    if away is not None:
        raise UnsupportedArchitecture(
            f"{away}: its parameters are offloaded by Accelerate, and a model of another type cannot be built around "
            "them; load the model without offloading, patch and save it, and load the result as you please"
        )
    found = record.read(model.config)
    if foreign.is_patched(model.config) or (found is not None and not found.stock):
        raise UnsupportedArchitecture(f"{type(model).__name__}: is no stock model any more; a home holds stock ones")
    return read_layers(model.config)


def find(model: PreTrainedModel, wanted: Layers, home: str, *, kinds: bool = False) -> Found:
    """Return the first home that holds a model and can say what its layers shall do.

    Args:
        model: a stock model, which is only read.
        wanted: what its layers shall do.
        home: a model type, or ``auto``.
        kinds: whether layers change their kind, so that the model's own type may say it where it is no home of others;
            then layers of that kind must compute the same bits while a window shows nothing.

    Raises:
        AttnPatchError: there is no such home.
        UnsupportedArchitecture: none fits, with the reason for each.
    """
    known = [row for row in HOMES if home in ("auto", row.model_type)]
    if not known:
        choices = ", ".join(row.model_type for row in HOMES)
        raise AttnPatchError(f"home {home!r} is not known; choose from auto, None, {choices}.")
    own = model.config.model_type
    if kinds and home == "auto" and own not in {row.model_type for row in HOMES}:
        known = [*own_home(model.config), *known]
    if not all(isinstance(row.fields(model.config, wanted), str) for row in known):
        _check_made_so(model)
    reasons = []
    for row in sorted(known, key=lambda row: row.model_type != own):  # its own type first: nothing has to move
        if home == "auto" and row.model_type != own and row.model_type in _OWN_ONLY:
            continue
        try:
            return _tried(model, row, wanted, kinds)
        except Unfit as error:
            reasons.append(f"{row.model_type} {error}")
    raise UnsupportedArchitecture(f"{_NONE.format(type(model).__name__)}: {'; '.join(reasons)}.")


def check_read(model: PreTrainedModel, layers: Layers) -> None:
    """Refuse to believe that a model's layers do what was read of them, unless a type that is known holds them so.

    Raises:
        UnsupportedArchitecture: none does.
    """
    find(model, layers, "auto")


def _check_made_so(model: PreTrainedModel) -> None:
    """Refuse models that are not what their class makes of their config: built again, they would be others.

    Raises:
        NoWeights: the weights are not in memory.
        UnsupportedArchitecture: so, with the first module that differs.
    """
    check_in_memory(model)
    kind = type(model).__name__
    try:
        made = rebuilt(model, type(model), {}, {})
    except Unfit as error:
        raise UnsupportedArchitecture(f"{_NONE.format(kind)}: its own type, built again, {error}") from error
    wanted = dict(made.named_modules())
    for path, module in model.named_modules():
        why = _otherwise(module, wanted.get(path))
        if why is not None:
            raise UnsupportedArchitecture(
                f"{_NONE.format(kind)}: {path or 'the model'} {why}, and would be built without it; patch the model as "
                "it was loaded"
            )
    inputs = default_inputs(model)
    found = _logits(model, inputs)
    try:
        again = _logits(made, inputs)
    except BUILDING as error:
        why = " ".join(str(error).split())[:200]
        raise UnsupportedArchitecture(
            f"{_NONE.format(kind)}: its own type, built again, does not run: {why}"
        ) from error
    if not torch.equal(found, again):
        raise UnsupportedArchitecture(
            f"{_NONE.format(kind)}: built again from its config, it computes something else than it does"
            f"{_changed(model, wanted)}; patch the model as it was loaded"
        )


def _otherwise(found: nn.Module, made: nn.Module | None) -> str | None:
    """Say what is otherwise in a module than where it is built from the config; None for nothing."""
    if type(found) is not type(made):
        return f"is a {type(found).__module__}.{type(found).__name__}, which its family does not build here"
    if "forward" in vars(found) and not hasattr(found, "_hf_hook"):  # Accelerate's, of which the edit knows more to say
        return "has a forward of its own"
    return None


def _changed(model: PreTrainedModel, made: Mapping[str, nn.Module]) -> str:
    """Name a buffer that no checkpoint holds and that is not what the config makes; empty where there is none."""
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            found, wanted = module._buffers.get(name), made[path]._buffers.get(name)
            same = found is None or (wanted is not None and torch.equal(found.to(wanted), wanted))
            if not same or (found is not None and wanted is not None and found.dtype != wanted.dtype):
                return f", as {path}.{name} is another (model.to(dtype) rounds it, from_pretrained(dtype=) does not)"
    return ""


_OWN_ONLY = ("qwen2", "qwen3", "mistral")  # can say no more than others do, so that nobody needs to move there


def _tried(model: PreTrainedModel, home: Home, wanted: Layers, kinds: bool) -> Found:
    """Prove that a home holds the model as it is, and return the edit that moves it there with what is wanted.

    Raises:
        Unfit: so.
    """
    cls = class_of(model, home)
    _said(home, model.config, wanted)
    if cls is not type(model):
        _prove(model, home, cls)
    if kinds:
        _prove_kinds(model, home, cls, wanted)
    attention = None if not home.eager or model.config._attn_implementation == _EAGER else _EAGER

    def make(live: PreTrainedModel) -> PreTrainedModel:
        return rebuilt(live, cls, _said(home, live.config, wanted), home.fills, attention)

    make(model)  # what it is to become can be built, too
    after = f"{cls.__name__}, the same parameters" + (" and sinks that take nothing" if home.fills else "")
    return Found(home, BecomeModel("", make, home.model_type, after), tuple(_notes(model, home, wanted, attention)))


def _notes(model: PreTrainedModel, home: Home, wanted: Layers, attention: str | None) -> Iterator[str]:
    others = " and ".join(home.readers(wanted))
    own = home.model_type == model.config.model_type
    what = "its own type can say this" if own else f"home: {home.model_type}, which holds this model bit for bit"
    read = f"; by their sources {others} read it, too" if others else ""
    yield f"{what}; transformers from {home.since} on loads the checkpoint without this package{read}"
    if attention is not None:
        yield (
            f"attention is computed eagerly, as transformers does for {home.model_type}, which adds a caller's mask of "
            "four dimensions to the scores: give floats, not bool; Flash puts a fused kernel there"
        )


def _said(home: Home, config: PretrainedConfig, layers: Layers) -> dict[str, Any]:
    """Return the fields of a home's config that say what layers do.

    Raises:
        Unfit: it cannot.
    """
    found = home.fields(config, layers)
    if isinstance(found, str):
        raise Unfit(found)
    return found


def class_of(model: PreTrainedModel, home: Home | LatentHome) -> type[PreTrainedModel]:
    """Return the home's class for what this model is used for.

    Raises:
        Unfit: there is none.
    """
    own: Any = type(model)
    if home.model_type == model.config.model_type:
        return own  # type: ignore[no-any-return]
    if home.model_type not in CONFIG_MAPPING:
        raise Unfit(f"is not known to this transformers (it came with {home.since})")
    config = CONFIG_MAPPING[home.model_type]
    for auto in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        if auto.startswith("AutoModel") and mapping is not None and type(model.config) in mapping and config in mapping:
            try:
                mine, theirs = mapping[type(model.config)], mapping[config]
            except ImportError as error:  # found only when its module is asked for
                raise Unfit(f"cannot be imported: {' '.join(str(error).split())[:120]}") from error
            if own in (mine if isinstance(mine, tuple) else (mine,)):
                return theirs[0] if isinstance(theirs, tuple) else theirs  # type: ignore[no-any-return]
    raise Unfit(f"has no counterpart of {own.__name__}")


def _prove(model: PreTrainedModel, home: Home, cls: type[PreTrainedModel]) -> None:
    """Compare the logits of a model and of the home that holds it unchanged, bit by bit.

    Once more with what shows only on long texts brought so near that the probe meets it, and in training if something
    is dropped there.

    Raises:
        Unfit: they differ.
    """
    inputs = default_inputs(model)
    attention = _EAGER if home.eager else None
    for fields, training in _tellings(model):
        here = rebuilt(model, type(model), fields, {}, attention)
        neutral = _said(home, here.config, read_layers(here.config))
        try:
            there = rebuilt(model, cls, neutral, home.fills, attention)
            found, wanted = (_logits(each, inputs, training) for each in (there, here))
        except Unfit:
            raise
        except BUILDING as error:
            raise Unfit(f"does not run: {' '.join(str(error).split())[:200]}") from error
        if not torch.equal(found, wanted):
            how = "in training" if training else f"where {', '.join(fields)} would be met" if fields else ""
            size = f"by up to {(found - wanted).abs().max():.1e}"
            raise Unfit(f"computes other logits ({', '.join(filter(None, (size, how)))})")


def _prove_kinds(model: PreTrainedModel, home: Home, cls: type[PreTrainedModel], wanted: Layers) -> None:
    """Compare the logits with layers of the wanted kinds, whose window is as long as the context, bit by bit.

    Raises:
        Unfit: they differ, as where layers with a window rotate otherwise.
    """
    inputs, length = default_inputs(model), int(model.config.max_position_embeddings)
    wide = dataclasses.replace(wanted, windows=tuple(w and length for w in wanted.windows))
    plain = dataclasses.replace(wanted, windows=(None,) * len(wanted.windows))
    attention = _EAGER if home.eager else None
    here, there = (
        _logits(rebuilt(model, cls, _said(home, model.config, each), home.fills, attention), inputs)
        for each in (plain, wide)
    )
    if not torch.equal(here, there):
        raise Unfit(f"computes something else in layers with a window (by up to {(here - there).abs().max():.1e})")


def _tellings(model: PreTrainedModel) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield fields of the model's own config, and whether to train: what shows whether a home does the same."""
    yield {}, False
    layers, near = read_layers(model.config), dict[str, Any]()
    if layers.window is not None:
        near["sliding_window"] = _NEAR
    if layers.temperature is not None:
        near["rope_parameters"] = {**model.config.rope_parameters, STEP: _NEAR}
    if near:
        yield near, False
    if any("drop" in name and value for name, value in model.config.to_dict().items()):
        yield {}, True


def _logits(model: PreTrainedModel, inputs: Inputs, training: bool = False) -> torch.Tensor:
    """Return the logits, or hidden states, at tokens that are not padding; in training, of one draw."""
    with quiet(model), torch.no_grad():
        if training:
            model.train()
            torch.manual_seed(0)
        return valid(model, model(**inputs)[0], inputs)


def rebuilt(
    model: PreTrainedModel,
    cls: type[PreTrainedModel],
    fields: Mapping[str, Any],
    fills: Mapping[str, float],
    attention: str | None = None,
    instead: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> PreTrainedModel:
    """Build a class around the parameters of a model, which is only read.

    Args:
        model: whose parameters, persistent buffers and config are taken.
        cls: of transformers.
        fields: of the new config, beside those that both have.
        fills: values of parameters that the model has not, by the last part of their name; a bias is 0.
        attention: the attention implementation; None keeps the model's.
        instead: path of a module -> the parameters, by name below it, that take the place of all it has.

    Raises:
        Unfit: a parameter has no place, or another shape, or something cannot be built.
    """
    try:
        config = _config(model, cls, fields, attention)
        with building():
            other: PreTrainedModel = inside(torch.device("meta"), lambda: cls(config))
        _fill(other, model, fills, instead or {})
        _materialise(other, model)
    except Unfit:
        raise
    except BUILDING as error:
        raise Unfit(f"cannot be built: {' '.join(str(error).split())[:200]}") from error
    learn(other)  # what its forwards call their arguments: nobody has described a model of this class yet
    return other.train(model.training)


def _config(
    model: PreTrainedModel, cls: type[PreTrainedModel], fields: Mapping[str, Any], attention: str | None
) -> PretrainedConfig:
    """Return the config of the home: what both types say, and ``fields``."""
    kind: Any = cls.config_class
    given = model.config.to_dict()
    known = {*inspect.signature(kind.__init__).parameters, *kind().to_dict(), record.FIELD, "head_dim"}
    kept = {
        name: value for name, value in given.items() if name in known and name not in ("model_type", "architectures")
    }
    if "attention_bias" in known and "attention_bias" not in given:  # Qwen2 has biases without a field for them
        kept["attention_bias"] = any(name.endswith("k_proj.bias") for name, _ in model.named_parameters())
    config = kind(**{**kept, **fields})
    config.dtype = model.config.dtype
    config._attn_implementation = attention or model.config._attn_implementation
    config.architectures = [cls.__name__]  # saving writes it, and revert is to take it back
    config._name_or_path = getattr(model.config, "_name_or_path", "")
    return config


def _fill(
    other: PreTrainedModel,
    model: PreTrainedModel,
    fills: Mapping[str, float],
    instead: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Put the parameters and persistent buffers of a model into another.

    Raises:
        Unfit: they are not the same ones.
    """
    held = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent(model)}
    for path, tensors in instead.items():
        gone = [held.pop(name) for name in list(held) if name.startswith(f"{path}.")]
        trains = any(old.requires_grad for old in gone)
        held |= {f"{path}.{name}": nn.Parameter(tensor, trains) for name, tensor in tensors.items()}
    wanted = {**dict(other.named_parameters(remove_duplicate=False)), **_persistent(other)}
    strange = sorted(held.keys() - wanted.keys())
    if strange:
        raise Unfit(f"has no place for {strange[0]}" + (f" and {len(strange) - 1} more" if strange[1:] else ""))
    like = next(iter(model.parameters()))
    for name, blank in wanted.items():
        owner, _, last = name.rpartition(".")
        module = other.get_submodule(owner)
        store: dict[str, Any] = module._parameters if last in module._parameters else module._buffers
        if name in held:
            if held[name].shape != blank.shape:
                raise Unfit(f"wants {name} of {tuple(blank.shape)}, which is {tuple(held[name].shape)} here")
            store[last] = held[name]
            continue
        value = 0.0 if last == "bias" else fills.get(last)
        if value is None:
            raise Unfit(f"needs {name}, which is not here")
        beside = next(module.parameters(recurse=False), like)
        beside = like if beside.is_meta else beside
        store[last] = nn.Parameter(torch.full(blank.shape, value, dtype=beside.dtype, device=beside.device))


def _persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    lost = {f"{p}.{n}".lstrip(".") for p, m in model.named_modules() for n in m._non_persistent_buffers_set}
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in lost}


def _materialise(other: PreTrainedModel, model: PreTrainedModel) -> None:
    """Make the buffers that no checkpoint holds, by building their modules once more.

    Raises:
        Unfit: one is not built from a config.
    """
    device = next(iter(model.parameters())).device
    blank = [
        path
        for path, module in other.named_modules()
        if any(b.is_meta for b in module._buffers.values() if b is not None)
    ]
    for path in blank:
        old: Any = other.get_submodule(path)
        needed = list(inspect.signature(type(old).__init__).parameters.values())[1:]
        free = [p.name for p in needed if p.default is inspect.Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if free != ["config"] or not hasattr(old, "config"):
            raise Unfit(f"has buffers in {path} that are not made from a config")
        parent, _, name = path.rpartition(".")
        other.get_submodule(parent)._modules[name] = type(old)(old.config).to(device)
    left = next((name for name, t in (*other.named_parameters(), *other.named_buffers()) if t.is_meta), None)
    if left is not None:
        raise Unfit(f"leaves {left} without numbers")
