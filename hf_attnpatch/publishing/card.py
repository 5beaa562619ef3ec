"""The model card of a patched model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import AttnPatchError
from ..patch import off_default
from ..record import Record
from ..showing import code, fenced, line, prose
from .origin import Origin


@dataclass(frozen=True)
class Evaluation:
    """The results of ``compare`` for a card.

    Attributes:
        table: Markdown.
        figures: what each shows -> its path in the repository.
        results: single figures, for the metadata.
        notes: what was measured and how, as Markdown.
        command: that measures it again.
    """

    table: str
    figures: Mapping[str, str]
    results: Sequence[EvalResult]
    notes: str
    command: str


@dataclass(frozen=True)
class Facts:
    """The contents of a card.

    Attributes:
        repo_id: where the model is published.
        record: what was done to it.
        origin: what it was before.
        auto_class: the class of transformers that loads it.
        commands: that made it; empty where none is known.
        report: the report of ``apply``, as text.
        evaluation: from ``compare``.
    """

    repo_id: str
    record: Record
    origin: Origin
    auto_class: str
    commands: Sequence[str]
    report: str | None = None
    evaluation: Evaluation | None = None


def render(facts: Facts) -> ModelCard:
    """Return the card.

    Raises:
        AttnPatchError: its metadata is refused by huggingface_hub.
    """
    names = list(dict.fromkeys(str(spec["patch"]) for spec in facts.record.patches))
    base = {"base_model": facts.origin.name, "base_model_relation": "finetune"} if facts.origin.name else {}
    results = facts.evaluation.results if facts.evaluation else ()
    metadata: dict[str, Any] = {"pipeline_tag": _task(facts.auto_class), **facts.origin.card, **base}
    try:
        data = ModelCardData(
            **metadata,
            library_name="transformers",
            tags=["hf_attnpatch", *names],
            model_name=facts.repo_id.split("/")[-1],
            eval_results=list(results) or None,
        )
    except (TypeError, ValueError) as error:
        raise AttnPatchError(f"{facts.repo_id}: the card's metadata cannot be written: {line(str(error))}") from error
    sections = [_head(facts), _load(facts), _evaluation(facts), _made(facts), _record(facts), _licence(facts)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def in_words(record: Record) -> list[str]:
    """Return each patch as it would be written in a script, without defaults."""
    return [f"{spec['patch']}({_fields(spec, ', ')})" for spec in record.patches]


def _head(facts: Facts) -> str:
    name, base = facts.repo_id.split("/")[-1], facts.origin.shown
    linked = f"[{prose(base)}](https://huggingface.co/{base})" if facts.origin.name else code(base)
    done = "\n".join(f"* {code(words)}" for words in in_words(facts.record))
    what = f"{linked} with its attention or positions changed by hf_attnpatch, in this order:"
    return f"# {prose(name)}\n\n{what}\n\n{done}"


def _load(facts: Facts) -> str:
    repo, auto = facts.repo_id, facts.auto_class
    pinned = 'revision = "main"  # better the commit that you have looked at: see "History" of this repository'
    ours = f'import hf_attnpatch as ap\n\n{pinned}\nmodel = ap.load("{repo}", revision=revision)'
    plain = (
        f"from transformers import {auto}, AutoTokenizer\n\n{pinned}\n"
        f'model = {auto}.from_pretrained("{repo}", revision=revision)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}", revision=revision)'
    )
    known = f'{auto}.from_pretrained("{repo}", revision=revision'
    trusting = plain.replace(known, f"{known}, trust_remote_code=True")
    if facts.record.stock:
        return (
            "## Load it\n\nTransformers expresses this structure itself, so nothing else is needed:\n\n"
            f"```python\n{plain}\n```\n\nor, with the package (any task, the right class by itself):\n\n"
            f"```python\n{ours}\n```"
        )
    return (
        "## Load it\n\nStock transformers has no field for this structure. With the package (`pip install "
        "hf_attnpatch`), the Auto classes know the checkpoint once it is imported, and so does\n\n"
        f"```python\n{ours}\n```\n\n"
        "Where the package is installed but your script does not import it, trust the loader in this repository, a "
        f"few lines that only import the package, at a commit where you have read it:\n\n```python\n{trusting}\n```\n\n"
        "Without the package it cannot be loaded: transformers refuses it, rather than loading it as something else."
    )


def _evaluation(facts: Facts) -> str:
    if facts.evaluation is None:
        return "## Evaluation\n\nNot measured for this checkpoint." + _how_to_measure(facts)
    found = facts.evaluation
    figures = "\n\n".join(f"![{prose(what)}]({path})" for what, path in found.figures.items())
    again = f"Measured by\n\n{fenced(found.command, 'sh')}"
    return "\n\n".join(part for part in ("## Evaluation", found.notes, found.table, figures, again) if part)


def _how_to_measure(facts: Facts) -> str:
    return (
        f" `attnpatch compare {shlex.quote(facts.origin.shown)} {facts.repo_id}` does it." if facts.origin.name else ""
    )


def _made(facts: Facts) -> str:
    if facts.commands:
        return f"## How it was made\n\n{fenced(chr(10).join(map(line, facts.commands)), 'sh')}" + _report(facts)
    options = " ".join(f"--patch {shlex.quote(_spelled(spec))}" for spec in facts.record.patches)
    source = shlex.quote(facts.origin.name or "BASE")
    return (
        "## How it was made\n\nBy a script. From its record, the command that makes the same structure; what was "
        f"fitted on text or trained needs that text again:\n\n{fenced(f'attnpatch apply {source} OUT {options}', 'sh')}"
        + _report(facts)
    )


def _report(facts: Facts) -> str:
    if facts.report is None:
        return ""
    return f"\n\n<details><summary>Report of the patch</summary>\n\n{fenced(facts.report)}\n\n</details>"


def _record(facts: Facts) -> str:
    versions = ", ".join(prose(f"{name} {version}") for name, version in facts.record.versions.items())
    text = json.dumps(facts.record.to_dict(), indent=2)
    return f"## Record\n\nWhat `config.json` says under `attnpatch` (written by {versions}):\n\n{fenced(text, 'json')}"


def _licence(facts: Facts) -> str:
    card = facts.origin.card
    named = str(card.get("license_name") or card["license"])
    linked = f"[{prose(named)}]({card['license_link']})" if card.get("license_link") else code(named)
    files = ", ".join(code(file.name) for file in facts.origin.files)
    carried = f" Its licence files are carried over: {files}." if files else ""
    base = prose(facts.origin.shown)
    return f"## Licence\n\n{linked}, as for {base}, from which the weights are derived.{carried}"


def _fields(spec: Mapping[str, Any], between: str) -> str:
    """Return the fields of a recorded patch that are off their default."""
    return between.join(f"{key}={json.dumps(value)}" for key, value in off_default(spec).items())


def _spelled(spec: Mapping[str, Any]) -> str:
    return f"{spec['patch']}:{_fields(spec, ',')}".rstrip(":").replace('"', "")


def _task(auto_class: str) -> str | None:
    return {
        "AutoModelForCausalLM": "text-generation",
        "AutoModelForMaskedLM": "fill-mask",
        "AutoModelForImageTextToText": "image-text-to-text",
    }.get(auto_class)
