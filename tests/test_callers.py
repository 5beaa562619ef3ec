"""What a caller does with a cache, with documents and with positions: right for every patch, or refused."""

import pytest
import torch
from architectures import tiny_model
from callers import CACHE, IDS, OTHER, SPLIT, WAYS, logits
from transformers import DynamicCache

import hf_attnpatch as ap

SHORT = {"segment_length": 4, "memory_length": 4, "num_sinks": 2}
LONG = {"segment_length": 8, "memory_length": 24}
PACKED = {"packed", "packed_with_bounds", "packed_by_mask"}
GAPS = {"a_gap", "a_gap_between_calls"}
SPANS = {*PACKED, *GAPS, "a_gap_without_a_mask"}
NOT_OURS = {"static", "chunked_static", "by_other_hands", "quantized"}
MEMORY = {*SPANS, *NOT_OURS, "assisted"}
# A text that grows beyond the trained window by the caller's own forwards has to be announced (`ap.request`).
GROWS = {*("two_turns", "chat", "crop", "reorder", "select", "repeat", "static", "by_other_hands", "quantized")}
UNANNOUNCED = {*GROWS, *PACKED, "left_padded_steps", "a_gap_between_calls", "a_gap_without_a_mask"}
SHARED, YARN = ap.GroupedQuery(num_kv_heads=2, method="mean"), {"kind": "yarn", "factor": 4.0}

# Model, patch, and what is refused; everything else is right. What the model gets wrong without a patch is left out.
ROWS = (
    *((kind, SHARED, set()) for kind in ("llama", "gpt2", "bloom", "mistral")),
    ("llama", ap.RopeScaling(**YARN), set()),
    ("llama", ap.RopeScaling(**YARN, per_request=True, trained_length=12), UNANNOUNCED),
    *((kind, ap.Alibi(), GAPS) for kind in ("llama", "gpt2", "bloom", "mistral", "gptj")),
    ("llama", ap.Alibi(backend="eager"), GAPS),
    ("llama", ap.RelativeXl(), GAPS),
    ("llama", ap.Rotary(theta=500.0), set()),
    ("gpt2", ap.Rotary(theta=500.0), set()),
    ("llama", ap.Sinusoidal(), set()),
    ("llama", ap.NoPosition(), set()),
    ("gpt2", ap.PositionTable(length=200), set()),
    ("llama", ap.SelfExtend(window=6, group=3, trained=10), SPANS),
    ("llama", ap.SelfExtend(window=6, group=3, trained=10, backend="eager"), SPANS),
    ("llama", ap.DualChunk(trained=12), SPANS),
    ("llama", ap.ReRope(window=5, leak=0.2, trained=10), SPANS),
    ("llama", ap.JetLong(window=3, trained=8), SPANS),
    ("llama", ap.AttentionSinks(num_sinks=2, window=6), {*SPANS, "crop"}),
    *((kind, ap.SegmentRecurrence(**LONG), MEMORY) for kind in ("llama", "bloom", "mistral", "gptj")),
    ("gpt2", ap.SegmentRecurrence(**LONG, positions="running"), MEMORY),
    ("llama", ap.SegmentRecurrence(**SHORT), {*MEMORY, "crop"}),
    ("llama", ap.Flash(backend="sdpa"), set()),
)
_FITS = {"mistral": {"sliding_window": 6}}
_TOLERANCE = 1e-5


def outcome(model, way):
    """`right`, `refused`, or how far apart."""
    try:
        found, wanted = way(model)
    except ap.AttnPatchError:
        return "refused"
    except ValueError as error:  # transformers' own words for a cache that says that it cannot be rolled back
        return "refused" if "cache that can be cropped" in str(error) else f"{type(error).__name__}: {error}"
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    return "right" if apart < _TOLERANCE else f"apart by {apart:.2g}"


def built(kind, patch=None):
    attention = {"attn_implementation": "eager"} if isinstance(patch, ap.Flash) else {}
    return tiny_model(kind, num_hidden_layers=2, **_FITS.get(kind, {}), **attention).eval()


@pytest.fixture(scope="module")
def possible():
    """By model: the ways that it gets right by itself."""
    found = {}
    for kind in dict.fromkeys(row[0] for row in ROWS):
        model = built(kind)
        found[kind] = [way for way in WAYS if outcome(model, way) == "right"]
        assert len(found[kind]) >= len(WAYS) - 7, kind  # BLOOM takes no positions; a window is not cropped
    return found


NAMES = [f"{number}-{row[0]}-{row[1].name}" for number, row in enumerate(ROWS)]


@pytest.mark.parametrize(("kind", "patch", "refused"), ROWS, ids=NAMES)
def test_right_or_refused(kind, patch, refused, possible):
    model = built(kind, patch)
    ap.apply(model, patch)
    found = {way.__name__: outcome(model, way) for way in possible[kind]}
    wanted = {name: "refused" if name in refused else "right" for name in found}
    assert found == wanted


def test_rows_of_announced_requests_move_with_the_cache():
    """Lengths differ by row: reordered, selected and repeated rows keep their own angles."""

    model = built("llama")
    ap.patch_rope_scaling(model, kind="yarn", factor=4.0, per_request=True, trained_length=8)
    moves = {
        "reorder_cache": (torch.tensor([1, 0]), [1, 0]),
        "batch_select_indices": (torch.tensor([1]), [1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1]),
    }
    lengths = (15, 30)
    with torch.no_grad(), ap.request(model, lengths):
        whole = logits(model, IDS)[:, SPLIT:]
    for name, (argument, rows) in moves.items():
        cache = DynamicCache(config=model.config)
        with ap.request(model, lengths):
            logits(model, IDS[:, :SPLIT], cache)
        getattr(cache, name)(argument)
        with ap.request(model, [lengths[row] for row in rows]):
            found = logits(model, IDS[rows, SPLIT:], cache)
        assert (found - whole[rows]).abs().max() < _TOLERANCE * whole.abs().max(), name


def test_a_memory_is_rolled_back_exactly_or_not_at_all():

    model = built("llama")
    ap.patch_segment_recurrence(model, segment_length=4, memory_length=4)
    whole = logits(model, IDS)
    for read in range(1, 5):  # beyond the ninth token, the first of a segment
        cache = DynamicCache(config=model.config)
        logits(model, torch.cat([IDS[:, :SPLIT], OTHER[:, :read]], 1), cache)
        if SPLIT + read < 12:
            cache.crop(-read)
            found = logits(model, IDS[:, SPLIT:], cache)
            assert (found - whole[:, SPLIT:]).abs().max() < _TOLERANCE * whole.abs().max()
            continue
        with pytest.raises(ap.AttnPatchError, match="earlier segment"):
            cache.crop(-read)


def test_revert_follows_a_cast_and_tensors_made_without_gradients_train():
    ids = torch.arange(5, 15)[None]
    plain = built("llama")
    wanted = plain.to(torch.bfloat16)(ids).logits
    model = built("llama")
    report = ap.apply(model, SHARED)
    model.to(torch.bfloat16)
    report.revert()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(ids).logits, wanted)
    for patch in (SHARED, ap.RelativeXl()):
        model = built("llama")
        with torch.inference_mode():
            ap.apply(model, patch)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_prefix_for_other_heads_is_refused():

    model = built("gpt2")
    ap.apply(model, SHARED)
    assert model.config.num_key_value_heads == 2  # by which PEFT and static caches choose the width
    states = torch.randn(1, 4, 3, model.config.n_embd // 4)
    cache, ids = DynamicCache([(states, states)] * 2), torch.arange(5, 9)[None]
    with pytest.raises(ap.AttnPatchError, match="prefix"):
        model(input_ids=ids, attention_mask=torch.ones(1, 7), **{CACHE: cache})
