"""What a forward calls its arguments: found by running it, or guessed from transformers' vocabulary before that.

The model's class is built once more on the meta device, where nothing is computed, and called with tokens, positions
and a cache that are recognised again wherever they arrive. What an argument is called is a fact about the code of a
forward, so that it is found once for each class and kept; the model that a user holds is not run for it. Where a
forward cannot run without data, what was seen until it stopped is known of it; the vocabulary serves for the rest.
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

_ROWS, _LENGTH = 3, 11  # of the probe: sizes that no model has by chance
FAILURES = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError, AssertionError)

_YES: Any = type("_Yes", (int,), {})(1)  # True, to be known again wherever a forward hands it on
_FOUND: dict[Any, dict[str, str]] = {}  # forward function -> role -> name
_MAKE_ANGLES: set[Any] = set()  # forward functions whose output attention modules get as their angles
_TABLES: dict[type, set[str]] = {}  # class of models -> paths of modules with a table that were given positions
_RUN: set[type] = set()  # classes of models that were run


@dataclass(frozen=True)
class Roles:
    """What one forward calls its arguments.

    Attributes:
        owner: class of the module, for errors.
        parameters: names that it declares, in order, less ``*args`` and ``**kwargs``.
        names: role -> name; a role that the forward has no name for is absent.
        aliases: spellings of other releases that a caller may use -> the name that the forward declares.
        open: whether it takes further keywords and hands them on.
    """

    owner: str
    parameters: tuple[str, ...]
    names: Mapping[str, str]
    aliases: Mapping[str, str]
    open: bool

    def takes(self, *roles: str) -> bool:
        """Whether the forward declares an argument for each of these roles."""
        return all(self.names.get(role) in self.parameters for role in roles)

    def name(self, role: str) -> str:
        """Return what the forward calls a role.

        Raises:
            UpstreamChanged: it takes no such argument that is known.
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
        """Return keywords for this forward from values by role; roles that it declares no argument for are left out."""
        return {self.names[role]: value for role, value in given.items() if self.takes(role)}


class Arguments:
    """The arguments of one call of a forward, read and replaced by role.

    A spelling of another release that the caller uses (transformers takes the old ones for a while) is put under the
    name that the forward declares.

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
        """Return the value that plays a role, or None. A cache is recognised whatever it is called."""
        name = self.roles.names.get(role)
        found = None if name is None else self.named.get(name)
        if found is None and role == words.CACHE:
            return first(self.named.values())
        return found

    def put(self, role: str, value: Any) -> None:
        """Replace the value that plays a role.

        Raises:
            UpstreamChanged: the forward has no name for it.
        """
        if role == words.CACHE:
            there = next((name for name, held in self.named.items() if isinstance(held, Cache)), None)
            self.named[there or self.roles.name(role)] = value
        else:
            self.named[self.roles.name(role)] = value

    def pop(self, name: str) -> Any:
        """Take out what travels under a keyword of this package's own; None where nothing does."""
        return self.named.pop(name, None)

    def back(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a forward pre-hook hands on: everything by keyword, unless something has no name."""
        if self.rest:
            return (*(self.named.pop(name) for name in self.placed), *self.rest), self.named
        return (), self.named


def roles_of(module: nn.Module) -> Roles:
    """Return what a module's forward calls its arguments: as found by :func:`learn`, else by the vocabulary."""
    parameters, opened = _declared(module.forward)
    replaced = "forward" in vars(module)  # on the instance: what it hands on goes to the class's own
    for owner in type(module).__mro__[not replaced :] if opened and (replaced or not parameters) else ():
        inherited = vars(owner).get("forward")  # of a class that hands everything on to the one below it
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
    """Return the names of a forward's parameters, less those that take what is left, and whether it takes that.

    Of a decorator that declares nothing but what is left, they are those of the one function that it stands around.
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
    """Whether a module was seen to compute the angles by which attention modules rotate."""
    return _key(module) in _MAKE_ANGLES


def frequencies(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module that hold its angles per position, (dimensions / 2,), by name.

    Known by their name, or as all rows of numbers of a module that was seen to make angles.
    """
    rows = {name: b for name, b in module._buffers.items() if b is not None and b.dim() == 1 and b.is_floating_point()}
    named = {name: b for name, b in rows.items() if name.endswith(words.FREQUENCIES)}
    if any("original" not in name for name in named):
        return named
    return rows if named or makes_angles(module) else {}


def learn(model: PreTrainedModel) -> None:
    """Find what the forwards of a model's class call their arguments, by running it once without data.

    Args:
        model: of the class and the config; it is not touched.
    """
    kind = type(model)
    if kind in _RUN:
        return
    _RUN.add(kind)
    try:
        twin = skeleton(model, attention="eager").eval()
    except (*FAILURES, ImportError, StrictDataclassError):
        return  # what cannot be built so is known by its vocabulary alone
    _TABLES[kind] = _Probe(twin).run()


def run_without_data(skeleton: PreTrainedModel) -> None:
    """Run a model on the meta device as far as it goes, with tokens, positions and a cache."""
    _Probe(skeleton)._forward({})


def position_tables(model: PreTrainedModel) -> frozenset[str]:
    """Return the paths of modules with a table, (rows, width), that were seen to be given positions."""
    return frozenset(_TABLES.get(type(model), ()))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside of wrappers (PEFT, DDP, torch.compile), or what is inside of them."""
    while not isinstance(model, PreTrainedModel):
        wrapper: Any = model
        inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else None
        inner = getattr(model, "module", getattr(model, "_orig_mod", None)) if inner is None else inner
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def run(model: nn.Module, given: Mapping[str, Any], **more: Any) -> Any:
    """Call a model, or a wrapper around one, with values by role.

    Args:
        model: whose forward is called.
        given: by role; roles that the forward has no argument for are left out.
        more: further keywords, as they are.
    """
    return model(**roles_of(unwrapped(model)).call(**given), **more)


def columns(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch under the names of a model's arguments, in the place of those that tokenizers give columns."""
    names = roles_of(unwrapped(model)).names
    roles = {word: role for role, spellings in words.ARGUMENTS.items() for word in spellings}
    return {names.get(roles.get(name, ""), name): value for name, value in batch.items()}


def resumed(model: nn.Module, output: Any) -> dict[str, Any]:
    """Return the keywords by which a model's next forward goes on from its last output; empty where it cannot."""
    roles = roles_of(unwrapped(model))
    found = {roles.names.get(words.CACHE, n) if isinstance(v, Cache) else n: v for n, v in returned(output).items()}
    return {name: value for name, value in found.items() if name in roles.parameters}


def predicted(output: Any) -> Tensor:
    """Return the logits that an output of a model holds, or its hidden states where it has none."""
    fields = output_fields(output)
    named = (getattr(output, name, fields.get(name)) for name in words.PREDICTIONS)
    found = next((value for value in named if isinstance(value, Tensor)), None)
    if found is None:  # of another name: the first that has a row of numbers for each token
        found = next(t for t in fields.values() if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2)
    assert isinstance(found, Tensor)
    return found


class _Probe:
    """One model on the meta device, and what is recognised again where it arrives.

    Args:
        model: to be run.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.tokens = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64, device="meta")
        self.positions = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64, device="meta")
        self.keep = torch.ones(_ROWS, _LENGTH, dtype=torch.int64, device="meta")
        self.arrived: set[int] = set()  # what reached a module inside the language model
        self.cached = False  # whether one of those got a cache
        self.seen: dict[Any, dict[str, str]] = {}  # what the last forward showed, as in _FOUND
        self.made: list[tuple[Any, Any]] = []  # what modules returned that looks like angles, and their forwards
        self.tables: set[str] = set()
        self.paths = {module: path for path, module in model.named_modules()}

    def run(self) -> set[str]:
        """Run it with each argument that the vocabulary knows; then look for the roles that it does not know.

        Returns:
            Paths of the modules with a table that were given positions.
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
        """Take what the last forward showed for true."""
        for forward, found in self.seen.items():
            _FOUND.setdefault(forward, {}).update(found)

    def _try(self, name: str) -> None:
        """Give an argument of an unknown name a cache, positions, a mask, True: until one of them plays a role."""
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
        """Whether attention modules get a cache although an argument is False."""
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
        for role, names in by_role.items():  # several play it: the one that is known, or the first
            found = next((name for name in words.ARGUMENTS[role] if name in names), names[0])
            self.seen.setdefault(_key(module), {})[role] = found

    def _note(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._role(output) == words.ANGLES:
            self.made.append((output, _key(module)))

    def _role(self, value: Any) -> str:
        """Say what an argument is, by what it holds; empty where that does not tell."""
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
