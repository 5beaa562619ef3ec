"""The commands of ``attnpatch``, beside those that :mod:`hf_attnpatch.cli` has."""
