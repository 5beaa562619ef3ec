"""Documents read in order: row r of a batch continues where row r of the previous batch stopped.

Each document stands in one row, one after another, cut into blocks; the last block of a document is padded on the
right, and the first one says that the row begins anew. Which tokens a row holds at a step is a function of seed, row
and step, so that no offset has to be remembered: with the model's memory in the checkpoint a resumed run is bit-equal.
Rows are dealt out to processes round robin, the same ones at every step.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_attnpatch import Stream
from recipes.checkpoints import ResumeError
from recipes.data import DataConfig, DataError, documents

IGNORED = -100


class Lanes:
    """Blocks of documents in rows that go on from step to step; item `step * rows + row`.

    Args:
        texts: token ids of each document, shape (tokens,), int64, two tokens or more.
        rows: of a batch over all processes.
        block: tokens per block.
        seed: of the order of documents, another one in each epoch.
        fingerprint: digest of what the tokens depend on.
    """

    def __init__(self, texts: list[Tensor], rows: int, block: int, seed: int = 0, fingerprint: str = "") -> None:
        if len(texts) < rows:
            raise DataError(f"found {len(texts)} documents for {rows} rows; give more text or a smaller batch_size.")
        self.texts, self.rows, self.block, self.seed, self.fingerprint = texts, rows, block, seed, fingerprint
        self._plans: dict[int, list[list[tuple[int, int]]]] = {}
        self._starts: list[list[int]] = [[0] for _ in range(rows)]  # of each epoch, in blocks, by row

    def __len__(self) -> int:
        """Blocks of an epoch."""
        return sum(map(len, self._plan(0)))

    def order(self, step: int) -> range:
        """Return the items of a step, one for each row."""
        return range(step * self.rows, (step + 1) * self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, `labels` (the token after each), `attention_mask`, each (block,), and `reset`, a bool."""
        step, row = divmod(index, self.rows)
        text, start = self._block(row, step)
        tokens = self.texts[text][start : start + self.block + 1]
        ids, labels = torch.zeros(self.block, dtype=torch.int64), torch.full((self.block,), IGNORED)
        count = len(tokens) - 1
        ids[:count], labels[:count] = tokens[:-1], tokens[1:]
        mask = (torch.arange(self.block) < count).long()
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "reset": torch.tensor(start == 0)}

    def _block(self, row: int, step: int) -> tuple[int, int]:
        """Return the document that a row reads at a step, and from which token on."""
        starts, epoch = self._starts[row], 0
        while True:
            blocks = self._plan(epoch)[row]
            if epoch + 1 == len(starts):
                starts.append(starts[epoch] + len(blocks))
            if step < starts[epoch + 1]:
                return blocks[step - starts[epoch]]
            epoch += 1

    def _plan(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Distribute the documents of an epoch: each goes to the row with the least tokens so far."""
        if epoch not in self._plans:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            loads, rows = [(0, row) for row in range(self.rows)], [[] for _ in range(self.rows)]  # type: ignore[var-annotated]
            for number in torch.randperm(len(self.texts), generator=generator).tolist():
                blocks = range(0, len(self.texts[number]) - 1, self.block)
                load, row = heapq.heappop(loads)
                rows[row] += [(number, start) for start in blocks]
                heapq.heappush(loads, (load + len(blocks), row))
            self._plans[epoch] = rows
        return self._plans[epoch]


def tokenised(config: DataConfig, tokenizer: Any, limit: int | None = None) -> Iterator[Tensor]:
    """Yield the token ids of each document, the end-of-sequence token before and behind it."""
    for text in islice(documents(config), limit):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: config.max_tokens]
        yield torch.tensor([tokenizer.eos_token_id, *ids, tokenizer.eos_token_id])


def load_lanes(config: DataConfig, tokenizer: Any, rows: int, seed: int) -> Lanes:
    """Read a source, local or of `datasets`, into rows.

    Args:
        config: where the text is; `max_tokens` cuts each document.
        tokenizer: with an eos token.
        rows: of a batch over all processes.
        seed: of the order.

    Raises:
        DataError: the source is missing or empty, or has fewer documents than rows.
    """
    texts = list(tokenised(config, tokenizer))
    digest = hashlib.sha256(repr(sorted(asdict(config).items())).encode())
    for text in texts:
        digest.update(text.numpy().tobytes())
    return Lanes(texts, rows, config.block, seed, digest.hexdigest()[:24])


def keep_memories(accelerator: Accelerator, streams: Sequence[Stream]) -> None:
    """Make the memories of streams part of Accelerate's checkpoints.

    Each process has a file of its own, of tensors alone: Accelerate's own files for registered objects are pickles,
    which run code when they are read.

    Args:
        accelerator: whose processes have a memory each.
        streams: of the model.

    Raises:
        ResumeError: when the state is loaded: a checkpoint has no such file.
    """

    def name(number: int) -> str:
        return f"memory_{number}_process_{accelerator.process_index}.safetensors"

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for number, stream in enumerate(streams):
            own = {key: tensor.cpu().contiguous() for key, tensor in stream.state_dict().items()}
            save_file(own, Path(folder) / name(number))

    def load(models: list[nn.Module], folder: str) -> None:
        for number, stream in enumerate(streams):
            file = Path(folder) / name(number)
            if not file.is_file():
                raise ResumeError(f"{file} is not there: the run is of an earlier release; start it anew.")
            stream.load_state_dict(load_file(file, str(accelerator.device)))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
