"""Key-value caches: finds by trying which method does what, and gives a module its own view of a cache."""

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
    """Return the name of the method that stores keys and values and returns all of them.

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
    """Return the name of the method that returns how many tokens a cache has seen.

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
    """Return how many tokens a cache has seen; 0 for None and for caches that do not count."""
    count = None if cache is None else getattr(cache, LENGTH or length_method(), None)
    return 0 if count is None else int(count(layer) if layer else count())


def queries(told: Any) -> int:
    """Return the number of queries in a cache's argument: a number, or, before 5.3, a tensor of their positions."""
    return int(told.shape[0]) if isinstance(told, Tensor) else int(told)


def first(values: Iterable[Any]) -> Any:
    """Return the first key-value cache among some objects, or None."""
    return next((value for value in values if isinstance(value, Cache)), None)


def returned(output: Any) -> Mapping[str, Any]:
    """Return the part of an output that the next forward continues from, with the name of its field.

    Any field that holds a cache is one. A state of another kind (Mamba's in some releases) is known by its name.
    """
    fields = output_fields(output)
    found = {name: value for name, value in fields.items() if isinstance(value, Cache)}
    others = (*words.ARGUMENTS[words.CACHE], *words.OTHER_STATES)
    known = {name: fields[name] for name in others if fields.get(name) is not None}
    return found or known


def output_fields(output: Any) -> Mapping[str, Any]:
    """Return the fields of a model's output by name; those of a tuple by number."""
    if isinstance(output, Mapping):
        return {name: output[name] for name in output}
    if isinstance(output, tuple):
        return {str(number): value for number, value in enumerate(output)}
    return vars(output) if hasattr(output, "__dict__") else {}


def own(cache: Any) -> Any:
    """Return the self-attention half of an encoder-decoder cache, or the cache itself."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


@dataclass(frozen=True)
class Storing:
    """One module's call of a cache to store new keys and values.

    Attributes:
        cache: that receives them, or None.
        arguments: of the call.
        keywords: of the call.
        places: where the keys and the values are among both.
    """

    cache: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    places: tuple[int | str, int | str]

    @property
    def layer(self) -> int:
        """The index of the module's layer in the cache."""
        rest = [*self.arguments, *self.keywords.values()]
        return next((value for value in rest if isinstance(value, int) and not isinstance(value, bool)), 0)

    def past(self) -> int:
        """Number of tokens that this layer of the cache has seen."""
        return length(self.cache, self.layer)

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values in the cache, and return what it returns; without a cache, return them."""
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
    """A cache as one attention module sees it: storing calls a function, everything else goes to the cache.

    Args:
        cache: or None, for a module that expects one.
        update: gets the call, the new keys and the new values; returns the keys and values to attend to.
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
    """The same for an encoder-decoder cache: only self-attention stores through the function."""

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
    """Return a view of a cache through which a module stores by ``update``.

    Raises:
        UpstreamChanged: the method by which modules store is unknown.
    """
    if not (UPDATE and LENGTH):
        update_method(), length_method()
    return PairView(cache, update) if isinstance(cache, EncoderDecoderCache) else CacheView(cache, update)


def overriding(purpose: str, *required: str, of_layer: bool = False) -> Callable[[type], type]:
    """Return a decorator for a class of caches, or of cache layers, that overrides methods of its base.

    The overriding methods also get this release's names. If the base lacks one of them, it would never be called:
    creating an instance is refused.

    Args:
        purpose: what needs the class, for the error.
        required: overridden methods beside those that store and count.
        of_layer: whether it is the class of a layer.
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
    """Return the function by which a module stores through a view of a cache; None for other objects."""
    return object.__getattribute__(value, "_update") if isinstance(value, CacheView) else None


def _fresh(of_layer: bool) -> Any:
    return DynamicLayer() if of_layer else DynamicCache()


def _method(owner: Any, known: Iterable[str], does: Callable[[str], bool], what: str) -> str:
    """Return the first public method that passes a test; known names are tried first."""
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


# Found once, on import: a constant to a compiler that traces it. Empty if nothing was found.
UPDATE, LENGTH = _or_nothing(update_method), _or_nothing(length_method)
