"""Loading what was patched and saved, with the right class and without being told which."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from . import foreign
from .errors import AttnPatchError
from .publishing.hub import Hub

# A class that several of these know (GPT-2's language model, say) is loaded by the first.
_AUTO = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def load(name: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """Load a model of any task, patched or not, as the class that its config names.

    A checkpoint that stock transformers can express is loaded by it; for another the recorded structure is rebuilt
    first (:mod:`hf_attnpatch.foreign`). No code from the checkpoint runs unless ``trust_remote_code=True`` is passed.

    Args:
        name: folder or hub repository.
        options: passed to ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ``attn_implementation`` ...

    Raises:
        AttnPatchError: no name, the record is damaged or of a newer release, no Auto class knows the architecture, or
            the connection to the Hub broke.
        OSError: transformers finds no such checkpoint.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise AttnPatchError(f"load: name is a {type(name).__name__}; it must be a folder or the name of a repository.")
    hub = {key: options[key] for key in ("revision", "token", "cache_dir", "trust_remote_code") if key in options}
    with Hub(hub.get("token")).downloading(str(name)):
        config = AutoConfig.from_pretrained(name, **hub)
        model: PreTrainedModel = auto_class(config).from_pretrained(name, **options)
    return model


def tokenizer_of(name: str, **options: Any) -> Any | None:
    """Return the tokenizer of a checkpoint, or None where it has none.

    Args:
        name: folder or hub repository.
        options: passed to ``from_pretrained``.
    """
    for file in _TOKENIZER_FILES:
        try:
            cached_file(name, file)
        except OSError:  # no such file there
            continue
        return AutoTokenizer.from_pretrained(name, **options)
    return None


def auto_class(config: PretrainedConfig) -> Any:
    """Return what gives the architecture named in a config, task head included: an Auto class, or a patched class.

    Raises:
        AttnPatchError: no Auto class of the installed transformers knows it.
    """
    names = [*_AUTO, *(n for n in modeling_auto.__all__ if n.startswith("AutoModelFor")), "AutoModel"]
    wanted = [name.removeprefix("Patched") for name in getattr(config, "architectures", None) or ()]
    remote = getattr(config, "auto_map", None) or {}
    for name in dict.fromkeys(names):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None) or {}
        found = mapping[type(config)] if type(config) in mapping else ()
        classes = found if isinstance(found, (list, tuple)) else (found,)
        if any(cls.__name__.removeprefix("Patched") in wanted for cls in classes) or name in remote:
            return getattr(modeling_auto, name)
    twin = next(filter(None, (foreign.twin_of(name, config) for name in wanted)), None)
    if twin is not None:
        return twin
    raise AttnPatchError(
        f"architectures {wanted} of model type {config.model_type!r}: no Auto class of the installed transformers "
        "gives it; write the class that the checkpoint was saved from into `architectures` of its config.json."
    )
