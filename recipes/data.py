"""Text from any source as data: a file, a folder or a `datasets` name, packed into token blocks of one length.

Documents are tokenised one after another with the end-of-sequence token between them and cut into blocks, without
padding. The tokens are written once to a memory-mapped cache whose name is the digest of everything they depend on, so
that block `i` is the same on every process and on every run. A stream is read once, up to `max_tokens`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from hf_attnpatch.schema import brief
from recipes.settings import at_least
from recipes.skipping import check as check_skip
from recipes.skipping import skipped_positions

UNREAD = ("cache", "source", "block", "skip_to", "skip_chunks")  # of the settings: the tokens do not depend on them
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")


class DataError(ValueError):
    """A source of text is missing, empty or too short; the message says what was found and what to do."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is packed.

    Args:
        source: a text file, a JSONL file, a folder of them, or the name of a dataset for `datasets.load_dataset`.
        block: tokens per block.
        field: the key of the text in JSONL rows and datasets.
        split: of a dataset.
        subset: of a dataset (its configuration name).
        data_files: passed on to `datasets.load_dataset`.
        streaming: reads a dataset as a stream; needs `max_tokens`.
        max_tokens: stops reading after so many tokens.
        cache: folder of the tokenised cache.
        skip_to: gives blocks positions with gaps, up to this many (PoSE); without, positions follow from the order.
        skip_chunks: how many pieces of a block stay contiguous then.
    """

    section: ClassVar[str] = "data"  # of the file, for errors

    source: str
    block: int = 512
    field: str = "text"
    split: str = "train"
    subset: str | None = None
    data_files: str | tuple[str, ...] | None = None
    streaming: bool = False
    max_tokens: int | None = None
    cache: str = "outputs/cache"
    skip_to: int | None = None
    skip_chunks: int = 2

    def __post_init__(self) -> None:
        at_least(2, self.section, block=self.block)  # of fewer tokens, none is predicted
        at_least(1, self.section, max_tokens=self.max_tokens)


class Blocks:
    """Token blocks of one length, by index.

    Args:
        tokens: token ids, shape (number of tokens,), any unsigned integer type.
        block: tokens per block; a last incomplete block is left out.
        fingerprint: digest of everything the tokens depend on.
        skip: positions and chunks of position skipping, if any.
    """

    def __init__(
        self, tokens: npt.NDArray[Any], block: int, fingerprint: str, skip: tuple[int, int] | None = None
    ) -> None:
        self.block, self.skip = block, skip
        self.fingerprint = fingerprint if skip is None else f"{fingerprint} skip {skip[0]} {skip[1]}"
        self.tokens = tokens[: len(tokens) // block * block].reshape(-1, block)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))  # block
        item = {"input_ids": ids, "labels": ids.clone()}
        if self.skip is not None:  # without a mask, transformers takes a gap for the beginning of another text
            positions = skipped_positions(self.block, *self.skip, index)
            item |= {"position_ids": positions, "attention_mask": torch.ones_like(ids)}
        return item


def local_files(source: str) -> list[Path] | None:
    """The text files behind a local source in a fixed order, or None if `source` names a dataset.

    Raises:
        DataError: `source` looks like a path and is missing, or is a folder without any text file.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES and each.is_file())
        if not files:
            found = sorted({each.suffix or each.name for each in path.rglob("*") if each.is_file()})
            raise DataError(
                f"{path}: a folder without text; found {', '.join(found) or 'nothing'}, wanted files ending in "
                f"{', '.join(SUFFIXES)}. Put text there or name another source."
            )
        return files
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix in SUFFIXES or source.count("/") > 1:
        raise DataError(
            f"{source}: no such file or folder (looked from {Path.cwd()}); wanted a text file, a folder, or the name "
            "of a dataset. Correct data.source, or create the file."
        )
    return None


def rows(path: Path, field: str) -> Iterator[str]:
    """The documents of one file: a line of JSONL each, otherwise the whole file.

    Raises:
        DataError: the file is not UTF-8, or a JSONL line is no JSON or lacks `field`.
    """
    try:
        if path.suffix != ".jsonl":
            yield path.read_text("utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(line, field, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it, or take it out of the source.") from error


def _row(line: str, field: str, where: str) -> str:
    try:
        text = json.loads(line)[field]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{where}: wanted a JSON object with the key '{field}': {brief(repr(error), 200)}") from error
    return _checked(text, field, where)


def _checked(text: object, field: str, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where}: '{field}' is {text!r:.40}; wanted a text. Take the row out, or set data.field.")
    return text


def open_dataset(config: DataConfig) -> Iterable[dict[str, Any]]:
    """Opens a source that is no local path with `datasets`.

    Raises:
        DataError: `datasets` is not installed or cannot find or read it, or a stream has no `max_tokens`.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{config.source}: no local path, and `datasets` is missing: pip install hf_attnpatch[recipes]"
        ) from error
    if config.streaming and not config.max_tokens:
        raise DataError(f"{config.source}: a stream has no end that we could wait for; set data.max_tokens.")
    files = list(config.data_files) if isinstance(config.data_files, tuple) else config.data_files
    try:
        opened: Iterable[dict[str, Any]] = datasets.load_dataset(
            config.source, config.subset, split=config.split, streaming=config.streaming, data_files=files
        )
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(
            f"{config.source}: neither a local file or folder (looked from {Path.cwd()}) nor a dataset that could be "
            f"opened ({type(error).__name__}: {error}). Correct data.source, data.subset or data.split."
        ) from error
    return opened


def documents(config: DataConfig) -> Iterator[str]:
    """Every document of the source that is not blank, in a fixed order.

    Raises:
        DataError: the source is missing, or a row lacks the text.
    """
    files = local_files(config.source)
    if files is not None:
        texts: Iterator[str] = (text for path in files for text in rows(path, config.field))
    else:
        texts = _dataset_texts(config)
    return (text for text in texts if text.strip())


def _dataset_texts(config: DataConfig) -> Iterator[str]:
    for row in open_dataset(config):
        if config.field not in row:
            raise DataError(f"{config.source}: rows have {sorted(row)}, no '{config.field}'; set data.field.")
        yield _checked(row[config.field], config.field, config.source)


def fingerprint(config: DataConfig, tokenizer: Any) -> str:
    """Digest of what the tokens depend on: the texts' bytes (a dataset's own fingerprint), tokenizer, settings."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    settings = {key: value for key, value in asdict(config).items() if key not in UNREAD}
    digest.update(json.dumps([settings, tokenizer.eos_token_id], sort_keys=True).encode())
    files = local_files(config.source)
    if files is None:
        opened = open_dataset(config)
        digest.update(f"{config.source} {getattr(opened, '_fingerprint', '')}".encode())
    for path in files or []:
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()[:24]


def token_batches(texts: Iterator[str], tokenizer: Any, size: int = 256) -> Iterator[list[int]]:
    """Token ids of one document after another, each ended by the tokenizer's eos."""
    while chunk := list(islice(texts, size)):
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [*ids, tokenizer.eos_token_id]


def write_tokens(config: DataConfig, tokenizer: Any, path: Path) -> None:
    """Tokenises the source into a flat file of token ids; the file appears whole or not at all."""
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")  # not mkstemp, whose files only their owner may read
    count = 0
    try:
        with open(temporary, "xb") as file:
            for ids in token_batches(documents(config), tokenizer):
                file.write(np.asarray(ids, dtype=kind).tobytes())
                count += len(ids)
                if config.max_tokens and count >= config.max_tokens:
                    break
        if count == 0:
            raise DataError(f"{config.source}: found no text, every document is blank; name a source with text in it.")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_blocks(config: DataConfig, tokenizer: Any) -> Blocks:
    """Packs a source into token blocks, from the cache if it was tokenised before. Call it before loading a model.

    Args:
        config: where the text is.
        tokenizer: a fast tokenizer with an eos token.

    Returns:
        The blocks; item `i` has `input_ids` and `labels`, each of shape (block,), int64.

    Raises:
        DataError: the source is missing or empty, or shorter than one block.
        SettingsError: positions that cannot be skipped so.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos token to put between documents; set tokenizer.eos_token.")
    skip = None if config.skip_to is None else (config.skip_to, config.skip_chunks)
    if skip is not None:
        check_skip(config.block, *skip)
    digest = fingerprint(config, tokenizer)
    path = Path(config.cache) / f"{digest}.{'u16' if len(tokenizer) <= 2**16 else 'u32'}"
    if not path.exists():
        write_tokens(config, tokenizer, path)
    kind = np.dtype(np.uint16 if path.suffix == ".u16" else np.uint32)
    tokens: npt.NDArray[Any] = np.memmap(path, dtype=kind, mode="r")[: config.max_tokens]
    if len(tokens) < config.block:
        raise DataError(
            f"{config.source}: found {len(tokens)} tokens, wanted at least one block of {config.block}; give more text "
            "or lower data.block."
        )
    return Blocks(tokens, config.block, digest, skip)
