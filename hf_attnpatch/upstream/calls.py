"""How transformers calls attention and mask functions, learned from one call of a tiny model.

The rest of this package uses ``(module, query, key, value, mask, dropout=, scaling=, ...)`` and ``(batch_size,
q_length, kv_length, q_offset, ...)``. Registered functions are adapted if the installed release uses other names or
positions, and so are calls of transformers' own functions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from ..errors import UnsupportedArchitecture
from ..interruption import inside
from . import words
from .find import changed, find
from .roles import learn, resumed, roles_of

Function = Callable[..., Any]
_LISTENING = "listening_hf_attnpatch"  # without a kernel's name, which families without that kernel refuse
_HEAD_DIM, _HEADS, _KV_HEADS, _DROPOUT = 8, 4, 2, 0.125
_ROWS, _CACHED, _NEW = 2, 3, 4
_STATES = ("module", "query", "key", "value", "mask")
_NEEDS = "every patch of attention"


def several_documents(given: Mapping[str, Any], tokens: int) -> bool:
    """Return whether an attention function's arguments describe packed documents, more than one in a row.

    Args:
        given: its keywords.
        tokens: queries of a row; one document of this length is an ordinary row.
    """
    bounds = given.get(words.PACKED)
    if not isinstance(bounds, Tensor):
        return bounds is not None
    return bounds.numel() != 2 or int(bounds[-1]) != tokens


@dataclass
class _Heard:
    """The arguments of the tiny model's last call."""

    attention: tuple[tuple[Any, ...], dict[str, Any]] = field(default_factory=lambda: ((), {}))
    mask: dict[str, Any] = field(default_factory=dict)
    first: tuple[Any, ...] = ()
    sentinel: Tensor | None = None


@dataclass(frozen=True)
class Interface:
    """How the installed release calls attention and mask functions.

    Attributes:
        places: where each of ``_STATES`` is passed: a position, or a keyword.
        keywords: this package's word -> transformers' keyword of an attention function, if they differ.
        masks: the same for mask functions.
        by_position: whether mask functions get a tensor of query positions (releases before 5.3).
        causal: attribute of a module that says whether its attention is causal.
        first: unknown positional arguments of mask functions before the known ones; empty in known releases.
        others: unknown positional arguments of attention functions, by position; likewise empty.
    """

    places: tuple[int | str, ...]
    keywords: Mapping[str, str]
    masks: Mapping[str, str]
    by_position: bool
    causal: str
    first: tuple[Any, ...] = ()
    others: Mapping[int, Any] = field(default_factory=dict)

    @property
    def usual(self) -> bool:
        """Whether attention functions are called as this package calls them."""
        return self.places == tuple(range(len(_STATES))) and not self.keywords


_KNOWN: Interface | None = None  # a plain global, not a cached function, so that compilers read it


def interface() -> Interface:
    """Return how the installed release calls attention and mask functions, learned on first use.

    Raises:
        UpstreamChanged: a tiny Llama does not run, or passes unknown arguments.
    """
    global _KNOWN
    if _KNOWN is None:
        try:  # the caller may be building a model on the meta device
            _KNOWN = inside(torch.device("cpu"), _learned)
        except (TypeError, AttributeError, LookupError, RuntimeError) as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise changed(f"attention or mask functions that are called in another way ({cause})", _NEEDS) from error
    return _KNOWN


def _learned() -> Interface:
    heard = _listen()
    args, kwargs = heard.attention
    keywords = _matched(
        (words.DROPOUT, words.SCALING), kwargs, {words.DROPOUT: _DROPOUT, words.SCALING: _HEAD_DIM**-0.5}
    )
    by_position = "cache_position" in heard.mask
    places, masks = _places(args, kwargs, heard.sentinel), _masks(heard.mask)
    last = max((place for place in places if isinstance(place, int)), default=-1)
    others = {place: value for place, value in enumerate(args[:last]) if place not in places}
    return Interface(places, keywords, masks, by_position, _causal(places, others), heard.first, others)


@functools.cache
def attention_registered(function: Function) -> Function:
    """Adapt an attention function with this package's words for registration.

    Its mask may be a keyword, as image towers pass it. An unknown keyword with a tensor for each head is refused in the
    forward: ignoring it would silently change the scores.
    """
    found = interface()
    ours = {theirs: word for word, theirs in found.keywords.items()}
    known = {*words.ATTENTION, words.ATTENTION_MASK, *inspect.signature(function).parameters}

    @functools.wraps(function)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if found.usual:
            given = (*args, kwargs.pop(words.ATTENTION_MASK)) if words.ATTENTION_MASK in kwargs else args
        else:
            given = tuple(args[p] if isinstance(p, int) else kwargs.pop(p) for p in found.places)
            kwargs = {ours.get(name, name): value for name, value in kwargs.items()}
        for name, value in kwargs.items():
            if name not in known and isinstance(value, Tensor) and _for_each_head(value, given[1].shape[1]):
                raise UnsupportedArchitecture(
                    f"{type(given[0]).__name__}: passes {name}, {tuple(value.shape)}, to its attention function: a "
                    "tensor for each head, which this package's attention does not compute with."
                )
        return function(*given, **kwargs)

    return attention


def _for_each_head(value: Tensor, heads: int) -> bool:
    """Return whether a tensor has values for each head: (heads,) or (batch, heads, queries, any)."""
    at = {1: 0, 4: 1}.get(value.dim())
    return at is not None and value.is_floating_point() and value.shape[at] == heads


def call_attention(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an attention function of transformers with this package's arguments, as the release expects them."""
    found = interface()
    if found.usual:
        return function(*args, **kwargs)
    named = {found.keywords.get(word, word): value for word, value in kwargs.items()}
    placed, by_name = _arranged(found.places, found.others, args)
    return function(*placed, **by_name, **named)


def _arranged(
    places: Sequence[int | str], others: Mapping[int, Any], states: Sequence[Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return ``_STATES`` as an attention function expects them: positional arguments and keywords."""
    pairs = list(zip(places, states, strict=True))
    placed = {**others, **{place: value for place, value in pairs if isinstance(place, int)}}
    return [placed[at] for at in sorted(placed)], {place: value for place, value in pairs if isinstance(place, str)}


def sdpa_attention(*args: Any, **kwargs: Any) -> Any:
    """Transformers' attention function of torch's kernels, in this package's words."""
    return call_attention(AttentionInterface()["sdpa"], args, kwargs)


def flex_attention(*args: Any, **kwargs: Any) -> Any:
    """Transformers' attention function of flex attention, in this package's words."""
    return call_attention(AttentionInterface()["flex_attention"], args, kwargs)


@functools.cache
def mask_registered(mask: Function) -> Function:
    """Adapt a mask function that takes ``q_length`` and ``q_offset`` for registration; the same object each time."""
    found = interface()
    if not found.by_position and not found.masks and not found.first:
        return mask
    ours = {theirs: word for word, theirs in found.masks.items()}

    def spoken(*args: Any, **kwargs: Any) -> Any:
        kwargs = {ours.get(name, name): value for name, value in kwargs.items()}
        position = kwargs.pop("cache_position", None)
        if position is not None:
            where = {"q_length": len(position), "q_offset": int(position[0])}
            kwargs = {**kwargs, **where, "device": position.device}
        return mask(*args[len(found.first) :], **kwargs)

    return spoken


def call_mask(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call transformers' mask function of a name with ``q_length`` and ``q_offset``, as the release expects them."""
    found, mask = interface(), AttentionMaskInterface()[name]
    given = {**dict(zip(words.MASKS, args, strict=False)), **kwargs}
    if found.by_position:
        here = torch.arange(given.pop("q_length"), device=given.pop("device", "cpu"))
        given["cache_position"] = here + given.pop("q_offset", 0)
    return mask(*found.first, **{found.masks.get(word, word): value for word, value in given.items()})


def sdpa_mask(*args: Any, **kwargs: Any) -> Any:
    """Transformers' mask for torch's kernels, bool, True is seen; or None."""
    return call_mask("sdpa", args, kwargs)


def looks_back(module: nn.Module, is_causal: bool | None = None) -> bool:
    """Return whether a call's attention is causal: as passed, else what the module says, else yes."""
    return bool(getattr(module, interface().causal, True) if is_causal is None else is_causal)


def says_causal(module: nn.Module) -> bool | None:
    """Return what a module says about causality: True, False or None."""
    found = getattr(module, interface().causal, None)
    return found if isinstance(found, bool) else None


def _listen() -> _Heard:
    """Run a one-layer Llama whose attention and mask functions only record: a filled cache, then four tokens."""
    heard = _Heard()

    def mask(*args: Any, **kwargs: Any) -> Tensor:
        extra = len(args) if words.MASKS[0] in kwargs else 0  # precede the known ones
        heard.first = args[:extra]
        heard.mask = {**dict(zip(words.MASKS, args[extra:], strict=False)), **kwargs}
        heard.sentinel = torch.ones(_ROWS, 1, _NEW, _CACHED + _NEW, dtype=torch.bool)
        return heard.sentinel

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        heard.attention = (args, kwargs)
        query = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() == 4)
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_LISTENING, attention)
    AttentionMaskInterface.register(_LISTENING, mask)
    sizes = {"hidden_size": _HEADS * _HEAD_DIM, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    heads = {"num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS, "head_dim": _HEAD_DIM}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            config = AutoConfig.for_model("llama", **sizes, **heads, attention_dropout=_DROPOUT)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=_LISTENING).train()
            learn(model)
            roles = roles_of(model)
            tokens = torch.ones(_ROWS, _CACHED + _NEW, dtype=torch.int64)
            keep = torch.ones_like(tokens)
            keep[1, 0] = 0
            head = {words.TOKENS: tokens[:, :_CACHED], words.MASK: keep[:, :_CACHED], words.USE_CACHE: True}
            state = resumed(model, model(**roles.call(**head)))
            rest = {words.TOKENS: tokens[:, _CACHED:], words.MASK: keep, words.USE_CACHE: True}
            model(**roles.call(**rest), **state)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, StopIteration) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise changed(f"a Llama that does not run with an attention function of another's ({cause})", _NEEDS) from error
    if heard.sentinel is None or not (heard.attention[0] or heard.attention[1]):
        raise changed("a Llama that asks its registry for no attention or no mask function", _NEEDS)
    return heard


def _places(args: tuple[Any, ...], kwargs: Mapping[str, Any], sentinel: Tensor | None) -> tuple[int | str, ...]:
    every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    states = [place for place, v in every if isinstance(v, Tensor) and v.dim() == 4 and v is not sentinel]
    module = [place for place, v in every if isinstance(v, nn.Module)]
    mask = [place for place, v in every if v is sentinel]
    if len(states) != 3 or len(module) != 1 or len(mask) != 1:
        raise changed(f"an attention function that is called with {len(states)} states and {len(mask)} masks", _NEEDS)
    return (module[0], *states, mask[0])


def _matched(wanted: tuple[str, ...], given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    """Return this package's word -> the keyword that carries its value, if it is no keyword here."""
    found = {}
    for word in wanted:
        if word in given:
            continue
        names = [name for name, value in given.items() if name not in wanted and _equal(value, values[word])]
        if len(names) != 1:
            raise changed(f"no keyword `{word}` among {', '.join(given)}, of which one would carry it", _NEEDS)
        found[word] = names[0]
    return found


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return isinstance(value, float) and abs(value - wanted) < 1e-9
    return type(value) is type(wanted) and bool(value == wanted)


def _masks(given: Mapping[str, Any]) -> dict[str, str]:
    """Return this package's word -> transformers' keyword of a mask function, if they differ."""
    offset: Any = {"q_offset": _CACHED, "q_length": _NEW}
    numbers = {"batch_size": _ROWS, "kv_length": _CACHED + _NEW, **({} if "cache_position" in given else offset)}
    plain = {name: int(v) if isinstance(v, Tensor) and v.dim() == 0 else v for name, v in given.items()}
    found = _matched(tuple(numbers), plain, numbers)
    kinds: dict[str, Callable[[Any], bool]] = {
        "mask_function": callable,
        "attention_mask": lambda v: isinstance(v, Tensor) and v.dim() == 2,
    }
    for word, is_it in kinds.items():
        names = [name for name, v in given.items() if name not in words.MASKS and is_it(v)]
        if word not in given and len(names) == 1:
            found[word] = names[0]
        elif word not in given:
            raise changed(f"no `{word}` among the keywords of its mask functions: {', '.join(given)}", _NEEDS)
    return found | _skips()


def _skips() -> dict[str, str]:
    """Return the keywords that let a mask function return None where a kernel needs no mask."""
    mask = AttentionMaskInterface()["sdpa"]
    declared = inspect.signature(mask).parameters
    found = {}
    for word, default in (("allow_is_causal_skip", True), ("allow_is_bidirectional_skip", False)):
        if word in declared:
            continue
        names = [n for n, p in declared.items() if p.default is default and n not in words.MASKS]
        if len(names) == 1:
            found[word] = names[0]
    return found


def _causal(places: Sequence[int | str], others: Mapping[int, Any]) -> str:
    """Return the attribute by which a module tells transformers' own kernel that it is causal."""
    asked: list[str] = []

    class Module(nn.Module):
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return super().__getattr__(name)

    states = torch.arange(12.0).view(1, 1, 3, 4) / 12

    def attend(module: nn.Module) -> Tensor:
        args, kwargs = _arranged(places, others, (module, states, states, states, None))
        attended: Tensor = AttentionInterface()["sdpa"](*args, **kwargs)[0]
        return attended

    wanted = attend(Module())
    for name in dict.fromkeys([words.IS_CAUSAL, *asked]):
        module = nn.Module()
        setattr(module, name, False)
        if name in asked and not torch.equal(attend(module), wanted):
            return name
    raise changed("no attribute by which an attention module says that it looks both ways", _NEEDS)


# The two basic masks: causal and bidirectional.
CAUSAL: Any = find("causal_mask_function", "masking_utils", "every mask of this package")
BIDIRECTIONAL: Any = find("bidirectional_mask_function", "masking_utils", "every mask of this package")
