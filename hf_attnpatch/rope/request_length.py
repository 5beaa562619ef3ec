"""The final length of each request: announced once, by ``generate`` or by the user, and stored with the cache.

Length-dependent angles must not change while a text is decoded, because cached keys stay as they were rotated. So each
row of a batch gets a length when its request begins, which never changes.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache

from ..errors import AttnPatchError
from ..interruption import ensured
from ..upstream import words
from ..upstream.caches import length as cached
from ..upstream.calls import several_documents
from ..upstream.roles import Arguments, Roles

Lengths = tuple[int, ...]  # tokens, one number for each row of a batch, or one for all


class Requests:
    """State shared by the hooks of one model.

    Attributes:
        trained: trained window in tokens, within which all lengths are treated as one.
    """

    def __init__(self, trained: int):
        self.trained = trained

    def served(self, lengths: Lengths) -> Lengths:
        """Round lengths up to the trained window, below which all requests share the same angles."""
        return tuple(max(length, self.trained) for length in lengths)

    def refuse_untold(self, lengths: Lengths) -> None:
        """Refuse lengths found by this thread if :func:`request` announced others in another thread.

        Raises:
            AttnPatchError: it is ambiguous which lengths apply.
        """
        for thread, told in list(_OPEN.get(self, {}).values()):
            if thread != threading.get_ident() and set(self.served(told)) != set(self.served(lengths)):
                raise AttnPatchError(
                    f"another thread said requests of {_listed(told)} tokens, which holds there only; this one would "
                    f"choose {_listed(lengths)}. Say it here, too: `with hf_attnpatch.request(model, length): ...`."
                )


@dataclass(frozen=True)
class Call:
    """A call of ``generate``.

    Attributes:
        requests: of its model.
        lengths: final lengths; None as long as they are unknown.
        drafts: whether it drafts for another model, which checks every token.
    """

    requests: Requests
    lengths: Lengths | None = None
    drafts: bool = False


# Per thread, since two threads may run one model: the current forward, what `request` and `generate` announced.
_FORWARD: ContextVar[tuple[Requests, Lengths] | None] = ContextVar("hf_attnpatch_forward", default=None)
_TOLD: ContextVar[tuple[tuple[Requests, Lengths], ...]] = ContextVar("hf_attnpatch_told", default=())
_GENERATING: ContextVar[tuple[Call, ...]] = ContextVar("hf_attnpatch_generating", default=())
# What `request` announces, by block and thread: a thread without an announcement must not choose by itself.
_OPEN: weakref.WeakKeyDictionary[Requests, dict[object, tuple[int, Lengths]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def request(model: nn.Module, length: int | Sequence[int]) -> Iterator[None]:
    """Tell length-dependent hooks (per-request RoPE) the final sequence length for the forwards in this block.

    Experimental: its arguments may get other names or defaults between minor versions.

    ``generate`` does not need it (prompt and ``max_new_tokens`` give the length), nor does a forward over whole texts.
    It is needed if a text grows beyond the trained window through a cache by your own forwards, or by several calls of
    ``generate``. It holds for this thread (and for code in a copy of its context, as with ``asyncio.to_thread``); a
    thread without it is refused where it would choose another length.

    Args:
        model: patched, or a wrapper around it.
        length: tokens of the whole request, including those to be generated; one number, or one for each row.

    Raises:
        AttnPatchError: the model has no per-request scaling, or a length is not a number of tokens.
    """
    requests = requests_of(model)
    if requests is None:
        raise AttnPatchError(
            f"{type(model).__name__}: no scaling here is chosen per request; patch it with per_request=True first."
        )
    lengths = tuple(length) if isinstance(length, Sequence) and not isinstance(length, str) else (length,)
    if not lengths or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in lengths):
        raise AttnPatchError(f"length is {length!r}; it must be a number of tokens, or a list of one for each row.")
    with _telling(requests, lengths):
        yield


@contextlib.contextmanager
def _telling(requests: Requests, lengths: Lengths) -> Iterator[None]:
    before, block, told = _TOLD.get(), object(), _OPEN.setdefault(requests, {})

    def put_back() -> None:
        told.pop(block, None)
        _TOLD.set(before)

    with ensured(put_back):
        told[block] = (threading.get_ident(), lengths)
        _TOLD.set((*before, (requests, lengths)))
        yield


def requests_of(model: nn.Module) -> Requests | None:
    """Return the state shared by the hooks of a model, or None if it has no per-request scaling."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook.requests for hook in hooks if isinstance(hook, ChooseLengths)), None)


def chosen(requests: Requests, rows: int) -> Lengths:
    """Return the length of each row of the current forward.

    Raises:
        AttnPatchError: the rotary module was called outside the forward that it belongs to.
    """
    found = _FORWARD.get()
    if found is None or found[0] is not requests:
        raise AttnPatchError("the rotary module was called outside its model, which tells it how long requests are.")
    return requests.served(_spread(found[1], rows))


class ChooseLengths:
    """Forward pre-hook of a decoder (or encoder): chooses the length of each row, or keeps the chosen one.

    Args:
        requests: shared by the hooks of the model.
        roles: argument roles of the forward.
    """

    def __init__(self, requests: Requests, roles: Roles):
        self.requests, self.roles = requests, roles

    def announced(self, length: int) -> contextlib.AbstractContextManager[None]:
        """Announce the length of all rows for the forwards of a block, as :func:`request` does."""
        return _telling(self.requests, (length,))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numbers from tensors: never part of a graph
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Choose the lengths, and change no argument."""
        named = self.roles.bind(args, kwargs)
        if named.named.get(words.PAGED) is not None or _several(named):
            raise AttnPatchError(
                f"{type(module).__name__}: requests packed into one row have one length for all of them here; "
                "per_request needs one row for each (no continuous batching, no packed training)."
            )
        cache = named.get(words.CACHE)
        past = cached(cache)
        _refuse_packed(module, named)
        now = _lengths(named, past)
        lengths = self._of(now, cache if past else None)
        for row, (n, limit) in enumerate(zip(now, self.requests.served(lengths), strict=True)):
            if n > limit and _generating(self.requests) is None:  # generate discards candidates beyond its end
                _refuse(f"row {row} is {n} tokens long, in a request for which {lengths[row]} were chosen")
        if cache is not None:
            remember(cache, lengths)
        _FORWARD.set((self.requests, lengths))

    def _of(self, now: Lengths, cache: Any) -> Lengths:
        """Return the length of each row; ``cache`` holds rotated keys, or is None."""
        told, rows, served = _told(self.requests), len(now), self.requests.served
        if cache is None:
            if told is None:
                self.requests.refuse_untold(now)
            return now if told is None else _spread(told, rows)
        kept = getattr(cache, "attnpatch_lengths", None)
        if kept is None:
            if max(served(told or now)) > self.requests.trained:
                _refuse(
                    "the cache was filled before the scaling was there, or by something else (PEFT's prefix tuning?)"
                )
            return now
        kept = _spread(kept, rows)
        call = _generating(self.requests)
        drafts = call is not None and call.drafts  # in pieces, each with its own length
        if told is not None and served(_spread(told, rows)) != served(kept) and not drafts:
            _refuse(
                f"the cache was begun for requests of {_listed(kept)} tokens, and now {_listed(told)} are asked for"
            )
        return kept


class KeepLengths:
    """Forward hook of the same module: stores the chosen lengths with a cache that the forward created."""

    def __init__(self, requests: Requests):
        self.requests = requests

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Mark the cache among the outputs."""
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        found = _FORWARD.get()
        for cache in (value for value in values if isinstance(value, Cache)):
            if found is not None and found[0] is self.requests:
                remember(cache, found[1])
        _FORWARD.set(None)


def remember(cache: Any, lengths: Lengths) -> None:
    """Attach the lengths for which its keys were rotated to a cache, through copies and row operations."""
    cache.attnpatch_lengths = lengths
    if len(set(lengths)) > 1:
        for name in (name for name in words.MOVES if hasattr(cache, name) and name not in vars(cache)):
            setattr(cache, name, ReorderLengths(cache, name))


class ReorderLengths:
    """Replaces a cache's method that reorders rows, and reorders their lengths, too.

    Args:
        cache: whose attribute this is; a copy of the cache has its own copy. Not kept alive by it.
        name: of the method, which takes the index of each new row, or the number of repetitions.
    """

    def __init__(self, cache: Any, name: str):
        self._cache, self.name = weakref.ref(cache), name

    def __call__(self, rows: Tensor | int) -> None:
        """Move them."""
        cache: Any = self._cache()
        getattr(type(cache), self.name)(cache, rows)
        kept = cache.attnpatch_lengths  # one for each row: what layers hold (quantized, linear) does not say how many
        if isinstance(rows, int):
            cache.attnpatch_lengths = tuple(length for length in kept for _ in range(rows))
        else:
            cache.attnpatch_lengths = tuple(kept[int(row)] for row in rows)

    def __getstate__(self) -> tuple[Any, str]:
        """Return the state for a copy: a copy of the cache."""
        return self._cache(), self.name

    def __setstate__(self, state: tuple[Any, str]) -> None:
        """Belong to the copied cache."""
        self._cache, self.name = weakref.ref(state[0]), state[1]


@contextlib.contextmanager
def generating(requests: Requests) -> Iterator[None]:
    """Mark a call of ``generate`` whose lengths are not known yet."""
    before = _GENERATING.get()
    with ensured(lambda: _GENERATING.set(before)):
        _GENERATING.set((*before, Call(requests)))
        yield


def found_by_generate(requests: Requests, lengths: Lengths, drafts: bool = False) -> None:
    """Set the lengths of the current call; a drafting call takes those of the call that it drafts for.

    Raises:
        AttnPatchError: ``generate`` was not called on the instance, or exceeds what :func:`request` announced.
    """
    calls = _GENERATING.get()
    if not calls or calls[-1].requests is not requests:
        raise AttnPatchError("generate was called past the model it belongs to; call model.generate(...).")
    if drafts:
        lengths = next((call.lengths for call in reversed(calls[:-1]) if call.lengths is not None), lengths)
    told = _explicit(requests)
    if told is None:
        requests.refuse_untold(lengths)
    elif any(a > b for a, b in zip(lengths, requests.served(_spread(told, len(lengths))), strict=True)):
        _refuse(f"generate leads to {_listed(lengths)} tokens, and the requests were said to have {_listed(told)}")
    _GENERATING.set((*calls[:-1], Call(requests, lengths, drafts)))


def _generating(requests: Requests) -> Call | None:
    """Return the call of ``generate`` whose forward is running."""
    calls = _GENERATING.get()
    return calls[-1] if calls and calls[-1].requests is requests else None


def _told(requests: Requests) -> Lengths | None:
    found, call = _explicit(requests), _generating(requests)
    return call.lengths if found is None and call is not None else found


def _explicit(requests: Requests) -> Lengths | None:
    return next((lengths for owner, lengths in reversed(_TOLD.get()) if owner is requests), None)


def _spread(lengths: Lengths, rows: int) -> Lengths:
    """Return one length for each row; several rows of one request (beams) are adjacent."""
    if rows % len(lengths):
        if len(set(lengths)) == 1:
            return lengths[:1] * rows
        raise AttnPatchError(f"{rows} rows in a batch, but lengths of {len(lengths)} requests; give one for each row.")
    return tuple(length for length in lengths for _ in range(rows // len(lengths)))


def _lengths(named: Arguments, past: int) -> Lengths:
    """Return the present length of each row's text."""
    tokens = named.get(words.TOKENS)
    inputs = tokens if isinstance(tokens, Tensor) else named.get(words.EMBEDDINGS)
    rows, positions, mask = int(inputs.shape[0]), named.get(words.POSITIONS), named.get(words.MASK)
    if isinstance(positions, Tensor):
        last = positions.amax(-1)
        last = last.amax(0) if last.dim() > 1 else last  # positions with several axes
        return _spread(tuple(int(n) + 1 for n in last.view(-1).tolist()), rows)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return tuple(int(n) for n in mask.ne(0).sum(-1).tolist())
    return (past + int(inputs.shape[1]),) * rows


def _several(named: Arguments) -> bool:
    given = named.get(words.TOKENS)
    given = named.get(words.EMBEDDINGS) if given is None else given
    return several_documents(named.named, int(given.shape[1]))


def _refuse_packed(module: nn.Module, named: Arguments) -> None:
    """Refuse positions that restart inside a row, where another document of another length begins.

    Without a mask and a cache, transformers reads every step other than one as a border of documents. Otherwise a text
    may skip positions, but they have to grow; of several axes (images), one has to.

    Raises:
        AttnPatchError: positions restart.
    """
    positions, mask = named.get(words.POSITIONS), named.get(words.MASK)
    if not isinstance(positions, Tensor) or positions.shape[-1] < 2:
        return
    steps = positions.diff(dim=-1)
    if steps.dim() > 2:
        steps = steps.amax(0)
    alone = mask is None and named.get(words.CACHE) is None and positions.dim() == 2
    begins = steps != 1 if alone else steps < 1
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[-1] >= positions.shape[-1]:
        keep = mask[:, -positions.shape[-1] :].bool()
        begins = begins & (keep[:, 1:] & keep[:, :-1]).to(begins.device)
    if bool(begins.any()):
        raise AttnPatchError(
            f"{type(module).__name__}: position_ids that do not count up by one hold several documents in a row, which "
            "would have the angles of the longest; per_request needs one row for each (no packed training)."
        )


def _listed(lengths: Lengths) -> str:
    return " and ".join(str(n) for n in dict.fromkeys(lengths))


def _refuse(found: str) -> NoReturn:
    raise AttnPatchError(
        f"{found}; angles follow from the length of the whole request, and those of keys in a cache stay. Say it "
        "before the first token: `with hf_attnpatch.request(model, length): ...`."
    )
