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
# # Write a patch
#
# A patch is a frozen dataclass whose fields are the settings, and a method that proposes edits and writes
# nothing. Planning, the self-check, the way back, the record and the command line come with it.

# %%
from dataclasses import dataclass
from typing import ClassVar

import torch

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.edits import SetAttribute
from hf_attnpatch.patch import Proposal


@dataclass(frozen=True, kw_only=True)
class Sharpened(ap.Patch):
    """Multiply the scale of every attention score."""

    name: ClassVar[str] = "sharpened"
    factor: float

    def propose(self, model, anatomy):
        """Read the anatomy, write nothing, return edits."""
        sites = [site for site in anatomy.sites if hasattr(model.get_submodule(site.path), "scaling")]
        if not sites:
            raise ap.UnsupportedArchitecture(f"{anatomy.architecture}: no attention module has a `scaling` to change.")
        paths = tuple(site.path for site in sites)  # the self-check counts their calls
        edits = (SetAttribute(path, "scaling", model.get_submodule(path).scaling * self.factor) for path in paths)
        return Proposal(tuple(edits), sites=paths, stock=False, notes=("scores are multiplied",))


# %% [markdown]
# The plan prints what it would write; `apply` writes, runs the model on a few tokens, and returns the way back.

# %%
model = embedded.load_model()
ap.plan(model, Sharpened(factor=2.0))

# %%
tokens = torch.arange(32)[None]
with torch.no_grad():
    before = model(tokens).logits
    report = ap.apply(model, Sharpened(factor=2.0))
    patched = model(tokens).logits
    report.revert()
    after = model(tokens).logits
assert not torch.equal(before, patched)
assert torch.equal(before, after)
report

# %% [markdown]
# It combines with others, in order, or none is applied.

# %%
report = ap.apply(model, ap.GroupedQuery(num_kv_heads=4), Sharpened(factor=1.0))
report
