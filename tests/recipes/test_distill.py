"""Distillation against the formula written out, and under accumulation."""

import math

import pytest
import torch
from worker import Rows, settings, tiny

from recipes import loop
from recipes.distill import Distillation
from recipes.schedule import indices


def student():
    """The same model with other weights."""
    model = tiny()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(teacher, model, batch):
    """Token by token in double precision: cross-entropy of the two distributions less the teacher's entropy."""
    wanted = teacher.eval()(input_ids=batch["input_ids"]).logits.double()
    logits = model(input_ids=batch["input_ids"]).logits.double()
    total, count = 0.0, 0
    for row, labels in enumerate(batch["labels"]):
        for position, label in enumerate(labels[1:].tolist()):
            if label == -100:
                continue
            p = wanted[row, position].exp() / wanted[row, position].exp().sum()
            q = logits[row, position].exp() / logits[row, position].exp().sum()
            entropy = -sum(each * math.log(each) for each in p.tolist())
            crossed = -sum(a * math.log(b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            total, count = total + crossed - entropy, count + 1
    return total, count


def rows(chosen):
    return {key: torch.stack([Rows()[index][key] for index in chosen]) for key in ("input_ids", "labels")}


def test_it_is_the_divergence_summed_over_the_tokens_that_count():
    batch = rows([0, 3, 5])
    value, count = Distillation(tiny())(student().eval(), batch)
    total, tokens = by_hand(tiny(), student().eval(), batch)
    assert value.item() == pytest.approx(total, abs=1e-4)
    assert count.item() == tokens
    assert total / tokens > 0.01


def test_the_unpatched_self_has_nothing_to_learn():
    model = tiny()
    value, _ = Distillation(tiny(0.3))(model.eval(), rows([0, 1]))  # the teacher drops nothing out
    value.backward()
    assert value.item() == 0
    assert max(parameter.grad.abs().max().item() for parameter in model.parameters()) < 1e-5


def test_the_teacher_is_left_as_it_is():
    teacher = tiny(0.3)
    before = [parameter.clone() for parameter in teacher.parameters()]
    Distillation(teacher)(student(), rows([0, 1]))[0].backward()
    assert not teacher.training
    for old, parameter in zip(before, teacher.parameters(), strict=True):
        assert torch.equal(old, parameter)
        assert parameter.grad is None
        assert not parameter.requires_grad


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_its_gradient_under_accumulation_is_that_of_the_mean(tmp_path, accumulation):
    """Rows count unevenly, so a mean of means would be another gradient."""
    config = settings(tmp_path, accumulation=accumulation, grad_clip=1e9)
    accelerator, model = loop.new_accelerator(config), student()
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    before = [each.detach().clone() for each in model.parameters()]
    parts = loop.batches(config, Rows(), 0, accelerator)
    value, tokens = loop.optimizer_step(accelerator, model, optimizer, parts, Distillation(tiny()), config)
    steps = [old - new for old, new in zip(before, model.parameters(), strict=True)]

    batch, reference = rows(indices(config, 24, 0)), student()
    p = tiny().eval()(input_ids=batch["input_ids"]).logits[:, :-1].detach().softmax(dim=-1)
    q = reference(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(dim=-1)
    counted = batch["labels"][:, 1:] != -100
    divergence = (p * (p.log() - q)).sum(dim=-1)[counted].mean()
    divergence.backward()
    assert tokens == counted.sum()
    assert value / tokens == pytest.approx(divergence.item(), abs=1e-6)
    for step, parameter in zip(steps, reference.parameters(), strict=True):
        torch.testing.assert_close(step, parameter.grad, atol=1e-6, rtol=0)


def test_under_bf16_teacher_and_student_round_alike(tmp_path):
    config = settings(tmp_path, mixed_precision="bf16")
    accelerator = loop.new_accelerator(config)
    model = accelerator.prepare_model(tiny())
    value, _ = Distillation(tiny(), accelerator.autocast)(model.eval(), rows([0, 1, 2]))
    assert value.item() == 0
