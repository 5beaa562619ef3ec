"""Fused kernels inside forwards that compute their scores by themselves."""
