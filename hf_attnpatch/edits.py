"""The only code that writes to a model. Every edit returns its inverse (:mod:`.edit`)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .configs import all_configs, config_at
from .edit import ABSENT as _ABSENT
from .edit import Edit, Inverse, check_hooks
from .edit import short as _short
from .edit import swap as _swap
from .errors import UnsupportedArchitecture

__all__ = [
    "AddModule",
    "AddPreHook",
    "Edit",
    "Inverse",
    "ReplaceModule",
    "SetAttention",
    "SetAttribute",
    "SetBuffer",
    "SetConfig",
    "SetConfigClass",
]


@dataclass(frozen=True)
class SetConfig(Edit):
    """Set one field of a config (``path`` is the sub-config). The value is stored as given, aliases resolved."""

    rung = "config"
    field: str
    value: Any

    @property
    def claim(self) -> str:
        """The field."""
        return ".".join(filter(None, ("config", self.path, self.field)))

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Old and new value."""
        return _short(getattr(config_at(model, self.path), self.field, None)), _short(self.value)

    def run(self, model: PreTrainedModel) -> Inverse:
        """Set it; the inverse restores the object, or its absence."""
        config = config_at(model, self.path)
        store = vars(config)
        field = config.attribute_map.get(self.field, self.field)
        old = store.get(field, _ABSENT)
        setattr(config, self.field, self.value)  # lets the config validate
        store[field] = old  # or its absence, as the swap knows it
        return _swap(store, field, self.value, self.claim)


@dataclass(frozen=True)
class SetAttribute(Edit):
    """Set a plain attribute of a module instance."""

    rung = "attribute"
    name: str
    value: Any

    @property
    def claim(self) -> str:
        """The attribute's dotted name."""
        return f"{self.path}.{self.name}"

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Old and new value."""
        return _short(getattr(model.get_submodule(self.path), self.name, None)), _short(self.value)

    def run(self, model: PreTrainedModel) -> Inverse:
        """Set it in the instance's dictionary."""
        return _swap(vars(model.get_submodule(self.path)), self.name, self.value, self.claim)


@dataclass(frozen=True)
class ReplaceModule(Edit):
    """Put another module in the place of one; its tensors are made only when the edit runs, not when it is planned.

    The inverse keeps the old module, so both live until the report is dropped.

    Attributes:
        make: builds the new module from the old one.
        after: text for the report.
    """

    rung = "module"
    make: Callable[[nn.Module], nn.Module]
    after: str

    @property
    def claim(self) -> str:
        """The module's path."""
        return self.path

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """What stands there and what will."""
        return _short(model.get_submodule(self.path)), self.after

    def run(self, model: PreTrainedModel) -> Inverse:
        """Swap the child in its parent, keeping its place in the order."""
        parent, _, name = self.path.rpartition(".")
        old = model.get_submodule(self.path)
        new = self.make(old).train(old.training)
        check_hooks(self.path, old, new)
        if hasattr(old, "_hf_hook"):  # accelerate moves the inputs of a dispatched model by these
            add_hook_to_module(new, _own_hook(old._hf_hook))
        return _swap(model.get_submodule(parent)._modules, name, new, self.claim)


@dataclass(frozen=True)
class AddModule(Edit):
    """Give a module a child that it did not have; ``make`` builds it from the parent when the edit runs."""

    rung = "module"
    name: str
    make: Callable[[nn.Module], nn.Module]
    after: str

    @property
    def claim(self) -> str:
        """The child's path."""
        return f"{self.path}.{self.name}".lstrip(".")

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """What will stand there."""
        return "-", self.after

    def run(self, model: PreTrainedModel) -> Inverse:
        """Put it behind the other children."""
        parent = model.get_submodule(self.path)
        return _swap(parent._modules, self.name, self.make(parent).train(parent.training), self.claim)


@dataclass(frozen=True)
class SetBuffer(Edit):
    """Put another tensor in the place of a buffer; it is made from the old one when the edit runs."""

    rung = "attribute"
    name: str
    make: Callable[[Tensor], Tensor]
    after: str

    @property
    def claim(self) -> str:
        """The buffer's dotted name."""
        return f"{self.path}.{self.name}"

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Old shape and new."""
        return str(tuple(model.get_submodule(self.path).get_buffer(self.name).shape)), self.after

    def run(self, model: PreTrainedModel) -> Inverse:
        """Swap it in its module."""
        module = model.get_submodule(self.path)
        return _swap(module._buffers, self.name, self.make(module.get_buffer(self.name)), self.claim)


@dataclass(frozen=True)
class AddPreHook(Edit):
    """Register a forward pre-hook (with keyword arguments) on a module, behind those there are or before them."""

    rung = "hook"
    hook: Callable[..., Any]
    after: str
    first: bool = False

    @property
    def claim(self) -> str:
        """The hook's kind at this path."""
        return f"{self.path}@{type(self.hook).__name__}"

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """What the hook does."""
        return "-", self.after

    def run(self, model: PreTrainedModel) -> Inverse:
        """Register it."""
        module = model.get_submodule(self.path)
        handle = module.register_forward_pre_hook(self.hook, with_kwargs=True, prepend=self.first)
        return Inverse(self.claim, lambda: handle.id in module._forward_pre_hooks, handle.remove)


@dataclass(frozen=True)
class AddHook(AddPreHook):
    """Register a forward hook (with keyword arguments) on a module: it may put another output in the place of its."""

    def run(self, model: PreTrainedModel) -> Inverse:
        """Register it."""
        module = model.get_submodule(self.path)
        handle = module.register_forward_hook(self.hook, with_kwargs=True, prepend=self.first)
        return Inverse(self.claim, lambda: handle.id in module._forward_hooks, handle.remove)


@dataclass(frozen=True)
class SetAttention(Edit):
    """Choose the attention function for the whole model.

    Attributes:
        implementation: transformers' name for it.
        register: makes the name known, where it is ours.
        only_masks: for models that compute attention by themselves and ask for masks under this name.
    """

    rung = "attention"
    implementation: str
    register: Callable[[], None] | None = None
    only_masks: bool = False

    @property
    def claim(self) -> str:
        """The implementation field, of which a model has one."""
        return "config._attn_implementation"

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Old and new."""
        return _short(model.config._attn_implementation), self.implementation

    def run(self, model: PreTrainedModel) -> Inverse:
        """Set it everywhere transformers keeps it; the inverse restores each config's own value."""
        key = "_attn_implementation_internal"
        stores = {id(c): vars(c) for c in all_configs(model)}
        before = {i: store.get(key, _ABSENT) for i, store in stores.items()}

        def undo() -> None:
            for i, store in stores.items():
                store.pop(key, None)
                if before[i] is not _ABSENT:
                    store[key] = before[i]

        if self.register is not None:
            self.register()
        try:
            if self.only_masks:
                for store in stores.values():
                    store[key] = self.implementation
            else:
                model.set_attn_implementation(self.implementation)
            if model.config._attn_implementation != self.implementation:  # transformers only logs that it will not
                raise UnsupportedArchitecture(
                    f"{type(model).__name__} chooses its attention when it is built; load it with "
                    f"attn_implementation={self.implementation!r} instead of patching it."
                )
        except BaseException:
            undo()
            raise
        return Inverse(self.claim, lambda: model.config._attn_implementation == self.implementation, undo)


@contextlib.contextmanager
def first_layers(model: nn.Module, path: str, count: int) -> Iterator[None]:
    """Let a list of layers end after ``count`` of them for the length of a block; none is copied, changed or lost.

    Args:
        model: any.
        path: of a ``ModuleList``.
        count: layers that stay.
    """
    parent, _, name = path.rpartition(".")
    store, whole = model.get_submodule(parent)._modules, model.get_submodule(path)
    store[name] = nn.ModuleList(list(whole.children())[:count])
    try:
        yield
    finally:
        store[name] = whole


@dataclass(frozen=True)
class SetConfigClass(Edit):
    """Give the config object another class, so that it saves under another model type; its identity stays."""

    rung = "config"
    cls: type[PretrainedConfig]

    @property
    def claim(self) -> str:
        """The class of the config."""
        return ".".join(filter(None, ("config", self.path, "__class__")))

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Old and new class."""
        return type(config_at(model, self.path)).__name__, self.cls.__name__

    def run(self, model: PreTrainedModel) -> Inverse:
        """Set ``__class__``."""
        config, old = config_at(model, self.path), type(config_at(model, self.path))
        config.__class__ = self.cls

        def undo() -> None:
            config.__class__ = old

        return Inverse(self.claim, lambda: type(config) is self.cls, undo)


def _own_hook(hook: Any) -> Any:
    """Return Accelerate's hook for a module in the place of another: what is offloaded are its own weights."""
    own = copy.copy(hook)
    if getattr(own, "hooks", None) is not None:
        own.hooks = tuple(map(_own_hook, own.hooks))
    if getattr(own, "weights_map", None) is not None:
        own.weights_map = None  # made anew, in memory, when the hook is added
    return own
