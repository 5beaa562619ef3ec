"""Attention: the call, the mask, the wrappers of each module and the kernels that compute it."""
