"""``compare``: measures what a patch costs and gains, and writes a report."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from . import embedded, record
from .comparing import settings, texts
from .comparing.digest import digest_of, model_digest
from .comparing.metrics import KEYS, VERSION, check
from .comparing.models import Named, about, check_vocabulary, context, loaded, tokenizer_for
from .comparing.parts import Pair, all_parts, machine, why_not
from .comparing.result import FILES, METRICS, Comparison
from .comparing.store import Store, check_results
from .comparing.tables import BOTH
from .errors import AttnPatchError
from .plotting import import_pyplot

HELD_OUT = "the held-out text of hf_attnpatch (Python, prose, documentation)"


def compare(
    original: Named,
    patched: Named,
    out: str | Path = "outputs/compare",
    *,
    parts: Sequence[str] | None = None,
    text: Sequence[str] | None = None,
    text_name: str | None = None,
    tokenizer: Any | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
    loading: Mapping[str, Any] | None = None,
    **amounts: Any,
) -> Comparison:
    """Measure two models side by side and write a report: what a patch cost and what it gained.

    Every part (the loss of one model, the damage by layer ...) is stored in ``out/parts`` when it is finished, under a
    digest of all that it depends on: weights, configs, text, settings. The same command therefore continues where it
    was interrupted, and another patched model in the same folder re-uses the results of the original.

    Args:
        original: a causal language model, or a folder or Hub name of one.
        patched: another with the same tokenizer.
        out: folder for ``report.md``, ``report.html``, ``metrics.json``, figures and parts.
        parts: of :data:`.comparing.settings.PARTS`; all by default.
        text: whole documents; by default those that ship with this package.
        text_name: name of the text in the report.
        tokenizer: for both models; None takes that of their checkpoints.
        command: that repeats the comparison, for the report.
        say: called with a message for every part that begins or ends.
        loading: options of ``from_pretrained`` for models given by name: ``dtype``, ``trust_remote_code`` ...
        amounts: how much is measured: fields of :class:`.comparing.settings.Settings`.

    Raises:
        EvaluationError: the tokenizers differ, there is too little text, a setting is invalid, or a loss is not finite;
            finished parts are kept.
        AttnPatchError: a model cannot be loaded.
        MissingExtra: matplotlib is not installed.
    """
    pair = _pair(original, patched, Path(out), loading or {}, tokenizer, (text, text_name), parts, amounts, say)
    found, seconds = _measured(pair, Store(Path(out) / "parts"), say)
    called = _names(original, patched)
    models = {which: about(pair.models[which], pair.digests[which], called[which]) for which in BOTH}
    measured = {"parts": found, "left_out": why_not(pair), "seconds": seconds}
    what = {"settings": pair.settings.to_dict(), "text": pair.text.name, "command": command or _script(called)}
    metrics = {"version": VERSION, **models, **what, "machine": machine(), **measured}
    written = json.loads(json.dumps(metrics))  # as `load` will read it
    check(written, str(Path(out) / METRICS))  # parts of earlier runs, too
    result = Comparison(Path(out), written)
    result.save()
    return result


def _pair(
    original: Named,
    patched: Named,
    out: Path,
    loading: Mapping[str, Any],
    tokenizer: Any | None,
    text: tuple[Sequence[str] | None, str | None],
    parts: Sequence[str] | None,
    amounts: Mapping[str, Any],
    say: Callable[[str], None],
) -> Pair:
    """Load the models given by name, and check that they can be compared."""
    import_pyplot("drawing a comparison")  # checked, like the folder, before an hour of measuring
    if out.exists() and not out.is_dir():
        raise AttnPatchError(f"compare: {out} is a file; wanted a folder for the report.")
    check_results(out, FILES, METRICS, KEYS)
    out.mkdir(parents=True, exist_ok=True)
    models = {w: loaded(m, loading, say) for w, m in zip(BOTH, (original, patched), strict=True)}
    check_vocabulary(models["original"], models["patched"])
    tokenizer = tokenizer_for(models, loading) if tokenizer is None else tokenizer
    chosen = settings.choose(parts, [context(m) for m in models.values()], **amounts)
    documents, name = (embedded.heldout(), HELD_OUT) if text[0] is None else (text[0], text[1] or "the given text")
    cut = texts.read(documents, tokenizer, name=name, count=chosen.documents, length=chosen.lengths[-1])
    digests = {which: model_digest(model) for which, model in models.items()}
    return Pair(models, digests, tokenizer, cut, chosen)


def _measured(pair: Pair, store: Store, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, float]]:
    """Measure what is not in the store; return results by part, and seconds by piece of work of all runs."""
    left_out = why_not(pair)
    todo = [part for part in all_parts(pair) if part.name not in left_out]
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for number, part in enumerate(todo, 1):
        key, head = digest_of({**part.depends, "part": part.title, "version": VERSION}), f"[{number}/{len(todo)}]"
        kept = store.get(part.title, key)
        if kept is None:
            say(f"{head} {part.title} ...")
            start = time.perf_counter()
            result = part.measure()
            kept = {"result": result, "seconds": time.perf_counter() - start}
            store.put(part.title, key, kept)
            say(f"{head} {part.title}: {kept['seconds']:.0f} s")
        else:
            say(f"{head} {part.title}: there already")
        seconds[part.title] = kept["seconds"]
        place = found.setdefault(part.name, {} if part.which else kept["result"])
        if part.which:
            place[part.which] = kept["result"]
    return found, seconds


def _name(model: Named) -> str:
    """Return the name of a model for a reader: a repository, or the last part of a path."""
    name = record.loaded_from(model) if isinstance(model, PreTrainedModel) else str(model)
    return (Path(name).resolve().name if Path(name).exists() else name) or "a model in memory"


def _names(original: Named, patched: Named) -> dict[str, str]:
    one, other = _name(original), _name(patched)
    return {"original": one, "patched": f"{other} (patched)" if one == other else other}


def _script(names: Mapping[str, str]) -> str:
    return f"attnpatch compare {shlex.quote(names['original'])} {shlex.quote(names['patched'])}"


__all__ = ["Comparison", "compare"]
