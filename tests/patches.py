"""The patches that the contract holds every architecture to: one row each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from architectures import tiny_config, tiny_model
from transformers import PretrainedConfig, PreTrainedModel

import hf_attnpatch as ap

_ATTENTION = "attn_implementation"
WINDOW = 16  # of the rotary cases: shorter than the probe of 24 tokens, so that what switches by length does switch
KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")
PER_REQUEST = ("yarn", "dynamic", "longrope")  # a factor for each request and row
WRITTEN = ("ntk", "ntk_by_parts", "resonance", "clipped")  # under a name of the above, or as another rope_theta
METHODS = ("first", "mean", "mean_rescaled")
TEXT = torch.randint(5, 99, (6, 48), generator=torch.Generator().manual_seed(0))  # no text, but tokens to calibrate on


@dataclass(frozen=True, eq=False)
class Case:
    """A patch, the model it is put on, and what is promised.

    Attributes:
        name: in test ids.
        patch: to apply.
        overrides: of the tiny model's config.
        identity: the logits must be the same bits.
        everywhere: part of the fast run on every fast architecture; otherwise there on `ONE_EACH` only.
        product: part of the whole product; otherwise on `ONE_EACH` only (it differs in numbers, not in structure).
    """

    name: str
    patch: ap.Patch
    overrides: Mapping[str, Any] = field(default_factory=dict)
    identity: bool = False
    everywhere: bool = False
    product: bool = True

    @property
    def kind(self) -> str:
        return self.patch.name


def _rope(kind: str, factor: float) -> Case:
    name = f"rope_{kind}" if factor > 1 else f"rope_{kind}_by_1"
    patch, window = ap.RopeScaling(kind=kind, factor=factor), {"max_position_embeddings": WINDOW}
    everywhere, product = name == "rope_yarn", kind not in WRITTEN
    return Case(name, patch, window, identity=factor == 1, everywhere=everywhere, product=product)


CASES = (
    *(
        Case(
            f"grouped_{n}_{m}",
            ap.GroupedQuery(num_kv_heads=n, method=m),
            everywhere=(n, m) == (2, "mean"),
            product=(n, m) in ((2, "mean"), (1, "first")),
        )
        for n in (2, 1)
        for m in METHODS
    ),
    Case("grouped_2_procrustes", ap.GroupedQuery(num_kv_heads=2, method="procrustes"), product=False),
    Case("grouped_2_principal", ap.GroupedQuery(num_kv_heads=2, method="principal")),
    *(
        Case(
            f"grouped_2_{m}",
            ap.GroupedQuery(num_kv_heads=2, method=m, calibration=TEXT, refine_steps=3),
            product=False,
        )
        for m in ("calibrated", "refined")
    ),
    Case("grouped_up", ap.GroupedQuery(num_kv_heads=4), {"num_key_value_heads": 2}),
    *(_rope(kind, 4.0) for kind in (*KINDS, *WRITTEN)),
    *(
        Case(
            f"rope_{kind}_per_request",
            ap.RopeScaling(kind=kind, factor=4.0, per_request=True),
            {"max_position_embeddings": WINDOW},
            everywhere=kind == "yarn",
            product=kind == "yarn",
        )
        for kind in PER_REQUEST
    ),
    Case("alibi", ap.Alibi(), everywhere=True),
    Case("alibi_clipped", ap.Alibi(distance_clip=6, backend="sdpa"), product=False),
    Case("alibi_rounded", ap.Alibi(exact=False, backend="sdpa"), product=False),
    Case("alibi_eager", ap.Alibi(backend="eager"), product=False),
    Case("relative_xl", ap.RelativeXl()),
    Case("rotary", ap.Rotary(theta=500.0)),
    Case("rotary_linear", ap.Rotary(theta=500.0, kind="linear", factor=2.0), product=False),
    Case("sinusoidal", ap.Sinusoidal()),
    Case("no_position", ap.NoPosition()),
    Case("no_position_some", ap.NoPosition(layers=[1]), product=False),
    Case("rotary_some", ap.Rotary(theta=500.0, layers=[1]), product=False),
    Case("score_temperature", ap.ScoreTemperature(slope=0.3, step=8)),
    Case("windowed", ap.Windowed(window=6)),
    Case("windowed_some", ap.Windowed(window=6, layers=[1]), product=False),
    Case("windowed_sinks", ap.Windowed(window=6, calibration=TEXT, first_tokens=2, refine_steps=3), product=False),
    Case("latent", ap.Latent(), product=False),
    Case("latent_small", ap.Latent(cache_target=0.5), product=False),
    Case("position_table", ap.PositionTable(length=200)),
    Case("self_extend", ap.SelfExtend(window=6, group=3, trained=10), everywhere=True),
    Case("dual_chunk", ap.DualChunk(trained=12), product=False),
    Case("re_rope", ap.ReRope(window=5, leak=0.2, trained=10), product=False),
    Case("jet_long", ap.JetLong(window=3, trained=8), product=False),
    Case("attention_sinks", ap.AttentionSinks(num_sinks=2, window=6), product=False),
    Case("recurrence", ap.SegmentRecurrence(segment_length=8, memory_length=6), product=False),
    Case("flash_auto", ap.Flash(), {_ATTENTION: "eager"}, everywhere=True),
    Case("flash_sdpa", ap.Flash(backend="sdpa"), {_ATTENTION: "eager"}, product=False),
    Case("flash_flex", ap.Flash(backend="flex_attention")),
)
IDENTITIES = (
    Case("grouped_as_before", ap.GroupedQuery(num_kv_heads=4), identity=True),
    *(_rope(kind, 1.0) for kind in (*KINDS, "ntk", "ntk_by_parts")),
)

# What `grouped_up` needs where key-value heads have another name, or where fewer than all cannot be had (none).
_UP: Mapping[str, Mapping[str, Any]] = {
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_bigcode": {"multi_query": True},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    **dict.fromkeys(["dots3_note", "dots3_note_text", "esmc"], {}),
}

# One architecture of each way in which a patch can act: every case runs on these in the fast run.
ONE_EACH = ("llama", "gemma3_text", "gpt2")


def build(model_type: str, encoder: bool, case: Case, seed: int = 0) -> PreTrainedModel:
    """The tiny model of a case; an override that the family does not know is left out."""
    overrides = dict(case.overrides)
    if case.name == "grouped_up" and model_type in _UP:
        overrides = dict(_UP[model_type])
    known = tiny_config(model_type, encoder=encoder)
    text = known.get_text_config(decoder=True)
    if case.kind == "rope_scaling" and not _windowed(text):
        overrides = {}
    overrides = {k: v for k, v in overrides.items() if hasattr(known, k) or hasattr(text, k) or k == _ATTENTION}
    return tiny_model(model_type, seed, encoder=encoder, **overrides)


def stock_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Transformers' own model of a patched model's config, with its weights; for patches it can express."""
    config = copy.deepcopy(model.config)
    vars(config).pop("attnpatch", None)  # a patch that needs no record leaves none
    attention = model.config._attn_implementation
    twin: PreTrainedModel = type(model)._from_config(config, attn_implementation=attention, dtype=model.dtype)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def _windowed(text: PretrainedConfig) -> bool:
    """Whether the window may be cut: it is a rotary model's, and no scaling is there that depends on it."""
    rope = getattr(text, "rope_parameters", None)
    return bool(rope) and rope.get("rope_type", "default") == "default"
