"""Attention: one call, one mask, one list of wrappers on each module, and the kernels beneath."""
