"""The expected result of each patch on each model: a reviewed table, never generated.

A patch that does not work where the table says so is a fault of this installation; so is a refusal with another reason
than the one that stands here. A release of transformers may take a patch that was refused before: that is no fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from packaging.version import Version

from .models import EMBEDDED, MODELS

WORKS, REFUSES = "works", "refuses"

_NOT_ROTARY = dict.fromkeys(("gpt2", "opt", "bloom", "mpt"), "positions here are")
_WINDOWS = {**_NOT_ROTARY, "gemma2": "has one width for all windows"}
_TEMPERATURE = {**_NOT_ROTARY, "gemma2": "no stock type can say this"}
_NO_LATENT = {
    **_NOT_ROTARY,
    "gemma2": "no stock latent type has windows",
    "mistral": "no stock latent type has windows",
}
# up to 5.1 these families hand their attention masks of their own making, which some patches cannot read
_MPT = {"mpt": "attention mask of shape"}
_MASKS = dict.fromkeys(("opt", "bloom", "mpt"), "a mask of type Tensor in the place of the memory")
# other distances: all that turns keys further
_DISTANCES = {**_NOT_ROTARY, "mistral": "no layer attends to the whole past", "gemma2": "flash calls cannot be merged"}


@dataclass(frozen=True)
class Case:
    """A patch to try, and its expected result.

    Attributes:
        spec: as ``from_spec`` takes it.
        refused: model -> words of the refusal; on all other models the patch must work.
        once: the same, on releases of transformers before 5.2 alone.
        same: models whose logits must stay what they were; on all other models they must not.
        held: most tokens that the cache may hold after 26, where the patch promises a bound.
        attention: attention implementation of the model before the patch; None is what transformers chooses.
    """

    spec: Mapping[str, Any]
    refused: Mapping[str, str] = field(default_factory=dict)
    once: Mapping[str, str] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    held: int | None = None
    attention: str | None = None

    def refusal(self, model: str) -> str | None:
        """Return words of the expected refusal, or None if the patch must work."""
        once = self.once if Version(transformers.__version__) < Version("5.2") else {}
        return self.refused.get(model, once.get(model))


CASES: Mapping[str, Case] = {
    "Alibi": Case({"patch": "alibi"}, once=_MPT, same=("bloom", "mpt")),  # which have it already
    "AttentionSinks": Case(
        {"patch": "attention_sinks", "num_sinks": 2, "window": 6},
        {**_DISTANCES, **dict.fromkeys(("bloom", "mpt"), "declares a context of None tokens")},
        held=15,  # 2 and 6, and 7 columns more because the rows' first tokens are so far apart
    ),
    "DualChunk": Case({"patch": "dual_chunk", "trained": 12}, _DISTANCES),
    "Flash": Case({"patch": "flash"}, once=_MPT, same=MODELS, attention="eager"),
    "GroupedQuery": Case({"patch": "grouped_query", "num_kv_heads": 1}),
    "JetLong": Case({"patch": "jet_long", "window": 3, "trained": 8}, _DISTANCES),
    "Latent": Case({"patch": "latent"}, _NO_LATENT, same=MODELS),
    "NoPosition": Case({"patch": "no_position"}, once=_MPT),
    "PositionTable": Case(  # within the old length of a table nothing changes
        {"patch": "position_table", "length": 128}, once=_MPT, same=("gpt2", "opt")
    ),
    "ReRope": Case({"patch": "re_rope", "window": 5, "trained": 10}, _DISTANCES),
    "RelativeXl": Case({"patch": "relative_xl"}, once=_MPT),
    "RopeScaling": Case({"patch": "rope_scaling", "kind": "yarn", "factor": 4.0}, _NOT_ROTARY),
    "RopeScaling, per request": Case(
        {"patch": "rope_scaling", "kind": "yarn", "factor": 4.0, "per_request": True, "trained_length": 16},
        _NOT_ROTARY,
    ),
    "Rotary": Case({"patch": "rotary", "theta": 500.0}, once=_MPT),
    "ScoreTemperature": Case({"patch": "score_temperature", "slope": 0.3, "step": 8}, _TEMPERATURE),
    "Windowed": Case({"patch": "windowed", "window": 6}, _WINDOWS, same=("mistral",)),
    "SegmentRecurrence": Case(
        {"patch": "segment_recurrence", "segment_length": 8, "memory_length": 6}, once=_MASKS, held=14
    ),
    "SelfExtend": Case({"patch": "self_extend", "window": 6, "group": 3, "trained": 10}, _DISTANCES),
    "Sinusoidal": Case({"patch": "sinusoidal"}, once=_MPT),
}

# What may keep a kernel from running without a fault of this installation; sdpa and flex run everywhere.
KERNELS: Mapping[str, tuple[str, ...]] = {
    "sdpa": (),
    "flex_attention": (),
    **dict.fromkeys(
        ("flash_attention_2", "flash_attention_3", "flash_attention_4"),
        ("needs a CUDA device", "needs compute capability", "is not installed"),
    ),
}
KERNEL_MODEL = EMBEDDED

# extra -> the modules that it brings, by the name of the distribution
EXTRAS: Mapping[str, Mapping[str, str]] = {
    "recipes": {"datasets": "datasets", "peft": "peft", "matplotlib": "matplotlib"},
    "plot": {"matplotlib": "matplotlib"},
    "docs": {"mkdocs-material": "material"},
    "eval": {"lm-eval": "lm_eval"},
    "kernels": {"kernels": "kernels"},
    "flash": {"flash-attn": "flash_attn"},
    "smollm2": {"gguf": "gguf"},
}
