"""Callbacks that patch a trainer's model and warm ALiBi up."""

import json

import pytest
import torch
from architectures import tiny_model
from test_trainer import OPTIONS, check, rows
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_attnpatch as ap
from hf_attnpatch.attention.alibi import alibi_of
from hf_attnpatch.trainer import REPORT, AlibiWarmup, PatchCallback

GROUPED = ap.GroupedQuery(num_kv_heads=2)


def trained(model, folder, steps, *callbacks, resume=False):
    arguments = TrainingArguments(str(folder), max_steps=steps, **OPTIONS)
    trainer = Trainer(model.train(), arguments, train_dataset=rows(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("patches", [(GROUPED,), (ap.Alibi(), GROUPED)], ids=["stock", "own type"])
def test_it_trains_what_is_patched_beforehand(patches, tmp_path):
    """Oracle: the model patched before the trainer is made, step by step the same weights."""
    model = tiny_model("llama")
    ap.apply(model, *patches)
    wanted = trained(model, tmp_path / "before", 2).model.state_dict()
    callback = PatchCallback(*patches)
    trainer = trained(tiny_model("llama"), tmp_path / "by", 2, callback)
    check(trainer.model.state_dict(), wanted)
    assert callback.report.changed
    logged = next(entry for entry in trainer.state.log_history if "attnpatch" in entry)
    assert logged["step"] == 0
    assert {found["patch"] for found in logged["attnpatch"]} == {patch.name for patch in patches}
    assert logged["attnpatch"] == json.loads((tmp_path / "by" / REPORT).read_text())["patches"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "by" / "checkpoint-2")
    check(again.state_dict(), wanted)


def test_a_stopped_run_resumes(tmp_path):
    wanted = trained(tiny_model("llama"), tmp_path / "whole", 2, PatchCallback(GROUPED)).model.state_dict()
    trained(tiny_model("llama"), tmp_path / "parts", 1, PatchCallback(GROUPED))
    found = trained(tiny_model("llama"), tmp_path / "parts", 2, PatchCallback(GROUPED), resume=True)
    check(found.model.state_dict(), wanted)


def test_a_model_that_is_patched_already_is_left_alone(tmp_path):
    model = tiny_model("llama")
    ap.apply(model, GROUPED)
    callback = PatchCallback(GROUPED)
    Trainer(model, TrainingArguments(str(tmp_path), **OPTIONS), callbacks=[callback])
    assert callback.report is None
    with pytest.raises(ap.AttnPatchError, match="has grouped_query already and lacks alibi"):
        Trainer(model, TrainingArguments(str(tmp_path), **OPTIONS), callbacks=[PatchCallback(GROUPED, ap.Alibi())])


@pytest.mark.parametrize("patch", [ap.GroupedQuery(num_kv_heads=1), ap.GroupedQuery(num_kv_heads=2, method="first")])
def test_a_model_that_is_patched_otherwise_is_refused(patch, tmp_path):
    model = tiny_model("llama")
    ap.apply(model, GROUPED)
    before = model.state_dict()
    with pytest.raises(ap.AttnPatchError, match=r"has grouped_query already with \w+=.* asks for"):
        Trainer(model, TrainingArguments(str(tmp_path), **OPTIONS), callbacks=[PatchCallback(patch)])
    check(model.state_dict(), before)


@pytest.mark.parametrize("patch", [GROUPED, ap.Flash(backend="sdpa")], ids=lambda patch: patch.name)
def test_a_model_that_the_trainer_builds_later_is_not_trained_unpatched(patch, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, **OPTIONS)

    def unpatched():
        return tiny_model("llama", attn_implementation="eager").train()

    def patched():
        model = unpatched()
        ap.apply(model, patch)
        return model

    trainer = Trainer(args=arguments, model_init=unpatched, train_dataset=rows(), callbacks=[PatchCallback(patch)])
    with pytest.raises(ap.AttnPatchError, match="let model_init apply the patches"), torch.random.fork_rng([]):
        trainer.train()
    if not patch.recorded:
        return
    trainer = Trainer(args=arguments, model_init=patched, train_dataset=rows(), callbacks=[PatchCallback(patch)])
    with torch.random.fork_rng([]):
        trainer.train()
    assert trainer.model.model.layers[0].self_attn.k_proj.out_features == 32


def test_alibi_is_warmed_up_and_goes_on_where_it_was(tmp_path):
    strengths = []

    class Watch(AlibiWarmup):
        def on_step_begin(self, args, state, control, **given):
            super().on_step_begin(args, state, control, **given)
            strengths.append(alibi_of(given["model"].model.layers[0].self_attn).strength)

    trained(tiny_model("llama"), tmp_path, 2, PatchCallback(ap.Alibi()), Watch(4))
    trained(tiny_model("llama"), tmp_path, 6, PatchCallback(ap.Alibi()), Watch(4), resume=True)
    assert strengths == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert alibi_of(saved.model.layers[0].self_attn).strength == 0.25


def test_what_is_no_number_of_steps_is_refused(tmp_path):
    for steps in (0, 1.5, True, "4"):
        with pytest.raises(ap.AttnPatchError, match="at least 1"):
            AlibiWarmup(steps)
    with pytest.raises(ap.AttnPatchError, match="no ALiBi"), torch.random.fork_rng([]):
        trained(tiny_model("llama"), tmp_path, 1, AlibiWarmup(2))
