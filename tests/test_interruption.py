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

import hf_attnpatch as ap
from hf_attnpatch import report as reports
from hf_attnpatch.edits import AddPreHook, SetAttribute, SetConfig, tried
from hf_attnpatch.interruption import all_or_nothing, complete, ensured, entered, inside, removing
from hf_attnpatch.probe import quiet, remembered

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


# a child for each of some hundred places: 20 to 50 ms each
@pytest.mark.parametrize(("action", "sample"), [("revert", None), ("apply", 40), ("patched", 15)])
def test_no_line_leaves_a_model_between_before_and_after(action, sample):
    (row,) = interrupt("gpt2", "position_table", [action], sample)
    assert row["damaged"] == 0, row["examples"]
    assert row["tried"] >= (sample or 50)
    assert row["before"]


def test_a_way_back_that_is_not_taken_again_is_found_here(monkeypatch):
    monkeypatch.setattr(reports, "complete", lambda put_back: put_back())
    (row,) = interrupt("gpt2", "position_table", ["revert"], None)
    assert row["damaged"] >= 5


def test_the_page_is_that_of_the_table_and_no_model_was_damaged():
    rows = list(csv.DictReader((RESULTS / "interruption.csv").open()))
    assert page(rows) == (RESULTS / "README.md").read_text()
    assert {row["damaged"] for row in rows} == {"0"}
    assert len({row["family"] for row in rows}) == 5
