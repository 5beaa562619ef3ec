"""Small settings, and pairs of models for tests of comparisons."""

from hf_attnpatch import embedded

SMALL = {
    "lengths": [64, 256],
    "targets": 32,
    "documents": 3,
    "fidelity_tokens": 128,
    "continuation": 4,
    "layer_tokens": 128,
    "retrieval_lengths": (128,),
    "retrieval_samples": 1,
    "contexts": (64, 128),
}


def with_other_tokenizer(folder):
    """Save the embedded model twice, the second with two tokens of its vocabulary exchanged."""
    for name in ("one", "other"):
        embedded.load_model().save_pretrained(folder / name)
        embedded.load_tokenizer().save_pretrained(folder / name)
    file = folder / "other" / "tokenizer.json"
    text = file.read_text()
    vocabulary = embedded.load_tokenizer().get_vocab()
    a, b = (next(token for token in ("the", "Ġthe") if token in vocabulary), "ing")
    text = text.replace(f'"{a}": {vocabulary[a]}', '"@@": 0').replace(
        f'"{b}": {vocabulary[b]}', f'"{b}": {vocabulary[a]}'
    )
    file.write_text(text.replace('"@@": 0', f'"{a}": {vocabulary[b]}'))
    return folder / "one", folder / "other"
