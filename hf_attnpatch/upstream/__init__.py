"""The interface to transformers: one word for each of its concepts, whatever a release calls it."""
