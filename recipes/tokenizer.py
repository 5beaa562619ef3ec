"""Trains the byte-level BPE tokenizer of the embedded model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int, context: int) -> None:
    """Trains a byte-level BPE tokenizer and saves it as transformers reads it.

    Every byte is in the vocabulary, so there is no unknown token. One special token ends documents and pads; nothing is
    put in front of a text.

    Args:
        texts: the training documents.
        folder: where the tokenizer's files go.
        vocab_size: tokens in all, the special one and the 256 bytes included.
        context: the model's longest input, in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
