"""The uptraining recipe on a tiny random model: two steps, resumed, with LoRA, on two processes, and its errors."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from recipes import job as jobs
from recipes import sharding, uptrain

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder with a model of 4 key-value heads, a tokenizer and text."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, num_key_value_heads=4, max_position_embeddings=64, **SIZES)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, number in (("train", 6), ("heldout", 4)):
        (tmp_path / name).mkdir()
        for index in range(number):
            text = f"{name} {index}: the quick brown fox jumps over the lazy dog\n" * (5 + index)
            (tmp_path / name / f"{index}.txt").write_text(text)
    return tmp_path


def settings(folder, **changes):
    values = {
        "model": str(folder / "model"),
        "patches": [{"patch": "grouped_query", "num_kv_heads": 2, "method": "mean_rescaled"}],
        "data": {"source": str(folder / "train"), "block": 16, "cache": str(folder / "cache")},
        "heldout": {"source": str(folder / "heldout"), "windows": 3, "during": 4},
        "train": {"output": str(folder / "out"), "steps": 2, "batch_size": 4, "lr": 1e-2, "log_every": 1},
        "threads": 1,
    }
    for key, value in changes.items():
        section = values.get(key)
        values[key] = section | value if isinstance(section, dict) else value
    return values


def written(folder, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    return path


@pytest.fixture
def no_reload(monkeypatch):
    """Leaves out the new process that loads the result; other tests have it."""
    found = {"max_difference": 0.0, "stock": True, "attention": "sdpa"}
    monkeypatch.setattr(uptrain.saving, "check_reload", lambda *_, **__: found)


def launch(monkeypatch, path, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)  # a run is a process's first, outside of tests
    monkeypatch.setattr("sys.argv", ["uptrain.py", "--config", str(path), *flags])
    uptrain.main()


def outcome(output):
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return json.loads((output / "metrics.json").read_text()), log


def weights(output, name="model"):
    return AutoModelForCausalLM.from_pretrained(output / name).state_dict()


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


# peft asks transformers by a name that transformers 5.23 calls deprecated
old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "o_proj", "up_proj"],
    "modules_to_save": ["k_proj", "v_proj"],
}


@old_name
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


@old_name
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


def spread(path, processes=2, script=ROOT / "recipes/uptrain.py"):
    """Runs the recipe on several processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += [str(script), "--config", str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.usefixtures("no_reload")
def test_two_processes_are_the_same_uptraining_as_one(folder, monkeypatch):
    launch(monkeypatch, written(folder, train={"output": str(folder / "one")}))
    done = spread(written(folder, processes=2, train={"output": str(folder / "two")}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("max difference 0") == 1
    (one, left), (two, right) = outcome(folder / "one"), outcome(folder / "two")
    assert two["machine"]["processes"] == 2
    for stage in ("original", "converted", "uptrained"):
        assert two["scores"][stage]["nats"] == pytest.approx(one["scores"][stage]["nats"], abs=1e-5)
        assert two["scores"][stage]["tokens"] == one["scores"][stage]["tokens"]
    assert [record["loss"] for record in left] == pytest.approx([record["loss"] for record in right], abs=1e-5)


@pytest.mark.usefixtures("no_reload")
def test_a_sharded_model_is_gathered_and_is_the_same(folder, monkeypatch):
    launch(monkeypatch, written(folder, train={"output": str(folder / "one"), "eval_every": 1}))
    path = written(folder, processes=2, train={"output": str(folder / "two"), "eval_every": 1})
    done = spread(path, script=Path(__file__).with_name("sharded_worker.py"))
    assert done.returncode == 0, done.stderr
    (one, left), (two, right) = outcome(folder / "one"), outcome(folder / "two")
    assert two["reload"]["max_difference"] == 0
    assert two["scores"]["uptrained"]["nats"] == pytest.approx(one["scores"]["uptrained"]["nats"], abs=1e-5)
    for before, after in zip(left, right, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert after["heldout_loss"] == pytest.approx(before["heldout_loss"], abs=1e-5)


def test_parallelism_that_hides_gradients_is_refused():
    kinds = [("NO", False), ("MULTI_GPU", False), ("FSDP", True)]
    for kind, second in kinds:
        sharding.check(SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=second))
    for kind in ("FSDP", "DEEPSPEED"):
        with pytest.raises(ValueError, match=f"{kind}: the recipes train with"):
            sharding.check(SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=False))


def test_fewer_processes_than_asked_for_is_an_error(folder, monkeypatch):
    with pytest.raises(ValueError, match="2 were asked for, this run has 1.*torchrun"):
        launch(monkeypatch, written(folder, processes=2))


@pytest.mark.parametrize("section", ["data", "heldout"])
@pytest.mark.parametrize("source", ["missing.txt", "blank.txt"])
def test_missing_and_empty_text_are_errors_before_a_model_is_loaded(folder, monkeypatch, section, source):
    (folder / "blank.txt").write_text(" \n")
    monkeypatch.setattr(uptrain, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="no such file or folder|found no text"):
        launch(monkeypatch, written(folder, **{section: {"source": str(folder / source)}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, r"unknown modle; choose from data, dtype, heldout, .*patches, .*trainable"),
        ({"heldout": {"window": 2}}, "heldout: unknown window; choose from .*windows"),
        ({"train": {"learning_rate": 1}}, "train: unknown learning_rate; choose from .*lr"),
        ({"loss": "kl"}, "loss: 'kl' does not exist; choose from 'distillation', 'cross_entropy'"),
        ({"trainable": "mlp"}, "trainable: 'mlp' does not exist; choose from 'attention', 'all', 'lora'"),
        ({"trainable": "lora"}, "belong together"),
        ({"lora": {"r": 4}}, "belong together"),
        ({"trainable": "lora", "lora": {"rank": 4}}, "lora: unknown rank; choose from .*target_modules"),
        ({"patches": []}, r"expected a list such as \[\{patch: grouped_query"),
        ({"patches": [{"patch": "grouped"}]}, "patch 'grouped' does not exist; choose from: .*grouped_query"),
        ({"patches": [{"patch": "grouped_query", "heads": 2}]}, "no field heads; its fields are: method, num_kv_heads"),
        ({"processes": "two"}, "processes: expected a whole number, found 'two'"),
    ],
)
def test_a_wrong_configuration_is_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        jobs.read(written(folder, **changes))


def test_defaults_follow_what_learns(folder):
    plain = settings(folder)
    del plain["train"]["lr"]
    for trainable, lr in (("attention", 1e-4), ("all", 2e-5), ("lora", 1e-4)):
        lora = {"lora": LORA} if trainable == "lora" else {}
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump({**plain, "trainable": trainable, **lora}))
        job = jobs.read(path, ["train.steps=100"])
        assert (job.train.lr, job.train.warmup, job.train.betas) == (lr, 2, (0.9, 0.95))
        assert job.heldout.block == job.data.block == 16
        assert json.dumps(jobs.plain(job))


def test_every_shipped_configuration_can_be_read():
    paths = [path for path in (ROOT / "recipes/configs").glob("*.yaml") if "pretrain" not in path.name]
    assert paths
    for path in paths:
        assert jobs.read(path).patches
