"""Whatever fails on the way of a conversion, and wherever: the model and the process are bitwise what they were."""

import random

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch.heads import calibration, conversion, estimate, repair

MODELS = ["llama", "gpt2", "bert", "qwen3"]


class Injected(Exception):
    """Not one that the package could expect."""


def patch(**more):
    ids = torch.randint(5, 99, (6, 48), generator=torch.Generator().manual_seed(0))
    settings = {"method": "refined", "calibration": ids, "refine_steps": 4, **more}
    return ap.GroupedQuery(num_kv_heads=2, **settings)


def build(model_type):
    """In a state that is nobody's default: half in training, half of it trainable, sdpa or eager, a gradient."""
    kernel = "sdpa" if model_type != "bert" else "eager"
    model = tiny_model(model_type, encoder=model_type == "bert", attn_implementation=kernel).train()
    model.get_submodule(ap.describe(model).sites[0].path).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    next(p for p in model.parameters() if p.requires_grad).grad = (
        torch.ones(1).expand(1, 1).new_zeros(next(p for p in model.parameters() if p.requires_grad).shape)
    )
    return model


def world():
    return torch.get_rng_state().tolist(), random.getstate(), torch.is_grad_enabled(), torch.get_default_dtype()


def assert_untouched(model, run, error):
    before, outside = snapshot(model), world()
    with pytest.raises(error):
        run()
    after = snapshot(model)
    for part in before:
        assert after[part] == before[part], part
    assert world() == outside


@pytest.mark.parametrize(
    ("model_type", "error"),
    [
        *(
            (t, Injected) if t in ("llama", "gpt2") else pytest.param(t, Injected, marks=pytest.mark.full)
            for t in MODELS
        ),
        ("llama", KeyboardInterrupt),
        *(pytest.param(t, KeyboardInterrupt, marks=pytest.mark.full) for t in MODELS if t != "llama"),
    ],
)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (conversion, "find_frames"),
        (conversion, "estimate"),
        (conversion, "merge"),
        (conversion, "refit_outputs"),
        (conversion, "repair"),
        (estimate, "read_frames"),
        (repair, "refit"),
        (repair, "target"),
        (repair, "gap"),
        (repair, "refine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_in_any_stage(model_type, error, module, name, monkeypatch):
    """Raised at the second call where there is one: in the midst of the layers, hooks on, kernel switched to eager."""
    model, calls, real = build(model_type), [], getattr(module, name)
    many = name in ("merge", "refit", "target", "gap", "refine", "read_frames")

    def fail(*args, **kwargs):
        calls.append(name)
        if len(calls) == (2 if many else 1):
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, fail)
    assert_untouched(model, lambda: ap.apply(model, patch()), error)
    assert calls


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_a_failure_inside_a_forward(model_type, part):
    """The output projection of the second layer raises at one of all the calls that a conversion makes of it."""

    def counting(at):
        model, calls = build(model_type), []

        def count(*_):
            calls.append(1)
            if len(calls) == at:
                raise Injected

        handle = model.get_submodule(ap.describe(model).sites[1].output).register_forward_pre_hook(count)
        return model, calls, handle

    model, calls, handle = counting(at=None)
    ap.apply(model, patch())
    whole = len(calls)
    assert whole > 10
    model, calls, handle = counting(at=1 + round(part * (whole - 1)))
    assert_untouched(model, lambda: ap.apply(model, patch()), Injected)
    handle.remove()
    ap.apply(model, patch())  # and it still can be converted


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_failure_between_chunks(model_type, monkeypatch):
    monkeypatch.setattr(calibration, "MEMORY", 1)
    model, calls, real = build(model_type), [], repair.gap

    def fail(*args):
        calls.append(1)
        if len(calls) == 5:
            raise Injected
        return real(*args)

    monkeypatch.setattr(repair, "gap", fail)
    assert_untouched(model, lambda: ap.apply(model, patch()), Injected)


def test_a_failure_in_the_text_itself():
    def text():
        yield {"input_ids": torch.full((4, 40), 9)}
        raise Injected

    model = build("llama")
    assert_untouched(model, lambda: ap.apply(model, patch(calibration=text())), Injected)


def test_a_failure_in_the_choice_of_a_count(monkeypatch):
    model = build("llama")

    def fail(*_):
        raise Injected

    monkeypatch.setattr(estimate, "read_frames", fail)
    auto = ap.GroupedQuery(num_kv_heads="auto", cache_target=0.5)
    assert_untouched(model, lambda: ap.plan(model, auto), Injected)


@pytest.mark.parametrize("model_type", MODELS)
def test_success_leaves_the_process_as_it_was(model_type):
    model, outside = build(model_type), world()
    modes = {path: m.training for path, m in model.named_modules()}
    kernel = model.config._attn_implementation
    hooks = {path: len(m._forward_hooks) for path, m in model.named_modules()}
    ap.apply(model, patch())
    assert world() == outside
    assert {path: m.training for path, m in model.named_modules()} == modes
    assert {path: len(m._forward_hooks) for path, m in model.named_modules()} == hooks
    assert model.config._attn_implementation == kernel
