"""``push_to_hub``: publishes a patched model with a card that says what was done, how to load it and what it loses."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from . import record
from .checkpoint import auto_class, tokenizer_of
from .comparing.result import Comparison
from .errors import AttnPatchError
from .publishing import card, confidential, origin
from .publishing.hub import Head, Hub
from .publishing.stale import stale_files
from .report import Report
from .rewriting.carrying import carry_read
from .rewriting.tokenizer import lengthened
from .showing import Shown, line

Reports: TypeAlias = Report | Comparison | str | Path | Sequence[Report | Comparison | str | Path]
FIGURES = "attnpatch"  # folder of the repository for figures and metrics
_UNTOUCHED = {".gitattributes"}  # what a new repository contains


@dataclass(frozen=True)
class Published(Shown):
    """A published repository.

    Attributes:
        repo_id: owner/name.
        url: of the repository.
        commit: its commit, for ``revision=`` of ``from_pretrained``.
        files: the uploaded files.
        notes: what the user may want to fix.
    """

    repo_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"published {self.url} at {self.commit[:12]}: {len(self.files)} files: {', '.join(self.files)}"
        return "\n".join([head, *self.notes])


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    report: Reports | None = None,
    tokenizer: Any | None = None,
    base_model: str | None = None,
    license: str | None = None,
    license_files: Sequence[str | Path] = (),
    command: str | None = None,
    private: bool | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    token: str | None = None,
) -> Published:
    """Publish a patched model as one commit, all or nothing: weights, tokenizer and a card.

    The upload contains what ``save_pretrained`` of model and tokenizer writes, tensors of the loaded checkpoint that no
    class loads or that had other dtypes (fp32 norms in bf16), the base model's licence files, the card, and the results
    of ``compare``; a token or a local path in it is refused. The card names the base model, what was done to it, how to
    load it with and without this package, the results of ``compare``, the command that made it, and the base model's
    licence.

    Args:
        model: patched by this package.
        repo_id: ``owner/name``; created if it does not exist.
        report: the result of ``apply`` or ``compare`` for this model, the folder of ``compare``, or several of these.
        tokenizer: None takes that of the checkpoint from which the model was loaded, if it has one.
        base_model: repository of the base model; None takes the recorded one, if it is public. A recorded folder is not
            read.
        license: identifier on the Hub, instead of the one in the base model's card.
        license_files: local licences and notices to upload.
        command: that made the model, instead of the recorded one.
        private: visibility of a new repository; None uses the Hub's default. An existing one must agree.
        overwrite: replace the model in a repository with files: weights, card, tokenizer, figures. Others stay.
        max_shard_size: of a weights file; at most this much has to be uploaded again after a failure.
        token: None takes the one that huggingface_hub finds. It appears in no error, log or file.

    Raises:
        AttnPatchError: the model is not patched, the report belongs to another model, no licence is known, the
            repository contains files, or the Hub refuses or cannot be reached; nothing was published then.
    """
    found, hub = _checked(model, repo_id), Hub(token, _version())
    head = _place(hub, repo_id, private, overwrite)
    named = {"base_model": base_model, "license": license, "license_files": license_files}
    base = origin.find(hub, found.base_model, model.config, **named)  # type: ignore[arg-type]  # three options by name
    source = record.loaded_from(model)
    if source:
        confidential.check_links(Path(source))
    tokenizer = tokenizer_of(source) if tokenizer is None else tokenizer
    with tempfile.TemporaryDirectory(prefix="hf_attnpatch-") as temporary:
        folder = Path(temporary)
        found, carried = _stage(model, tokenizer, folder, found, base, max_shard_size)
        commands = [confidential.command(command)] if command else found.commands
        facts = card.Facts(repo_id, found, base, auto_class(model.config).__name__, commands)
        card.render(_with_reports(facts, model, report, folder)).save(folder / "README.md")
        confidential.check(folder, hub.token)
        head = hub.create(repo_id, private) if head is None else head
        commit, files = hub.commit(repo_id, folder, head, stale_files(head.files, folder), _message(found))
    return Published(repo_id, f"{hub.api.endpoint}/{repo_id}", commit, files, (*carried, *_notes(base, tokenizer)))


def _checked(model: PreTrainedModel, repo_id: str) -> record.Record:
    if not isinstance(model, PreTrainedModel):
        raise AttnPatchError(f"push_to_hub: model is a {type(model).__name__}; it must be a transformers model.")
    if not isinstance(repo_id, str) or not origin.REPOSITORY.fullmatch(repo_id) or "/" not in repo_id:
        raise AttnPatchError(f"push_to_hub: {repo_id!r} is no repository; write it as user/name.")
    found = record.read(model.config)
    if found is None:
        raise AttnPatchError(
            f"push_to_hub: this {type(model).__name__} has no record of a patch in its config (choosing a kernel "
            "leaves none); publish it with model.push_to_hub of transformers."
        )
    return found


def _place(hub: Hub, repo_id: str, private: bool | None, overwrite: bool) -> Head | None:
    """Return the files of the repository; refuse if they are in the way."""
    head = hub.look(repo_id)
    if head is None:
        return None
    if private is not None and head.private != private:
        is_, wanted = ("private", "public") if head.private else ("public", "private")
        raise AttnPatchError(
            f"{repo_id}: is there and {is_}, {wanted} was asked for; change it in its settings on the Hub, choose "
            "another name, or leave private out."
        )
    held = [name for name in head.files if name not in _UNTOUCHED]
    if held and not overwrite:
        raise AttnPatchError(
            f"{repo_id}: holds {len(held)} files already ({', '.join(held[:3])} ...); choose another name, or pass "
            "overwrite=True (--overwrite) to replace the model in it."
        )
    return head


def _stage(
    model: PreTrainedModel, tokenizer: Any, folder: Path, found: record.Record, base: origin.Origin, max_shard_size: str
) -> tuple[record.Record, tuple[str, ...]]:
    """Save everything but the card, with a public name of the base model in the record; return notes."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    carried = carry_read(model, folder)
    if tokenizer is not None:
        longer = copy.copy(tokenizer)  # the caller's is not changed
        fitted = lengthened(longer, *found.contexts)
        carried = (*carried, *((fitted,) if fitted else ()))
        longer.save_pretrained(folder)
    base.copy_licences(folder)
    commands = tuple(map(confidential.command, found.commands))
    found = replace(found, base_model=line(base.shown, 100), commands=commands)
    record.rewrite(folder, found)
    return found, carried


def _with_reports(facts: card.Facts, model: PreTrainedModel, report: Any, folder: Path) -> card.Facts:
    """Add results from reports, after checking that they belong to this model."""
    for each in report if isinstance(report, (list, tuple)) else [] if report is None else [report]:
        if isinstance(each, Report):
            if json.dumps(each.record) != json.dumps(getattr(model.config, record.FIELD)):
                raise AttnPatchError(
                    "push_to_hub: the report of apply is of another model, or of before another patch."
                )
            facts = replace(facts, report=confidential.shortened(str(each)))
        elif isinstance(each, (Comparison, str, Path)):
            found = each if isinstance(each, Comparison) else Comparison.load(each)
            found.check_model(model)
            facts = replace(facts, evaluation=found.for_card(folder / FIGURES, FIGURES))
        else:
            raise AttnPatchError(
                f"push_to_hub: report is a {type(each).__name__}; it must be what apply or compare returned, or the "
                "folder that compare wrote."
            )
    return facts


def _message(found: record.Record) -> str:
    return f"Upload with hf_attnpatch: {', '.join(card.in_words(found))}"


def _notes(base: origin.Origin, tokenizer: Any) -> tuple[str, ...]:
    notes = []
    if base.name is None:
        notes.append(f"the card does not link its base model, {line(base.shown)}; base_model='owner/name' does")
    if tokenizer is None:
        notes.append("no tokenizer was published: the checkpoint that the model was loaded from has none")
    return tuple(notes)


def _version() -> str:
    from . import __version__

    return __version__
