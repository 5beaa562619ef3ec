"""Caches of keys and values: which of their methods does what, found by trying it, and a view that one module gets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from ..errors import UpstreamChanged
from . import words
from .find import changed, find

DynamicLayer: Any = find("DynamicLayer", "cache_utils", "a cache that lets go of tokens")


@functools.cache
def update_method(of_layer: bool = False) -> str:
    """Return the name of the method that stores keys and values and returns all there are.

    Args:
        of_layer: the method of one layer of a cache instead of the cache's.

    Raises:
        UpstreamChanged: no method does that.
    """

    def stores(name: str) -> bool:
        owner, key = _fresh(of_layer), torch.zeros(1, 1, 2, 1)
        layer = () if of_layer else (0,)
        for length in (2, 4):
            found = getattr(owner, name)(key, key, *layer)
            if not isinstance(found, tuple) or [t.shape[2] for t in found] != [length, length]:
                return False
        return True

    return _method(_fresh(of_layer), words.UPDATE, stores, "no method by which a cache stores keys and values")


@functools.cache
def length_method(of_layer: bool = False) -> str:
    """Return the name of the method that says how many tokens a cache has seen.

    Args:
        of_layer: the method of one layer of a cache instead of the cache's.

    Raises:
        UpstreamChanged: no method does that.
    """

    def counts(name: str) -> bool:
        owner, layer = _fresh(of_layer), () if of_layer else (0,)
        for length in (5, 12):
            key = torch.zeros(1, 1, length if length == 5 else 7, 1)
            getattr(owner, update_method(of_layer))(key, key, *layer)
            found = getattr(owner, name)()
            if isinstance(found, bool) or not isinstance(found, int) or found != length:
                return False
        return True

    return _method(
        _fresh(of_layer), words.LENGTH, counts, "no method by which a cache says how many tokens it has seen"
    )


def length(cache: Any, layer: int = 0) -> int:
    """Return how many tokens a cache has seen; 0 for None and for what counts none."""
    count = None if cache is None else getattr(cache, LENGTH or length_method(), None)
    return 0 if count is None else int(count(layer) if layer else count())


def queries(told: Any) -> int:
    """Return how many queries a cache is told of: their number, or, before 5.3, a tensor of their positions."""
    return int(told.shape[0]) if isinstance(told, Tensor) else int(told)


def first(values: Iterable[Any]) -> Any:
    """Return the first cache of keys and values among some objects, or None."""
    return next((value for value in values if isinstance(value, Cache)), None)


def returned(output: Any) -> Mapping[str, Any]:
    """Return what a model gives back for the next forward to go on from, by the name of the field of its output.

    A field that holds a cache is one, whatever it is called; a state of another kind (Mamba's in some releases) is
    known by its name.
    """
    fields = output_fields(output)
    found = {name: value for name, value in fields.items() if isinstance(value, Cache)}
    others = (*words.ARGUMENTS[words.CACHE], *words.OTHER_STATES)
    known = {name: fields[name] for name in others if fields.get(name) is not None}
    return found or known


def output_fields(output: Any) -> Mapping[str, Any]:
    """Return the fields of a model's output by name; those of a tuple are numbered."""
    if isinstance(output, Mapping):
        return {name: output[name] for name in output}
    if isinstance(output, tuple):
        return {str(number): value for number, value in enumerate(output)}
    return vars(output) if hasattr(output, "__dict__") else {}


def own(cache: Any) -> Any:
    """Return the self-attention half of a pair of caches, or the cache itself."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


@dataclass(frozen=True)
class Storing:
    """One module's call of a cache, while new keys and values are stored.

    Attributes:
        cache: that they go to, or None.
        arguments: of the call.
        keywords: of the call.
        places: where among both the keys and the values are.
    """

    cache: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    places: tuple[int | str, int | str]

    @property
    def layer(self) -> int:
        """Which layer of the cache is the module's own."""
        rest = [*self.arguments, *self.keywords.values()]
        return next((value for value in rest if isinstance(value, int) and not isinstance(value, bool)), 0)

    def past(self) -> int:
        """Tokens that this layer of the cache has seen."""
        return length(self.cache, self.layer)

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Do what the cache does with these keys and values; without a cache there is nothing but them."""
        if self.cache is None:
            return key, value
        rest, named = list(self.arguments), dict(self.keywords)
        for place, tensor in zip(self.places, (key, value), strict=True):
            if isinstance(place, int):
                rest[place] = tensor
            else:
                named[place] = tensor
        found: tuple[Tensor, Tensor] = getattr(self.cache, UPDATE)(*rest, **named)
        return found


Update = Callable[[Storing, Tensor, Tensor], Any]


class CacheView(Cache):  # type: ignore[misc]  # transformers is not followed
    """A cache seen through one attention module: storing goes through a function, all else is the cache's own.

    Args:
        cache: or None, for a module that expects one.
        update: gets the call, the new keys and the new values, and returns the keys and values to attend to.
    """

    def __init__(self, cache: Any, update: Update):
        self._cache, self._update = cache, update

    def _stored(self, *args: Any, **kwargs: Any) -> Any:
        every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        (key, first_state), (value, second_state) = [pair for pair in every if isinstance(pair[1], Tensor)][:2]
        cache = object.__getattribute__(self, "_cache")
        return object.__getattribute__(self, "_update")(
            Storing(cache, args, kwargs, (key, value)), first_state, second_state
        )

    def __getattribute__(self, name: str) -> Any:
        if name in ("_cache", "_update", "_stored", "__class__", "__dict__"):
            return object.__getattribute__(self, name)
        if name == UPDATE:
            return object.__getattribute__(self, "_stored")
        cache = object.__getattribute__(self, "_cache")
        if cache is None and name == LENGTH:
            return lambda *_: 0
        return getattr(cache, name)


class PairView(EncoderDecoderCache):  # type: ignore[misc]  # transformers is not followed
    """The same for a pair of self- and cross-attention caches: only self-attention stores through the function."""

    def __init__(self, pair: EncoderDecoderCache, update: Update):
        self._pair, self._own = pair, CacheView(pair.self_attention_cache, update)

    def __getattribute__(self, name: str) -> Any:
        if name in ("_pair", "_own", "__class__", "__dict__"):
            return object.__getattribute__(self, name)
        inside = object.__getattribute__(self, "_own")
        if name == "self_attention_cache":
            return inside
        if name == UPDATE:
            return getattr(inside, name)
        return getattr(object.__getattribute__(self, "_pair"), name)


def view(cache: Any, update: Update) -> Any:
    """Return the view of a cache, or of a pair of caches, through which a module stores by ``update``.

    Raises:
        UpstreamChanged: it is not known by which method modules store.
    """
    if not (UPDATE and LENGTH):
        update_method(), length_method()
    return PairView(cache, update) if isinstance(cache, EncoderDecoderCache) else CacheView(cache, update)


def overriding(purpose: str, *required: str, of_layer: bool = False) -> Callable[[type], type]:
    """Return a decorator for a class of caches, or of their layers, that does some things otherwise than its base.

    What stores and what counts stands under this release's names, too. A class whose base lacks something that the
    class replaces would never be asked for it: making one is refused.

    Args:
        purpose: what needs the class, for the error.
        required: methods that it replaces, beside those that store and count.
        of_layer: whether it is a layer's class.
    """

    def decorate(cls: type) -> type:
        base = cls.__mro__[1]
        for ours, theirs in ((words.UPDATE, update_method), (words.LENGTH, length_method)):
            name = _or_nothing(functools.partial(theirs, of_layer))
            if name and ours[0] in vars(cls) and name not in vars(cls):
                setattr(cls, name, vars(cls)[ours[0]])
        lost = next((name for name in required if not hasattr(base, name)), None)
        plain: Any = vars(cls).get("__init__", base.__init__)  # type: ignore[misc]

        @functools.wraps(plain)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            if lost is not None:
                raise changed(f"no {base.__name__}.{lost}", purpose)
            update_method(of_layer), length_method(of_layer)
            plain(self, *args, **kwargs)

        cls.__init__ = init  # type: ignore[misc]
        return cls

    return decorate


def update_of(value: Any) -> Any:
    """Return the function by which a module stores through a view of a cache; None for what is no view."""
    return object.__getattribute__(value, "_update") if isinstance(value, CacheView) else None


def _fresh(of_layer: bool) -> Any:
    return DynamicLayer() if of_layer else DynamicCache()


def _method(owner: Any, known: Iterable[str], does: Callable[[str], bool], what: str) -> str:
    """Return the first public method that does something, those of known names tried first."""
    public = [name for name in dir(type(owner)) if not name.startswith("_") and callable(getattr(type(owner), name))]
    for name in dict.fromkeys([*(n for n in known if n in public), *public]):
        try:
            if does(name):
                return name
        except (TypeError, ValueError, AttributeError, IndexError, NotImplementedError, RuntimeError, AssertionError):
            continue
    raise changed(what, "every patch that reads or writes a cache")


def _or_nothing(name: Callable[[], str]) -> str:
    try:
        return name()
    except UpstreamChanged:
        return ""


# Found once, when the module is imported: what a compiler traces is then a constant. Empty where nothing was found.
UPDATE, LENGTH = _or_nothing(update_method), _or_nothing(length_method)
