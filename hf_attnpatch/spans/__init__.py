"""Attention that sees distances otherwise than they are, without training."""
