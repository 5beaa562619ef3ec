"""Which patches are taken off for one that comes beneath them, on modules that hold nothing but marks."""

import types

import pytest
from torch import nn

import hf_attnpatch as ap
from hf_attnpatch import record, stacking
from hf_attnpatch.attention.wrapper import HELD, AddWrapper, RemoveWrapper, Wrapper
from hf_attnpatch.edits import AddHook, AddPreHook, RemoveHook, SetAttribute
from hf_attnpatch.errors import AttnPatchError, PatchConflict
from hf_attnpatch.patch import REGISTRY
from hf_attnpatch.stacking import Lifted, in_order, lift, own

SPAN = ap.SelfExtend(window=6, group=3, trained=10)
SINKS = ap.AttentionSinks(num_sinks=2, window=6)
MEMORY = ap.SegmentRecurrence(segment_length=8, memory_length=8)
SCALING, ALIBI, HEADS = ap.RopeScaling(kind="yarn", factor=2.0), ap.Alibi(), ap.GroupedQuery(num_kv_heads=2)


class _Around(Wrapper):
    name, order = "around", 1


class _Hook:
    def __call__(self, *args):
        return None


class _Stream(_Hook):
    """The hook of a memory."""

    def __init__(self, is_open):
        self.is_open = is_open


def _model(*patches, recorded=True):
    """A model whose hooks and wrappers say that these patches put them there."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    marks = {}
    for place, patch in zip(model, patches, strict=False):
        marks[patch.name] = hook, wrapper = _Hook(), _Around()
        own(patch.name, [AddHook("", hook, ""), AddWrapper("", wrapper)])
        place.register_forward_hook(hook, with_kwargs=True)
        setattr(place, HELD, (*vars(place).get(HELD, ()), wrapper))
    model[0].register_forward_pre_hook(lambda *_: None)  # a user's
    model.config = types.SimpleNamespace()
    if recorded:
        entries = tuple({**patch.to_record(None), "stock": False} for patch in patches)
        kept = record.Record(entries, "x", "llama", False, {"hf_attnpatch": "0", "transformers": "0"})
        setattr(model.config, record.FIELD, kept.to_dict())
    return model, marks


def test_heights_are_what_patches_say_they_stand_on():
    assert [p.height for p in (HEADS, SCALING, ALIBI, SPAN, MEMORY)] == [0, 0, 0, 1, 2]
    assert in_order([MEMORY, SPAN, HEADS, SCALING]) == (HEADS, SCALING, SPAN, MEMORY)  # of one height, as given
    assert in_order([SCALING, HEADS]) == (SCALING, HEADS)
    assert {name: stacking._height(name) for name in ("self_extend", "", "nobody's")} == {
        **{"self_extend": 1, "": 0},
        "nobody's": 0,
    }
    assert REGISTRY["segment_recurrence"].height == 2


@pytest.mark.parametrize(
    ("there", "new", "off"),
    [
        ((SPAN, MEMORY), SCALING, (SPAN, MEMORY)),  # changes positions: both stand on them
        ((MEMORY, SPAN), SCALING, (SPAN, MEMORY)),
        ((SPAN,), SCALING, (SPAN,)),
        ((MEMORY,), SCALING, (MEMORY,)),
        ((MEMORY,), SPAN, (MEMORY,)),
        ((SPAN, MEMORY), HEADS, ()),
        ((SPAN,), MEMORY, ()),
        ((ALIBI, SPAN), SCALING, (SPAN,)),
        ((SPAN, MEMORY), SINKS, (MEMORY,)),
        ((ALIBI,), SCALING, ()),  # beneath which nothing stands
        ((SPAN,), SPAN, ()),  # that it is there twice is another's error
        ((), SCALING, ()),
    ],
)
def test_what_stands_above_is_taken_off_and_put_on_again_in_order(there, new, off):
    model, marks = _model(*there)
    found = lift(model, new)
    assert found.patches == off
    wanted = []
    for n, patch in enumerate(there):
        if patch in off:
            hook, _ = marks[patch.name]
            wanted += [RemoveWrapper(str(n), "around"), RemoveHook(str(n), hook)]
    assert list(found.edits) == wanted
    assert off or found == Lifted()


def test_what_no_record_tells_cannot_be_put_on_again():
    for model, lost in ((_model(SPAN, recorded=False)[0], "self_extend"), (_model(SPAN, MEMORY)[0], "self_extend")):
        kept = getattr(model.config, record.FIELD, None)
        if kept is not None:
            kept["patches"] = kept["patches"][1:]
        with pytest.raises(
            PatchConflict, match=f"{lost} is on this model and stands in no record, .* above {ALIBI.name}"
        ):
            lift(model, ALIBI)


@pytest.mark.parametrize("is_open", [True, False])
def test_nothing_comes_beneath_a_stream_that_is_open(is_open, monkeypatch):
    model, _ = _model(MEMORY)
    streams = {id(model[0]): None, id(model[1]): _Stream(is_open)}
    monkeypatch.setattr(stacking, "recalling_of", lambda module: streams.get(id(module)))
    if not is_open:
        assert lift(model, SCALING).patches == (MEMORY,)
        return
    with pytest.raises(AttnPatchError, match=f"a stream is open, .* before {SCALING.name}; leave its with block first"):
        lift(model, SCALING)


def test_marks_are_on_what_can_be_found_again():
    hook, behind, wrapper = _Hook(), _Hook(), _Around()
    edits = [AddPreHook("a", hook, ""), AddHook("a", behind, ""), AddWrapper("a", wrapper), SetAttribute("a", "b", 1)]
    own("mine", edits)
    assert [vars(thing)[stacking._OWNER] for thing in (hook, behind, wrapper)] == ["mine"] * 3
