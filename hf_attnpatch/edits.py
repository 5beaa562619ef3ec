"""The edits: the only code that writes to a model. Every edit knows its way back before it writes (:mod:`.edit`)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .configs import all_configs, config_at
from .edit import ABSENT as _ABSENT
from .edit import Edit, Write, check_hooks, lost, tried, undo_all, write_all
from .edit import short as _short
from .edit import swap as _swap
from .errors import AttnPatchError, UnsupportedArchitecture
from .upstream import words
from .upstream.partitioned import is_partitioned, shape_of

__all__ = [
    "AddModule",
    "AddPreHook",
    "BecomeModel",
    "Edit",
    "FirstLayers",
    "RemoveHook",
    "ReplaceModule",
    "SetAttention",
    "SetAttribute",
    "SetBuffer",
    "SetConfig",
    "SetConfigClass",
    "Write",
    "hooks_of",
    "lost",
    "tried",
    "undo_all",
    "write_all",
]


@dataclass(frozen=True)
class SetConfig(Edit):
    """Set one field of a config (``path`` is the sub-config). The value is stored as given, under its real name."""

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

    def prepare(self, model: PreTrainedModel) -> Write:
        """Validate the value on a copy of the config."""
        config = config_at(model, self.path)
        setattr(copy.copy(config), self.field, self.value)
        return _swap(vars(config), config.attribute_map.get(self.field, self.field), self.value, self.claim)


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

    def prepare(self, model: PreTrainedModel) -> Write:
        """Prepare the write to the instance's dictionary."""
        return _swap(vars(model.get_submodule(self.path)), self.name, self.value, self.claim)


@dataclass(frozen=True)
class ReplaceModule(Edit):
    """Replace a module; the new one's tensors are made only when the edit runs, not when it is planned.

    The way back keeps the old module, so both live until the report is dropped.

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
        """Return the old and the new module."""
        return _short(model.get_submodule(self.path)), self.after

    def prepare(self, model: PreTrainedModel) -> Write:
        """Make the module that will take the old one's place in its parent's order."""
        parent, _, name = self.path.rpartition(".")
        old = model.get_submodule(self.path)
        new = self.make(old).train(old.training)
        check_hooks(self.path, old, new)
        if hasattr(old, "_hf_hook"):  # accelerate moves the inputs of a dispatched model by these
            add_hook_to_module(new, _own_hook(old._hf_hook))
        return _swap(model.get_submodule(parent)._modules, name, new, self.claim)


@dataclass(frozen=True)
class AddModule(Edit):
    """Add a child to a module; ``make`` builds it from the parent when the edit runs."""

    rung = "module"
    name: str
    make: Callable[[nn.Module], nn.Module]
    after: str

    @property
    def claim(self) -> str:
        """The child's path."""
        return f"{self.path}.{self.name}".lstrip(".")

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Return the new child."""
        return "-", self.after

    def prepare(self, model: PreTrainedModel) -> Write:
        """Make the child, which will follow the other children."""
        parent = model.get_submodule(self.path)
        return _swap(parent._modules, self.name, self.make(parent).train(parent.training), self.claim)


@dataclass(frozen=True)
class SetBuffer(Edit):
    """Replace a buffer by a tensor made from the old one when the edit runs."""

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

    def prepare(self, model: PreTrainedModel) -> Write:
        """Make the tensor."""
        module = model.get_submodule(self.path)
        return _swap(module._buffers, self.name, self.make(module.get_buffer(self.name)), self.claim)


@dataclass(frozen=True)
class AddPreHook(Edit):
    """Register a forward pre-hook (with keyword arguments) on a module, after the present hooks or before them."""

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

    def prepare(self, model: PreTrainedModel) -> Write:
        """Prepare the registration; the hook is found again by its identity, whatever registering it returns."""
        module = model.get_submodule(self.path)
        stores = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        return self._registered(module.register_forward_pre_hook, *stores)

    def _registered(self, register: Callable[..., Any], hooks: dict[int, Any], *marks: dict[int, Any]) -> Write:
        """Return the write that registers the hook among ``hooks``; ``marks`` tell how each hook is called."""

        def ours() -> list[int]:
            return [key for key, hook in hooks.items() if hook is self.hook]

        def undo() -> None:
            for key in ours():
                hooks.pop(key)  # first: without its marks it would get other arguments
            for store in marks:
                for key in [key for key in store if key not in hooks]:
                    store.pop(key)

        def do() -> None:
            register(self.hook, with_kwargs=True, prepend=self.first)

        return Write(self.claim, lambda: bool(ours()), do, undo)


@dataclass(frozen=True)
class AddHook(AddPreHook):
    """Register a forward hook (with keyword arguments) on a module, which may replace its output."""

    def prepare(self, model: PreTrainedModel) -> Write:
        """As before."""
        module = model.get_submodule(self.path)
        marks = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
        return self._registered(module.register_forward_hook, module._forward_hooks, *marks)


@dataclass(frozen=True)
class RemoveHook(Edit):
    """Remove a forward hook or pre-hook from a module; undoing restores its place in the order."""

    rung = "hook"
    hook: Callable[..., Any]

    @property
    def claim(self) -> str:
        """The hook's kind at this path."""
        return f"{self.path}@{type(self.hook).__name__}"

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Return the kind of hook."""
        return type(self.hook).__name__, "-"

    def prepare(self, model: PreTrainedModel) -> Write:
        """Find the hook by its identity."""
        module = model.get_submodule(self.path)
        hooks, *marks = next(stores for stores in _hook_stores(module) if self.hook in stores[0].values())
        key = next(key for key, hook in hooks.items() if hook is self.hook)
        marked = [(store, store[key]) for store in marks if key in store]
        orders = [(store, list(store)) for store in (hooks, *marks)]

        def do() -> None:
            hooks.pop(key, None)  # first: without its marks it would get other arguments
            for store, _ in marked:
                store.pop(key, None)

        def undo() -> None:
            for store, mark in marked:
                store[key] = mark
            hooks[key] = self.hook
            for store, order in orders:
                for other in (*order, *(other for other in list(store) if other not in order)):
                    if other in store:
                        store.move_to_end(other)

        return Write(self.claim, lambda: key not in hooks, do, undo)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the forward pre-hooks and forward hooks of a module."""
    return [hook for hooks, *_ in _hook_stores(module) for hook in hooks.values()]


def _hook_stores(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield the ordered dictionaries of hooks, each with those that tell how its hooks are called."""
    yield module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    yield module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called


class Unpaged:
    """Stands in a model in the place of continuous batching, whose cache knows nothing of attention that is ours.

    Args:
        architecture: class name of the model.
    """

    def __init__(self, architecture: str):
        self.architecture = architecture

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            AttnPatchError: always.
        """
        raise AttnPatchError(
            f"{self.architecture}: its attention is patched in a way that the paged cache of continuous batching "
            "(generate_batch, `transformers serve --continuous-batching`) would pass over. Take model.generate with a "
            "padded batch, or serve without --continuous-batching; grouped heads, rotary scalings of one factor for "
            "all requests, and position tables run in it."
        )


@dataclass(frozen=True)
class SetAttention(Edit):
    """Set the attention implementation of the whole model.

    Attributes:
        implementation: transformers' name of it.
        register: registers the name, if it is this package's.
        only_masks: for models that compute attention themselves and only ask for masks under this name.
        configs: with ``only_masks``, paths of the configs to set; None for all. An image tower may dispatch.
        otherwise: the name for families that transformers lets ask for no kernel of torch's; None for the same.
    """

    rung = "attention"
    implementation: str
    register: Callable[[], None] | None = None
    only_masks: bool = False
    configs: tuple[str, ...] | None = None
    otherwise: str | None = None

    @property
    def claim(self) -> str:
        """The implementation field, of which a model has one."""
        return "config._attn_implementation"

    def name_for(self, model: PreTrainedModel) -> str:
        """Return the name that this model asks for."""
        declared = getattr(model, words.DECLARES_SDPA, False)
        return self.implementation if declared or self.otherwise is None else self.otherwise

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Old and new."""
        return _short(model.config._attn_implementation), self.name_for(model)

    def prepare(self, model: PreTrainedModel) -> Write:
        """Find every config that holds the implementation; undoing restores each one's own value."""
        key, name = "_attn_implementation_internal", self.name_for(model)
        stores = [vars(config) for config in all_configs(model)]
        own, held = vars(model), vars(model).get(words.BATCHING, _ABSENT)
        asking = stores if self.configs is None else [vars(config_at(model, path)) for path in self.configs]
        before = [store.get(key, _ABSENT) for store in stores]

        def undo() -> None:
            for store, old in zip(stores, before, strict=True):
                if old is _ABSENT:
                    store.pop(key, None)
                else:
                    store[key] = old
            if held is _ABSENT:
                own.pop(words.BATCHING, None)
            else:
                own[words.BATCHING] = held

        def do() -> None:
            if self.register is not None:
                self.register()
            if self.only_masks:
                for store in asking:
                    store[key] = name
            else:
                model.set_attn_implementation(name)
            if model.config._attn_implementation != name:  # transformers only logs that it will not
                raise UnsupportedArchitecture(
                    f"{type(model).__name__} chooses its attention when it is built; load it with "
                    f"attn_implementation={name!r} instead of patching it."
                )
            if self.register is not None and hasattr(type(model), words.BATCHING):  # last: the name says it is done
                own[words.BATCHING] = Unpaged(type(model).__name__)

        return Write(
            self.claim,
            lambda: model.config._attn_implementation == name,
            do,
            undo,
            (id(model.config), self.claim),
        )


@dataclass(frozen=True)
class FirstLayers(Edit):
    """Shorten a list of layers (``path``) to the first ``count``; no layer is copied or changed."""

    rung = "module"
    count: int

    @property
    def claim(self) -> str:
        """The list."""
        return self.path

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Return the old and the new number of layers."""
        return f"{len(_children(model, self.path))} layers", f"the first {self.count}"

    def prepare(self, model: PreTrainedModel) -> Write:
        """Make the shorter list."""
        parent, _, name = self.path.rpartition(".")
        short = nn.ModuleList(_children(model, self.path)[: self.count])
        return _swap(model.get_submodule(parent)._modules, name, short, self.claim)


def _children(model: nn.Module, path: str) -> list[nn.Module]:
    return list(model.get_submodule(path).children())


@contextlib.contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """Give ZeRO-3's partitioned parameters their full shape for the duration of a block, in which edits run.

    While a model is built, structure is read from shapes; numbers come from the checkpoint later. The stand-in of a
    parameter holds one number. DeepSpeed partitions new modules when they are made; modules that stay get their own
    parameters back.
    """
    partitioned = {id(p): p for p in model.parameters() if is_partitioned(p)}
    if not partitioned:
        yield
        return
    stand_ins = {
        key: nn.Parameter(p.new_zeros(()).expand(shape_of(p)), requires_grad=p.requires_grad)
        for key, p in partitioned.items()
    }
    _exchange(model, stand_ins)
    try:
        yield
    finally:
        _exchange(model, {id(stand_in): partitioned[key] for key, stand_in in stand_ins.items()})


def _exchange(model: nn.Module, others: dict[int, nn.Parameter]) -> None:
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in others:
                module._parameters[name] = others[id(parameter)]


@dataclass(frozen=True)
class SetConfigClass(Edit):
    """Change the class of the config object, so that it saves under another model type; its identity stays."""

    rung = "config"
    cls: type[PretrainedConfig]

    @property
    def claim(self) -> str:
        """The class of the config."""
        return ".".join(filter(None, ("config", self.path, "__class__")))

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Old and new class."""
        return type(config_at(model, self.path)).__name__, self.cls.__name__

    def prepare(self, model: PreTrainedModel) -> Write:
        """Prepare the assignment of its ``__class__``."""
        config, old = config_at(model, self.path), type(config_at(model, self.path))

        def do() -> None:
            config.__class__ = self.cls

        def undo() -> None:
            config.__class__ = old

        return Write(self.claim, lambda: type(config) is self.cls, do, undo)


@dataclass(frozen=True)
class BecomeModel(Edit):
    """Make a model one of another type: class, config and modules change, its identity stays, as parameters mostly do.

    Attributes:
        make: builds a model of the other type around the same parameters.
        model_type: of the new type.
        after: text for the report.
        rewrites: whether modules get other parameters, so that other patches must be proposed on the result.
    """

    rung = "model"
    make: Callable[[PreTrainedModel], PreTrainedModel]
    model_type: str
    after: str
    rewrites: bool = False

    @property
    def claim(self) -> str:
        """The class of the model."""
        return "the class of the model"

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Old and new class."""
        return type(model).__name__, self.after

    def prepare(self, model: PreTrainedModel) -> Write:
        """Build the other model, whose modules will hold this one's config.

        Raises:
            AttnPatchError: a user's hook would be lost.
            UnsupportedArchitecture: the model is spread over devices.
        """
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise UnsupportedArchitecture(
                f"{type(model).__name__}: is spread over devices or offloaded; load it without device_map before it "
                "becomes one of another type."
            )
        config, other = model.config, self.make(model)
        for name, child in model.named_children():
            check_hooks(name, child, other.get_submodule(name))
        _checkpointing(model, other)
        borrowed = other.config
        for module in other.modules():
            if vars(module).get("config") is borrowed:
                module.config = config
        swaps = [
            _ordered(vars(config), self.claim),  # taken back last
            *_swapped(model._modules, other._modules, self.claim),
            *_swapped(vars(model), {k: v for k, v in vars(other).items() if k not in _KEPT}, self.claim),
            *_swapped(vars(config), vars(borrowed), self.claim),
            *(_dropped(vars(config), key, self.claim) for key in vars(config).keys() - vars(borrowed).keys()),
        ]
        classes = ((model, type(model), type(other)), (config, type(config), type(borrowed)))

        def do() -> None:
            for swap_ in swaps:
                swap_.do()
            for thing, _, new in classes:
                thing.__class__ = new

        def undo() -> None:
            for thing, old, _ in classes:
                thing.__class__ = old
            undo_all(swaps)

        placed = [_placed(other)]

        def stands() -> bool:
            return type(model) is type(other) and _placed(model) == placed[0]

        def settle() -> None:
            placed[0] = _placed(model)

        return Write(self.claim, stands, do, undo, settle=settle)


def _placed(model: nn.Module) -> list[tuple[int, str, int]]:
    """Return which modules and parameters stand where below a model; adapters and new embeddings are others."""
    below = [module for child in model.children() for module in child.modules()]
    held = [(id(m), name, id(p)) for m in below for name, p in (*m._modules.items(), *m._parameters.items())]
    return [*((0, name, id(child)) for name, child in model.named_children()), *held]


# What a model keeps when its class changes: torch's module state, and what belongs to this object.
_KEPT = frozenset({*vars(nn.Module()), "config", "generation_config", "name_or_path", "warnings_issued"})


def _swapped(store: dict[str, Any], new: dict[str, Any], claim: str) -> Iterator[Write]:
    """Yield the writes that update a dictionary with ``new``."""
    yield from (_swap(store, key, value, claim) for key, value in new.items() if store.get(key, _ABSENT) is not value)


def _dropped(store: dict[str, Any], key: str, claim: str) -> Write:
    """Return the write that removes a key from a dictionary."""
    old = store[key]

    def undo() -> None:
        store[key] = old

    return Write(claim, lambda: key not in store, lambda: store.pop(key, None), undo)


def _ordered(store: dict[str, Any], claim: str) -> Write:
    """Return a write that does nothing, and puts the keys of a dictionary back into their present order."""
    order, held = list(store), dict[str, Any]()

    def undo() -> None:
        held.update({**store, **held})  # where this is begun again, a key may be out of the dictionary
        for key in sorted(held, key=lambda key: order.index(key) if key in order else len(order)):
            store.pop(key, None)
            store[key] = held[key]
        held.clear()

    return Write(claim, lambda: True, lambda: None, undo)


def _checkpointing(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Copy gradient checkpointing to another model."""
    for path, module in other.named_modules():
        mine = vars(dict(model.named_modules()).get(path, module))
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if name in mine:
                setattr(module, name, mine[name])


def _own_hook(hook: Any) -> Any:
    """Return a copy of Accelerate's hook for a replacement module, which offloads its own weights."""
    own = copy.copy(hook)
    if getattr(own, "hooks", None) is not None:
        own.hooks = tuple(map(_own_hook, own.hooks))
    if getattr(own, "weights_map", None) is not None:
        own.weights_map = None  # made anew, in memory, when the hook is added
    return own
