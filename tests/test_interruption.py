"""Ctrl-C: what puts things back runs to its end, and no line of a patch leaves a model between before and after."""

import csv
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from snapshot import registries, snapshot
from standing import Standing

import hf_attnpatch as ap
from hf_attnpatch import report as reports
from hf_attnpatch.edits import AddPreHook, SetAttribute, SetConfig, tried
from hf_attnpatch.exclusive import lock_of
from hf_attnpatch.interruption import all_or_nothing, complete, ensured, entered, inside, removing
from hf_attnpatch.probe import quiet, remembered
from hf_attnpatch.recurrence import streams

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from interrupt import RESULTS, interrupt, page  # noqa: E402


def stopping_once(done):
    """Something that is stopped on its way the first time."""

    def put_back():
        done.append("begun")
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append("ended")

    return put_back


def in_a_block(put_back):
    with ensured(put_back):
        pass


@pytest.mark.parametrize(
    "around",
    [complete, in_a_block, lambda put_back: all_or_nothing(lambda: 1 / 0, put_back)],
    ids=["complete", "ensured", "all_or_nothing"],
)
def test_what_is_stopped_while_it_puts_things_back_begins_again(around):
    done = []
    with pytest.raises(KeyboardInterrupt):
        around(stopping_once(done))
    assert done[:3] == ["begun", "begun", "ended"]


def test_a_signal_waits_until_things_are_back():
    done = []

    def put_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("ended")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        complete(put_back)
    assert done == ["ended"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_of_one_s_own_is_asked_afterwards():
    seen, before = [], signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        complete(lambda: complete(lambda: (signal.raise_signal(signal.SIGTERM), seen.append("back"))))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["back", signal.SIGTERM]


def test_other_threads_leave_signals_alone():
    before, found = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: complete(lambda: found.append(signal.getsignal(signal.SIGINT))))
    thread.start()
    thread.join()
    assert found == [before]


def test_modes_of_torch_and_hooks_end_with_their_block():
    model = tiny_model("gpt2")
    with entered(torch.no_grad()):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert inside(torch.device("meta"), lambda: torch.zeros(1)).is_meta
    with pytest.raises(ZeroDivisionError):
        inside(torch.device("meta"), lambda: 1 / 0)
    assert not torch.zeros(1).is_meta
    with removing() as handles:
        handles.append(model.register_forward_hook(lambda *_: None))
    assert not model._forward_hooks


def test_a_namespace_is_never_emptied_while_it_is_put_back():
    class Watched(dict):
        least = 2

        def __delitem__(self, key):
            super().__delitem__(key)
            self.least = min(self.least, len(self))

        def pop(self, *args):
            found = super().pop(*args)
            self.least = min(self.least, len(self))
            return found

        def clear(self):
            raise AssertionError("another thread would find nothing")

    store = Watched(a=1, b=[2])
    way_back = remembered(store)
    store["c"] = 3
    store["b"].append(4)
    store["a"] = 5
    del store["a"]
    way_back()
    assert list(store.items()) == [("a", 1), ("b", [2])]
    way_back()
    assert list(store) == ["a", "b"]


class _Hook:
    def __call__(self, module, args, kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "edits",
    [
        [SetConfig("", "n_ctx", 7), SetAttribute("transformer.h.0", "note", 1), AddPreHook("transformer", _Hook(), "")],
    ],
)
def test_an_interrupted_forward_takes_the_edits_back(edits):
    model = tiny_model("gpt2")
    registries()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), tried(model, edits), quiet(model):
        model(torch.arange(5, 10)[None])
    assert snapshot(model) == before


def test_ctrl_c_within_a_revert_comes_after_it(monkeypatch):
    model = tiny_model("gpt2")
    registries()
    before = snapshot(model)
    report = ap.apply(model, ap.PositionTable(length=200))
    last = report._writes[-1]
    stopped = last.undo

    def undo():
        signal.raise_signal(signal.SIGINT)
        stopped()

    object.__setattr__(last, "undo", undo)
    with pytest.raises(KeyboardInterrupt):
        report.revert()
    assert snapshot(model) == before
    report.revert()
    assert snapshot(model) == before


def test_a_stream_that_is_interrupted_as_it_ends_is_closed(monkeypatch):
    model, left = tiny_model("llama"), []
    ap.apply(model, ap.SegmentRecurrence(segment_length=8, memory_length=6), self_check=False)

    def stopped(put_back):
        left.append(put_back)
        if len(left) == 1:
            raise KeyboardInterrupt
        complete(put_back)

    monkeypatch.setattr(streams, "complete", stopped)
    stream = ap.stream(model)
    with pytest.raises(KeyboardInterrupt), stream:
        pass
    with ap.stream(model), pytest.raises(ap.AttnPatchError, match="open stream"):
        stream.__enter__()


# a child for each place: 30 to 60 ms
@pytest.mark.parametrize(("action", "sample"), [("revert", 40), ("apply", 30), ("patched", 15)])
def test_no_line_leaves_a_model_between_before_and_after(action, sample):
    (row,) = interrupt("gpt2", "position_table", [action], sample)
    assert row["damaged"] == 0, row["examples"]
    assert row["tried"] >= sample
    assert row["exact"] == row["lines"]  # so that the last visit of each was known
    assert row["before"]


def test_a_way_back_that_is_not_taken_again_is_found_here(monkeypatch):
    monkeypatch.setattr(reports, "complete", lambda put_back: put_back())
    (row,) = interrupt("gpt2", "position_table", ["revert"], 40)
    assert row["damaged"] >= 2


def test_lines_that_are_known_need_no_child():
    known = {}
    (first,) = interrupt("gpt2", "position_table", ["revert"], 5, known)
    (second,) = interrupt("gpt2", "position_table", ["revert"], None, known)
    assert first["tried"] >= 5
    assert (second["tried"], second["lines"]) == (0, first["lines"])


def _another_handler(model):
    signal.signal(signal.SIGTERM, lambda *_: None)


CHANGES = {
    "an attribute": lambda model: setattr(model.transformer.h[0].attn, "scale_attn_weights", False),
    "a hook": lambda model: model.transformer.register_forward_hook(print),
    "a field of the config": lambda model: model.config.__setattr__("n_ctx", 7),
    "the config's class": lambda model: setattr(model.config, "__class__", type("Other", (type(model.config),), {})),
    "a weight": lambda model: model.lm_head.weight.data[0, 0].add_(1),
    "a parameter's object": lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight)),
    "a gradient": lambda model: setattr(model.lm_head.weight, "grad", torch.zeros_like(model.lm_head.weight)),
    "the mode": lambda model: model.transformer.h[1].train(),
    "the order of modules": lambda model: model._modules.update(transformer=model._modules.pop("transformer")),
    "gradients of the process": lambda model: torch.set_grad_enabled(False),
    "random numbers of the process": lambda model: torch.rand(1),
    "signal handlers of the process": _another_handler,
    "lock of the process": lambda model: lock_of(model).acquire(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_judge_sees(name):
    model = tiny_model("gpt2")
    handler, gradients = signal.getsignal(signal.SIGTERM), torch.is_grad_enabled()
    standing = Standing(model)
    assert standing.difference() is None
    try:
        CHANGES[name](model)
        assert standing.difference() is not None
        assert (standing.difference_around() == name) == name.endswith("of the process")
    finally:
        signal.signal(signal.SIGTERM, handler)
        torch.set_grad_enabled(gradients)


def test_the_page_is_that_of_the_table_and_no_model_was_damaged():
    rows = list(csv.DictReader((RESULTS / "interruption.csv").open()))
    assert page(rows) == (RESULTS / "README.md").read_text()
    assert {row["damaged"] for row in rows} == {"0"}
    assert len({row["family"] for row in rows}) == 5


def test_a_thread_that_ended_does_not_count_and_one_that_began_does():
    """A fork has one thread, however many the process had, as pytest's workers and progress bars have."""
    stop = threading.Event()
    first, second = threading.Thread(target=stop.wait), threading.Thread(target=stop.wait)
    first.start()
    standing = Standing(tiny_model("llama"))
    assert standing.difference() is None
    second.start()
    assert standing.difference() == "threads of the process"
    stop.set()
    first.join()
    second.join()
    assert standing.difference() is None
