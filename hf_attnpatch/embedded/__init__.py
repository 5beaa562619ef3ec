"""A small real model in the package: 5.9 million parameters, pretrained, with the text it has never seen.

A Llama with plain multi-head attention (8 heads), context 512 and a byte-level tokenizer of 4096, so that the demo and
the tests need no network. `README.md` beside this file says what it was trained on and how well it models it.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DOMAINS = ("python", "prose", "docs")


def path() -> Path:
    """The folder that `from_pretrained` takes: weights, configuration, tokenizer, model card."""
    return Path(__file__).resolve().parent


def load_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Loads the model in eval mode on the CPU.

    Args:
        dtype: of the weights, which are stored in bfloat16; float32 holds the same values.

    Returns:
        A stock `LlamaForCausalLM`, unpatched.
    """
    from transformers import LlamaForCausalLM

    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(path(), dtype=dtype)
    return model.eval()


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Loads the tokenizer: byte-level BPE of 4096; its one special token ends documents and pads."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path())
    return tokenizer


def heldout(domain: str | None = None) -> list[str]:
    """Whole documents that the model was not trained on, each 16 thousand characters or longer.

    Args:
        domain: `python` (library code), `prose` (Shakespeare, the King James Bible, the Jargon File), `docs` (Python's
            manual), or None for all.

    Returns:
        The documents, always in the same order.

    Raises:
        ValueError: there is no such domain.
    """
    if domain not in (None, *DOMAINS):
        raise ValueError(f"heldout: no domain '{domain}'; choose from {', '.join(DOMAINS)}, or None for all.")
    with lzma.open(path() / "heldout.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["text"] for row in rows if domain in (None, row["domain"])]
