"""The commands of ``attnpatch``, besides those in :mod:`hf_attnpatch.cli`."""
