"""What publishing a patched model takes: the Hub, the base model's card and licence, a card of its own."""
