"""What ``attnpatch doctor`` finds out: about this installation by running it, about a checkpoint by reading it."""
