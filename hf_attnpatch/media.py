"""Inputs beside text as a model's processor makes them: images, sound, token types, positions with several axes.

Which inputs a forward takes is read from its signature, its ``main_input_name`` and its config. Their form is found by
trying: the first that the model runs with. A model that takes text only is neither tried nor run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .errors import UnsupportedArchitecture
from .probe import brief_inputs, quiet, reads_tokens
from .upstream import words
from .upstream.roles import predicted, roles_of

IMAGE, SOUND = "an image", "sound"
AXES = "positions of several axes"
PLAIN = "tokens without a mask"
_MAX_FEATURES = 4096  # placeholders of one image: more is no probe of a few tokens
_FAILURES = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError, ArithmeticError)
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Probes:
    """Inputs for probing a model.

    Attributes:
        main: tokens; if a model does not run on tokens alone, the first of the others.
        more: name of what they contain -> inputs of the forward, two rows.
        missing: name of an input for which no probe could be built -> the reason.
    """

    main: Mapping[str, Tensor]
    more: Mapping[str, Inputs] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def probes(model: PreTrainedModel, text: Callable[[PreTrainedModel], Mapping[str, Tensor]] = brief_inputs) -> Probes:
    """Return the inputs for probing a model, of every kind that its processor makes.

    Args:
        model: weights in memory; it is run if it takes more than text.
        text: makes the token probe, two rows, under the model's own argument names.

    Raises:
        UnsupportedArchitecture: it reads no tokens, and no other input could be built.
    """
    if not _arguments(model) and not _may_have_axes(model):
        return Probes(text(model))
    tokens = text(model) if reads_tokens(model) else None
    with quiet(model):
        more, missing = _media(model, tokens)
        alone = tokens is not None and _runs(model, tokens)
    if tokens is not None and (alone or not more):
        mask = roles_of(model).names.get(words.MASK)
        return Probes(tokens, {PLAIN: {k: v for k, v in tokens.items() if k != mask}, **more} if alone else {}, missing)
    if not more:
        what, why = next(iter(missing.items()))
        raise UnsupportedArchitecture(
            f"{type(model).__name__}: reads no tokens, and a probe with {what} could not be built ({why}); pass "
            "probe={...} with inputs of its forward."
        )
    main, *rest = more.items()
    return Probes(main[1], dict(rest), missing)


def _runs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    with contextlib.suppress(*_FAILURES):
        _run(model, inputs)
        return True
    return False


def _media(model: PreTrainedModel, text: Mapping[str, Tensor] | None) -> tuple[dict[str, Inputs], dict[str, str]]:
    """Build a model's inputs beside text, without padding; with the reasons for those that could not be built."""
    mask = roles_of(model).names.get(words.MASK)
    text = None if text is None else {k: torch.ones_like(v) if k == mask else v for k, v in text.items()}
    axes = None if text is None else _several_axes(model, text)
    found: dict[str, Inputs] = {} if axes is None else {AXES: axes}
    missing: dict[str, str] = {}
    for what, name in _arguments(model).items():
        probe = _built(model, what, name, text) if what in (IMAGE, SOUND) else "no form of it is known"
        if isinstance(probe, str):
            missing[what] = probe
            continue
        found[what] = probe
        types = _typed(model, what, probe)
        if types is not None:
            found[f"{what} and types of tokens"] = types
    return found, missing


def _arguments(model: PreTrainedModel) -> dict[str, str]:
    """Return what a forward takes beside text -> the name of its argument."""
    declared = roles_of(model).parameters
    found = {}
    for what, names in ((IMAGE, words.PICTURES), (SOUND, words.SOUNDS)):
        name = next((n for n in names if n in declared), None)
        if name is not None and not _left_out(model, what):
            found[what] = name
    main = model.main_input_name
    if main in declared and main not in (*found.values(), *_text_names(model)):
        found.setdefault(IMAGE if _convolves(model) == 2 else SOUND, main)
    others = [n for n in words.OTHER_MEDIA if n in declared and n not in found.values()]
    return found if found else {name: name for name in others if name != "inputs"}


def _left_out(model: PreTrainedModel, what: str) -> bool:
    """Return whether a model was built without the image or sound part that its family may have."""
    parts = [(n, c) for n, c in vars(model.config).items() if n.endswith("_config")]
    own = [config for name, config in parts if any(word in name for word in words.MEDIA_CONFIGS[what])]
    return bool(own) and not any(own)


def _text_names(model: PreTrainedModel) -> set[str]:
    roles = roles_of(model)
    return {roles.names.get(r, "") for r in (words.TOKENS, words.EMBEDDINGS, words.DECODER_TOKENS)} | {words.INPUT_IDS}


def _convolves(model: nn.Module) -> int:
    """Return the number of dimensions of the first convolution, 0 if there is none."""
    ranks = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 2}
    return next((rank for m in model.modules() for kind, rank in ranks.items() if isinstance(m, kind)), 0)


def _built(model: PreTrainedModel, what: str, name: str, text: Mapping[str, Tensor] | None) -> Inputs | str:
    """Return the first form of an input that the model runs with, or why there is none."""
    reasons = []
    for form in (_pictures if what == IMAGE else _sounds)(model, name):
        try:
            probe = form if text is None else _placed(model, what, form, text)
            if isinstance(probe, str):
                reasons.append(probe)
                continue
            _run(model, probe)
        except _FAILURES as error:
            reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:160])
            continue
        return probe
    return reasons[0]


def _run(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = predicted(model(**inputs, **roles_of(model).call(**{words.USE_CACHE: False})))
    if not found.isfinite().all():
        raise ValueError("its output is not finite")
    return found


def _placed(model: PreTrainedModel, what: str, form: Inputs, text: Mapping[str, Tensor]) -> Inputs | str:
    """Insert as many placeholders as there are features after the first two tokens; or return why not."""
    roles = roles_of(model)
    if not roles.takes(words.TOKENS):  # it reads other inputs, and generates text
        return {**text, **form}
    name, token = roles.name(words.TOKENS), _number(_configs(model, ""), words.PLACEHOLDERS[what])
    if token is None:
        return {**text, **form}
    ids = text[name]
    count = _features(model, what, form)
    if count is None or count % len(ids) or not 0 < count <= _MAX_FEATURES:
        return f"{count or 'an unknown number of'} features"
    per_row = count // len(ids)

    def widened(tensor: Tensor, fill: int) -> Tensor:
        return torch.cat([tensor[:, :2], tensor.new_full((len(tensor), per_row), fill), tensor[:, 2:]], 1)

    wide = {name: widened(ids.masked_fill(ids == token, 0), token)}
    mask = roles.names.get(words.MASK, "")
    if mask in text:
        wide[mask] = widened(text[mask], 1)
    kinds = next((n for n in words.KINDS_OF_TOKENS if n in roles.parameters), None)
    if kinds is not None:
        wide[kinds] = (wide[name] == token).long() * (1 if what == IMAGE else 3)
    return {**text, **wide, **form}


def _features(model: PreTrainedModel, what: str, form: Inputs) -> int | None:
    """Return the number of feature rows that a model makes of a form; None if it does not tell."""
    makers = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    make = next((f for m in makers for n in words.FEATURES[what] if callable(f := getattr(m, n, None))), None)
    if make is None:
        return None
    with torch.no_grad():
        found = make(**form)
    for name in words.POOLED:
        found = (
            getattr(found, name, None)
            if not isinstance(found, (Tensor, list, tuple)) and hasattr(found, name)
            else found
        )
    tensors = [found] if isinstance(found, Tensor) else list(found)
    return sum(math.prod(t.shape[:-1]) for t in tensors)


def _typed(model: PreTrainedModel, what: str, probe: Inputs) -> Inputs | None:
    """Return a probe with token types, 1 at the features, if the model takes them."""
    roles = roles_of(model)
    segments, token = roles.names.get(words.SEGMENTS), _number(_configs(model, ""), words.PLACEHOLDERS[what])
    if segments not in roles.parameters or token is None or segments is None:
        return None
    typed = {**probe, segments: (probe[roles.name(words.TOKENS)] == token).long()}
    with contextlib.suppress(*_FAILURES):
        _run(model, typed)
        return typed
    return None


def _may_have_axes(model: PreTrainedModel) -> bool:
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    return words.AXES in str(rope) and roles_of(model).takes(words.POSITIONS, words.TOKENS)


def _several_axes(model: PreTrainedModel, text: Mapping[str, Tensor]) -> Inputs | None:
    """Return positions with three different axes, if the model takes them: equal axes change nothing."""
    roles = roles_of(model)
    if not roles.takes(words.POSITIONS, words.TOKENS):
        return None
    name = roles.name(words.POSITIONS)
    plain = {k: v for k, v in text.items() if k != roles.names.get(words.MASK)}
    ids = plain[roles.name(words.TOKENS)]
    equal = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape).clone()
    apart = equal.clone()
    apart[1:, :, 2:5] = 2
    with contextlib.suppress(*_FAILURES):
        wanted, same = _run(model, plain), _run(model, {**plain, name: equal})
        if wanted.shape == same.shape and torch.allclose(wanted, same, rtol=1e-3, atol=1e-3):
            _run(model, {**plain, name: apart})
            return {**plain, name: apart}
    return None


def _configs(model: PreTrainedModel, what: str) -> list[PretrainedConfig]:
    """Return the configs that may describe images or sound: those of that part first, then the model's own."""
    parts = [(n, c) for n, c in vars(model.config).items() if isinstance(c, PretrainedConfig)]
    inner = [(m, c) for _, part in parts for m, c in vars(part).items() if isinstance(c, PretrainedConfig)]
    known = words.MEDIA_CONFIGS.get(what, ())
    own = [c for name, c in [*parts, *inner] if any(word in name for word in known)]
    return [*own, model.config, *(c for _, c in parts if c not in own)] if not what else [*own, model.config]


def _number(configs: list[PretrainedConfig], names: tuple[str, ...]) -> int | None:
    """Return the first whole number that a config has under one of these names; the first of a pair."""
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _noise(model: PreTrainedModel, *shape: int) -> Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    first = next((p for p in model.parameters() if not p.is_meta), found)
    return found.to(first.device, first.dtype if first.is_floating_point() else torch.float32)


def _pictures(model: PreTrainedModel, name: str) -> Iterator[Inputs]:
    """Yield forms of two images: patches with a grid, whole images, a list of one, tiles."""
    configs = _configs(model, IMAGE)
    channels = _number(configs, ("num_channels", "in_channels", "in_chans")) or 3
    patch = _number(configs, ("patch_size", "spatial_patch_size")) or 16
    merge = _number(configs, ("spatial_merge_size", "merge_size")) or 1
    time = _number(configs, ("temporal_patch_size",)) or 1
    declared, device = roles_of(model).parameters, next(model.parameters()).device

    def pair(names: tuple[str, ...], value: list[int], rows: int = 2) -> Inputs:
        known = next((n for n in names if n in declared), None)
        return {} if known is None else {known: torch.tensor([value] * rows, device=device)}

    side = 2 * merge
    if pair(words.GRID, [1]):
        value = [1, side, side] if words.GRID[0] in declared else [side, side]
        patches = _noise(model, 2 * side * side, channels * time * patch * patch)
        yield {name: patches, **pair(words.GRID, value)}
        yield {name: patches.view(-1, channels, patch, patch * time), **pair(words.GRID, value)}
    if pair(words.PATCH_SHAPES, [1]):
        count = _number(configs, ("num_patches",)) or side * side
        mask: Inputs = {
            n: torch.ones(2, count, dtype=torch.long, device=device) for n in words.PATCH_MASK if n in declared
        }
        root = math.isqrt(count)
        yield {name: _noise(model, 2, count, channels * patch**2), **mask, **pair(words.PATCH_SHAPES, [root, root])}
    if pair(words.PATCH_PLACES, [1]):
        place = torch.cartesian_prod(torch.arange(6), torch.arange(6)).to(device)
        places = {words.PATCH_PLACES[0]: place.expand(2, -1, -1)}
        yield {name: _noise(model, 2, 36, channels * patch**2).sigmoid(), **places}
    size = _number(configs, ("image_size", "input_size")) or max(side * patch, 32)
    whole = _noise(model, 2, channels, size, size)
    sizes = pair(words.SIZES, [size, size])
    yield from ({name: whole, **sizes}, {name: whole}, {name: whole[:, None], **sizes})
    for tiles in range(2, 6) if sizes else ():
        yield {name: _noise(model, 2, tiles, channels, size, size), **sizes}


def _sounds(model: PreTrainedModel, name: str) -> Iterator[Inputs]:
    """Yield forms of two sounds: spectrogram frames in either orientation, and samples; with and without a mask."""
    configs = _configs(model, SOUND)
    bins = _number(configs, ("num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", "mel_bins")) or 80
    longest = _number(configs, ("max_source_positions", "max_length", "max_position_embeddings"))
    declared, device = roles_of(model).parameters, next(model.parameters()).device
    frames = 2 * longest if longest is not None and longest <= 1500 else 64
    shapes = [(2, bins, frames), (2, frames, bins), (2, 64, bins), (2, longest or 64, bins), (2, 4000), (2, 1, 4000)]
    if name == "input_values":
        shapes = [(2, 4000), (2, 1, 4000), *shapes[:4]]
    for shape in shapes:
        length = max(shape[1:]) if len(shape) == 3 else shape[1]
        masks: Inputs = {
            n: torch.ones(2, length, dtype=torch.long, device=device) for n in words.SOUND_MASK if n in declared
        }
        sound = _noise(model, *shape)
        yield {name: sound, **masks}
        if masks:
            yield {name: sound}
            yield {name: sound, **{n: m.bool() for n, m in masks.items()}}


__all__ = ["AXES", "IMAGE", "PLAIN", "SOUND", "Probes", "probes"]
