"""Checkpoints that stock transformers must refuse: a model type of our own, registered when the package is imported.

The config object of a patched GPT-2, say, becomes a ``PatchedGPT2Config``: in memory it behaves as GPT-2's (generation,
PEFT and tokenizers look at ``model_type``), on disk it is written as model type ``hf_attnpatch`` with a stub for
``trust_remote_code``. Reading it back gives a subclass of ``GPT2LMHeadModel``, whose constructor rebuilds the recorded
structure before the weights are loaded; so sharding, dtypes, ``device_map``, ``from_config`` and saving again are
transformers' own.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import record
from .errors import AttnPatchError

MODEL_TYPE = "hf_attnpatch"
STUB = "modeling_hf_attnpatch"

_STUB_TEXT = '''"""Loads a checkpoint patched by hf_attnpatch: pip install hf_attnpatch.

With the package imported (`import hf_attnpatch`) nothing here is used; this file serves trust_remote_code=True.
"""

from hf_attnpatch.foreign import PatchedConfig  # noqa: F401
from hf_attnpatch.foreign import model_class

{classes}
'''


class PatchedConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not followed
    """Reads a config of model type ``hf_attnpatch``: returns the patched class of the family underneath."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the family's patched config.

        Raises:
            AttnPatchError: the record is missing, damaged, of a newer version or of a family unknown here.
        """
        found = record.parse(config_dict.get(record.FIELD))
        if found.base_model_type not in CONFIG_MAPPING:
            raise AttnPatchError(
                f"the checkpoint is a patched {found.base_model_type!r}, which transformers "
                f"{transformers.__version__} does not know; upgrade transformers."
            )
        patched = config_class(CONFIG_MAPPING[found.base_model_type])
        rest = {key: value for key, value in config_dict.items() if key not in ("model_type", "auto_map")}
        return patched.from_dict(rest, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: the stub, not a copy of this file, is what a checkpoint carries."""


class _Config:
    """Mixin of every patched config class."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, under our own model type."""
        data: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # mixed into PretrainedConfig
        base = type(self).__mro__[2]
        return {**data, "model_type": MODEL_TYPE, "auto_map": _auto_map(base)}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save, and lay the stub beside it."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]  # mixed into PretrainedConfig
        base = type(self).__mro__[2]
        lines = [f'{_stub_name(auto)} = model_class("{cls}")' for auto, cls in _auto_models(base).items()]
        Path(save_directory, f"{STUB}.py").write_text(_STUB_TEXT.format(classes="\n".join(lines)))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing; see :class:`PatchedConfig`."""


class _Model:
    """Mixin of every patched model class."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # mixed into PreTrainedModel
        from .api import restore  # the edits need models, which must not need the edits to be imported

        restore(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: weights are converted on loading and saving just as for the class underneath."""
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing; see :class:`PatchedConfig`."""


@functools.cache
def config_class(base: Any) -> Any:
    """Return the patched twin of a config class, its models registered with the Auto classes that know the family."""
    if issubclass(base, _Config):
        return base
    cls = _bare_config_class(base)
    for auto, name in _auto_models(base).items():
        getattr(modeling_auto, auto).register(cls, model_class(name), exist_ok=True)
    return cls


@functools.cache
def model_class(name: str) -> type[PreTrainedModel]:
    """Return the patched twin of the transformers model class of this name, under the same name.

    transformers looks weight conversions up by class name, and ``architectures`` in a config stays what it was.
    """
    base = getattr(transformers, name)
    body = {"__module__": __name__, "__doc__": f"Patched {name}.", "unpatched": base}
    body["config_class"] = _bare_config_class(base.config_class)
    return type(name, (_Model, base), body)


@functools.cache
def _bare_config_class(base: Any) -> Any:
    body = {"__module__": __name__, "__doc__": f"Patched {base.__name__}."}
    return type(f"Patched{base.__name__}", (_Config, base), body)


def __getattr__(name: str) -> Any:
    """Make the generated classes importable by name, as pickling needs."""
    base = None if name.startswith("_") else getattr(transformers, name.removeprefix("Patched"), None)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return model_class(base.__name__)
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _auto_models(base: type[PretrainedConfig]) -> dict[str, str]:
    """Return Auto class name -> model class name for a config class."""
    found = {}
    for auto in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        if auto.startswith("AutoModel") and mapping is not None and base in mapping:
            model = mapping[base]
            found[auto] = (model[0] if isinstance(model, tuple) else model).__name__
    return found


def _stub_name(auto: str) -> str:
    return auto.replace("AutoModel", "PatchedModel")


def _auto_map(base: type[PretrainedConfig]) -> dict[str, str]:
    models = {auto: f"{STUB}.{_stub_name(auto)}" for auto in _auto_models(base)}
    return {"AutoConfig": f"{STUB}.PatchedConfig", **models}


def register() -> None:
    """Teach ``AutoConfig`` our model type; called on import of the package."""
    AutoConfig.register(MODEL_TYPE, PatchedConfig, exist_ok=True)
