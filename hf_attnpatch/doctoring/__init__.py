"""The parts of ``attnpatch doctor``: trials of this installation, and facts about a checkpoint's config."""
