"""Refuses checkpoints whose small files ask for code, for other files, or for absurd sizes.

transformers acts on some of these without ``trust_remote_code``: it downloads and imports an attention implementation
that is a repository, an index may name weights anywhere on the disk, an adapter's base model is loaded from the path in
its config, and early releases open the vocabulary that a tokenizer's config names, wherever it is. All of them are
refused here before transformers sees them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from .errors import AttnPatchError
from .publishing import confidential
from .schema import brief, text_of

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"[\w-][\w.-]*", re.ASCII)  # a file of weights, in the folder of its index
_SMALL = 16 << 20  # bytes of a config: a million labels
_TEXTS = (".json", ".txt", ".jinja", ".model")  # endings of a tokenizer's files
_DEEPEST = 32  # configs in configs
# Numbers from which lists, modules and tables are built before a weight is read: far above any model's, far below what
# fills a machine's memory. The first pattern that matches a key counts.
_LARGEST = (
    (re.compile(r"num_labels"), 1 << 20),
    (re.compile(r".*vocab_size.*"), 1 << 24),
    (re.compile(r"n_embd|n_inner|d_model|d_ff|.*(hidden_size|intermediate_size|ffn_dim|head_dim).*"), 1 << 20),
    (re.compile(r"n_positions|n_ctx|seq_length|max_seq_len|max_sequence_length|max_.*(positions|embeddings)"), 1 << 25),
    (re.compile(r"n_layer|n_head|.*(layers|heads|experts)"), 10_000),
)


def check(name: str, where: Mapping[str, Any], *, trusted: bool) -> None:
    """Check the small files of a checkpoint before anything is built from them.

    Args:
        name: folder or hub repository.
        where: options that locate the files, such as the revision.
        trusted: whether the caller allows code that the checkpoint carries or names.

    Raises:
        AttnPatchError: names the file, what it asks for, and what to do.
        OSError: there is no such checkpoint.
    """
    config = _json(name, "config.json", where)
    if config is None:
        return  # transformers reports what is there instead
    _check_sizes(config, f"{name}/config.json")
    _check_dtypes(config, f"{name}/config.json")
    _check_weights(name, config, where)
    if not trusted:  # another attention that the caller chooses does not keep transformers from fetching this one
        _check_kernels(config, f"{name}/config.json")
    adapter = _json(name, "adapter_config.json", where)
    if adapter is not None:
        base = brief(adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else adapter)
        raise AttnPatchError(
            f"{name}: is an adapter (adapter_config.json) on top of {base}, which its config names and nobody else; "
            "load that model, and the adapter with PEFT, then pass the model."
        )


def check_tokenizer(name: str, where: Mapping[str, Any]) -> None:
    """Check a tokenizer's config before it is read: all its files must be in its folder.

    Raises:
        AttnPatchError: it names another file, which is there, or one of its files is a link out of the checkpoint:
            a vocabulary or a template may be any text, and would be saved as part of the patched checkpoint.
    """
    confidential.check_links(Path(name), _TEXTS)
    config = _json(name, "tokenizer_config.json", where)
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.endswith("_file") and isinstance(value, str) and os.path.lexists(value):
            raise AttnPatchError(
                f"{name}/tokenizer_config.json: {key} names {brief(value)}, a file of this machine that is no part of "
                "the checkpoint; take the line out."
            )


def _json(name: str, file: str, where: Mapping[str, Any]) -> Any:
    """Return the data of a small file of a checkpoint; None if it does not exist."""
    found = cached_file(name, file, **where, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    text = text_of(Path(found), _SMALL)
    try:
        return json.loads(text)  # transformers validates the values
    except (ValueError, RecursionError) as error:
        raise AttnPatchError(f"{name}/{file}: not JSON ({brief(str(error))}).") from error


def _items(config: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a config and of its nested configs.

    Raises:
        AttnPatchError: they are nested more deeply than any model's.
    """
    level = [config]
    for _ in range(_DEEPEST):
        pairs = [pair for each in level for pair in _pairs(each)]
        yield from pairs
        level = [value for _, value in pairs] + [item for each in level if isinstance(each, list) for item in each]
        if not level:
            return
    raise AttnPatchError(f"{where}: nested more than {_DEEPEST} levels deep; get the checkpoint anew.")


def _check_weights(name: str, config: Any, where: Mapping[str, Any]) -> None:
    """Refuse weight files outside the checkpoint, which an index or a config may name."""
    named = [("config.json", config.get("transformers_weights"))] if isinstance(config, Mapping) else []
    found = {path.name for path in Path(name).glob("*.index*.json")} if Path(name).is_dir() else set()
    for file in (*_INDEXES, *found - set(_INDEXES)):
        index = _json(name, file, where)
        shards = index.get("weight_map") if isinstance(index, Mapping) else None
        named += [(file, shard) for shard in (shards.values() if isinstance(shards, Mapping) else ())]
    for file, shard in named:
        if shard is not None and not (isinstance(shard, str) and _SHARD.fullmatch(shard)):
            raise AttnPatchError(
                f"{name}/{file}: names the weights {brief(shard)}, which do not lie beside it; get the checkpoint anew."
            )


def _check_kernels(config: Any, where: str) -> None:
    for key, value in _items(config, where):
        each = value.values() if isinstance(value, Mapping) else [value]  # one for each model inside
        named = [name for name in each if isinstance(name, str) and "attn_implementation" in key]
        repository = next((name for name in named if "/" in name or "@" in name), None)
        if repository is not None:
            raise AttnPatchError(
                f"{where}: {key} is {brief(repository)}, a repository whose code would run; take the line out, "
                "or pass trust_remote_code=True (--trust-remote-code) if you trust it."
            )


def _check_dtypes(config: Any, where: str) -> None:
    """Refuse dtypes unknown to torch: transformers takes any name that torch has."""
    inner = [item for key, item in _pairs(config) if key.endswith("config") and key != "quantization_config"]
    for key, value in (pair for each in (config, *inner) for pair in _pairs(each)):
        if key in ("dtype", "torch_dtype") and value is not None:
            found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
            if not isinstance(found, torch.dtype):
                raise AttnPatchError(f"{where}: {key} is {brief(value)}; wanted a dtype of torch, such as 'bfloat16'.")


def _pairs(config: Any) -> list[tuple[str, Any]]:
    return list(config.items()) if isinstance(config, Mapping) else []


def _check_sizes(config: Any, where: str) -> None:
    """Refuse numbers that would build lists and modules for hours, or fill the memory."""
    for key, value in _items(config, where):
        number = value if isinstance(value, int) and not isinstance(value, bool) else 0
        most = next((most for pattern, most in _LARGEST if pattern.fullmatch(key)), None)
        if most is not None and number > most:
            raise AttnPatchError(f"{where}: {key} is {brief(number)}; wanted at most {most:,}.")
