"""Parts of remapped positions that need no model: lengths, the cache that lets go, how keys were turned."""

import types

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import hf_attnpatch as ap
from hf_attnpatch.errors import AttnPatchError, UnsupportedArchitecture
from hf_attnpatch.functional.rerotation import RotaryPlanes
from hf_attnpatch.functional.spans import Sinks
from hf_attnpatch.positions import keys
from hf_attnpatch.spans import modules
from hf_attnpatch.spans.modules import EvictHook, EvictingStore, Evicts, ShiftedAngles, SinkLayer
from hf_attnpatch.spans.proposal import check_fields, target_length, trained_length, within
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.caches import DynamicLayer
from hf_attnpatch.upstream.roles import Roles

PATCH = types.SimpleNamespace(name="odd", trained_length=None, target_length=None, factor=None)

# -- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least"), [("window", 2), ("trained_length", 2), ("group", 1), ("num_sinks", 0), ("start", 0)]
)
def test_the_least_that_a_length_may_be(name, least):
    for fine in (least, least + 1, 10**9, None):
        check_fields(PATCH, "auto", **{name: fine})
    for wrong in (least - 1, -5, 3.0, "3", True, [3]):
        with pytest.raises(AttnPatchError, match=rf"odd: {name} is .*; it must be a whole number, at least {least}\."):
            check_fields(PATCH, "sdpa", other=5, **{name: wrong})


def test_backends_there_are():
    for backend in ("auto", "sdpa", "eager"):
        check_fields(PATCH, backend)
    with pytest.raises(AttnPatchError, match="backend 'flash' does not exist; choose from auto, sdpa, eager"):
        check_fields(PATCH, "flash")


@pytest.mark.parametrize(
    ("given", "declared", "found"),
    [
        (None, 128, 128),
        (64, 128, 64),
        (64, None, 64),
        (None, 8, 8),
        (None, 7, None),
        (None, None, None),
        (7, 128, None),
    ],
)
def test_the_trained_length_is_the_patch_s_or_the_config_s(given, declared, found):
    patch = types.SimpleNamespace(**{**vars(PATCH), "trained_length": given})
    anatomy = types.SimpleNamespace(architecture="Model", max_positions=declared)
    if found is not None:
        assert trained_length(patch, anatomy) == found
        return
    with pytest.raises(
        UnsupportedArchitecture, match=f"Model: .* a context of {given or declared!r} tokens; pass trained"
    ):
        trained_length(patch, anatomy)


@pytest.mark.parametrize(
    ("target", "factor", "found"),
    [
        (None, None, None),
        (200, None, 200),
        (101, None, 101),
        (None, 1.505, 150),
        (100, None, 0),
        (None, 1.0, 0),
        (5, 3.0, 300),
    ],
)
def test_what_is_to_be_reached_is_above_what_was_trained(target, factor, found):
    patch = types.SimpleNamespace(name="odd", target_length=target, factor=factor)
    if found == 0:
        with pytest.raises(AttnPatchError, match="odd: target_length 100 is not above the 100 tokens that the model"):
            target_length(patch, 100)
        return
    assert target_length(patch, 100) == found


def test_distances_are_within_what_was_trained():
    within(PATCH, 100, window=100, start=0)
    with pytest.raises(AttnPatchError, match="odd: window 101 is above the 100 tokens that the model was trained on"):
        within(PATCH, 100, start=3, window=101)


# -- a cache that lets go ----------------------------------------------------------------------------------------------


def numbered(first, count):
    return torch.arange(first, first + count).float().view(1, 1, count, 1)


def test_a_layer_keeps_its_head_and_its_window():
    layer, read = SinkLayer(2, 4), 0
    assert layer.get_mask_sizes(3) == (3, 0)
    for count in (3, 1, 1, 1, 2, 1):
        keys_, values = layer.update(numbered(read, count), -numbered(read, count))
        held = [*range(read)] if read <= 5 else [0, 1, *range(read - 3, read)]
        assert keys_.flatten().tolist() == [*held, *range(read, read + count)]  # what the new queries may see
        assert torch.equal(values, -keys_)
        read += count
        kept = [*range(read)] if read <= 5 else [0, 1, *range(read - 3, read)]
        assert layer.keys.flatten().tolist() == kept
        assert torch.equal(layer.values, -layer.keys)
        assert layer.get_seq_length() == read
        assert layer.get_mask_sizes(2) == (len(kept) + 2, 0 if len(kept) == read else 2)


def test_tokens_are_taken_back_until_some_were_let_go():
    layer = SinkLayer(2, 4)
    layer.crop(0)
    assert layer.get_seq_length() == 0
    layer.update(numbered(0, 5), numbered(0, 5))
    layer.crop(-2)
    assert (layer.get_seq_length(), layer.keys.shape[2]) == (3, 3)
    layer.crop(0)
    assert layer.get_seq_length() == 3
    layer.update(numbered(3, 4), numbered(3, 4))
    with pytest.raises(AttnPatchError, match="has evicted tokens that a rollback needs"):
        layer.crop(-1)
    layer.crop(0)
    assert (layer.get_seq_length(), layer.keys.shape[2]) == (7, 5)
    assert layer.get_mask_sizes(1) == (6, 2)


def test_a_longer_padding_lengthens_the_head_as_long_as_nothing_was_let_go():
    layer = SinkLayer(2, 4)
    layer.begin(3)
    assert layer.head == 3
    layer.update(numbered(0, 6), numbered(0, 6))
    layer.begin(4)
    assert layer.head == 4
    layer.update(numbered(6, 2), numbered(6, 2))
    layer.begin(9)
    assert layer.head == 4
    assert layer.keys.flatten().tolist() == [0, 1, 2, 3, 5, 6, 7]


def test_the_first_keys_exchange_a_layer_that_is_empty():
    cache, stored = DynamicCache(), []
    for number in (0, 1):
        storing = types.SimpleNamespace(cache=cache, layer=number, store=lambda *states: stored.append(states) or "out")
        assert EvictingStore(2 + number, 4).stored(storing, "key", "value") == "out"
    assert stored == [("key", "value")] * 2
    assert [(type(layer), layer.head, layer.window) for layer in cache.layers] == [(SinkLayer, 2, 4), (SinkLayer, 3, 4)]
    storing = types.SimpleNamespace(cache=cache, layer=0, store=lambda *states: None)
    EvictingStore(5, 4).stored(storing, "key", "value")
    assert [layer.head for layer in cache.layers] == [5, 3]
    full = DynamicCache()
    full.update(numbered(0, 3), numbered(0, 3), 0)
    EvictingStore(2, 4).stored(types.SimpleNamespace(cache=full, layer=0, store=lambda *states: None), "key", "value")
    assert type(full.layers[0]) is DynamicLayer  # what it holds was stored by other hands


def test_a_promise_counts_the_layers_that_let_go():
    layers = [SinkLayer(2, 4), DynamicLayer(), SinkLayer(2, 4)]
    cache = types.SimpleNamespace(layers=layers)
    assert Evicts(2)(cache) is None
    assert Evicts(1)(cache) is None  # modules that run twice have a layer for each time
    assert Evicts(3)(cache) == "the cache would keep every token: 2 of 3 layers evict those outside the window"
    assert Evicts(1)(object()).startswith("the cache would keep every token: 0 of 1")


NAMES = {words.STATES: "x", words.POSITIONS: "places", words.CACHE: "kept", words.MASK: "mask"}
ROLES = Roles("Module", tuple(NAMES.values()), NAMES, {}, False)


def test_only_a_growing_cache_is_exchanged(monkeypatch):
    monkeypatch.setattr(modules, "_padding", lambda mask: {"padded": 3}.get(mask, 0))
    monkeypatch.setattr(modules, "view", lambda cache, stored: (cache, stored.__self__.head, stored.__self__.window))
    hook, cache = EvictHook(ROLES, Sinks(2, 6)), DynamicCache()
    for mask, head in (("padded", 5), (None, 2)):
        args, kwargs = hook(nn.Identity(), ("x",), {"kept": cache, "mask": mask})
        assert args == ()
        assert kwargs == {"x": "x", "kept": (cache, head, 6), "mask": mask}
    assert hook(nn.Identity(), ("x",), {}) is None
    assert hook(nn.Identity(), ("x",), {"kept": object.__new__(StaticCache)}) is None


def test_the_longest_padding_before_a_row(monkeypatch):
    places = torch.tensor([[-1, -1, 0, 1], [-1, 0, 1, 2], [0, 1, 2, 3]])
    made = types.SimpleNamespace(positions=lambda: places, once=lambda key, make: make())
    monkeypatch.setattr(modules, "mask_of", lambda mask: mask)
    assert modules._padding(made) == 2
    assert modules._padding(None) == 0
    assert modules._padding(types.SimpleNamespace(positions=lambda: None)) == 0


def test_every_token_is_put_at_one_position():
    args, kwargs = ShiftedAngles(ROLES, 7)(nn.Identity(), ("x", torch.arange(6).view(2, 3)), {"mask": "m"})
    assert args == ()
    assert (kwargs["x"], kwargs["mask"]) == ("x", "m")
    assert kwargs["places"].tolist() == [[7] * 3] * 2
    assert kwargs["places"].dtype == torch.int64


# -- how keys were turned ----------------------------------------------------------------------------------------------

FREQUENCIES = {"long": torch.tensor([1.0, 0.3, 0.1, 0.02]), "short": torch.tensor([0.7, 0.05])}


class _Rotary(nn.Module):
    def __init__(self, **buffers):
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


@pytest.fixture
def subject(monkeypatch):
    """A model with two tables of frequencies, one of which keeps its original beside it."""
    model = nn.ModuleDict(
        {"long": _Rotary(inv_freq=FREQUENCIES["long"]), "short": _Rotary(inv_freq=FREQUENCIES["short"])}
    )
    model["long"].register_buffer("original_inv_freq", FREQUENCIES["long"] * 2)
    monkeypatch.setattr(keys, "frequencies", lambda module: dict(module.named_buffers()))
    rotary = tuple(types.SimpleNamespace(path=path) for path in ("long", "short"))
    return model, types.SimpleNamespace(inner=(), rotary=rotary)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("table", "first", "width"), [("long", 0, 8), ("long", 0, 10), ("long", 2, 10), ("short", 0, 10), ("short", 6, 10)]
)
def test_the_way_that_keys_were_turned_is_found(table, first, width, interleaved, subject):
    states = torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(0))
    turning = RotaryPlanes(FREQUENCIES[table], interleaved, first)
    after = turning.turn(states, turning.table(torch.full((5,), 7), torch.float32))
    assert keys.BY == 7
    found = keys.way_of(*subject, [(states, after), (states * 3, after * 3)])
    assert found == (table, "inv_freq", interleaved, first)
    assert keys.way_of(*subject, [(states, after), (states, states)]) is None  # of all pairs alike
    assert keys.way_of(*subject, [(states, after * 1.01)]) is None
    original = RotaryPlanes(FREQUENCIES["long"] * 2, interleaved, first)
    if width == 8:
        after = original.turn(states, original.table(torch.full((5,), 7), torch.float32))
        assert keys.way_of(*subject, [(states, after)]) is None  # it is no table that the model turns by


def test_heads_too_narrow_for_a_table_are_not_tried_with_it(subject):
    states = torch.randn(1, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    turning = RotaryPlanes(FREQUENCIES["short"], False, 0)
    after = turning.turn(states, turning.table(torch.full((2,), 7), torch.float32))
    assert keys.way_of(*subject, [(states, after)]) == ("short", "inv_freq", False, 0)
    assert keys.tables(*subject) == ["long.inv_freq", "short.inv_freq"]


def test_modules_that_turn_by_a_table_of_angles_of_their_own(subject, monkeypatch):
    model, anatomy = subject
    anatomy = types.SimpleNamespace(inner=("short",), rotary=())
    monkeypatch.setattr(keys, "angle_table", lambda module: "inv_freq")
    monkeypatch.setattr(keys, "frequencies_of", lambda table: table)
    for interleaved in (False, True):
        states = torch.randn(1, 2, 3, 6, generator=torch.Generator().manual_seed(0))
        turning = RotaryPlanes(FREQUENCIES["short"], interleaved, 0)
        after = turning.turn(states, turning.table(torch.full((3,), 7), torch.float32))
        assert keys.way_of(model, anatomy, [(states, after)]) == ("short", "inv_freq", interleaved, 0)
    assert keys.tables(model, anatomy) == ["short.inv_freq"]


def test_as_much_as_angles_in_fp32_explain_is_allowed():
    """In a model of float64, too; and more in one of half precision."""
    by = {torch.float64: 5e-5, torch.float32: 5e-5, torch.float16: 2.5e-2, torch.bfloat16: 0.1}
    assert {dtype: keys.allowed(dtype) for dtype in by} == pytest.approx(by)


def test_patches_ask_for_whole_lengths():
    with pytest.raises(AttnPatchError, match="window is 1; it must be a whole number, at least 2"):
        ap.AttentionSinks(num_sinks=0, window=1)
