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
# # Diagnose, patch, compare, publish
#
# From a cost to a model card, in four calls.

# %%
import hf_attnpatch as ap
from hf_attnpatch import embedded

original, tokenizer = embedded.load_model(), embedded.load_tokenizer()

# %% [markdown]
# What does the model lack for this work, on that machine? Nothing is loaded onto it and nothing is changed:
# operations are counted on tensors without data.

# %%
found = ap.diagnose(original, context=1024, batch=16, hardware="h100", training=False, losses=False)
found

# %% [markdown]
# Take what it prescribes, or a milder setting.

# %%
patched = embedded.load_model()
report = ap.patch_grouped_query(patched, num_kv_heads=4)
report

# %% [markdown]
# Does the patched model keep to what every correct model keeps to: padding, cached decoding, saving, gradients?

# %%
verification = ap.verify(patched, ways=False)
assert verification.passed
verification

# %% [markdown]
# What did it cost, and what did it gain? One offline page with figures, in
# `outputs/notebooks/compared/report.html`. Leave the amounts out to measure everything.

# %%
amounts = {"parts": ["loss", "layers"], "documents": 2, "lengths": [64, 256], "layer_tokens": 256}
comparison = ap.compare(original, patched, "outputs/notebooks/compared", tokenizer=tokenizer, **amounts)
comparison

# %% [markdown]
# Publish the model with a card that holds all of this. It needs `HF_TOKEN` or `hf auth login`:
#
# ```python
# ap.push_to_hub(patched, "user/name", report=[report, comparison])
# ```
