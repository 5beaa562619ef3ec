"""The loop against a plain torch loop, and against itself accumulated, checkpointed and in half precision."""

import pytest
import torch
from worker import Rows, settings, tiny

from recipes import loop
from recipes.checkpoints import ResumeError
from recipes.log import LossError
from recipes.schedule import indices, learning_rate


def difference(left, right):
    return max((a - b).abs().max().item() for a, b in zip(left.parameters(), right.parameters(), strict=True))


def plain(config):
    """The same training, written down: mean cross-entropy over the tokens of the whole batch."""
    model, rows = tiny(), Rows()
    matrices = [each for each in model.parameters() if each.ndim >= 2]
    vectors = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.betas)
    losses = []
    for step in range(config.steps):
        batch = [rows[index] for index in indices(config, len(rows), step)]
        ids, labels = (torch.stack([each[key] for each in batch]) for key in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2}, {"accumulation": 8}, {"gradient_checkpointing": True}])
def test_equals_a_plain_loop_whatever_the_accumulation(tmp_path, changes):
    config = settings(tmp_path, lr=1e-3, **changes)
    model = tiny()
    log = loop.train(model, Rows(), loop.next_token_loss, config)
    expected, losses = plain(config)
    assert difference(model, expected) < 1e-6
    assert [record["loss"] for record in log] == pytest.approx(losses, abs=1e-6)
    assert difference(model, tiny()) > 1e-3  # it did learn something


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_is_that_of_the_mean_over_uneven_rows(tmp_path, accumulation):
    """Before the optimizer, which would hide a wrong scale (Adam does not see it)."""
    config = settings(tmp_path, accumulation=accumulation, grad_clip=1e9)
    accelerator = loop.new_accelerator(config)
    model, rows = tiny(), Rows()
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    before = [each.detach().clone() for each in model.parameters()]
    value, tokens = loop.optimizer_step(
        accelerator, model, optimizer, loop.batches(config, rows, 0, accelerator), loop.next_token_loss, config
    )
    steps = [old - new for old, new in zip(before, model.parameters(), strict=True)]
    batch = [rows[index] for index in indices(config, len(rows), 0)]
    ids, labels = (torch.stack([each[key] for each in batch]) for key in ("input_ids", "labels"))
    reference = tiny()
    logits = reference(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    loss.backward()
    assert tokens == (labels[:, 1:] != -100).sum()
    assert value / tokens == pytest.approx(loss.item(), abs=1e-6)
    for step, parameter in zip(steps, reference.parameters(), strict=True):
        torch.testing.assert_close(step, parameter.grad, atol=1e-6, rtol=0)


def test_bf16_stays_near_and_leaves_the_model_as_it_was(tmp_path):
    model = tiny()
    log = loop.train(model, Rows(), loop.next_token_loss, settings(tmp_path, mixed_precision="bf16", lr=1e-3))
    _, losses = plain(settings(tmp_path, lr=1e-3))
    assert [record["loss"] for record in log] == pytest.approx(losses, abs=2e-2)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    ids = Rows().ids[:2]
    fresh = tiny()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids).logits, fresh.eval()(ids).logits)  # no autocast left on forward


def test_every_example_once_an_epoch_in_another_order():
    config = settings("unused", batch_size=6)
    epochs = [[index for step in range(4) for index in indices(config, 24, 4 * epoch + step)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]


def test_learning_rate_rises_falls_and_ends_at_its_floor():
    config = settings("unused", steps=100, warmup=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)


def test_evaluation_is_logged_and_costs_no_randomness(tmp_path):
    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"heldout_loss": 1.5}

    plainly, evaluated = tiny(0.1), tiny(0.1)
    loop.train(plainly, Rows(), loop.next_token_loss, settings(tmp_path / "a"))
    config = settings(tmp_path / "b", eval_every=2, log_every=4)
    log = loop.train(evaluated, Rows(), loop.next_token_loss, config, evaluate=evaluate)
    assert [record["step"] for record in log if record.get("heldout_loss") == 1.5] == [2, 4, 6]
    assert difference(plainly, evaluated) == 0


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="choose a multiple of 3"):
        loop.train(tiny(), Rows(), loop.next_token_loss, settings(tmp_path, accumulation=3))
    with pytest.raises(ResumeError, match="start without --resume"):
        loop.train(tiny(), Rows(), loop.next_token_loss, settings(tmp_path), resume=True)
    rows = Rows()
    rows.kept.zero_()
    with pytest.raises(ValueError, match="every label is -100"):
        loop.train(tiny(), rows, loop.next_token_loss, settings(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing(tmp_path):
    def loss(model, batch):
        total, count = loop.next_token_loss(model, batch)
        return total * float("nan"), count

    model = tiny()
    with pytest.raises(LossError, match=r"loss of a step is nan.*lower train.lr"):
        loop.train(model, Rows(), loss, settings(tmp_path, save_every=1))
    assert difference(model, tiny()) == 0
    assert not list((tmp_path / "checkpoints").iterdir())


def test_half_a_line_of_the_log_is_dropped(tmp_path):
    """The machine may stop in the middle of a line; the run goes on from its checkpoint all the same."""
    loop.train(tiny(), Rows(), loop.next_token_loss, settings(tmp_path, steps=2, save_every=2))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    config = settings(tmp_path, steps=4, save_every=2)
    log = loop.train(tiny(), Rows(), loop.next_token_loss, config, resume=True)
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulation", "log_every", "keep"])
def test_counts_of_nothing_are_refused(tmp_path, name):
    """`log_every: 0` ended in an IndexError once everything had been trained."""
    with pytest.raises(ValueError, match=f"train.{name}: 0; wanted 1 or more"):
        settings(tmp_path, **{name: 0})
