"""Between this package and transformers: whatever a release calls a thing, the other rooms use one word for it."""
