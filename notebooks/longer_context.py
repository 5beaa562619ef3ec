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
# # A longer context without training
#
# The model was trained at 512 tokens. It reads 1,024 here, with weights as they are.

# %%
import copy

import matplotlib.pyplot as plt

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.evaluation import loss_by_position

model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
texts = [tokenizer(text, verbose=False)["input_ids"][:1024] for text in embedded.heldout()[::30]]
texts = {f"document {number}": ids for number, ids in enumerate(texts) if len(ids) == 1024}

# %% [markdown]
# What goes wrong in silence elsewhere: a rope scaling that is set on a loaded model does nothing in
# transformers 5. Here config and rotary modules change together, or an error says why not.

# %%
ways = {
    "unpatched": None,
    "YaRN": ap.RopeScaling(kind="yarn", factor=2.0),
    "SelfExtend": ap.SelfExtend(target_length=1024),
}
found = {}
for name, patch in ways.items():
    patched = copy.deepcopy(model)
    if patch is not None:
        ap.apply(patched, patch)
    found[name] = loss_by_position(patched, texts, length=1024, bins=8, resamples=100)
found["SelfExtend"]

# %%
for name, result in found.items():
    plt.plot(result.edges[1:], [score.nats for score in result.scores], "o-", label=name)
plt.axvline(512, color="grey", linestyle=":")
plt.xlabel("tokens of context")
plt.ylabel("nats per token")
_ = plt.legend()

# %% [markdown]
# Beyond the trained length the unpatched model fails. YaRN leaves a stock checkpoint and costs no speed;
# SelfExtend keeps distances that the model knows, and its attention is dearer.
#
# | you want | take |
# | --- | --- |
# | stock transformers, vLLM | `patch_rope_scaling(model, kind="yarn", factor=2.0)` |
# | short requests that keep the bits of the base model | `patch_rope_scaling(model, ..., per_request=True)` |
# | the best recall far back | `patch_re_rope` or `patch_self_extend` |

# %%
report = ap.patch_rope_scaling(model, kind="yarn", factor=2.0)
report
