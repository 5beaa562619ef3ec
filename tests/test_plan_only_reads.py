"""``plan`` and ``describe`` only read a model: at every moment, and while another thread runs it."""

import copy
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from architectures import tiny_model
from patches import CASES
from snapshot import registries, snapshot
from torch import nn

import hf_attnpatch as ap
from hf_attnpatch.plan import copied_around_parameters

PACKAGE = str(Path(ap.__file__).parent)
TOKENS = torch.randint(5, 99, (2, 12), generator=torch.Generator().manual_seed(2))
PATCHES = {case.name: (case.patch, dict(case.overrides)) for case in CASES}


def model_of(model_type, name):
    model = tiny_model(model_type, **(PATCHES[name][1] if model_type == "llama" else {}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()  # a probe that calls `eval` on it would show


def planned(model, *patches):
    try:
        return str(ap.plan(model, *patches))
    except ap.AttnPatchError as error:
        return f"refused: {error}"


def state(model):
    """What a write could change, cheap enough to be looked at thousands of times."""
    found = []
    for module in model.modules():
        held = vars(module)
        found += [id(module), *held, *map(id, held.values())]
        found += [x for v in held.values() if isinstance(v, dict) for pair in v.items() for x in (pair[0], id(pair[1]))]
    for config in (model.config, model.generation_config):
        found += [id(x) for pair in vars(config).items() for x in pair]
    found += [x for p in (*model.parameters(), *model.buffers()) for x in (p._version, id(p.grad), p.requires_grad)]
    return found


def watched(model, call):
    """Call something while the model is looked at where functions of the package begin, this thread's and others'."""
    before, changed, looks = state(model), [], [0]

    def look(frame, event, _):
        if frame.f_code.co_filename.startswith(PACKAGE):
            looks[0] += 1
            if looks[0] % 5 == 0 and not changed and state(model) != before:
                changed.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")

    old = sys.gettrace()
    sys.settrace(look)
    try:
        result = call()
    finally:
        sys.settrace(old)
    assert looks[0] > 20
    assert not changed
    assert state(model) == before
    return result


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("name", PATCHES)
def test_a_model_is_what_it_was_at_every_moment_of_a_plan(model_type, name):
    model = model_of(model_type, name)
    registries()
    before = snapshot(model)
    text = watched(model, lambda: planned(model, PATCHES[name][0]))
    assert watched(model, lambda: str(ap.describe(model)))
    assert snapshot(model) == before
    assert text.startswith("refused") or planned(copy.deepcopy(model), PATCHES[name][0]) == text


def served(model, call):
    """Call something while another thread runs a model over and over; return how its forwards differed, if they did."""
    with torch.no_grad():
        wanted = model(TOKENS).logits
    stop, wrong, ran = threading.Event(), [], []

    def serve():
        while not stop.is_set():
            with torch.no_grad():
                found = model(TOKENS).logits
            ran.append(True)
            if not torch.equal(found, wanted) or not model.training:
                wrong.append((found - wanted).abs().max())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        call()
    finally:
        stop.set()
        thread.join(60)
    assert ran
    return wrong


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_a_thread_serves_a_model_while_every_patch_is_planned(model_type):
    for name, (patch, _) in PATCHES.items():
        model = model_of(model_type, name)
        assert not served(model, lambda model=model, patch=patch: (planned(model, patch), ap.describe(model))), name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ap.SelfExtend(window=6, group=3, trained=10), ap.RopeScaling(kind="yarn", factor=2.0)),  # lifted, put on again
        (ap.SegmentRecurrence(segment_length=8, memory_length=8), ap.NoPosition(home=None)),
        (ap.GroupedQuery(num_kv_heads=2, method="mean"), ap.Rotary(theta=500.0)),
    ],
)
def test_a_patched_model_is_only_read_too(first, second):
    model = tiny_model("llama").train()
    ap.apply(model, first)
    text = watched(model, lambda: planned(model, second))
    assert not text.startswith("refused"), text
    assert str(ap.apply(model, second)).startswith(text)


def test_an_open_stream_is_seen_on_the_model_itself():
    model = tiny_model("llama")
    ap.patch_segment_recurrence(model, segment_length=8, memory_length=8)
    with torch.no_grad(), ap.stream(model), pytest.raises(ap.AttnPatchError, match="a stream is open"):
        ap.plan(model, ap.NoPosition(home=None))


def test_a_copy_shares_the_memory_of_parameters_and_nothing_else():
    model = tiny_model("gpt2")
    model.lm_head.weight.register_hook(lambda gradient: pytest.fail("a hook of the live parameter ran"))
    other = copied_around_parameters(model)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert theirs is not mine, name
        assert theirs.data_ptr() == mine.data_ptr()
        assert theirs.requires_grad == mine.requires_grad
    assert other.lm_head.weight is other.transformer.wte.weight  # tied as before
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    other(TOKENS).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_offloaded_weights_are_read_where_they_are():
    model = tiny_model("llama")
    wanted = planned(model, ap.GroupedQuery(num_kv_heads=2, method="mean"))
    cpu_offload(model, execution_device=torch.device("cpu"))
    maps = [module._hf_hook.weights_map for module in model.modules() if getattr(module, "_hf_hook", None)]
    assert watched(model, lambda: planned(model, ap.GroupedQuery(num_kv_heads=2, method="mean"))) == wanted
    assert all(
        mine is theirs
        for mine, theirs in zip(
            maps,
            [m._hf_hook.weights_map for m in copied_around_parameters(model).modules() if getattr(m, "_hf_hook", None)],
            strict=True,
        )
    )


def test_what_cannot_be_copied_is_refused_by_plan_and_not_by_apply():
    model = tiny_model("llama")
    model.model.layers[0].lock = threading.Lock()
    with pytest.raises(ap.UnsupportedArchitecture, match=r"cannot be copied \(TypeError: .*call apply"):
        ap.plan(model, ap.GroupedQuery(num_kv_heads=2, method="mean"))
    ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method="mean")).revert()
