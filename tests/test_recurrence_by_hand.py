"""A memory and what guards it, on tokens that can be counted: what may be taken back, what a state may hold."""

import re
import threading

import pytest
import torch
from architectures import tiny_model
from recurring import logits_of, random_ids, with_memory
from transformers import DynamicCache

import hf_attnpatch as ap
from hf_attnpatch.attention.call import AttentionCall
from hf_attnpatch.attention.masks import MemoryMask
from hf_attnpatch.functional.segments import NOBODY, Segments
from hf_attnpatch.recurrence.attention import _known, met
from hf_attnpatch.recurrence.call import Call, Tokens
from hf_attnpatch.recurrence.memory import Memory, RecurrentCache
from hf_attnpatch.recurrence.modules import MemoryHook, _check_gaps, _check_packed, _check_shapes
from hf_attnpatch.recurrence.sinks import Sinks
from hf_attnpatch.recurrence.state import check_state
from hf_attnpatch.upstream import words

LENGTH, MEMORY = 4, 3
CUT = Segments(LENGTH, MEMORY)


def _read(count, cut=CUT):
    """One row that has read so many tokens, with keys that are their numbers."""
    memory = Memory()
    memory.begin(1)
    number = torch.arange(max(0, count - cut.memory - count % cut.length), count)[None]
    states = number[:, None, :, None].float()
    counts = torch.tensor([count])
    memory.put({0: (states, states + 100)}, Sinks(), number, number, counts, counts * 0, torch.ones(1, count))
    return memory


# -- what may be taken back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 15))
def test_tokens_are_taken_back_as_long_as_the_next_one_finds_all_that_it_sees(count):
    for columns in range(1, count + 1):
        memory, left = _read(count), count - columns
        seen = range(max(0, left // LENGTH * LENGTH - MEMORY), left)
        if not set(seen) <= set(memory.number[0].tolist()):
            before = memory.number
            with pytest.raises(ap.AttnPatchError, match=f"rolled back by {columns} tokens"):
                memory.crop(columns, CUT)
            assert memory.number is before
            assert memory.columns == count
            continue
        memory.crop(columns, CUT)
        assert set(seen) <= set(memory.number[0].tolist()) <= set(range(left))
        assert int(memory.count) == memory.columns == memory.whole == left
        assert memory.turned.tolist() == memory.number.tolist()
        key, value = memory.layers[0]
        assert key.flatten().tolist() == memory.number[0].tolist()
        assert torch.equal(value, key + 100)


def test_only_columns_that_are_tokens_in_every_row_are_taken_back():
    memory = Memory()
    memory.begin(2)
    keep = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    number = torch.tensor([[NOBODY, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    memory.put({}, Sinks(), number, number, torch.tensor([4, 5]), torch.zeros(2), keep)
    assert memory.whole == 2
    with pytest.raises(ap.AttnPatchError, match="the last 3 columns of the cache are not all tokens"):
        memory.crop(3, Segments(8, 8))
    memory.crop(2, Segments(8, 8))
    assert (memory.whole, memory.columns, memory.count.tolist()) == (0, 3, [2, 3])
    with pytest.raises(ap.AttnPatchError, match="the last 1 columns"):
        memory.crop(1, Segments(8, 8))
    more = torch.ones(2, 3)  # tokens again: these, and none of those before
    memory.put({}, Sinks(), number, number, torch.tensor([5, 6]), torch.zeros(2), more)
    memory.put({}, Sinks(), number, number, torch.tensor([8, 9]), torch.zeros(2), more)
    assert memory.whole == 6
    memory.put({}, Sinks(), number, number, torch.tensor([12, 14]), torch.zeros(2), keep)
    assert memory.whole == 2  # what came before the padding cannot be reached any more


def test_each_row_is_held_to_what_it_holds_itself():
    memory = Memory()
    memory.begin(2)
    number = torch.stack([torch.arange(6), torch.arange(10, 16)])
    counts, shift = torch.tensor([6, 16]), torch.tensor([5, 7])
    memory.put({}, Sinks(), number, number, counts, shift, torch.ones(2, 6))
    with pytest.raises(ap.AttnPatchError, match="rolled back by 1 tokens"):
        memory.crop(1, CUT)  # the second row goes on in segment 12, and would see from 9 on
    memory.crop(1, Segments(LENGTH, 2))
    assert memory.shift.tolist() == [5, 7]


@pytest.mark.parametrize(("columns", "shift"), [(2, 5), (3, 0)])
def test_a_row_without_tokens_begins_where_it_likes(columns, shift):
    memory = _read(3)
    memory.shift = torch.tensor([5])
    memory.crop(columns, CUT)
    assert memory.shift.tolist() == [shift]


def test_a_row_that_began_anew_has_nothing_to_take_back():
    memory = _read(6)
    memory.count, memory.whole = torch.tensor([1]), 6
    with pytest.raises(ap.AttnPatchError, match="not all tokens of every row"):
        memory.crop(2, CUT)


def test_a_state_that_was_loaded_says_nothing_of_its_last_columns():
    """They may be padding, which must not be taken for tokens because those of another text were some."""
    memory, state = _read(6), _read(5).state_dict()
    memory.load_state_dict(state)
    assert (int(memory.count), memory.columns) == (5, 5)
    with pytest.raises(ap.AttnPatchError, match="not all tokens of every row"):
        memory.crop(1, CUT)
    more = torch.arange(7)[None]
    memory.put({}, Sinks(), more, more, torch.tensor([7]), torch.zeros(1), torch.ones(1, 2))
    memory.crop(2, Segments(8, 8))
    assert int(memory.count) == 5


@pytest.mark.parametrize(("asked", "left"), [(-1, 5), (-2, 4), (-6, 0), (5, 5), (4, 4), (6, 6), (9, 6), (0, 6)])
def test_a_cache_is_cropped_by_what_goes_or_to_what_stays(asked, left):
    cache = RecurrentCache(Memory(), CUT)
    cache.memory = _read(6)
    cache.crop(asked)
    assert cache.get_seq_length() == left
    with pytest.raises(ap.AttnPatchError, match=f"from a cache that has read {left}"):
        cache.crop(-left - 1)
    cache.memory = _read(3)
    cache.crop(1)
    assert cache.get_seq_length() == 1


def test_a_cache_that_the_caller_holds_becomes_a_view_of_a_memory():
    held, memory = DynamicCache(), _read(6)
    held.mine = 3
    RecurrentCache.take_over(held, memory, CUT)
    assert type(held) is RecurrentCache
    assert held.memory is memory
    assert held.segments is CUT
    assert not hasattr(held, "mine")
    assert held.get_seq_length() == 0
    assert held.get_max_length() == -1  # none
    assert held.offloading is False


def test_what_a_cache_holds_can_be_counted():
    memory = _read(6)
    cache = RecurrentCache(memory, CUT)
    assert cache.layers[0].keys.flatten().tolist() == memory.number[0].tolist()
    assert cache.layers[0].is_initialized
    sinks = torch.full((1, 1, 2, 1), -7.0)
    memory.sinks = Sinks({0: (sinks, sinks * 2)}, torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    assert cache.layers[0].keys.flatten().tolist() == [-7, -7, *memory.number[0].tolist()]
    assert cache.layers[0].values[0, 0, :2, 0].tolist() == [-14, -14]


def test_a_cache_counts_from_where_it_began():
    memory = _read(6)
    cache = RecurrentCache(memory, CUT)
    assert cache.get_seq_length() == 0
    assert cache.is_initialized
    assert not cache.is_croppable
    assert not cache.is_compileable
    memory.columns += 2
    assert cache.get_seq_length() == 2
    cache.reset()
    assert (cache.get_seq_length(), cache.is_initialized, memory.columns) == (0, False, 8)
    assert cache.layers == []


# -- rows --------------------------------------------------------------------------------------------------------------


def _three():
    memory = Memory()
    memory.begin(3)
    number = torch.tensor([[0, 1], [2, 3], [4, 5]])
    states = number[:, None, :, None].float()
    counts, keep = torch.tensor([2, 4, 6]), torch.ones(3, 2)
    memory.put({0: (states, states + 100)}, Sinks(), number, number + 50, counts, counts + 7, keep)
    return memory


def test_a_batch_has_as_many_rows_as_the_one_before():
    memory = Memory()
    memory.reset([5])  # nothing was read yet
    memory.begin(2)
    assert {t.dtype for t in (memory.number, memory.turned, memory.count, memory.shift)} == {torch.int64}
    memory.begin(2)
    for rows in (1, 3):
        with pytest.raises(ap.AttnPatchError, match=f"a stream of 2 rows was given a batch of {rows}"):
            memory.begin(rows)
    memory.reset()
    memory.begin(3)


@pytest.mark.parametrize(
    "rows",
    [[0, 2], torch.tensor([0, 2]), torch.tensor([True, False, True]), (n for n in (2, 0))]
    + [torch.tensor([2, 0], dtype=torch.uint8)],
)
def test_the_rows_that_are_reset_and_no_others(rows):
    memory = _three()
    before = memory.number
    memory.reset(rows)
    assert memory.number.tolist() == [[NOBODY] * 2, [2, 3], [NOBODY] * 2]
    assert memory.count.tolist() == [0, 4, 0]
    assert memory.shift.tolist() == [0, 11, 0]
    assert memory.columns == 2
    assert before.tolist() == [[0, 1], [2, 3], [4, 5]]  # a checkpoint that holds it keeps it
    assert not memory.empty
    memory.reset([1])
    assert memory.empty


@pytest.mark.parametrize("rows", [[-1], [3], [0, 3], torch.tensor([1, -1])])
def test_a_row_that_is_not_there_cannot_be_reset(rows):
    memory = _three()
    with pytest.raises(ap.AttnPatchError, match="the stream has rows 0 to 2"):
        memory.reset(rows)
    assert memory.count.tolist() == [2, 4, 6]
    memory.reset([])
    assert memory.count.tolist() == [2, 4, 6]


def test_rows_go_where_they_are_told():
    memory = _three()
    RecurrentCache(memory, CUT).reorder_cache(torch.tensor([2, 0, 2, 1]))
    assert memory.count.tolist() == [6, 2, 6, 4]
    assert memory.shift.tolist() == [13, 9, 13, 11]
    assert memory.number.tolist() == [[4, 5], [0, 1], [4, 5], [2, 3]]
    assert memory.turned.tolist() == [[54, 55], [50, 51], [54, 55], [52, 53]]
    assert memory.layers[0][0][:, 0, :, 0].tolist() == memory.number.tolist()
    assert memory.layers[0][1][:, 0, 0, 0].tolist() == [104, 100, 104, 102]
    RecurrentCache(memory, CUT).batch_repeat_interleave(2)
    assert memory.count.tolist() == [6, 6, 2, 2, 6, 6, 4, 4]
    RecurrentCache(memory, CUT).batch_select_indices(torch.tensor([6, 3]))
    assert memory.count.tolist() == [4, 2]


# -- what a state may hold ---------------------------------------------------------------------------------------------


def _state(sinks=False):
    number = torch.tensor([[-1, 0, 1], [3, 4, 5]])
    state = {
        "segments": torch.tensor([4, 3, 2]), "columns": torch.tensor(6), "number": number, "turned": number.clone(),
        "count": torch.tensor([2, 6]), "shift": torch.tensor([0, -3]),
    }  # fmt: skip
    for layer in (0, 11):
        state |= {f"{layer}.k": torch.ones(2, 4, 3, 5), f"{layer}.v": torch.ones(2, 4, 3, 7)}
    if sinks:
        state |= {"sinks.number": torch.tensor([[0, -1], [0, 1]]), "sinks.turned": torch.zeros(2, 2, dtype=torch.int64)}
        for layer in (0, 11):
            state |= {f"sinks.{layer}.{side}": torch.ones(2, 4, 2, 5) for side in "kv"}
    return state


def test_what_a_stream_returns_is_taken():
    for sinks in (False, True):
        state = _state(sinks)
        assert check_state(state) == state
    edge = {**_state(), "shift": torch.tensor([-(1 << 48), (1 << 48) - 1]), "count": torch.tensor([0, (1 << 48) - 1])}
    assert check_state(edge) == edge
    empty = {**_state(), "number": torch.zeros(2, 0, dtype=torch.int64), "turned": torch.zeros(2, 0, dtype=torch.int64)}
    empty |= {name: t[:, :, :0] for name, t in empty.items() if t.dim() == 4}
    assert check_state(empty) == empty


@pytest.mark.parametrize("found", [None, [], "state", torch.ones(2)])
def test_a_state_is_a_mapping(found):
    with pytest.raises(ap.AttnPatchError, match="wanted a mapping of names to tensors"):
        check_state(found)


@pytest.mark.parametrize(
    "name", ["x", "00.k", "123456.k", "-1.k", "1.q", "1.kk", "1\u0663.k", "sinks.1", "sinks.count", 3, "1.k\n"]
)
def test_a_name_that_no_stream_returns(name):
    with pytest.raises(ap.AttnPatchError, match="no tensor"):
        check_state({**_state(True), name: torch.ones(1)})


@pytest.mark.parametrize("name", sorted(_state(True)))
def test_every_tensor_is_needed(name):
    state = _state(True)
    del state[name]
    with pytest.raises(ap.AttnPatchError, match=f"{name} is missing"):
        check_state(state)


@pytest.mark.parametrize("name", ["segments", "columns", "number", "turned", "count", "shift", "sinks.number"])
def test_numbers_are_int64_of_as_many_dimensions_as_they_have(name):
    good = _state(True)[name]
    wide = re.escape(str((1, *good.shape)))
    for bad, said in (
        *((good.float(), "float32 of"), (good.int(), "int32 of"), (good[None], f"int64 of shape {wide}")),
        *((good.tolist(), "a list of|6"), (good.to("meta"), "int64 of")),
    ):
        with pytest.raises(ap.AttnPatchError, match=f"{name} is ({said}).*; wanted int64 of {good.dim()} dimensions"):
            check_state({**_state(True), name: bad})


@pytest.mark.parametrize(
    ("name", "least"),
    [("segments", 0), ("columns", 0), ("number", -1), ("turned", -1), ("count", 0), ("shift", -(1 << 48))]
    + [("sinks.number", -1), ("sinks.turned", -1)],
)
def test_numbers_have_limits(name, least):
    for value in (least - 1, 1 << 48):
        state = _state(True)
        state[name].view(-1)[-1] = value
        with pytest.raises(ap.AttnPatchError, match=f"{name} is from .* wanted {least} to {1 << 48}"):
            check_state(state)
    state = _state(True)
    state[name].view(-1)[-1] = least
    assert check_state(state)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("number", lambda t: t[:1], "2 rows, as count has"),
        ("shift", lambda t: t[:1], "2 rows, as count has"),
        ("sinks.number", lambda t: t[:1], "2 rows, as count has"),
        ("turned", lambda t: t[:, 1:], r"turned is .*the shape of number, \(2, 3\)"),
        ("sinks.turned", lambda t: t[:, 1:], r"the shape of sinks.number, \(2, 2\)"),
        ("0.k", lambda t: t[:1], r"\(2, 3\) of them held"),
        ("0.v", lambda t: t[:, :, 1:], r"\(2, 3\) of them held"),
        ("sinks.11.k", lambda t: t[:, :, 1:], r"\(2, 2\) of them held"),
        ("0.k", lambda t: t.long(), "wanted floats"),
        ("0.k", lambda t: t[0], "wanted floats"),
        ("0.k", lambda t: t.to("meta"), "wanted floats"),
        ("0.k", lambda t: t.tolist(), "wanted floats"),
        ("11.v", lambda t: t * float("nan"), "not finite"),
        ("sinks.0.v", lambda t: t / 0, "not finite"),
        ("11.k", lambda t: t[:, 1:], "heads and dtype of the other of its layer"),
        ("11.v", lambda t: t.double(), "heads and dtype of the other of its layer"),
    ],
)
def test_tensors_that_do_not_go_together(name, change, said):
    state = _state(True)
    with pytest.raises(ap.AttnPatchError, match=said):
        check_state({**state, name: change(state[name])})


def test_sinks_are_of_every_layer():
    state = {name: t for name, t in _state(True).items() if not name.startswith("sinks.11")}
    with pytest.raises(ap.AttnPatchError, match="sinks is of 1 layers; wanted the 2 layers"):
        check_state(state)


# -- what a forward is given -------------------------------------------------------------------------------------------


def test_a_mask_may_name_the_tokens_before_and_positions_may_be_of_one_row():
    mask, place = torch.ones(2, 5), torch.arange(5)
    for fine in ((None, None), (mask, None), (torch.ones(2, 9), None), (None, place[None]), (mask, place.expand(2, 5))):
        _check_shapes(*fine, 2, 5)
    for bad in (torch.ones(1, 5), torch.ones(3, 5), torch.ones(2, 4)):
        with pytest.raises(ap.AttnPatchError, match="wanted one for each token"):
            _check_shapes(bad, None, 2, 5)
    for bad in (place, place[None, :4], place.expand(3, 5), place.expand(3, 2, 5)):
        with pytest.raises(ap.AttnPatchError, match="give each token its own"):
            _check_shapes(None, bad, 2, 5)


@pytest.mark.parametrize(
    ("keep", "read", "fine"),
    [
        ([1, 1, 1], 0, True),
        ([0, 1, 1], 0, True),
        ([0, 1, 0], 0, True),
        ([1, 0, 1], 0, False),
        ([0, 0, 0], 0, True),
        ([1, 1, 0], 3, True),
        ([0, 1, 1], 3, False),  # padding behind what was read, and tokens behind that
        ([0, 0, 0], 3, True),
    ],
)
def test_padding_stands_before_a_document_or_behind_it(keep, read, fine):
    given = torch.tensor([[1, 1, 1], keep]).bool(), torch.tensor([2, read])
    if fine:
        _check_gaps(*given)
    else:
        with pytest.raises(ap.AttnPatchError, match=r"row 1: padding between tokens.*reset\(\[1\]\)"):
            _check_gaps(*given)


@pytest.mark.parametrize(
    ("place", "keep", "allowed", "fine"),
    [
        ([4, 5, 6], [1, 1, 1], False, True),
        ([4, 5, 0], [1, 1, 1], False, False),
        ([4, 5, 0], [1, 1, 1], True, True),
        ([4, 6, 7], [1, 1, 1], False, False),
        ([9, 5, 6], [0, 1, 1], False, True),  # what stands at padding is nobody's
        ([4, 5, 0], [1, 1, 0], False, True),
    ],
)
def test_positions_count_up(place, keep, allowed, fine):
    given = torch.tensor([[0, 1, 2], place]), torch.tensor([[1, 1, 1], keep]).bool(), allowed
    if fine:
        _check_packed(*given)
    else:
        with pytest.raises(ap.AttnPatchError, match="position_ids that do not count up"):
            _check_packed(*given)


def test_what_attention_is_handed_beside_the_memory_is_looked_at():
    model = with_memory(tiny_model("llama", num_hidden_layers=1))
    module = model.model.layers[0].self_attn
    states = [torch.zeros(1, 4, 3, 16)] * 3

    def asked(window, given):
        return _known(AttentionCall("sdpa", module, *states, None, given), window)

    for fine in ({}, {"sliding_window": 7}, {"sliding_window": None}, {"output_attentions": False}):
        assert asked(7, fine) == fine
    passed = {"position_ids": torch.arange(3)[None], "cu_seq_lens_q": torch.tensor([0, 3])}
    assert asked(None, passed) == {}  # flash attention would read documents from them
    for bad, said in (
        ({"sliding_window": 6}, "asks for a window of 6 tokens; when it was patched, the window was 7"),
        ({"output_attentions": True}, "attention weights"),
        ({"cu_seq_lens_q": torch.tensor([0, 1, 3])}, "passes cu_seq_lens_q to its attention"),
        ({words.SCORE_BIAS: torch.ones(1)}, f"passes {words.SCORE_BIAS} to its attention"),
    ):
        with pytest.raises(ap.AttnPatchError, match=said):
            asked(7, bad)
    call = Call(CUT, Tokens(*(torch.ones(1, 2, dtype=torch.int64),) * 3), None, 1)
    assert met(module, MemoryMask(call)).call is call
    for other, mask in ((module, None), (module, torch.ones(1, 1, 2, 2)), (torch.nn.Linear(2, 2), MemoryMask(call))):
        with pytest.raises(ap.AttnPatchError, match="in the place of the memory"):
            met(other, mask)


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_thread_opens_one_stream_and_closes_it_whatever_happens():
    model, ids = with_memory(tiny_model("llama", num_hidden_layers=1)), random_ids(1, 12)
    wanted = logits_of(model, ids)
    outer, inner = ap.stream(model), ap.stream(model)
    with outer:
        with pytest.raises(ap.AttnPatchError, match="this thread has an open stream"):
            inner.__enter__()
        logits_of(model, ids)
        assert outer.tokens == [12]  # and is still open
    assert torch.equal(logits_of(model, ids), wanted)
    with pytest.raises(KeyError), inner:
        raise KeyError
    assert torch.equal(logits_of(model, ids), wanted)
    with inner:
        logits_of(model, ids)
    assert inner.tokens == [12]


def test_a_stream_whose_opening_is_interrupted_is_closed(monkeypatch):
    model = with_memory(tiny_model("llama", num_hidden_layers=1))
    plain = MemoryHook.open

    def interrupted(self, memory):
        plain(self, memory)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MemoryHook, "open", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ap.stream(model).__enter__()
    with ap.stream(model):  # or another would be open
        pass


def test_a_thread_without_a_stream_is_refused_while_another_has_one():
    model, ids, found = with_memory(tiny_model("llama", num_hidden_layers=1)), random_ids(1, 12), []

    def run():
        with pytest.raises(ap.AttnPatchError, match="another thread has a stream open"):
            logits_of(model, ids)
        with ap.stream(model) as own:
            found.append(logits_of(model, ids))
        assert own.tokens == [12]
        found.append(True)

    wanted = logits_of(model, ids)
    with ap.stream(model) as stream:
        logits_of(model, ids)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert stream.tokens == [12]
    assert torch.equal(found[0], wanted)
    assert found[1:] == [True]


@pytest.mark.parametrize("count", [0, 2])
def test_a_stream_is_of_one_memory(count):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.models = torch.nn.ModuleList(
                with_memory(tiny_model("llama", num_hidden_layers=1)) for _ in range(count)
            )

    with pytest.raises(ap.AttnPatchError, match=f"Both: {count} of its modules have a memory, wanted one"):
        ap.stream(Both())


@torch.no_grad()
def test_a_cache_of_another_stream_is_refused():
    model, ids = with_memory(tiny_model("llama", num_hidden_layers=1)), random_ids(1, 12)
    outside = ap.stream(model)
    output = model(input_ids=ids, use_cache=True)
    cache = next(value for value in output.values() if isinstance(value, RecurrentCache))
    name = next(name for name, value in output.items() if value is cache)
    with outside, pytest.raises(ap.AttnPatchError, match="the cache comes from outside of the open stream"):
        logits_of(model, ids, **{name: cache})
    model(input_ids=ids, **{name: cache})
    assert cache.get_seq_length() == 24
