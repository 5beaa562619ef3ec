"""The argument roles of forwards: found by running the model's class, or guessed from transformers' vocabulary.

The model's class is built again on the meta device and called with tokens, positions and a cache, which are recognised
wherever they arrive. Argument names are a property of a forward's code, so they are found once for each class and kept;
the user's model is not run. If a forward cannot run without data, what was seen until it stopped counts, and the
vocabulary supplies the rest.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ..configs import skeleton
from ..interruption import removing
from . import words
from .caches import first, output_fields, returned
from .find import changed
from .parts import parts_of

_ROWS, _LENGTH = 3, 11  # sizes of the probe that no model has by chance
FAILURES = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError, AssertionError)

_YES: Any = type("_Yes", (int,), {})(1)  # True, to be known again wherever a forward hands it on
_FOUND: dict[Any, dict[str, str]] = {}  # forward function -> role -> name
_MAKE_ANGLES: set[Any] = set()  # forward functions that return rotary angles
_TABLES: dict[type, set[str]] = {}  # class of models -> paths of modules with a table that receive positions
_RUN: set[type] = set()  # classes of models that have been run


@dataclass(frozen=True)
class Roles:
    """The argument names of one forward, by role.

    Attributes:
        owner: class of the module, for errors.
        parameters: declared names, in order, without ``*args`` and ``**kwargs``.
        names: role -> name; roles that the forward has no name for are absent.
        aliases: names of other releases that a caller may use -> the declared name.
        open: whether it accepts further keywords and passes them on.
    """

    owner: str
    parameters: tuple[str, ...]
    names: Mapping[str, str]
    aliases: Mapping[str, str]
    open: bool

    def takes(self, *roles: str) -> bool:
        """Return whether the forward declares an argument for each of these roles."""
        return all(self.names.get(role) in self.parameters for role in roles)

    def name(self, role: str) -> str:
        """Return the forward's name of a role.

        Raises:
            UpstreamChanged: it has no known argument for the role.
        """
        found = self.names.get(role)
        if found is None:
            raise changed(
                f"no argument for {role} in the forward of {self.owner} (it takes {', '.join(self.parameters)})",
                "this patch",
            )
        return found

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Return the arguments of one call, by role."""
        return Arguments(self, args, kwargs)

    def call(self, **given: Any) -> dict[str, Any]:
        """Return keyword arguments for this forward from values by role; roles without an argument are left out."""
        return {self.names[role]: value for role, value in given.items() if self.takes(role)}


class Arguments:
    """The arguments of one call of a forward, read and replaced by role.

    If the caller uses another release's name, which transformers accepts for a while, the value moves to the declared
    name.

    Args:
        roles: of the forward.
        args: that it was called with.
        kwargs: likewise.
    """

    def __init__(self, roles: Roles, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.roles = roles
        self.named: dict[str, Any] = {**dict(zip(roles.parameters, args, strict=False)), **kwargs}
        self.placed, self.rest = roles.parameters[: len(args)], tuple(args[len(roles.parameters) :])
        for other in kwargs:
            name = roles.aliases.get(other)
            if name is not None and self.named.get(name) is None:
                self.named[name] = self.named.pop(other)

    def get(self, role: str) -> Any:
        """Return the value of a role, or None. A cache is recognised under any name."""
        name = self.roles.names.get(role)
        found = None if name is None else self.named.get(name)
        if found is None and role == words.CACHE:
            return first(self.named.values())
        return found

    def put(self, role: str, value: Any) -> None:
        """Replace the value of a role.

        Raises:
            UpstreamChanged: the forward has no name for it.
        """
        if role == words.CACHE:
            there = next((name for name, held in self.named.items() if isinstance(held, Cache)), None)
            self.named[there or self.roles.name(role)] = value
        else:
            self.named[self.roles.name(role)] = value

    def pop(self, name: str) -> Any:
        """Remove and return a keyword of this package; None if it is absent."""
        return self.named.pop(name, None)

    def back(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for the module: all by keyword, unless one has no name."""
        if self.rest:
            return (*(self.named.pop(name) for name in self.placed), *self.rest), self.named
        return (), self.named


class ArgumentHook:
    """Base class of forward pre-hooks that replace arguments by role.

    Args:
        roles: argument roles of the forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Edit the arguments of a call."""
        given = self.roles.bind(args, kwargs)
        return None if self.edit(module, given) is False else given.back()

    def edit(self, module: nn.Module, given: Arguments) -> bool | None:
        """Replace arguments; False leaves the call as it is."""
        raise NotImplementedError


def roles_of(module: nn.Module) -> Roles:
    """Return the argument roles of a module's forward: those found by :func:`learn`, else by the vocabulary."""
    parameters, opened = _declared(module.forward)
    replaced = "forward" in vars(module)  # replaced on the instance: it passes its arguments to the class's forward
    for owner in type(module).__mro__[not replaced :] if opened and (replaced or not parameters) else ():
        inherited = vars(owner).get("forward")  # of a class that passes everything on to its base
        if inherited is not None and _declared(inherited)[0]:
            parameters += tuple(name for name in _declared(inherited)[0][1:] if name not in parameters)
            break
    guessed = {role: _guess(spellings, parameters, opened) for role, spellings in words.ARGUMENTS.items()}
    known = {role: name for role, name in guessed.items() if name is not None}
    names = {**known, **_FOUND.get(_key(module), {})}
    spelled = [(other, name) for role, name in names.items() for other in words.ARGUMENTS[role] if other != name]
    aliases = {other: name for other, name in spelled if other not in parameters and name in parameters}
    return Roles(type(module).__name__, parameters, names, aliases, opened)


def _declared(forward: Any) -> tuple[tuple[str, ...], bool]:
    """Return a forward's parameter names without ``*args`` and ``**kwargs``, and whether it has the latter.

    For a decorator that declares only those, the names are those of the one function that it wraps.
    """
    declared = inspect.signature(forward).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = tuple(name for name, p in declared.items() if p.kind not in variadic)
    function = inspect.unwrap(getattr(forward, "__func__", forward))
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()] if not names else []
    inner = [value for value in held if inspect.isfunction(value)]
    if len(inner) == 1:
        names, opened = _declared(inner[0])
        return names[inspect.ismethod(forward) :], opened
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in declared.values())


def _guess(spellings: Sequence[str], parameters: Sequence[str], opened: bool) -> str | None:
    declared = next((name for name in spellings if name in parameters), None)
    return spellings[0] if declared is None and opened and spellings[0] in words.HANDED_ON else declared


def makes_angles(module: nn.Module) -> bool:
    """Return whether a module was seen to compute the rotary angles of attention modules."""
    return _key(module) in _MAKE_ANGLES


def frequencies(module: nn.Module) -> dict[str, Tensor]:
    """Return the frequency buffers of a module, (dimensions / 2,), by name.

    They are recognised by name, or as all vectors of a module that was seen to make angles.
    """
    rows = {name: b for name, b in module._buffers.items() if b is not None and b.dim() == 1 and b.is_floating_point()}
    named = {name: b for name, b in rows.items() if name.endswith(words.FREQUENCIES)}
    if any("original" not in name for name in named):
        return named
    return rows if named or makes_angles(module) else {}


def learn(model: PreTrainedModel) -> None:
    """Find the argument roles of a model class's forwards, by running it once without data.

    Args:
        model: gives the class and the config; it is not touched.
    """
    kind = type(model)
    if kind in _RUN:
        return
    _RUN.add(kind)
    try:
        twin = skeleton(model, attention="eager").eval()
    except (*FAILURES, ImportError, StrictDataclassError):
        return  # cannot be built: only the vocabulary tells
    _TABLES[kind] = _Probe(twin).run()


def run_without_data(skeleton: PreTrainedModel) -> None:
    """Run a model on the meta device as far as possible, with tokens, positions and a cache."""
    _Probe(skeleton)._forward({})


def position_tables(model: PreTrainedModel) -> frozenset[str]:
    """Return the paths of modules with a table, (rows, width), that were seen to receive positions."""
    return frozenset(_TABLES.get(type(model), ()))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside wrappers (PEFT, DDP, torch.compile), or the innermost module."""
    while not isinstance(model, PreTrainedModel):
        wrapper: Any = model
        inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else None
        inner = getattr(model, "module", getattr(model, "_orig_mod", None)) if inner is None else inner
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def run(model: nn.Module, given: Mapping[str, Any], **more: Any) -> Any:
    """Call a model, or a wrapper of one, with values by role.

    Args:
        model: the model whose forward is called.
        given: by role; roles without an argument are left out.
        more: further keyword arguments.
    """
    return model(**roles_of(unwrapped(model)).call(**given), **more)


def columns(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the columns of a batch from a tokenizer's names to those of a model's arguments."""
    names = roles_of(unwrapped(model)).names
    roles = {word: role for role, spellings in words.ARGUMENTS.items() for word in spellings}
    return {names.get(roles.get(name, ""), name): value for name, value in batch.items()}


def resumed(model: nn.Module, output: Any) -> dict[str, Any]:
    """Return the keyword arguments with which the next forward continues from an output; empty if it cannot."""
    roles = roles_of(unwrapped(model))
    found = {roles.names.get(words.CACHE, n) if isinstance(v, Cache) else n: v for n, v in returned(output).items()}
    return {name: value for name, value in found.items() if name in roles.parameters}


def predicted(output: Any) -> Tensor:
    """Return an output's logits, or its hidden states if it has none."""
    fields = output_fields(output)
    named = (getattr(output, name, fields.get(name)) for name in words.PREDICTIONS)
    found = next((value for value in named if isinstance(value, Tensor)), None)
    if found is None:  # another name: the first tensor with a vector for each token
        found = next(t for t in fields.values() if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2)
    assert isinstance(found, Tensor)
    return found


class _Probe:
    """One model on the meta device, with the tensors that are recognised where they arrive.

    Args:
        model: the model to run.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.tokens = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64, device="meta")
        self.positions = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64, device="meta")
        self.keep = torch.ones(_ROWS, _LENGTH, dtype=torch.int64, device="meta")
        self.arrived: set[int] = set()  # roles that reached a module inside the language model
        self.cached = False  # whether one of those received a cache
        self.seen: dict[Any, dict[str, str]] = {}  # findings of the last forward, as in _FOUND
        self.made: list[tuple[Any, Any]] = []  # outputs that look like angles, with their forwards
        self.tables: set[str] = set()
        self.paths = {module: path for path, module in model.named_modules()}

    def run(self) -> set[str]:
        """Run it with each argument that the vocabulary knows; then look for roles under unknown names.

        Returns:
            Paths of the modules with a table that received positions.
        """
        self._forward({})
        self._keep()
        if roles_of(self.model).takes(words.MASK):
            self._forward({roles_of(self.model).name(words.MASK): self.keep})  # ends where its numbers are looked at
            self._keep()
        known = {name for spellings in words.ARGUMENTS.values() for name in spellings} | words.OTHER_ARGUMENTS
        for name in roles_of(self.model).parameters:
            if name not in known and name not in roles_of(self.model).names.values():
                self._try(name)
        return self.tables

    def _keep(self) -> None:
        """Accept the findings of the last forward."""
        for forward, found in self.seen.items():
            _FOUND.setdefault(forward, {}).update(found)

    def _try(self, name: str) -> None:
        """Pass a cache, positions, a mask or True to an argument of unknown name, until one is recognised."""
        for role, value in self._sentinels().items():
            if roles_of(self.model).takes(role):
                continue
            self._forward({name: value})
            seen = dict(self.seen)
            if role == words.USE_CACHE:
                plays = self.cached and not self._keeps(name)
            else:
                plays = id(value) in self.arrived
            if plays:
                self.seen = seen
                self._keep()
                _FOUND.setdefault(_key(self.model), {})[role] = name
                return

    def _sentinels(self) -> dict[str, Any]:
        wanted = {words.CACHE: self._cache(), words.POSITIONS: self.positions, words.MASK: self.keep}
        return {**{role: value for role, value in wanted.items() if value is not None}, words.USE_CACHE: _YES}

    def _keeps(self, name: str) -> bool:
        """Return whether attention modules receive a cache although an argument is False."""
        self._forward({name: False})
        return self.cached

    def _cache(self) -> Any:
        if not self.model.can_generate():
            return None
        try:
            return DynamicCache(config=self.model.config.get_text_config(decoder=True))
        except FAILURES:
            return DynamicCache()

    def _forward(self, more: Mapping[str, Any]) -> None:
        self.arrived.clear()
        self.made.clear()
        self.seen.clear()
        self.cached = False
        roles = roles_of(self.model)
        given = {words.TOKENS: self.tokens, words.DECODER_TOKENS: self.tokens, words.USE_CACHE: True}
        given |= {words.POSITIONS: self.positions, words.CACHE: self._cache()} if not more else {}
        given = {role: value for role, value in given.items() if roles.names.get(role) not in more}
        inputs = {k: v for k, v in roles.call(**given).items() if k in roles.parameters and v is not None}
        with self._watched(), torch.no_grad(), contextlib.suppress(*FAILURES):
            self.model(**inputs, **more)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        with removing() as handles:
            for module in self.model.modules():
                handles.append(module.register_forward_pre_hook(self._look, with_kwargs=True))
                if not module._modules:
                    handles.append(module.register_forward_hook(self._note))
            yield

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        declared = roles_of(module).parameters
        named = {**dict(zip(declared, args, strict=False)), **kwargs}
        deep = not isinstance(module, PreTrainedModel)
        if deep:
            self.arrived |= {id(value) for value in named.values()}
            self.cached = self.cached or any(isinstance(value, Cache) for value in named.values())
        elif module is not self.model:  # a mask of two dimensions goes no deeper
            self.arrived |= {id(value) for value in named.values() if value is self.keep}
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and any(value is self.positions for value in named.values()):
            self.tables.add(self.paths[module])
        by_role: dict[str, list[str]] = {}
        for name, value in named.items():
            by_role.setdefault(self._role(value), []).append(name)
        by_role.pop("", None)
        angles = [named[name] for name in by_role.get(words.ANGLES, ())]
        _MAKE_ANGLES.update(key for made, key in self.made if any(made is given for given in angles))
        for role, names in by_role.items():  # several candidates: the known name, or the first
            found = next((name for name in words.ARGUMENTS[role] if name in names), names[0])
            self.seen.setdefault(_key(module), {})[role] = found

    def _note(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._role(output) == words.ANGLES:
            self.made.append((output, _key(module)))

    def _role(self, value: Any) -> str:
        """Return the role of an argument by its value; empty if that does not tell."""
        if isinstance(value, Cache):
            return words.CACHE
        if value is self.tokens:
            return words.TOKENS
        if value is self.positions:
            return words.POSITIONS
        if value is self.keep:
            return words.MASK
        if value is _YES:
            return words.USE_CACHE
        if isinstance(value, Tensor):
            whole = value.dim() == 3 and value.shape[:2] == (_ROWS, _LENGTH) and value.is_floating_point()
            square = value.dim() == 4 and value.shape[1] == 1 and value.shape[-2:] == (_LENGTH, _LENGTH)
            return words.STATES if whole else words.MASK if square else ""
        pair = parts_of(value) or ()
        both = len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)
        return words.ANGLES if both and pair[0].shape == pair[1].shape and pair[0].shape[-2] == _LENGTH else ""


def _key(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)
