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
# # With Trainer and PEFT
#
# The rule for every trainer: patch first, then wrap.

# %%
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.trainer import PatchCallback

model, tokenizer = embedded.load_model(), embedded.load_tokenizer()


def blocks(texts, length=128, each=8):
    """Windows of each document, as examples of a trainer."""
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, min(len(ids) - length, each * length), length):
            yield {"input_ids": ids[start : start + length], "labels": ids[start : start + length]}


training = list(blocks(embedded.heldout("python")[:4]))
how = {"per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True}

# %% [markdown]
# ## Trainer
#
# A callback patches the model before the optimizer is made. Checkpoints carry the record of the patch, so that
# they resume and load anywhere.

# %%
arguments = TrainingArguments("outputs/notebooks/trained", max_steps=4, save_steps=2, learning_rate=3e-4, **how)
trainer = Trainer(model, arguments, train_dataset=training, callbacks=[PatchCallback(ap.GroupedQuery(num_kv_heads=2))])
trainer.train()
[entry for entry in trainer.state.log_history if "attnpatch" in entry]

# %%
again = ap.load("outputs/notebooks/trained/checkpoint-4")
ap.describe(again).sites[0].num_kv_heads

# %% [markdown]
# ## PEFT
#
# An adapter of a patched model names what was patched, so that it fails on another base instead of writing
# nonsense.

# %%
model = embedded.load_model()
ap.patch_grouped_query(model, num_kv_heads=2)
adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
trainer = Trainer(
    adapted, TrainingArguments("outputs/notebooks/lora", max_steps=2, save_strategy="no", **how), train_dataset=training
)
trainer.train()
adapted.save_pretrained("outputs/notebooks/adapter")

# %% [markdown]
# A model that an adapter holds already is refused: patch the base first.

# %%
try:
    ap.patch_rope_scaling(adapted, kind="yarn", factor=2.0)
except ap.AttnPatchError as error:
    print(error)
else:
    raise AssertionError("it should have been refused")
