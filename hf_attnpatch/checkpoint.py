"""Loads patched checkpoints with the right class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import cached_file

from . import foreign, record, untrusted
from .errors import AttnPatchError
from .publishing.hub import Hub
from .publishing.origin import REPOSITORY
from .schema import brief
from .showing import line

# A class that several of these know (GPT-2's language model, say) is loaded by the first.
_AUTO = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_WHERE = ("revision", "token", "cache_dir", "subfolder", "local_files_only")  # options that locate files


def load(name: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """Load a model of any task, patched or not, as the class that its config names, with every tensor it needs.

    Stock transformers loads a checkpoint that it can express; for others the recorded structure is rebuilt first
    (:mod:`hf_attnpatch.foreign`). No code from the checkpoint runs, and none that its config names, unless
    ``trust_remote_code=True`` is passed; there is no prompt. See `docs/trust.md` of this package.

    Args:
        name: folder or hub repository.
        options: passed to ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ``attn_implementation`` ...

    Raises:
        AttnPatchError: no such folder, a damaged record or one of a newer release, a config that asks for code or
            absurd sizes, a missing tensor, no Auto class for the architecture, or a broken connection to the Hub.
        OSError: transformers finds no such checkpoint.
    """
    options = {"trust_remote_code": False, **options}
    told = options.pop("output_loading_info", False)
    with Hub(options.get("token")).downloading(str(name)):
        config = config_of(name, **options)
        model, info = auto_class(config).from_pretrained(name, output_loading_info=True, **options)
    _check_whole(str(name), model, info)
    where = {key: options[key] for key in _WHERE if key in options and key != "token"}
    setattr(model, record.READ, {"name": str(name), "where": where, "unexpected": tuple(info["unexpected_keys"])})
    return (model, info) if told else model


def config_of(name: str | os.PathLike[str], **options: Any) -> PretrainedConfig:
    """Return the config of a checkpoint after checking what it asks for; see :func:`load`."""
    check_name(name)
    trust, hub = bool(options.get("trust_remote_code")), {key: options[key] for key in _WHERE if key in options}
    untrusted.check(str(name), hub, trusted=trust)
    return AutoConfig.from_pretrained(name, **hub, trust_remote_code=trust)


def _check_whole(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a model with tensors that no file contains; transformers fills them with random numbers."""
    missing = sorted(info["missing_keys"])
    if missing:
        few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise AttnPatchError(
            f"{name}: lacks {few}, in whose place {type(model).__name__} would have random numbers; get the whole "
            "checkpoint, or let `architectures` in its config.json name the class that it was saved from."
        )


def check_name(name: object) -> None:
    """Check that a name is an existing folder, or may be the name of a repository.

    Raises:
        AttnPatchError: it is neither.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise AttnPatchError(f"load: name is a {type(name).__name__}; it must be a folder or the name of a repository.")
    text = os.fspath(name)
    named = not isinstance(name, os.PathLike) and not os.path.lexists(text) and REPOSITORY.fullmatch(text)
    if not os.path.isdir(text) and not named:
        found = "is a file" if os.path.lexists(text) else "is not there"
        raise AttnPatchError(f"{line(text)}: {found}; wanted the folder of a checkpoint, or owner/name on the Hub.")


def tokenizer_of(name: str, **options: Any) -> Any | None:
    """Return the tokenizer of a checkpoint, or None if it has none. No code from the checkpoint runs; see above.

    Args:
        name: folder or hub repository.
        options: passed to ``from_pretrained``.

    Raises:
        AttnPatchError: its configuration names a file that is not part of the checkpoint.
    """
    options = {"trust_remote_code": False, **options}
    hub = {key: options[key] for key in _WHERE if key in options}
    for file in _TOKENIZER_FILES:
        try:
            cached_file(name, file, **hub)
        except OSError:  # no such file there
            continue
        untrusted.check_tokenizer(name, hub)
        return AutoTokenizer.from_pretrained(name, **options)
    return None


def auto_class(config: PretrainedConfig) -> Any:
    """Return what loads the architecture named in a config, task head included: an Auto class, or a patched class.

    Raises:
        AttnPatchError: no Auto class of the installed transformers knows it.
    """
    names = [*_AUTO, *(n for n in modeling_auto.__all__ if n.startswith("AutoModelFor")), "AutoModel"]
    wanted = [name.removeprefix("Patched") for name in _architectures(config)]
    remote = {} if foreign.is_patched(config) else getattr(config, "auto_map", None) or {}
    for name in dict.fromkeys(names):
        mapping = getattr(
            getattr(modeling_auto, name), "_model_mapping", None
        )  # testing its truth imports every family
        found = mapping[type(config)] if mapping is not None and type(config) in mapping else ()
        classes = found if isinstance(found, (list, tuple)) else (found,)
        if any(cls.__name__.removeprefix("Patched") in wanted for cls in classes) or name in remote:
            return getattr(modeling_auto, name)
    twin = next(filter(None, (foreign.twin_of(name, config) for name in wanted)), None)
    if twin is not None:
        return twin
    named = brief(", ".join(wanted))
    raise AttnPatchError(
        f"architectures [{named}] of model type {config.model_type!r}: no Auto class of the installed transformers "
        "gives it; write the class that the checkpoint was saved from into `architectures` of its config.json."
    )


def _architectures(config: PretrainedConfig) -> list[str]:
    """Return the class names in a config, which are data of whoever made the checkpoint.

    Raises:
        AttnPatchError: they are not a list of names.
    """
    found = getattr(config, "architectures", None)
    if found is None:
        return []
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise AttnPatchError(f"architectures in config.json is {brief(found)}; wanted a list of class names.")
    return list(found)
