"""torch.compile on patched models: whole graphs where numbers decide nothing; how often a step asks the device."""

import pytest
import torch
from architectures import tiny_model
from caches import CACHE
from tolerances import ROUNDING
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import hf_attnpatch as ap

FP32 = ROUNDING[torch.float32]
IDS = torch.arange(5, 53).view(2, 24)
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
SPANS = (
    ap.SelfExtend(window=6, group=3, trained_length=10),
    ap.ReRope(window=5, trained_length=10),
    ap.DualChunk(trained_length=12),
    ap.JetLong(window=3, trained_length=8),
    ap.AttentionSinks(num_sinks=2, window=6, trained_length=20),
)
WHOLE = (
    ap.Alibi(),
    ap.RelativeXl(),
    ap.Rotary(theta=500.0),
    ap.RopeScaling(kind="yarn", factor=2.0),
    ap.GroupedQuery(num_kv_heads=2, method="mean"),
    ap.Flash(backend="sdpa"),
    ap.NoPosition(home=None),
    ap.NoPosition(layers=[0]),
    ap.ScoreTemperature(slope=0.3, step=8),
    ap.Windowed(window=8),
    ap.Sinusoidal(),
    ap.PositionTable(length=200),
    *SPANS,
)
BROKEN = (  # what they do follows from numbers: which memory a row has, how long its request is
    ap.SegmentRecurrence(segment_length=8, memory_length=8),
    ap.RopeScaling(kind="yarn", factor=2.0, per_request=True),
)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_before():
    torch._dynamo.reset()


def built(patch, layers=1):
    model = tiny_model("llama", num_hidden_layers=layers)
    ap.apply(model, patch)
    return model


def run(model):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]


@pytest.mark.parametrize("patch", WHOLE, ids=lambda patch: patch.name)
def test_a_patched_model_is_one_graph(patch):
    """Oracle: the same model, not compiled; a padded row among them."""
    model = built(patch)
    wanted = run(model)
    found = run(torch.compile(model, fullgraph=True, backend="eager"))
    assert float((found - wanted).abs().max()) < FP32


@pytest.mark.parametrize("patch", BROKEN, ids=lambda patch: patch.name)
def test_others_are_compiled_in_pieces(patch):
    model = built(patch)
    wanted = run(model)
    assert float((run(torch.compile(model, backend="eager")) - wanted).abs().max()) < FP32


@pytest.mark.parametrize("patch", [ap.Alibi(), ap.RelativeXl(), SPANS[0]], ids=lambda patch: patch.name)
def test_a_decode_step_with_a_static_cache_is_one_graph(patch):
    model = built(patch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted = model(IDS, attention_mask=MASK, use_cache=False).logits
        cache = StaticCache(model.config, max_cache_len=32)
        model(IDS[:, :20], attention_mask=MASK[:, :20], use_cache=True, **{CACHE: cache})
        for n in range(20, 24):
            step = {"attention_mask": MASK[:, : n + 1], "use_cache": True, CACHE: cache}
            found = compiled(IDS[:, n : n + 1], **step).logits[:, 0]
            assert float((found - wanted[:, n]).abs().max()) < 10 * FP32


@pytest.mark.parametrize("patch", SPANS[:2], ids=lambda patch: patch.name)
def test_gradients_go_through_the_operation(patch):
    """Oracle: autograd without a graph."""
    model = built(patch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for each in (model, compiled):
        model.zero_grad()
        each(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if "self_attn" in name})
    assert all(float((found[1][name] - grad).abs().max()) < FP32 for name, grad in found[0].items())
    assert any(float(grad.abs().max()) > 1e-4 for grad in found[0].values())


class Reads(TorchDispatchMode):
    """Counts how often the host waits for a number of the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def reads(patch, layers):
    """Of the third of three steps with a cache."""
    model = built(patch, layers)
    cache = None
    with torch.no_grad():
        for start, stop in ((0, 20), (20, 21), (21, 22)):
            step = {"attention_mask": MASK[:, :stop], "use_cache": True, CACHE: cache}
            with Reads() as counted:
                cache = model(IDS[:, start:stop], **step)[CACHE]
    return counted.count


@pytest.mark.parametrize(
    "patch", [ap.Alibi(), ap.RelativeXl(), ap.Sinusoidal(), *SPANS, *BROKEN], ids=lambda patch: patch.name
)
def test_a_step_asks_the_device_as_often_in_a_deep_model_as_in_a_flat_one(patch):
    assert reads(patch, 4) == reads(patch, 1)


@pytest.mark.parametrize("patch", WHOLE[2:9], ids=lambda patch: patch.name)
def test_others_ask_as_often_as_an_unpatched_model(patch):
    plain = tiny_model("llama", num_hidden_layers=1)
    cache = None
    with torch.no_grad():
        for start, stop in ((0, 20), (20, 21), (21, 22)):
            step = {"attention_mask": MASK[:, :stop], "use_cache": True, CACHE: cache}
            with Reads() as counted:
                cache = plain(IDS[:, start:stop], **step)[CACHE]
    assert reads(patch, 1) == counted.count
