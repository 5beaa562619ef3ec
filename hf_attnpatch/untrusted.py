"""What a checkpoint's small files may not ask for: code, other files, sizes that no machine has.

transformers acts on some of these without ``trust_remote_code``: an attention implementation that is a repository is
downloaded and imported, an index may name weights anywhere on the disk, an adapter's base model is loaded from whatever
path its config names, and early releases open the vocabulary that a tokenizer's config names, wherever that lies. Here
all of them are refused before transformers sees them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from .errors import AttnPatchError
from .schema import brief, from_json, text_of

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"[\w-][\w.-]*", re.ASCII)  # a file of weights: beside its index, nowhere else
_SMALL = 16 << 20  # bytes of a config: a million labels
MOST_LAYERS = 10_000
_WIDTHS = ("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "n_positions", "num_labels")
_LARGEST_WIDTH = 1 << 28


def check(name: str, where: Mapping[str, Any], *, trusted: bool, chosen: Mapping[str, Any]) -> None:
    """Look at a checkpoint before anything of it is built.

    Args:
        name: folder or hub repository.
        where: options that say which revision and the like.
        trusted: whether the caller lets code run that the checkpoint carries or names.
        chosen: what the caller passes to ``from_pretrained``, which takes the place of what the config says.

    Raises:
        AttnPatchError: says the file, what it asks for, and what to do.
        OSError: there is no such checkpoint.
    """
    config = _json(name, "config.json", where)
    if config is None:
        return  # transformers says what it found in its place
    _check_sizes(config, f"{name}/config.json")
    _check_weights(name, config, where)
    if not trusted and "attn_implementation" not in chosen:
        _check_kernels(config, f"{name}/config.json")
    adapter = _json(name, "adapter_config.json", where)
    if adapter is not None:
        base = brief(adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else adapter)
        raise AttnPatchError(
            f"{name}: is an adapter (adapter_config.json) on top of {base}, which its config names and nobody else; "
            "load that model, and the adapter with PEFT, then pass the model."
        )


def check_tokenizer(name: str, where: Mapping[str, Any]) -> None:
    """Look at a tokenizer's config before it is read: the files of a tokenizer lie beside it.

    Raises:
        AttnPatchError: it names another file, which is there.
    """
    config = _json(name, "tokenizer_config.json", where)
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.endswith("_file") and isinstance(value, str) and os.path.lexists(value):
            raise AttnPatchError(
                f"{name}/tokenizer_config.json: {key} names {brief(value)}, a file of this machine that is no part of "
                "the checkpoint; take the line out."
            )


def _json(name: str, file: str, where: Mapping[str, Any]) -> Any:
    """Return what a small file of a checkpoint says; None where it is not there."""
    found = cached_file(name, file, **where, _raise_exceptions_for_missing_entries=False)
    return None if found is None else from_json(text_of(Path(found), _SMALL), f"{name}/{file}", finite=False)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key, item
            yield from _items(item)


def _check_weights(name: str, config: Any, where: Mapping[str, Any]) -> None:
    """Refuse files of weights that lie elsewhere: an index or a config may name them."""
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
    for key, value in _items(config):
        named = value if isinstance(value, str) else ""
        if "attn_implementation" in key and ("/" in named or "@" in named):
            raise AttnPatchError(
                f"{where}: {key} is {brief(named)}, a repository whose code would run; pass another attention, "
                "attn_implementation='sdpa', or trust_remote_code=True (--trust-remote-code) if you trust it."
            )


def _check_sizes(config: Any, where: str) -> None:
    """Refuse numbers from which lists and modules would be built for hours, or until the memory is full."""
    for key, value in _items(config):
        number = value if isinstance(value, int) and not isinstance(value, bool) else 0
        most = MOST_LAYERS if "layer" in key else _LARGEST_WIDTH if key in _WIDTHS else None
        if most is not None and number > most:
            raise AttnPatchError(f"{where}: {key} is {brief(number)}; wanted at most {most:,}.")
