"""Whatever fails, and wherever: the model is bitwise what it was."""

import dataclasses

import pytest
from patches import CASES, build
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch import api, edits

_BY_NAME = {case.name: case for case in CASES}
# one model for each way in which a patch writes: config and projections, config and rotary module (nested too), rope
# in a fused family, shared projections with hooks and a config class of our own, with and without new output
# projections, the attention function
WAYS = [
    ("llama", "grouped_2_mean"),
    ("llama", "rope_yarn"),
    ("gemma3_text", "rope_llama3"),
    ("phi3", "rope_longrope"),
    ("gpt2", "grouped_2_mean"),
    ("gpt2", "grouped_2_principal"),
    ("gpt_neox", "grouped_1_first"),
    ("olmo2", "grouped_2_mean"),
    ("llama", "flash_sdpa"),
]


class Injected(Exception):
    """Not one that the package could expect."""


class _Edits:
    """Counts the edits that run, a kernel's trial included, and raises at one of them."""

    def __init__(self, monkeypatch, at=None):
        self.count = 0
        for kind in vars(edits).values():
            if isinstance(kind, type) and issubclass(kind, edits.Edit) and kind is not edits.Edit:
                monkeypatch.setattr(kind, "run", self._wrapped(kind.run, at))

    def _wrapped(self, run, at):
        def counted(edit, model):
            index, self.count = self.count, self.count + 1
            if index == at:
                raise Injected(index)
            return run(edit, model)

        return counted


def _number_of_edits(model_type, case):
    with pytest.MonkeyPatch.context() as monkeypatch:
        model = build(model_type, False, case)
        counter = _Edits(monkeypatch)
        assert ap.apply(model, case.patch).changed
        return counter.count


def _cells():
    for model_type, name in WAYS:
        for index in range(_number_of_edits(model_type, _BY_NAME[name])):
            yield pytest.param(model_type, _BY_NAME[name], index, id=f"{model_type}-{name}-{index}")


def pytest_generate_tests(metafunc):
    if "index" in metafunc.fixturenames:
        metafunc.parametrize(("model_type", "case", "index"), list(_cells()))


def test_an_exception_at_any_edit_unwinds_all(model_type, case, index, monkeypatch):
    model = build(model_type, False, case)
    before = snapshot(model)
    counter = _Edits(monkeypatch, at=index)
    with pytest.raises(Injected):
        ap.apply(model, case.patch)
    assert counter.count == index + 1
    assert snapshot(model) == before


@pytest.mark.parametrize(("model_type", "name"), WAYS)
@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_an_exception_in_the_self_check_unwinds_all(model_type, name, error, monkeypatch):
    def check(*_):
        raise error

    model = build(model_type, False, _BY_NAME[name])
    before = snapshot(model)
    monkeypatch.setattr(api, "_check", check)
    with pytest.raises(error):
        ap.apply(model, _BY_NAME[name].patch)
    assert snapshot(model) == before


@pytest.mark.parametrize(("model_type", "name"), WAYS)
def test_an_exception_in_the_forward_after_patching_unwinds_all(model_type, name, monkeypatch):
    model = build(model_type, False, _BY_NAME[name])
    before = snapshot(model)
    real, calls = api.trace, []

    def trace(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Injected
        return real(*args)

    monkeypatch.setattr(api, "trace", trace)
    with pytest.raises(Injected):
        ap.apply(model, _BY_NAME[name].patch)
    assert len(calls) == 2
    assert snapshot(model) == before


def test_a_patch_that_makes_numbers_that_are_not_finite_is_undone(monkeypatch):
    from hf_attnpatch.heads import regroup

    model = build("llama", False, _BY_NAME["grouped_2_mean"])
    before = snapshot(model)
    with monkeypatch.context() as planted:  # while heads are made
        planted.setattr(regroup, "resize_heads", lambda rows, n, method: rows[:n] * float("nan"))
        with pytest.raises(ap.AttnPatchError, match="the new heads are not finite"):
            ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    assert snapshot(model) == before
    filled = regroup._filled
    spoilt = lambda new, tensors, old: filled(new, {k: t * float("nan") for k, t in tensors.items()}, old)  # noqa: E731
    monkeypatch.setattr(regroup, "_filled", spoilt)  # after that
    with pytest.raises(ap.SelfCheckFailed, match="not finite"):
        ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    assert snapshot(model) == before


def test_a_patch_that_should_preserve_the_logits_and_does_not_is_undone(monkeypatch):
    from hf_attnpatch.heads import regroup

    case = _BY_NAME["grouped_up"]
    model = build("llama", False, case)
    before = snapshot(model)
    monkeypatch.setattr(regroup, "resize_heads", lambda rows, n, method: rows.repeat(2, *[1] * (rows.dim() - 1)))
    with pytest.raises(ap.SelfCheckFailed, match="must not change the logits"):
        ap.apply(model, case.patch)
    assert snapshot(model) == before


def test_a_site_that_never_runs_is_an_error(monkeypatch):
    case = _BY_NAME["grouped_2_mean"]
    model = build("llama", False, case)
    before = snapshot(model)
    real = api.trace

    def trace(model, inputs, watch=()):
        found = real(model, inputs, watch)
        return dataclasses.replace(found, calls={**found.calls, watch[0]: 0})

    monkeypatch.setattr(api, "trace", trace)
    with pytest.raises(ap.SelfCheckFailed, match="model.layers.0.self_attn: ran 0 times"):
        ap.apply(model, case.patch)
    assert snapshot(model) == before
