"""Invariants of other ways to read and write: what ``generate`` and its callers do with a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from ..edits import SetAttribute, tried
from ..errors import AttnPatchError
from ..evaluation.announcing import announced
from ..media import PLAIN, probes
from ..probe import _counting, largest_difference, quiet
from ..stepwise import STEPS, NoCache, in_pieces, unmasked
from ..upstream import words
from ..upstream.roles import predicted, resumed
from .noise import rounding
from .subject import Answer, Measured, Subject, compare

_WRITTEN = 4  # tokens
_PREFIX = 5  # tokens of a learned prefix


def static_cache(subject: Subject) -> Answer:
    """Text read in chunks into a static cache, and continued, equals what full forwards predict."""
    if not subject.anatomy.sites:
        return "no module keeps keys and values, for which a cache could hold room"
    chunk = max(subject.tokens.shape[1] // 3, 1)
    return _greedy(subject, subject.inputs, cache_implementation="static", prefill_chunk_size=chunk)


def assisted(subject: Subject) -> Answer:
    """Text of which several tokens are drafted at once, and some rejected, equals what forwards predict."""
    if subject.model.config.is_encoder_decoder:
        return "its second text is too short to draft from the first"
    half = subject.tokens[: subject.item, : subject.tokens.shape[1] // 2]
    again = subject.with_tokens(torch.cat([half, half], 1))  # repeated, so that there is always something to draft
    return _greedy(subject, again, prompt_lookup_num_tokens=3)


def beams(subject: Subject) -> Answer:
    """Beam search, which reorders the rows of the cache, finds the same likelihood as without a cache."""
    if (why := _cannot_write(subject)) is not None:
        return why
    ways: tuple[dict[str, Any], ...] = ({}, {subject.roles.names.get(words.USE_CACHE, words.USE_CACHE): False})
    inputs = _shortened(subject, subject.inputs)
    found = [_written(subject, inputs, lambda out: out.sequences_scores, num_beams=2, **way) for way in ways]
    cached, plain = found
    if isinstance(cached, str) or isinstance(plain, str):
        return cached if isinstance(cached, str) else str(plain)
    largest = 2 * subject.logits().abs().max()  # bounds the change of a log-likelihood by that of a logit
    figure = float((cached - plain).abs().max() / largest)
    return Measured(figure, subject.rounding, "mean log-likelihood, relative to twice the largest logit")


def learned_prefix(subject: Subject) -> Answer:
    """Keys and values that precede the text in the cache count as tokens, at once and token by token."""
    if not subject.generates or subject.model.config.is_encoder_decoder or subject.item > 1:
        return "no text of one sequence is written"
    if not subject.takes(words.MASK):
        return "its forward takes no attention mask"
    made = _prefix(subject)
    if isinstance(made, str):
        return made
    length = subject.tokens.shape[1]
    try:
        with announced(subject.model, length + _PREFIX):
            wanted = _behind(subject, copy.deepcopy(made), [length])
            return compare(subject, wanted, _behind(subject, made, [length // 2, *[1] * (length - length // 2)]))
    except AttnPatchError as error:
        return _refusal(error)


def with_media(subject: Subject) -> Answer:
    """Images, sound, token types and positions with several axes: repeatable, and decoded as read at once."""
    asked = probes(subject.model)
    more: dict[str, Mapping[str, Tensor]] = {what: i for what, i in asked.more.items() if what != PLAIN}
    text = {subject.roles.names.get(role) for role in (words.TOKENS, words.MASK, words.DECODER_TOKENS)}
    more |= {} if set(asked.main) <= text else {", ".join(asked.main): asked.main}
    if not more:
        missing = next((f"{what} could not be built: {why}" for what, why in asked.missing.items()), None)
        return missing or "it takes text alone"
    first = next(iter(more.values()))
    allowed = rounding(subject.model, lambda: subject.logits(first))
    figures, notes = dict[str, float](), [f"{what} was not tried: {why}" for what, why in asked.missing.items()]
    for what, inputs in more.items():
        with quiet(subject.model):  # some models keep state
            figures[what], said = _decoded(subject, unmasked(subject.model, inputs), allowed)
        notes += [f"with {what}, {said}"] * bool(said)
    worst = max(figures, key=lambda what: figures[what])
    return Measured(figures[worst], allowed, "; ".join([f"most with {worst}", *notes]))


def _decoded(subject: Subject, inputs: Mapping[str, Tensor], allowed: float) -> tuple[float, str]:
    """Return how far two forwards, or a full one and one in pieces, differ; with a note."""
    wanted = subject.logits(inputs)
    apart = largest_difference(wanted, subject.logits(inputs))
    if not subject.generates or subject.stream not in inputs:
        return apart, ""
    if _looks_ahead(subject, inputs, wanted, allowed):
        return apart, "earlier tokens see later ones, so that decoding is not the full forward"
    length = inputs[subject.stream].shape[1]
    try:
        found = in_pieces(subject.model, inputs, [length - sum(STEPS), *STEPS])
    except NoCache as error:
        found = error.found
    return max(apart, largest_difference(wanted, found)), ""


def _looks_ahead(subject: Subject, inputs: Mapping[str, Tensor], wanted: Tensor, allowed: float) -> bool:
    """Return whether another last token changes earlier logits: some models attend to an image bidirectionally."""
    ids = inputs[subject.stream].clone()
    ids[:, -1] = torch.where(ids[:, -1] == ids[:, 0], ids[:, 1], ids[:, 0])
    found = subject.logits({**inputs, subject.stream: ids})
    return largest_difference(wanted[:, :-1], found[:, :-1]) > allowed


def _greedy(subject: Subject, inputs: Mapping[str, Tensor], **how: Any) -> Answer:
    """Measure how far the logit of a generated token is below the likeliest one's in a full forward."""
    if (why := _cannot_write(subject)) is not None:
        return why
    given = _shortened(subject, inputs)
    text = _written(subject, given, lambda out: out.sequences, **how)
    if isinstance(text, str):
        return text
    with announced(subject.model, text.shape[1]):
        wanted = subject.logits({**given, subject.stream: text[:, :-1]})[:, -_WRITTEN:]
    taken = wanted.gather(-1, text[:, -_WRITTEN:, None])[..., 0]
    short = (wanted.amax(-1) - taken).max() / wanted.abs().max()
    return Measured(float(short), subject.rounding, "below the likeliest token's logit, relative to the largest logit")


def _cannot_write(subject: Subject) -> str | None:
    if not subject.generates:
        return "it does not generate"
    return "it writes a row for each codebook" if subject.item > 1 else None


def _shortened(subject: Subject, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shorten inputs to leave room for the generated tokens within position tables."""
    ids = inputs[subject.stream]
    return {**inputs, subject.stream: ids[:, : ids.shape[1] - _WRITTEN]}


def _written(subject: Subject, inputs: Mapping[str, Tensor], take: Callable[[Any], Tensor], **how: Any) -> Tensor | str:
    """Return what ``generate`` gives, or why it refuses."""
    model = subject.model
    start = getattr(model.generation_config, "decoder_start_token_id", None)
    scored = {"return_dict_in_generate": True, "output_scores": True}
    plain = GenerationConfig(
        **{"max_new_tokens": _WRITTEN, "do_sample": False, "pad_token_id": 0, "eos_token_id": None},
        **{"decoder_start_token_id": start, **scored, **how},
    )
    with tried(model, [SetAttribute("", "generation_config", plain)]), _counting(model, ("",)) as calls:
        try:
            return take(model.generate(**inputs))
        except AttnPatchError as error:
            return _refusal(error)
        except (ValueError, NotImplementedError, ImportError) as error:
            if calls[""] and not _of_generate(error):
                raise
            return " ".join(f"generate refuses: {error}".split())[:200]


def _of_generate(error: Exception) -> bool:
    """Return whether the error comes from code around the forwards."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("transformers.generation")


def _refusal(error: AttnPatchError) -> str:
    return " ".join(f"it refuses: {error}".split())[:200]


def _prefix(subject: Subject) -> Any:
    """Return a cache of random keys and values, in the shapes that the config declares.

    A sentence if the model keeps something else, or the config disagrees.
    """
    caches: list[Any] = []
    with announced(subject.model, _PREFIX):
        try:
            in_pieces(subject.model, subject.with_tokens(subject.tokens[:, :_PREFIX]), [_PREFIX], caches.append)
        except NoCache:
            return "it keeps no cache"
        except AttnPatchError as error:
            return _refusal(error)
    layers = getattr(caches[-1], "layers", None) or ()
    pairs: list[tuple[Any, Any]] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if type(caches[-1]) is not DynamicCache or not all(_alike(pair) for pair in pairs):
        return "its cache holds something else than keys and values of every token"
    text = subject.model.config.get_text_config(decoder=True)
    told = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    held = next((keys.shape[1] for keys, _ in pairs if keys.shape[1] != told), None)
    if held is not None:
        return f"its cache holds {held} key-value heads and its config says {told}: no prefix is made for that"
    generator = torch.Generator().manual_seed(0)

    def other(states: Tensor) -> Tensor:
        noise = torch.randn(states.shape, generator=generator).to(states)
        return noise * states.std()

    return DynamicCache([(other(keys), other(values)) for keys, values in pairs])


def _alike(pair: Sequence[Any]) -> bool:
    return all(isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == _PREFIX for t in pair)


def _behind(subject: Subject, cache: Any, sizes: Sequence[int]) -> Tensor:
    """Return the logits of the tokens, read in pieces of these sizes after a filled cache, without positions."""
    roles, rows, start, found = subject.roles, len(subject.tokens), 0, list[Tensor]()
    state: dict[str, Any] = {roles.name(words.CACHE): cache}
    for size in sizes:
        end = start + size
        mask = torch.ones(rows, _PREFIX + end, dtype=torch.long, device=subject.tokens.device)
        more = roles.call(**{words.MASK: mask, words.USE_CACHE: True})
        output = subject.model(**subject.with_tokens(subject.tokens[:, start:end]), **more, **state)
        state = resumed(subject.model, output) or state
        found.append(predicted(output))
        start = end
    return torch.cat(found, 1)


__all__ = ["assisted", "beams", "learned_prefix", "static_cache", "with_media"]
