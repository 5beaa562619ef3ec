"""Parts of publishing a patched model: the Hub, the base model's card and licence, the model card."""
