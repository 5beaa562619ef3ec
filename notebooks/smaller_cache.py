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
# # A smaller cache in ten minutes
#
# A model with many key-value heads holds a large cache. Here 8 heads become 2: a quarter of the cache. The
# model is the small one that ships with the package; the lines are the same for yours.

# %%
import torch

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.evaluation import cache_bytes_per_token, mean_loss

model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
ap.describe(model)

# %% [markdown]
# The dry run: what would change, and whether stock transformers could load the result.

# %%
ap.plan(model, ap.GroupedQuery(num_kv_heads=2))

# %% [markdown]
# Text to measure on, and text to fit on. They are different documents.

# %%
documents = embedded.heldout("python")


def blocks(texts, length=256, each=2):
    """A few windows of each document."""
    for number, text in enumerate(texts):
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        for start in range(0, min(len(ids) - length, each * length), length):
            yield {"input_ids": ids[start : start + length], "document": number}


measured = list(blocks(documents[:4]))
before = mean_loss(model, measured)
before.nats, cache_bytes_per_token(model)

# %% [markdown]
# Averaging heads, the usual way, costs much. `revert` puts back the very weights that were there.

# %%
report = ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
averaged = mean_loss(model, measured)
report.revert()
averaged.nats - before.nats

# %% [markdown]
# With a little text, heads are turned towards each other before they are merged, and what is lost is fitted
# away. On a model of your own give some 64 sequences of 512 tokens, and leave `refine_steps` out.

# %%
texts = [text[:6000] for text in documents[8:14]]
report = ap.patch_grouped_query(model, num_kv_heads=2, calibration=texts, tokenizer=tokenizer, refine_steps=10)
refined = mean_loss(model, measured)
refined.nats - before.nats, cache_bytes_per_token(model)

# %% [markdown]
# What each layer lost.

# %%
report.damage

# %% [markdown]
# The checkpoint is a stock one: transformers, llama.cpp and vLLM load it as any other.

# %%
assert report.stock
model.save_pretrained("outputs/notebooks/smaller_cache")
tokenizer.save_pretrained("outputs/notebooks/smaller_cache")
report

# %% [markdown]
# Next: train the rest of the damage away (`trainer_and_peft`), or combine it with a longer context
# (`longer_context`).
