"""Trainer and SFTTrainer on what is not stock: trained, stopped, resumed, the best model reloaded."""

import dataclasses
import importlib.util

import pytest
import torch
from architectures import tiny_model
from patches import CASES
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_attnpatch as ap
from hf_attnpatch import embedded

PATCHES = [case.patch for case in {case.kind: case for case in reversed(CASES)}.values() if case.patch.recorded]
TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
OPTIONS = {
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "report_to": [],
    "seed": 0,
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "save_steps": 1,
}


NEW = {f.name for f in dataclasses.fields(TrainingArguments)} & {"activation_checkpointing"}
TRL_OPTIONS = {**OPTIONS, "bf16": False, **dict.fromkeys(NEW, False)}  # its own default has a name of before 5.24


def rows():
    ids = torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def patched(patch, model_type="llama"):
    model = tiny_model(model_type).train()
    ap.apply(model, patch)
    return model


def trained(model, folder, steps, resume=False, **options):
    arguments = TrainingArguments(str(folder), max_steps=steps, **{**OPTIONS, **options})
    trainer = Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:2])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def check(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_a_stopped_run_resumes_to_the_same_weights(patch, tmp_path):
    _resumes(patch, "llama", tmp_path)


@pytest.mark.parametrize("patch", [ap.GroupedQuery(num_kv_heads=2), ap.Alibi(), ap.RelativeXl()], ids=lambda p: p.name)
@pytest.mark.parametrize("model_type", ["gpt2", "bloom"])
def test_a_stopped_run_of_another_family_resumes(patch, model_type, tmp_path):
    _resumes(patch, model_type, tmp_path)


def _resumes(patch, model_type, folder):
    wanted = trained(patched(patch, model_type), folder / "whole", 2).model.state_dict()
    trained(patched(patch, model_type), folder / "parts", 1)
    check(trained(patched(patch, model_type), folder / "parts", 2, resume=True).model.state_dict(), wanted)
    again = AutoModelForCausalLM.from_pretrained(folder / "parts" / "checkpoint-2")
    check(again.state_dict(), wanted)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_the_best_model_is_reloaded(patch, tmp_path):
    model = patched(patch)
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.5}
    best = trained(model, tmp_path, 2, **options, save_total_limit=2)
    assert best.state.best_model_checkpoint is not None
    check(model.state_dict(), ap.load(best.state.best_model_checkpoint).state_dict())


@TRL
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_sft_resumes_to_the_same_weights(patch, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    text = embedded.heldout("prose")[0]
    data = Dataset.from_list([{"text": text[100 * i : 100 * i + 80]} for i in range(8)])
    tokenizer = embedded.load_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token

    def run(folder, steps, resume=False):
        model = embedded.load_model().float().train()
        ap.apply(model, patch)
        arguments = SFTConfig(str(folder), max_steps=steps, max_length=32, **TRL_OPTIONS)
        trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    wanted = run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 1)
    check(run(tmp_path / "parts", 2, resume=True), wanted)


@TRL
@pytest.mark.parametrize("patch", [ap.GroupedQuery(num_kv_heads=2), ap.Alibi()], ids=lambda p: p.name)
def test_dpo_refers_to_the_patched_model_or_fails(patch, tmp_path):
    """First loss ln 2, as with a copy of the model as reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    text, tokenizer = embedded.heldout("prose")[0], embedded.load_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    cuts = [(i * 200, i * 200 + 60, i * 200 + 100, i * 200 + 140) for i in range(4)]
    data = Dataset.from_list([{"prompt": text[a:b], "chosen": text[b:c], "rejected": text[c:d]} for a, b, c, d in cuts])
    embedded.load_model().float().save_pretrained(tmp_path / "source")
    arguments = DPOConfig(str(tmp_path / "run"), max_steps=1, logging_steps=1, **TRL_OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    ap.apply(model, patch)
    with pytest.raises(OSError, match="patched in memory by hf_attnpatch"):
        DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)

    model.save_pretrained(tmp_path / "patched")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype=torch.float32)
    trainer = DPOTrainer(saved, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert float(first) == pytest.approx(0.693147, abs=1e-5)
