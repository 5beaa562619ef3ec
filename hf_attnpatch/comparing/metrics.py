"""The schema of ``metrics.json``, and what its tables and figures rely on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import AttnPatchError
from ..evaluation import Decoding, Fidelity, LayerDifference, LossByLength, Retrieval, Score
from ..record import parse
from ..schema import brief, fields_of

VERSION = 1
_MOST = 10_000  # documents, modules or prompts: intervals draw 2,000 times as many numbers
_LONGEST = 16_384  # characters of a text that is shown


@dataclass(frozen=True)
class Metrics:
    """A finished comparison of two models, as stored in its file."""

    version: int
    original: Model
    patched: Model
    settings: dict[str, Any]
    text: str
    command: str
    machine: dict[str, str | int | None]
    parts: dict[str, Any]
    left_out: dict[str, str]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Model:
    """Facts about a model; ``record`` is the record in its config, or None."""

    name: str
    digest: str
    architecture: str
    dtype: str
    context: int | None
    parameters: int
    cache_bytes_per_token: float | None
    record: dict[str, Any] | None


@dataclass(frozen=True)
class Losses:
    """Of both models."""

    original: LossByLength
    patched: LossByLength


@dataclass(frozen=True)
class Retrievals:
    """Of both models."""

    original: Retrieval
    patched: Retrieval


@dataclass(frozen=True)
class Decodings:
    """Of both models."""

    original: Decoding
    patched: Decoding


PARTS: dict[str, type[Any]] = {
    "loss": Losses,
    "fidelity": Fidelity,
    "layers": LayerDifference,
    "retrieval": Retrievals,
    "decoding": Decodings,
}
KEYS = {field.name for field in fields(Metrics)}


def check(found: Any, where: str) -> None:
    """Check metrics before reports are made from them.

    Args:
        found: from JSON.
        where: for the message.

    Raises:
        AttnPatchError: names the key, what it is and what was wanted.
    """
    version = found.get("version") if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) and "version" in found and (version != VERSION or isinstance(version, bool)):
        raise AttnPatchError(f"{where}: is of version {brief(version)}; wanted version {VERSION}.")
    metrics = fields_of(Metrics, found, where, whole=True)
    for which in ("original", "patched"):
        _check_model(getattr(metrics, which), f"{where}.{which}")
    texts = [metrics.text, metrics.command, *metrics.left_out, *metrics.left_out.values(), *metrics.machine]
    _want(max(map(len, texts)) <= _LONGEST, where, f"texts of at most {_LONGEST} characters")
    _want(all(value >= 0 for value in metrics.seconds.values()), f"{where}.seconds", "times of 0 or more")
    for name, value in metrics.parts.items():
        if name not in PARTS:
            raise AttnPatchError(f"{where}.parts: no part {brief(name, 40)}; choose from {', '.join(PARTS)}.")
        place = f"{where}.parts.{name}"
        part = fields_of(PARTS[name], value, place, whole=True)
        for right, wanted in _wanted(part):
            _want(right, place, wanted)


def _want(right: bool, where: str, wanted: str) -> None:
    if not right:
        raise AttnPatchError(f"{where}: does not hold together; wanted {wanted}.")


def _check_model(model: Model, where: str) -> None:
    _want(max(map(len, (model.name, model.digest, model.architecture, model.dtype))) <= _LONGEST, where, "short texts")
    cache = model.cache_bytes_per_token
    _want(model.parameters >= 0 and (cache is None or cache >= 0), where, "sizes of 0 or more")
    if model.record is not None:
        try:
            parse(model.record)
        except AttnPatchError as error:
            raise AttnPatchError(f"{where}.record: {brief(str(error), 400)}") from error


def _wanted(part: Any) -> Iterable[tuple[bool, str]]:
    """Yield whether a part is valid, and what was expected."""
    if isinstance(part, Losses):
        yield from _losses(part)
    elif isinstance(part, Fidelity):
        yield from _score(part.kl)
    elif isinstance(part, LayerDifference):
        sizes = {len(part.paths), len(part.alone), len(part.in_place)}
        yield len(sizes) == 1 and 0 < sizes.pop() <= _MOST, "paths, alone and in_place of one length"
        yield min((*part.alone, *part.in_place), default=0) >= 0, "errors of 0 or more"
    elif isinstance(part, Retrievals):
        yield from _retrievals(part)
    elif isinstance(part, Decodings):
        yield from _decodings(part)


def _losses(part: Losses) -> Iterable[tuple[bool, str]]:
    one, other = part.original, part.patched
    for each in (one, other):
        yield 0 < len(each.lengths) == len(each.scores) <= _MOST, "a score for each length"
        yield all(a < b for a, b in zip((0, *each.lengths), each.lengths, strict=False)), "lengths in ascending order"
    yield one.lengths == other.lengths and one.window == other.window, "the same lengths and window of both models"
    pairs = zip((*one.scores, one.truncated, one.sliding), (*other.scores, other.truncated, other.sliding), strict=True)
    for before, after in pairs:
        yield from _score(before)
        yield from _score(after)
        counts = [{name: pair[1] for name, pair in score.losses.items()} for score in (before, after)]
        yield counts[0] == counts[1], "the same documents of both models"


def _score(score: Score) -> Iterable[tuple[bool, str]]:
    counts = [count for _, count in score.losses.values()]
    yield 0 < len(counts) <= _MOST and min(counts) >= 0, f"losses of 1 to {_MOST:,} documents"
    yield 0 < sum(counts) == score.tokens < 1 << 53, "as many tokens as the documents have"


def _retrievals(part: Retrievals) -> Iterable[tuple[bool, str]]:
    yield part.original.lengths == part.patched.lengths, "the same lengths of both models"
    for each in (part.original, part.patched):
        yield 0 < len(each.answers) <= 100 * _MOST and each.samples > 0, "answers, and samples above 0"
        yield 0 < len(each.lengths) * len(each.depths) <= 1000, "1 to 1,000 pairs of a length and a depth"
        there = {(answer.length, answer.depth) for answer in each.answers}
        wanted = {(length, depth) for length in each.lengths for depth in each.depths}
        yield there == wanted, "answers for each length and depth, and for no other"
        yield len({(a.length, a.sample) for a in each.answers}) <= _MOST, f"at most {_MOST:,} samples"
        yield all(0 <= answer.score <= 100 for answer in each.answers), "scores of 0 to 100"
        yield all(depth is None or 0 <= depth <= 1 for depth in each.depths), "depths of 0 to 1"


def _decodings(part: Decodings) -> Iterable[tuple[bool, str]]:
    contexts = [[row.context for row in each.rows] for each in (part.original, part.patched)]
    yield contexts[0] == contexts[1] and 0 < len(contexts[0]) <= _MOST, "the same contexts of both models"
    yield all(context > 0 for context in contexts[0]), "contexts above 0"
    rows = [*part.original.rows, *part.patched.rows]
    rates = [(row.prefill_tokens_per_second, row.decode_tokens_per_second, row.cache_bytes) for row in rows]
    yield all(rate > 0 for row in rates for rate in row), "rates and caches above 0"
