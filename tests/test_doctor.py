"""``attnpatch doctor`` without a folder: what works here is proved, and what does not is seen."""

import importlib.metadata
import json
import re
import types
from pathlib import Path

import pytest
import torch
from test_cli import fails, run
from transformers.cache_utils import Cache

import hf_attnpatch as ap
from hf_attnpatch.commands import doctor as cli_doctor  # noqa: F401 - the module that the tests below patch
from hf_attnpatch.doctoring import environment, expected, trial
from hf_attnpatch.doctoring.decoding import by_hand, generated, texts
from hf_attnpatch.doctoring.environment import Extra, Package
from hf_attnpatch.doctoring.expected import CASES, EXTRAS, KERNELS, Case
from hf_attnpatch.doctoring.kernels import Kernel
from hf_attnpatch.doctoring.models import MODELS, build
from hf_attnpatch.doctoring.result import DoctorReport
from hf_attnpatch.doctoring.text import clean
from hf_attnpatch.doctoring.trial import FAILS, Trial
from hf_attnpatch.patch import REGISTRY
from hf_attnpatch.stepwise import NoCache

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report():
    return ap.doctor(models=("llama", "gpt2"))


def test_all_that_should_work_here_does(report):
    assert report.failures == ()
    assert report.ok


def test_every_patch_is_tried_on_every_model(report):
    assert {spec["patch"] for spec in (case.spec for case in CASES.values())} == set(REGISTRY)
    assert {(t.patch, t.model) for t in report.trials} == {
        (p, m) for p in ("nothing", *CASES) for m in ("llama", "gpt2")
    }


def test_what_works_was_measured(report):
    working = [t for t in report.trials if t.outcome == "works"]
    assert len(working) > 20
    for t in working:
        assert 0 <= t.difference <= 1e-5, t
        assert t.held > 0, t
        assert t.patch == "nothing" or t.change is not None, t


@pytest.mark.parametrize("name", MODELS)
def test_the_table_names_models_that_there_are(name):
    assert all({*case.refused, *case.once, *case.same} <= set(MODELS) for case in CASES.values())
    model = build(name, CPU)
    assert generated(model, texts(model)).difference <= 1e-5
    assert by_hand(model, texts(model)[0]) <= 1e-5


def test_kernels_are_run_or_refuse_with_a_reason(report):
    assert [k.name for k in report.kernels if k.device == "cpu"] == list(KERNELS)
    for k in report.kernels:
        assert k.ok, k
        assert (k.difference is None) == (k.outcome == "refuses") == bool(k.note), k
    assert {k.name for k in report.kernels if k.outcome == "works"} >= {"sdpa", "flex_attention"}


def test_the_report_is_json_and_says_nothing_of_this_machine(report):
    text = json.dumps(report.to_dict())
    assert json.loads(text)["ok"] is report.ok
    for private in (str(ROOT), str(Path.home()), "site-packages/"):
        assert private not in text
    assert "transformers" in str(report)


# what a release that does not fit may do, one fault each


class Faulty:
    """In the place of `apply`: applies, and then breaks something."""

    def __init__(self, monkeypatch, fault=None, revert=True):
        self.fault, self.revert, self.true = fault, revert, trial.apply
        monkeypatch.setattr(trial, "apply", self)

    def __call__(self, model, patch):
        report = self.true(model, patch)
        undo = self.fault(model) if self.fault is not None else lambda: None

        def revert():
            undo()
            if self.revert:
                report.revert()

        return types.SimpleNamespace(revert=revert)


def tried(label="NoPosition", name="llama", case=None):
    case = CASES[label] if case is None else case
    return trial.trial(label, name, build(name, CPU, case.attention), case)


def test_without_a_fault_it_works(monkeypatch):
    Faulty(monkeypatch)
    assert tried().outcome == "works"


def test_a_patch_that_decodes_wrongly_fails(monkeypatch):
    def fault(model):
        def one_more(module, args, output):
            return output + 0.01 if output.shape[1] == 1 else output

        return model.get_input_embeddings().register_forward_hook(one_more).remove

    Faulty(monkeypatch, fault)
    found = tried()
    assert found.outcome == FAILS
    assert found.difference > 1e-5
    assert "cached decoding by generate differs" in found.note


def test_a_patch_that_is_wrong_only_where_nothing_tells_positions_fails(monkeypatch):
    """`generate` passes positions; a forward of one's own, on the cache alone, must be right, too."""

    def fault(model):
        true = model.forward

        def forward(*args, position_ids=None, **kwargs):
            ids = args[0] if args else kwargs.get("input_ids")
            if ids is not None and ids.shape[1] < 3 and position_ids is None:
                position_ids = torch.zeros_like(ids)
            return true(*args, position_ids=position_ids, **kwargs)

        model.forward = forward
        return lambda: vars(model).pop("forward")

    Faulty(monkeypatch, fault)
    found = tried("Rotary")
    assert found.outcome == FAILS
    assert "forwards of one's own" in found.note, found.note


def test_a_model_that_returns_no_cache_fails():
    model = build("llama", CPU)
    true = model.forward

    def forward(*args, **kwargs):
        output = true(*args, **kwargs)
        for name in [name for name, value in output.items() if isinstance(value, Cache)]:
            output[name] = None
        return output

    model.forward = forward
    with pytest.raises(NoCache, match="returned none that it takes again"):
        by_hand(model, texts(model)[0])


def test_generating_without_a_cache_fails():
    model = build("llama", CPU)

    def generate(ids, attention_mask, max_new_tokens, **_):
        for _step in range(max_new_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)

    model.generate = generate
    with pytest.raises(NoCache, match=r"handed \[20, 21, 22, .*no cache was used"):
        generated(model, texts(model))


def test_a_patch_without_effect_fails(monkeypatch):
    monkeypatch.setattr(trial, "apply", lambda *_: types.SimpleNamespace(revert=lambda: None))
    found = tried()
    assert found.outcome == FAILS
    assert "no effect" in found.note


def test_a_patch_that_must_not_change_the_logits_and_does_fails(monkeypatch):
    Faulty(
        monkeypatch, lambda model: model.get_input_embeddings().register_forward_hook(lambda m, a, out: 2 * out).remove
    )
    found = tried("Flash")
    assert found.outcome == FAILS
    assert "must not" in found.note


def test_a_revert_that_leaves_something_fails(monkeypatch):
    Faulty(monkeypatch, revert=False)
    found = tried()
    assert found.outcome == FAILS
    assert "after revert, the model's" in found.note


def test_a_cache_that_grows_beyond_what_is_promised_fails():
    found = trial.trial("NoPosition", "llama", build("llama", CPU), Case({"patch": "no_position"}, held=20))
    assert found.outcome == FAILS
    assert "the cache holds 25 tokens, 20 allowed" in found.note


def refusing(message, leaves=lambda model: None):
    def apply(model, patch):
        leaves(model)
        raise ap.UnsupportedArchitecture(message)

    return apply


def test_a_refusal_is_a_fault_unless_the_table_says_so(monkeypatch):
    monkeypatch.setattr(trial, "apply", refusing("no such place"))
    assert not tried().ok
    assert tried(case=Case({"patch": "no_position"}, {"llama": "no such place"})).ok
    other = tried(case=Case({"patch": "no_position"}, {"llama": "another reason"}))
    assert not other.ok
    assert "not because 'another reason'" in other.note


def test_a_refusal_that_touches_the_model_fails(monkeypatch):
    def leaves(model):
        model.get_input_embeddings().weight.data[7] += 1

    monkeypatch.setattr(trial, "apply", refusing("no such place", leaves))
    found = tried(case=Case({"patch": "no_position"}, {"llama": "no such place"}))
    assert found.outcome == FAILS
    assert "the model's tensors are not what they were" in found.note


@pytest.mark.parametrize("error", [ap.SelfCheckFailed, KeyError, TypeError, RuntimeError])
def test_a_failed_self_check_and_a_crash_are_faults_and_not_refusals(monkeypatch, error):
    def apply(model, patch):
        raise error("broken")

    monkeypatch.setattr(trial, "apply", apply)
    found = tried(case=Case({"patch": "no_position"}, {"llama": "broken"}))
    assert found.outcome == FAILS
    assert error.__name__ in found.note


def test_a_refusal_of_old_releases_is_expected_there_alone(monkeypatch):
    monkeypatch.setattr(expected.transformers, "__version__", "5.0.0")
    assert CASES["Flash"].refusal("mpt") is not None
    monkeypatch.setattr(expected.transformers, "__version__", "5.23.0")
    assert CASES["Flash"].refusal("mpt") is None


# what stands beside the trials


def test_extras_are_those_of_the_project():
    text = (
        (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    )
    wanted = {
        name: set(re.findall(r'"([a-z-]+)[>=]', packages))
        for name, packages in re.findall(r"^(\w+) = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        if name != "dev"
    }
    assert {name: set(modules) for name, modules in EXTRAS.items()} == wanted


def test_an_extra_that_is_there_and_broken_is_a_fault(monkeypatch):
    def broken(name):
        raise AttributeError("module has no attribute")

    monkeypatch.setattr(
        environment, "importlib", types.SimpleNamespace(import_module=broken, metadata=importlib.metadata)
    )
    found = environment._extra("plot", EXTRAS["plot"])
    assert (found.outcome, found.ok) == (FAILS, False)
    absent = environment._extra("none", {"no-such-distribution": "no_such_module"})
    assert (absent.outcome, absent.ok) == ("not installed", True)


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        ("5.0.0", "tested"),
        ("5.2+cpu", "tested"),
        ("5.4", "newer than tested"),
        ("4.57.6", "older than tested"),
        (None, "not installed"),
        ("unknown", ""),
    ],
)
def test_how_a_release_stands_to_those_that_were_tested(version, standing):
    assert Package("transformers", version, ("5.0.0", "5.3.0")).standing == standing


def test_texts_are_one_line_without_folders_and_tokens(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    found = clean(f"in {ROOT}/hf_attnpatch/api.py\n and {Path.home()}/x, secret-of-mine, hf_{'a' * 30}")
    assert "\n" not in found
    for private in (str(ROOT), str(Path.home()), "secret-of-mine", "a" * 30):
        assert private not in found
    assert len(clean("word " * 1000)) == 400
    assert clean("/opt/x/lib/python3.11/site-packages/transformers/utils.py") == "site-packages/transformers/utils.py"


def test_mistakes_are_clear():
    with pytest.raises(ap.AttnPatchError, match="no 'bert'; choose from embedded"):
        ap.doctor(models=["bert"])
    assert fails(run("doctor", "--write-legacy-keys"), "no FOLDER is given")
    assert fails(run("doctor", "--device", "abacus"), "device 'abacus' is not there")


def small(outcome):
    trials = (
        Trial("Alibi", "llama", outcome, "works", 1e-7, 0.5, 25, "" if outcome == "works" else "wrong [numbers]"),
    )
    kernels = (Kernel("sdpa", "cpu", "float32", "works", "works", 1e-7),)
    packages = (Package("transformers", "5.99", ("5.0", "5.3")),)
    return DoctorReport(packages, "Linux", trials, kernels, (Extra("plot", "not installed", "needs matplotlib"),), 1.0)


@pytest.mark.parametrize(("outcome", "status"), [("works", 0), (FAILS, 1)])
def test_the_exit_status_says_whether_something_fails(monkeypatch, outcome, status):
    monkeypatch.setattr(ap, "doctor", lambda **_: small(outcome))
    tables, data = run("doctor"), run("doctor", "--json")
    assert tables.exit_code == data.exit_code == status
    assert json.loads(data.stdout) == small(outcome).to_dict()
    for shown in ("newer than tested", "Alibi", "sdpa", "[plot]", *(["wrong [numbers]"] if status else [])):
        assert shown in tables.stdout
