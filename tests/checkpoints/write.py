"""Writes the checkpoints of this folder: one of every patch, with the logits that the writing code computed.

They hold later code to what earlier code wrote (``tests/test_checkpoints.py``). Write new rows only, with the code of
the release that is to be remembered; never write an old row again:

    PYTHONPATH=.:tests python tests/checkpoints/write.py NAME ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from architectures import tiny_model
from caches import CACHE
from safetensors.torch import load_file, save_file

import hf_attnpatch as ap

HERE = Path(__file__).parent
EXPECTED = HERE / "logits.safetensors"
SMALL = {
    "llama": {"hidden_size": 16, "head_dim": 4, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1},
    "gpt2": {"n_embd": 16, "vocab_size": 32, "n_positions": 64, "n_layer": 1, "n_inner": 16},
    "bloom": {"hidden_size": 16, "vocab_size": 32, "n_layer": 1},
    "gptj": {"n_embd": 16, "rotary_dim": 4, "vocab_size": 32, "n_layer": 1, "n_inner": 16, "n_positions": 64},
    "bert": {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1},
}
DEEP = {"llama": {"num_hidden_layers": 2}, "bloom": {"n_layer": 2}, "gptj": {"n_layer": 2}}
MEMORY = ap.SegmentRecurrence(segment_length=8, memory_length=6)

# name -> model type, patches in the order of their calls
ROWS: dict[str, tuple[str, tuple[ap.Patch, ...]]] = {
    "llama-grouped_query": ("llama", (ap.GroupedQuery(num_kv_heads=2, method="mean"),)),
    "llama-rope_scaling": ("llama", (ap.RopeScaling(kind="yarn", factor=2.0),)),
    "llama-rope_scaling-per_request": ("llama", (ap.RopeScaling(kind="yarn", factor=2.0, per_request=True),)),
    "llama-alibi": ("llama", (ap.Alibi(),)),
    "llama-alibi-eager": ("llama", (ap.Alibi(backend="eager", slopes=(0.5, 0.25, 0.125, 0.0625)),)),
    "llama-alibi-clipped": ("llama", (ap.Alibi(distance_clip=6, strength=0.5),)),
    "llama-alibi-rounded": ("llama", (ap.Alibi(exact=False),)),
    "llama-relative_xl": ("llama", (ap.RelativeXl(),)),
    "llama-rotary": ("llama", (ap.Rotary(theta=500.0),)),
    "llama-sinusoidal": ("llama", (ap.Sinusoidal(),)),
    "llama-no_position": ("llama", (ap.NoPosition(),)),
    "llama-position_table": ("llama", (ap.PositionTable(length=64),)),
    "llama-self_extend": ("llama", (ap.SelfExtend(window=6, group=3, trained=10),)),
    "llama-self_extend-eager": ("llama", (ap.SelfExtend(window=6, group=3, trained=10, backend="eager"),)),
    "llama-dual_chunk": ("llama", (ap.DualChunk(trained=12),)),
    "llama-re_rope": ("llama", (ap.ReRope(window=5, leak=0.2, trained=10),)),
    "llama-jet_long": ("llama", (ap.JetLong(window=3, trained=8),)),
    "llama-attention_sinks": ("llama", (ap.AttentionSinks(num_sinks=2, window=6),)),
    "llama-recurrence": ("llama", (MEMORY,)),
    "llama-recurrence-sinks": ("llama", (ap.SegmentRecurrence(segment_length=8, memory_length=6, num_sinks=2),)),
    "llama-alibi-recurrence": ("llama", (ap.Alibi(), MEMORY)),
    "llama-relative_xl-recurrence": ("llama", (ap.RelativeXl(), MEMORY)),
    "llama-grouped_query-self_extend": (
        "llama",
        (ap.GroupedQuery(num_kv_heads=2, method="mean"), ap.SelfExtend(window=6, group=3, trained=10)),
    ),
    "llama-score_temperature": ("llama", (ap.ScoreTemperature(slope=0.3, step=8),)),
    "llama-windowed": ("llama", (ap.Windowed(window=6),)),
    "llama-latent": ("llama", (ap.Latent(cache_target=0.5),)),
    "gpt2-alibi": ("gpt2", (ap.Alibi(),)),
    "gpt2-rotary": ("gpt2", (ap.Rotary(theta=500.0),)),
    "gpt2-position_table": ("gpt2", (ap.PositionTable(length=100),)),
    "bloom-alibi": ("bloom", (ap.Alibi(distance_clip=6),)),
    "bloom-relative_xl": ("bloom", (ap.RelativeXl(),)),
    "bloom-rotary": ("bloom", (ap.Rotary(theta=500.0),)),
    "bloom-no_position": ("bloom", (ap.NoPosition(),)),
    "bloom-recurrence": ("bloom", (MEMORY,)),
    "gptj-rotary": ("gptj", (ap.Rotary(theta=500.0),)),
    "gptj-recurrence": ("gptj", (MEMORY,)),
    "bert-alibi": ("bert", (ap.Alibi(),)),
}


def inputs() -> dict[str, torch.Tensor]:
    """Two rows of 24 tokens, one left-padded."""
    ids = torch.randint(5, 30, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model says of them: at once, and, where it decodes, in steps of 18, 1, 1, 3 and 1 tokens."""
    given = inputs()
    found = {"whole": model(**given).logits}
    if model.can_generate():
        cache, steps, start = None, [], 0
        for new in (18, 1, 1, 3, 1):
            stop = start + new
            mask = given["attention_mask"][:, :stop]
            out = model(given["input_ids"][:, start:stop], attention_mask=mask, use_cache=True, **{CACHE: cache})
            cache, start = out[CACHE], stop
            steps.append(out.logits)
        found["steps"] = torch.cat(steps, 1)
    return {name: tensor[..., :8].contiguous() for name, tensor in found.items()}  # of eight words: enough to tell


def made(name: str) -> torch.nn.Module:
    """Return the patched model of a row."""
    kind, patches = ROWS[name]
    deep = DEEP.get(kind, {}) if "recurrence" in name else {}
    model = tiny_model(kind, **{**SMALL[kind], **deep}, **({"encoder": True} if kind == "bert" else {}))
    for patch in patches:
        ap.apply(model, patch)
    return model.eval()


def main(names: list[str]) -> None:
    """Write rows and their logits."""
    expected = load_file(EXPECTED) if EXPECTED.exists() else {}
    for name in names or list(ROWS):
        model = made(name)
        model.save_pretrained(HERE / name)
        (HERE / name / "modeling_hf_attnpatch.py").unlink(missing_ok=True)  # for who has not installed the package
        expected |= {f"{name}.{way}": tensor for way, tensor in logits(model).items()}
        save_file(expected, EXPECTED)


if __name__ == "__main__":
    main(sys.argv[1:])
