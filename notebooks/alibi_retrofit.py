# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ALiBi in a model that was trained without it
#
# ALiBi takes the place of rotary angles. The model did not learn distances so: it must be trained. A curriculum
# raises the slopes from 0, and any flash kernel computes it.

# %%
import torch
from transformers import Trainer, TrainingArguments

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.evaluation import mean_loss
from hf_attnpatch.trainer import AlibiWarmup, PatchCallback

model, tokenizer = embedded.load_model(), embedded.load_tokenizer()


def blocks(texts, length=128, each=8):
    """Windows of each document, as examples of a trainer."""
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, min(len(ids) - length, each * length), length):
            yield {"input_ids": ids[start : start + length], "labels": ids[start : start + length]}


texts = embedded.heldout("docs")
training = list(blocks(texts[2:6]))
measured = [{"input_ids": torch.tensor(block["input_ids"])} for block in blocks(texts[:2], each=2)]
before = mean_loss(model, measured).nats

# %% [markdown]
# The callback patches the model before the trainer wraps it, logs what was done, and resumes. Eight steps are a
# demonstration; a retrofit wants a share of the pretraining.

# %%
arguments = TrainingArguments(
    "outputs/notebooks/alibi",
    max_steps=8,
    per_device_train_batch_size=4,
    learning_rate=3e-4,
    logging_steps=2,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)
patching = PatchCallback(ap.Alibi())
trainer = Trainer(model, arguments, train_dataset=training, callbacks=[patching, AlibiWarmup(steps=4)])
switched = mean_loss(model, measured).nats
trainer.train()
before, switched, mean_loss(model, measured).nats

# %% [markdown]
# No position has a longest length now, and the checkpoint says what it is: stock transformers refuses it by
# name, and it loads wherever the package is installed.

# %%
patching.report
