"""The uptraining recipe on a tiny random model: two steps, resumed, with LoRA, in half precision, without stock."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from uptraining import LORA, launch, outcome, weights, written

from recipes import uptrain


@pytest.mark.parametrize("loss", ["distillation", "cross_entropy"])
def test_two_steps_measure_save_reload_and_draw(folder, monkeypatch, capsys, loss):
    launch(monkeypatch, written(folder, loss=loss, train={"eval_every": 1}))
    metrics, log = outcome(folder / "out")
    scores = metrics["scores"]
    assert list(scores) == ["original", "converted", "uptrained"]
    assert scores["original"]["cache_bytes_per_token"] == 2 * 2 * 32 * 4
    assert scores["uptrained"]["cache_bytes_per_token"] == 2 * 2 * 16 * 4
    assert all(score["low"] <= score["nats"] <= score["high"] for score in scores.values())
    gap = scores["uptrained"]["nats"] - scores["original"]["nats"]
    assert metrics["differences"]["uptrained"]["value"] == pytest.approx(gap)
    assert metrics["reload"] == {"max_difference": 0.0, "stock": True, "attention": "sdpa"}
    assert [record["step"] for record in log] == [1, 2]
    assert "heldout_loss" in log[0]
    if loss == "cross_entropy":
        assert scores["uptrained"]["nats"] < scores["converted"]["nats"]
    assert AutoModelForCausalLM.from_pretrained(folder / "out/model").config.num_key_value_heads == 2
    for name in ("loss.png", "comparison.png"):
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "stock transformers reload: max difference 0" in printed
    assert "grouped_query" in (folder / "out/report.txt").read_text()


@pytest.mark.usefixtures("no_reload")
def test_only_the_attention_moves_unless_all_may(folder, monkeypatch):
    launch(monkeypatch, written(folder, trainable="attention", train={"output": str(folder / "a")}))
    launch(monkeypatch, written(folder, trainable="all", train={"output": str(folder / "b")}))
    before = weights(folder)
    for output, wanted in (("a", {"self_attn"}), ("b", {"self_attn", "mlp", "layernorm", "embed"})):
        after = weights(folder / output)
        moved = {
            name for name in after if after[name].shape != before[name].shape or (after[name] != before[name]).any()
        }
        assert all(any(part in name for name in moved) for part in wanted)
        assert wanted != {"self_attn"} or all("self_attn" in name for name in moved)


@pytest.mark.usefixtures("no_reload")
def test_a_stopped_run_resumes_bit_equal(folder, monkeypatch):
    changes = {"steps": 4, "save_every": 2, "accumulation": 2}
    launch(monkeypatch, written(folder, train=changes | {"output": str(folder / "whole")}))
    path = written(folder, train=changes)
    real = uptrain.train

    def stopped(model, data, loss, config, **options):
        seen = 0

        def count(model, batch):
            nonlocal seen
            seen += 1
            if seen > 6:
                raise KeyboardInterrupt
            return loss(model, batch)

        return real(model, data, count, config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(uptrain, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            launch(patch, path)
    with pytest.raises(ValueError, match="pass --resume"):
        launch(monkeypatch, path)
    launch(monkeypatch, path, "--resume")
    whole, resumed = weights(folder / "whole"), weights(folder / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for left, right in zip(outcome(folder / "whole")[1], outcome(folder / "out")[1], strict=True):
        assert left | {"seconds": 0} == right | {"seconds": 0}
    other = written(folder, train=changes, patches=[{"patch": "grouped_query", "num_kv_heads": 1}])
    with pytest.raises(ValueError, match="the settings changed .*patches"):
        launch(monkeypatch, other, "--resume")


def test_lora_is_merged_and_lies_beside(folder, monkeypatch):
    from peft import PeftModel

    launch(monkeypatch, written(folder, trainable="lora", lora=LORA, train={"lr": 0.05}))
    metrics, _ = outcome(folder / "out")
    assert metrics["reload"]["max_difference"] == 0
    assert metrics["training"]["trainable_parameters"] < 0.5 * metrics["training"]["parameters"]
    converted, merged = weights(folder / "out", "converted"), weights(folder / "out")
    moved = {name.split(".")[-2] for name in merged if not torch.equal(merged[name], converted[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"}
    described = json.loads((folder / "out/adapter/adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(described["base_model_name_or_path"])
    ids = torch.arange(20)[None]
    apart = PeftModel.from_pretrained(base, folder / "out/adapter").eval()(ids).logits
    together = AutoModelForCausalLM.from_pretrained(folder / "out/model").eval()(ids).logits
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("no_reload")
def test_lora_resumes_bit_equal(folder, monkeypatch):
    changes = {"trainable": "lora", "lora": LORA | {"lora_dropout": 0.1}}
    training = {"steps": 4, "save_every": 2, "lr": 0.05}
    launch(monkeypatch, written(folder, **changes, train=training | {"output": str(folder / "whole")}))
    launch(monkeypatch, written(folder, **changes, train=training))
    for late in (folder / "out/checkpoints").glob("step_*4"):
        late.rename(folder / "late")  # as if killed between step 2 and step 4
    launch(monkeypatch, written(folder, **changes, train=training), "--resume")
    whole, resumed = weights(folder / "whole"), weights(folder / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.usefixtures("no_reload")
def test_gradient_checkpointing_and_bf16_run(folder, monkeypatch):
    launch(monkeypatch, written(folder, train={"output": str(folder / "plain")}))
    launch(monkeypatch, written(folder, train={"output": str(folder / "again"), "gradient_checkpointing": True}))
    plain, again = outcome(folder / "plain")[1], outcome(folder / "again")[1]
    assert [record["loss"] for record in plain] == [record["loss"] for record in again]
    launch(monkeypatch, written(folder, train={"mixed_precision": "bf16"}))
    assert outcome(folder / "out")[1][0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.1)


def test_a_patch_that_stock_cannot_express_is_reloaded_with_the_package(folder, monkeypatch, capsys):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4)).save_pretrained(
        folder / "model"
    )
    launch(monkeypatch, written(folder))
    metrics, _ = outcome(folder / "out")
    assert metrics["reload"] == {"max_difference": 0.0, "stock": False, "attention": "sdpa"}
    assert "transformers with hf_attnpatch imported reload: max difference 0" in capsys.readouterr().out
