"""Distillation in pieces and layer by layer, against the formula written out."""

import pytest
import torch
from test_distill import rows, student
from torch import nn
from uptraining import LORA, launch, outcome, written
from worker import Rows, settings, tiny

import hf_attnpatch as ap
from recipes import distill, loop
from recipes.distill import Distillation, LayerwiseDistillation, divergence


@pytest.mark.parametrize("room", [1, 7 * 11, 2**24])
def test_pieces_of_the_vocabulary_change_neither_value_nor_gradient(monkeypatch, room):
    monkeypatch.setattr(distill, "ROOM", room)
    given = torch.randn(3, 5, 11, dtype=torch.float32, requires_grad=True)
    wanted, counted = torch.randn(3, 5, 11), torch.rand(3, 5) > 0.3
    value = 2 * divergence(given, wanted, counted)
    (gradient,) = torch.autograd.grad(value, given)
    p, log_q = wanted.double().softmax(-1), given.double().log_softmax(-1)
    by_hand = 2 * ((p * (p.log() - log_q)).sum(-1) * counted).sum()
    (exact,) = torch.autograd.grad(by_hand, given)
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-5)
    torch.testing.assert_close(gradient, exact, atol=1e-6, rtol=0)


def test_nothing_of_the_vocabulary_is_kept_but_the_gradient():
    """The plain formula keeps two float32 sets of log-probabilities for bfloat16 logits."""
    given = torch.randn(2, 8, 50).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        divergence(given, torch.randn(2, 8, 50).bfloat16(), torch.ones(2, 8, dtype=torch.bool))
    assert [(t.shape, t.dtype) for t in kept] == [(given.shape, torch.bfloat16)]


def sites(model):
    return [site.path for site in ap.describe(model).sites]


def watched(model):
    """A dictionary that a forward fills with the attention modules' outputs."""
    outputs = {}
    for path in sites(model):
        keep = lambda _, __, output, path=path: outputs.__setitem__(path, output[0])  # noqa: E731
        model.get_submodule(path).register_forward_hook(keep)
    return outputs


def by_hand(teacher, model, batch, scales):
    """The divergence and the error of every attention module, token by token."""
    found = []
    for each in (teacher, model):
        outputs = watched(each)
        found.append((each(input_ids=batch["input_ids"]).logits[:, :-1].double(), outputs))
    (wanted, wanted_out), (given, given_out) = found
    counted = batch["labels"][:, 1:] != -100
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - given.log_softmax(-1))).sum(-1)[counted].sum()
    errors = []
    for path in wanted_out:
        squared = (wanted_out[path] - given_out[path])[:, :-1].double().square().mean(-1)
        errors.append(squared[counted].sum() / scales[path])
    return (kl + sum(errors) / len(errors)) / 2, counted.sum()


def test_it_is_the_mean_of_divergence_and_output_error():
    batch, sample = rows([0, 3, 5]), rows([1, 2])
    teacher, model = tiny().eval(), student().eval()
    loss = LayerwiseDistillation(teacher, sites(teacher), sample)
    value, count = loss(model, batch)
    total, tokens = by_hand(tiny().eval(), student().eval(), batch, loss.scales)
    assert value.item() == pytest.approx(total.item(), rel=1e-5)
    assert count == tokens
    plain, _ = Distillation(tiny())(model, batch)
    assert abs(value.item() - plain.item() / 2) > 0.01 * plain.item()
    assert not any(each._forward_hooks for net in (teacher, model) for each in net.modules())


def test_scales_are_the_teachers_own_mean_square():
    teacher, sample = tiny().eval(), rows([1, 2])
    outputs = watched(teacher)
    teacher(input_ids=sample["input_ids"])
    wanted = {path: output.square().mean().item() for path, output in outputs.items()}
    assert LayerwiseDistillation(tiny(), sites(teacher), sample).scales == pytest.approx(wanted)


def test_the_unpatched_self_has_nothing_to_learn():
    model = tiny()
    value, _ = LayerwiseDistillation(tiny(0.3), sites(model), rows([0]))(model.eval(), rows([0, 1]))
    value.backward()
    assert value.item() == 0
    assert max(parameter.grad.abs().max().item() for parameter in model.parameters()) < 1e-5


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_changes_no_step(tmp_path, accumulation):
    steps = []
    for parts in (1, accumulation):
        config = settings(tmp_path, accumulation=parts, grad_clip=1e9)
        accelerator, model = loop.new_accelerator(config), student()
        before = [each.detach().clone() for each in model.parameters()]
        optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
        loss = LayerwiseDistillation(tiny(), sites(model), rows([0]))
        loop.optimizer_step(accelerator, model, optimizer, loop.batches(config, Rows(), 0, accelerator), loss, config)
        steps.append(torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)]))
    torch.testing.assert_close(*steps, atol=1e-6 * steps[0].abs().max().item(), rtol=0)


def test_a_wrapper_does_not_hide_the_modules_and_a_wrong_path_is_named():
    model = student()
    wrapped = nn.ModuleDict({"module": model})
    path = sites(model)[0]
    with distill.outputs(wrapped, [path]) as found:
        model(**{"input_ids": rows([0])["input_ids"]})
    assert found[path].shape[-1] == model.config.hidden_size
    with pytest.raises(ValueError, match="model.layers.9.self_attn: 0 such modules in GPT2LMHeadModel"):
        with distill.outputs(model, ["model.layers.9.self_attn"]):
            pass


@pytest.mark.usefixtures("no_reload")
@pytest.mark.parametrize(
    "changes", [{}, {"trainable": "lora", "lora": LORA}, {"train": {"gradient_checkpointing": True}}]
)
def test_the_recipe_trains_with_it(folder, monkeypatch, changes):
    training = {"steps": 12, "lr": 1e-3} | changes.get("train", {})
    launch(monkeypatch, written(folder, **changes | {"train": training}, loss="layerwise_distillation"))
    metrics, log = outcome(folder / "out")
    assert metrics["job"]["loss"] == "layerwise_distillation"
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
