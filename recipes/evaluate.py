"""How well does a checkpoint, patched or not, predict held-out text?

    python recipes/evaluate.py outputs/grouped_query_tiny/model --config recipes/configs/grouped_query_tiny.yaml

Measures on the `heldout` section of an uptraining's configuration, so that figures can be compared with its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.evaluation import Losses, Score, cache_bytes_per_token, document_losses, mean_loss, summarise
from recipes import job as jobs
from recipes import settings
from recipes.data import DataError, documents
from recipes.job import HeldoutConfig
from recipes.settings import SettingsError
from recipes.sources import load_model, load_tokenizer, resolve

Window = dict[str, Any]


def heldout_windows(config: HeldoutConfig, tokenizer: Any) -> list[Window]:
    """Cuts windows of `block` tokens from each document, spread evenly over it.

    A document starts with the end-of-sequence token, as in training; its windows share a border token, so each token
    is predicted at most once. An incomplete window counts only where a document has no other.

    Returns:
        `input_ids` (length,) int64 and `document`, its number.

    Raises:
        DataError: the source is missing or has no text.
    """
    windows: list[Window] = []
    for number, text in enumerate(islice(documents(resolve(config)), config.documents)):
        ids = torch.tensor(
            [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        )
        starts = list(range(0, max(1, len(ids) - config.block + 1), config.block - 1))
        count = min(config.windows, len(starts))
        for position in (index * len(starts) // count for index in range(count)):
            start = starts[position]
            windows.append({"input_ids": ids[start : start + config.block], "document": number})
    if not any(len(window["input_ids"]) > 1 for window in windows):
        raise DataError(f"{config.source}: found no text to measure on; name a source with text in it.")
    return windows


def score(
    accelerator: Accelerator, model: torch.nn.Module, windows: Sequence[Window], batch: int, caption: str
) -> Score:
    """Measures an unwrapped model, the windows shared out between the processes."""
    own = windows[accelerator.process_index :: accelerator.num_processes]
    shown = caption if accelerator.is_main_process else None
    losses: Losses = {}
    for part in gather_object([document_losses(model, own, batch=batch, progress=shown)]):
        for document, (total, count) in part.items():
            before = losses.get(document, (0.0, 0))
            losses[document] = (before[0] + total, before[1] + count)
    return summarise({document: losses[document] for document in sorted(losses, key=int)})


def main() -> None:
    """Measures one checkpoint and prints its loss and what its cache costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder, a hub name, or `embedded`")
    parser.add_argument("--config", required=True, help="a configuration of uptrain.py; its `heldout` section is used")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    job = jobs.read(arguments.config, arguments.overrides)
    windows = heldout_windows(job.heldout, load_tokenizer(arguments.model))
    model = load_model(arguments.model, job.dtype)
    found = mean_loss(model, windows, batch=job.heldout.batch, progress="evaluating")
    interval = f"[{found.low:.4f}, {found.high:.4f}]"
    print(f"{found.nats:.4f} {interval} nats per token, perplexity {found.perplexity:.2f}, {found.tokens:,} tokens")
    print(f"{cache_bytes_per_token(model):,.0f} bytes of cache per token")


if __name__ == "__main__":
    settings.clearly(main, AttnPatchError, SettingsError, DataError)
