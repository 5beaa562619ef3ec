"""What the attention of each decoder layer does, as far as a stock config can express it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from .configs import declared
from .errors import AttnPatchError, UnsupportedArchitecture

SLIDING, FULL = "sliding_attention", "full_attention"
SLOPE, STEP = "llama_4_scaling_beta", "original_max_position_embeddings"  # keys of rope_parameters
_LARGEST = 2**63


@dataclass(frozen=True)
class Temperature:
    """Queries at position t are multiplied by 1 + slope * log(1 + floor(t / step)) (2504.08719, section 3.3).

    Attributes:
        slope: 0 changes nothing.
        step: in tokens; queries below it are unchanged.
    """

    slope: float
    step: int


@dataclass(frozen=True)
class Layers:
    """The layers of a decoder.

    Attributes:
        bases: base of the rotary frequencies for each layer; None if the layer does not rotate.
        windows: how many tokens each layer attends to, the query included; None for all before it.
        temperature: of all layers, or None.
    """

    bases: tuple[float | None, ...]
    windows: tuple[int | None, ...]
    temperature: Temperature | None = None

    @property
    def base(self) -> float | None:
        """The single base of all layers that rotate; None if there are several, or none rotates."""
        found = {base for base in self.bases if base is not None}
        return found.pop() if len(found) == 1 else None

    @property
    def window(self) -> int | None:
        """The single window of all layers that have one; None if there are several, or none."""
        found = {window for window in self.windows if window is not None}
        return found.pop() if len(found) == 1 else None

    @property
    def kinds(self) -> list[str]:
        """Transformers' name of each layer's attention pattern."""
        return [FULL if window is None else SLIDING for window in self.windows]

    def rotated(self, base: float | None, layers: Collection[int] | None = None) -> Layers:
        """Return these layers with another base in some of them (None: all); a base of None disables rotation.

        Raises:
            AttnPatchError: there is no such layer.
        """
        chosen = self._those(layers)
        return dataclasses.replace(self, bases=tuple(base if n in chosen else b for n, b in enumerate(self.bases)))

    def windowed(self, window: int, layers: Collection[int] | None = None) -> Layers:
        """Return these layers with a window in some of them (None: all); one that sees less already stays so.

        Raises:
            AttnPatchError: there is no such layer.
        """
        chosen = self._those(layers)
        narrowed = (w if n not in chosen else min(w or window, window) for n, w in enumerate(self.windows))
        return dataclasses.replace(self, windows=tuple(narrowed))

    def _those(self, layers: Collection[int] | None) -> Collection[int]:
        count = len(self.bases)
        strange = [number for number in layers or () if not 0 <= number < count]
        if strange:
            raise AttnPatchError(
                f"layers: {', '.join(map(str, strange))} is not there; this model has layers 0 to {count - 1}."
            )
        return range(count) if layers is None else set(layers)


def read_layers(config: PretrainedConfig) -> Layers:
    """Read the layers from a config.

    A field counts only where the family's config declares it: a converted checkpoint often keeps fields that its model
    does not read. A family that uses its own fields for this is misread here, so the result must be verified.

    Raises:
        UnsupportedArchitecture: the config says what no home can hold, or contains other configs.
    """
    count, rope = getattr(config, "num_hidden_layers", None), getattr(config, "rope_parameters", None)
    if config.sub_configs or not isinstance(count, int):
        raise UnsupportedArchitecture(f"{config.model_type}: is no decoder of text alone")
    if not isinstance(rope, Mapping) or not isinstance(rope.get("rope_theta"), (int, float)):
        raise UnsupportedArchitecture(f"{config.model_type}: has no rotary base that all layers share")
    return Layers(_bases(config, float(rope["rope_theta"]), count), _windows(config, count), _temperature(rope))


def unrotated(model: PreTrainedModel) -> bool:
    """Return whether the config of a model with rotary modules says that no layer rotates."""
    try:
        return not any(read_layers(model.config).bases)
    except UnsupportedArchitecture:
        return False


def _bases(config: PretrainedConfig, theta: float, count: int) -> tuple[float | None, ...]:
    each, flags = declared(config, "layer_rope_theta"), declared(config, "no_rope_layers")
    if isinstance(each, (list, tuple)):
        return tuple(float(base) if base else None for base in each[:count])
    if isinstance(flags, (list, tuple)):  # 1 where the layer does rotate
        return tuple(theta if flag else None for flag in flags[:count])
    return (theta,) * count


def _windows(config: PretrainedConfig, count: int) -> tuple[int | None, ...]:
    width, kinds = declared(config, "sliding_window"), declared(config, "layer_types")
    if declared(config, "use_sliding_window", True) is False:
        width = None
    if kinds is None:
        return (width,) * count
    strange = set(kinds) - {SLIDING, FULL}
    if strange:
        raise UnsupportedArchitecture(f"{config.model_type}: has layers of {', '.join(sorted(strange))}")
    return tuple(width if kind == SLIDING else None for kind in kinds[:count])


def _temperature(rope: Mapping[str, Any]) -> Temperature | None:
    slope, step = rope.get(SLOPE), rope.get(STEP)
    if not slope or not step:
        return None
    if not all(isinstance(each, (int, float)) and abs(each) < _LARGEST for each in (slope, step)):
        raise UnsupportedArchitecture(f"rope_parameters: {SLOPE} or {STEP} is no number")
    return Temperature(float(slope), int(step))
