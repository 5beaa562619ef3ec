"""Every numerical tolerance of the tests. Relative to the largest logit, as the package's own self-check is."""

import torch

from hf_attnpatch.probe import TOLERANCE

EXACT = 0.0
ROUNDING = dict(TOLERANCE)  # by dtype
HEADS_PERMUTED = 1e-5  # another order of summation over heads, fp32
FREQUENCIES = 1e-6  # rotary frequencies against transformers' own, relative, fp32
LOOPS = {torch.float64: 1e-12, torch.float32: 1e-5}  # vectorised against plain loops
