"""Combines the facts of a checkpoint with who reads them: by running transformers, and by rows for other readers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from ..foreign import MODEL_TYPE
from ..record import FIELD
from ..showing import Shown
from .asking import Answer, ask
from .facts import CONDITIONS, Fact, facts, kind_of
from .files import CONFIG, Files
from .legacy import OLD_NAMES
from .readers import (
    DIFFERS,
    IGNORES,
    NO_LOSS,
    READERS,
    READS,
    SILENT,
    TRANSFORMERS_4,
    TRANSFORMERS_5,
    Row,
    row_for,
)

SCHEMA = 1
# Fields that from_pretrained or save_pretrained read, or nobody: they say nothing of what a model computes.
_ABOUT = frozenset(
    "architectures attnpatch auto_map bos_token_id decoder_start_token_id dtype eos_token_id finetuning_task id2label "
    "initializer_range is_decoder is_encoder_decoder label2id model_type name_or_path pad_token_id problem_type "
    "quantization_config return_dict tie_word_embeddings tokenizer_class torch_dtype torchscript transformers_version "
    "use_cache _name_or_path output_attentions output_hidden_states use_return_dict chunk_size_feed_forward".split()
)
_OLD = frozenset(
    "rope_theta rope_scaling partial_rotary_factor original_max_position_embeddings rope_local_base_freq rotary_pct "
    "global_rope_theta local_rope_theta rotary_emb_base".split()
)
_LOADING = ("dtype", "torch_dtype")  # which from_pretrained reads, before there is a model


@dataclass(frozen=True)
class Reading:
    """How one reader treats one fact of a checkpoint.

    Attributes:
        fact: the thing.
        value: as the checkpoint has it, short.
        reader: ``transformers 5``, ``transformers 4``, ``llama.cpp`` or ``vLLM``.
        verdict: ``reads``, ``ignores`` or ``differs`` (both silently), ``warns``, ``refuses`` or ``not needed``.
        says: what happens.
        since: release or change from which this holds; empty where nothing else is known.
        source: where that is known from.
        part_of: the thing with which this one is lost; empty where it stands for itself.
    """

    fact: str
    value: str
    reader: str
    verdict: str
    says: str
    since: str
    source: str
    part_of: str = ""

    @property
    def silent(self) -> bool:
        """Whether something is lost silently."""
        return self.verdict in SILENT


@dataclass(frozen=True)
class CheckpointReport(Shown):
    """Who reads which facts of a checkpoint; ``str()`` names what is lost silently.

    Attributes:
        name: of the folder.
        model_type: of the config.
        readings: one for each thing that the checkpoint says and each reader.
        unread: fields of ``config.json`` that change nothing in the installed transformers, beside what is about files.
        ran: whether transformers could be asked by a forward, too; else only by building the model.
        advice: what to do about what is lost.
    """

    name: str
    model_type: str
    readings: tuple[Reading, ...]
    unread: tuple[str, ...]
    ran: bool
    advice: tuple[str, ...]

    @property
    def silent(self) -> tuple[Reading, ...]:
        """What readers lose silently; facts that are lost together are named once."""
        return tuple(r for r in self.readings if r.silent and not r.part_of)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "model_type": self.model_type,
            "transformers": transformers.__version__,
            "readings": [{**dataclasses.asdict(r), "silent": r.silent} for r in self.readings],
            "unread": list(self.unread),
            "ran": self.ran,
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.model_type}): {len(self.silent)} things are lost silently"]
        lines += [f"  {r.reader} {r.verdict} {r.fact} ({r.value}): {r.says}" for r in self.silent]
        lines += [f"  {line}" for line in self.advice]
        return "\n".join(lines)


def readings_of(files: Files) -> CheckpointReport:
    """Return, for each fact of a checkpoint, who reads it.

    Raises:
        AttnPatchError: transformers knows no such family, or refuses the config.
    """
    answer = ask(files.config, f"{files.name}/{CONFIG}")
    readings = tuple(reading for fact in facts(files) for reading in _readings(fact, files, answer))
    about = _ABOUT | (_OLD if CONDITIONS["old keys agree"][0](files) else frozenset())
    unread = tuple(f for f in files.config if f not in about and not answer.reader_of(f))
    kind = str(files.config.get("model_type"))
    return CheckpointReport(files.name, kind, readings, unread, answer.ran, tuple(_advice(files, readings)))


def _readings(fact: Fact, files: Files, answer: Answer) -> Iterator[Reading]:
    """Yield how each reader treats a fact; transformers 5 defines the right result."""
    here = _asked(fact, files, answer) if fact.fields else None
    for reader in READERS:
        row = row_for(fact.name, reader, files.model_type)
        if reader == TRANSFORMERS_5 and here is not None:
            asked = f"asked transformers {transformers.__version__}"
            yield Reading(fact.name, fact.value, reader, *here, "", asked)
        elif row is not None:
            missed = reader == TRANSFORMERS_4 and _missed_by_4(fact, files)
            part_of = "rope_parameters" if missed and not CONDITIONS["old keys agree"][0](files) else ""
            own = (IGNORES, "stands in rope_parameters, which it does not read") if missed else _judged(row, files)
            verdict, says = own if part_of else _held_to(here, own)
            yield Reading(fact.name, fact.value, reader, verdict, says, row.since, row.source, part_of)


def _missed_by_4(fact: Fact, files: Files) -> bool:
    """Whether readers of version 4 miss a thing because it stands in ``rope_parameters`` alone."""
    names = {field.rpartition(".")[2] for field in fact.fields if "rope_parameters." in field}
    old = files.text.get("rope_scaling")
    there = {OLD_NAMES.get(key, key) for key in (*files.text, *(old if isinstance(old, Mapping) else ()))}
    return bool(names - there) or (bool(names) and not CONDITIONS["old keys agree"][0](files))


def _judged(row: Row, files: Files) -> tuple[str, str]:
    """Return the verdict of a row on this checkpoint, and why."""
    for name in row.unless:
        holds, why = CONDITIONS[name]
        if holds(files):
            return (READS if row.verdict == DIFFERS else NO_LOSS), why
    return row.verdict, row.says


def _held_to(here: tuple[str, str] | None, own: tuple[str, str]) -> tuple[str, str]:
    """Return a verdict where transformers 5, which says what should come of a thing, may not read it itself."""
    if here is None or here[0] not in SILENT or own[0] not in (READS, IGNORES):
        return own
    if own[0] == IGNORES:
        return NO_LOSS, "transformers 5 computes the same without it"
    return DIFFERS, "reads it, and transformers 5 does not"


def _asked(fact: Fact, files: Files, answer: Answer) -> tuple[str, str]:
    """Say what the installed transformers does with a field that it was asked about."""
    field = fact.fields[0]
    if field == "model_type":
        return READS, "with `import hf_attnpatch`; without, an Auto class asks for trust_remote_code"
    if field == FIELD:
        stock = files.config.get("model_type") != MODEL_TYPE
        return (
            (NO_LOSS, "only hf_attnpatch reads it: the other fields say all of it")
            if stock
            else (READS, "by hf_attnpatch")
        )
    if field.rpartition(".")[2] in _LOADING:
        return READS, "by from_pretrained"
    by = answer.reader_of(field)
    if not by and field.rpartition(".")[2] in _OLD and CONDITIONS["old keys agree"][0](files):
        return NO_LOSS, "rope_parameters say the same"
    if not by:
        return IGNORES, "no code that computes reads it, and no field that is read depends on it"
    only = {module for name in by for module in answer.reads.get(name, ())}
    if only and only <= {"cache_utils"}:
        return DIFFERS, "only its cache reads it, and forgets tokens that attention should still see"
    others = [name for name in by if name != field]
    return READS, f"as {', '.join(others[:3])}" if others and field not in by else ""


def _advice(files: Files, readings: tuple[Reading, ...]) -> list[str]:
    """Return what can be done about what is lost."""
    lost = {(r.reader, r.fact) for r in readings if r.silent}
    found = []
    if any(reader == "transformers 4" and fact.startswith("rope_parameters") for reader, fact in lost):
        found.append(f"attnpatch doctor {files.name} --write-legacy-keys writes what readers of version 4 look for")
    if any(reader == "llama.cpp" and fact.startswith("rope_type") for reader, fact in lost):
        fixes = "linear or yarn" if kind_of(files.text) != "llama3" else "yarn"
        found.append(f"for llama.cpp, scale by {fixes}, which its converter writes for most families")
    return found
