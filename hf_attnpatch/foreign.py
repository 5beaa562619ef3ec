"""The model type of patched checkpoints that stock transformers must refuse, registered on import.

The config of a patched GPT-2, for example, becomes a ``PatchedGPT2Config``. In memory it acts like GPT-2's (generation,
PEFT and tokenizers look at ``model_type``); on disk it has model type ``hf_attnpatch`` and a stub for
``trust_remote_code``. Loading it gives a subclass of ``GPT2LMHeadModel``, whose constructor rebuilds the recorded
structure before the weights are loaded. Sharding, dtypes, ``device_map``, ``from_config`` and saving again are
therefore transformers' own.

The concrete classes of transformers never check the model type, so two more things keep them from building an unpatched
model: on disk the attention and experts implementations have a name that no stock model class accepts (:data:`SEAL`),
and in memory the config stops every constructor but those made here (``_Config.name_or_path``). Config classes can read
the files, as Trainer and tokenizers require. The class in ``architectures`` has a name unknown to transformers, so that
code that looks it up there (TRL) falls back to an Auto class.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import record
from .configs import building, is_building
from .errors import AttnPatchError
from .upstream import words

if TYPE_CHECKING:  # takes as long to import as all the rest, and may not be needed
    from transformers import PreTrainedModel

MODEL_TYPE = "hf_attnpatch"
STUB = "modeling_hf_attnpatch"
_BORROWED = "_of_"
_PATCHED = "Patched"  # prefix to the name of a transformers class
# Takes the place of the implementations on disk. Every constructor of a stock model checks that it knows them, and its
# error quotes the text: the only sentence of ours that a stock class can be made to say.
SEAL = (
    "a checkpoint patched by hf_attnpatch: `pip install hf_attnpatch`, `import hf_attnpatch`, then load it with an "
    "Auto class or hf_attnpatch.load; this class cannot read it"
)

_STUB_TEXT = '''"""Loads a checkpoint patched by hf_attnpatch: pip install hf_attnpatch.

With the package imported (`import hf_attnpatch`) nothing here is used; this file serves trust_remote_code=True.
"""

from hf_attnpatch.foreign import PatchedConfig  # noqa: F401
from hf_attnpatch.foreign import model_class

{classes}
'''


class PatchedConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not followed
    """Reads a config of model type ``hf_attnpatch``: returns the patched class of the underlying family."""

    model_type = MODEL_TYPE

    def __new__(cls, **fields: Any) -> Any:
        """Build the family's patched config, as ``AutoConfig.for_model`` does for a nested config."""
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the family's patched config.

        Raises:
            AttnPatchError: the record is missing, damaged, of a newer version or of a family unknown here.
        """
        found = record.parse(config_dict.get(record.FIELD))
        config_dict = {**config_dict, record.FIELD: found.to_dict()}  # without what earlier releases kept in it
        if found.base_model_type not in CONFIG_MAPPING or found.base_model_type == MODEL_TYPE:
            raise AttnPatchError(
                f"the checkpoint is a patched {found.base_model_type!r}, which transformers "
                f"{transformers.__version__} does not know; upgrade transformers."
            )
        return config_class(CONFIG_MAPPING[found.base_model_type]).from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: the stub, not a copy of this file, is what a checkpoint carries."""


class _Config:
    """Mixin of every patched config class."""

    @property
    def name_or_path(self) -> str | None:
        """Return where the model came from; or refuse.

        Every constructor of transformers reads this before it builds anything: the only moment to stop a class that
        would silently build an unpatched model from this config.

        Raises:
            AttnPatchError: a model class that does not rebuild the record is being constructed.
        """
        model = _under_construction(inspect.currentframe())
        if model is not None and not is_building():
            name = type(model).__name__
            raise AttnPatchError(
                f"{name}(config): the config is that of a model patched by hf_attnpatch, of which "
                f"{type(model).__module__}.{name} would build an unpatched one; use from_config or from_pretrained of "
                f"an Auto class, or the class of the same name in {__name__}."
            )
        name_or_path: str | None = super().name_or_path  # type: ignore[misc]  # mixed into PretrainedConfig
        return name_or_path

    @name_or_path.setter
    def name_or_path(self, value: str) -> None:
        PretrainedConfig.name_or_path.fset(self, value)

    @property
    def auto_map(self) -> dict[str, str]:
        """Tell TRL, which asks this of classes that transformers does not know, whether the model reads images."""
        images = "AutoModelForImageTextToText"
        return {auto: code for auto, code in _auto_map(type(self).__mro__[2]).items() if auto == images}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with this package's model type, class names and the seal."""
        data: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # mixed into PretrainedConfig
        named = data.get("architectures")
        if isinstance(named, list) and all(isinstance(name, str) for name in named):
            data["architectures"] = [_PATCHED + name.removeprefix(_PATCHED) for name in named]
        base = type(self).__mro__[2]
        return {**data, "model_type": MODEL_TYPE, "auto_map": _auto_map(base), **dict.fromkeys(words.SEALED, SEAL)}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save, and write the stub next to it."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]  # mixed into PretrainedConfig
        base = type(self).__mro__[2]
        models = _auto_models(base).items()
        lines = [f'{_stub_name(auto)} = model_class("{cls}", "{base.__name__}")' for auto, cls in models]
        Path(save_directory, f"{STUB}.py").write_text(_STUB_TEXT.format(classes="\n".join(lines)))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing; see :class:`PatchedConfig`."""


def _under_construction(frame: FrameType | None) -> PreTrainedModel | None:
    """Return the model whose constructor reads the property in this frame, or None."""
    frame = frame and frame.f_back
    while frame is not None and frame.f_code.co_name == "__getattribute__":  # configs have one, for their aliases
        frame = frame.f_back
    reader = frame.f_locals.get("self") if frame is not None and frame.f_code.co_name == "__init__" else None
    return reader if reader is not None and isinstance(reader, transformers.PreTrainedModel) else None


class _Model:
    """Mixin of every patched model class."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        inner = is_building()  # the trunk of a head, or a module of a skeleton: what is around it is restored whole
        with building():
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # mixed into PreTrainedModel
        if inner:
            return
        from .restoring import restore  # the edits need models, which must not need the edits to be imported

        restore(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: weights are converted on loading and saving as for the class underneath."""
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing; see :class:`PatchedConfig`."""


@functools.cache
def config_class(base: Any) -> Any:
    """Return the patched twin of a config class, with its models registered in the family's Auto classes."""
    if issubclass(base, _Config):
        return base
    cls = _bare_config_class(base)
    for auto, name in _auto_models(base).items():
        getattr(modeling_auto, auto).register(cls, model_class(name, base.__name__), exist_ok=True)
    return cls


@functools.cache
def model_class(name: str, config: str | None = None) -> type[PreTrainedModel]:
    """Return the patched twin of the transformers model class of this name, under the same name.

    transformers looks up weight conversions by class name, and ``architectures`` in a config stays unchanged.

    Args:
        name: of the stock class.
        config: of the stock config class, where a family borrows the model class of another (InternLM3 has Llama's).
    """
    base = getattr(transformers, name)
    if config == base.config_class.__name__:
        return model_class(name)
    own = base.config_class if config is None else getattr(transformers, config)
    body = {"__module__": __name__, "__doc__": f"Patched {name}.", "unpatched": base}
    body["config_class"] = _bare_config_class(own)
    body["__qualname__"] = name if config is None else f"{name}{_BORROWED}{config}"  # by which pickle finds it
    return type(name, (_Model, base), body)


@functools.cache
def _bare_config_class(base: Any) -> Any:
    def __init__(self: Any, **fields: Any) -> None:
        base.__init__(self, **_unsealed(fields))

    # the constructor stands in the class itself: dataclasses, which configs are, would put theirs before a mixin's
    body = {"__module__": __name__, "__doc__": f"Patched {base.__name__}.", "__init__": __init__}
    return type(f"{_PATCHED}{base.__name__}", (_Config, base), body)


def _unsealed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the family's own fields from those that :meth:`_Config.to_dict` wrote, in this release or another."""
    own = {key: value for key, value in fields.items() if key not in ("model_type", "auto_map", *words.SEALED)}
    labels = own.get("id2label") or {}
    behind = [value for key, value in labels.items() if not str(key).isdigit()]  # where the seal stood before
    return {**own, "id2label": behind[0]} if behind else own


def __getattr__(name: str) -> Any:
    """Make the generated classes importable by name, as pickling needs."""
    model, borrowed, config = name.partition(_BORROWED)
    if borrowed and not name.startswith("_"):
        return model_class(model, config)
    base = None if name.startswith("_") else getattr(transformers, name.removeprefix(_PATCHED), None)
    if isinstance(base, type) and issubclass(base, transformers.PreTrainedModel):
        return model_class(base.__name__)
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _auto_models(base: type[PretrainedConfig]) -> dict[str, str]:
    """Return Auto class name -> model class name for a config class, without the models of nested configs."""
    found = {}
    for auto in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        if auto.startswith("AutoModel") and mapping is not None and base in mapping:
            model = mapping[base]
            cls = model[0] if isinstance(model, tuple) else model
            if cls.config_class is not None and cls.config_class not in base.sub_configs.values():
                found[auto] = cls.__name__
    return found


def is_patched(config: PretrainedConfig) -> bool:
    """Return whether a config is of this package's type, so that its models are known here, whatever code it names."""
    return isinstance(config, _Config)


def twin_of(architecture: str, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the patched class for a patched config that no Auto class knows (Musicgen's decoder alone), or None.

    The name is data of whoever made the checkpoint: it is looked up among the models of the config's own family only,
    and nothing else of transformers is imported because of it.
    """
    if not isinstance(config, _Config):
        return None
    own = type(config).__mro__[2]
    family = importlib.import_module(own.__module__.rpartition(".")[0])
    known = architecture.isidentifier() and architecture in dir(family)
    base = getattr(family, architecture) if known else None
    if not isinstance(base, type) or not issubclass(base, transformers.PreTrainedModel):
        return None
    return model_class(architecture, own.__name__)


def _stub_name(auto: str) -> str:
    return auto.replace("AutoModel", "PatchedModel")


def _auto_map(base: type[PretrainedConfig]) -> dict[str, str]:
    """Return the code that ``trust_remote_code=True`` runs.

    Without that, an Auto class of stock transformers names the folder and asks for it; no wording of ours gets into
    that error. Tried: another file name or model type (neither is quoted), ``text--file.class`` (quoted, but taken for
    a repository when it is trusted), no entry for AutoConfig (quotes the model type, but then nothing can be trusted),
    the family's own model type (quotes the seal, but the package would have to replace the family's config class).
    """
    models = {auto: f"{STUB}.{_stub_name(auto)}" for auto in _auto_models(base)}
    return {"AutoConfig": f"{STUB}.PatchedConfig", **models}


def register() -> None:
    """Teach ``AutoConfig`` our model type; called on import of the package."""
    AutoConfig.register(MODEL_TYPE, PatchedConfig, exist_ok=True)
