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
# # Text longer than any window
#
# `SegmentRecurrence` reads segments, each with a memory of the tokens before it, in every layer: constant
# memory, whatever the length.

# %%
import torch

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.evaluation import recurrence

model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
texts = [tokenizer(text, verbose=False)["input_ids"][:1000] for text in embedded.heldout("prose")[:2]]

# %% [markdown]
# How much does the memory help? The same documents, without it and with three segments of 128 tokens.

# %%
losses = {}
for segments in (0, 3):
    report = ap.patch_segment_recurrence(model, segment_length=128, memory_length=segments * 128)
    losses[segments] = recurrence(model, ap.stream(model), texts, rows=2, columns=128).nats
    report.revert()
losses

# %% [markdown]
# A stream reads on where it stopped. `state_dict` is what a checkpoint of a long run needs.

# %%
ap.patch_segment_recurrence(model, segment_length=128, memory_length=384, num_sinks=4)
tokens = torch.tensor([texts[0][:512]])
with torch.no_grad(), ap.stream(model) as stream:
    for part in tokens.split(128, dim=1):
        logits = model(input_ids=part).logits
    state = stream.state_dict()
logits.shape

# %% [markdown]
# `generate` goes on for ever in constant memory, with no stream: the cache that it makes is the memory.

# %%
written = model.generate(tokens[:, :256], max_new_tokens=12, do_sample=False)
print(tokenizer.decode(written[0, 256:]))
