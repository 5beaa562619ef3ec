"""``attnpatch eval MODEL``: measures one checkpoint, prints results as they are found and writes them as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..writing import write
from . import voice
from .command import command
from .models import Source
from .options import Device, Dtype, Model, Revision, Trust, check_file

if TYPE_CHECKING:
    from ..evaluation import Result

RETRIEVAL = ("passkey", "needle", "key_value")
RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"),
)
_GROUPS = {"retrieval": RETRIEVAL, "ruler": RULER}
_OTHERS = ("perplexity", "positions", "fidelity", "decoding")


@dataclass(frozen=True, kw_only=True)
class Work:
    """The measurements that the options select; see the command for each."""

    lengths: tuple[int, ...]
    targets: int | None
    documents: int
    text: Path | None
    original: str | None
    depths: tuple[float, ...] | None
    samples: int
    chat: bool
    tasks: tuple[str, ...]
    max_length: int | None
    limit: int | None


Suite = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="perplexity (the default), positions, fidelity, decoding, retrieval (passkey, needle, key_value), ruler, "
        "or one task of these.",
    ),
]
Tasks = Annotated[str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-eval, or YAML files of tasks.")]
Lengths = Annotated[
    str | None, typer.Option(metavar="N,...", help="Tokens of context; up to the model's own unless given.")
]
Targets = Annotated[int | None, typer.Option(min=1, help="Last tokens of a document, for perplexity.")]
Documents = Annotated[int, typer.Option(min=1, help="Documents, spread evenly over the text.")]
Text = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text, or JSON lines with a field text; embedded text otherwise.")
]
Original = Annotated[str | None, typer.Option(metavar="MODEL", help="What fidelity compares with.")]
Depths = Annotated[str | None, typer.Option(metavar="X,...", help="Of a needle, 0 to 1.")]
Samples = Annotated[int, typer.Option(min=1, help="Prompts for each length and depth.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask retrieval's questions in the chat template.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens of an example of lm-eval, at most.")]
Limit = Annotated[int | None, typer.Option(min=1, help="First examples of each task of lm-eval only.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures here, as JSON.")]


def evaluate(
    model: Model,
    suite: Suite = None,
    tasks: Tasks = None,
    lengths: Lengths = None,
    targets: Targets = None,
    documents: Documents = 8,
    text: Text = None,
    original: Original = None,
    depths: Depths = None,
    samples: Samples = 5,
    chat: Chat = False,
    max_length: MaxLength = None,
    limit: Limit = None,
    out: Out = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a checkpoint: perplexity by context, retrieval, fidelity, decoding, tasks of lm-eval."""
    check_file(out, "--out", {"model", "results"})
    names = _names(suite, tasks)
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    source = Source(name=model, revision=revision, **options)  # type: ignore[arg-type]  # three options by name
    loaded, tokenizer = source.model(), _tokenizer(source)
    work = Work(
        lengths=_numbers(lengths, int, "--lengths", least=2) or _usual(loaded),
        depths=_numbers(depths, float, "--depths"),
        tasks=tuple(_words(tasks)),
        **{"targets": targets, "documents": documents, "text": text, "original": original},  # type: ignore[arg-type]
        **{"samples": samples, "chat": chat, "max_length": max_length, "limit": limit},  # type: ignore[arg-type]
    )
    found: dict[str, Any] = {}
    for name in names:
        result = _measured(name, loaded, tokenizer, work, options)
        found[name] = result.to_dict()
        if not voice.is_json():  # each when it is there
            voice.answer(f"{result}\n")
        if out is not None:  # after each: a later one that fails takes nothing away
            write(out, json.dumps({"model": model, "results": found}, indent=1) + "\n")
    voice.answer_for_machines({"model": model, "results": found})


def add(app: typer.Typer) -> None:
    """Add the command to an app."""
    command(
        app,
        "eval",
        "attnpatch eval embedded",
        "attnpatch eval out --suite perplexity,passkey --lengths 256,512 --out figures.json",
        "attnpatch eval out --tasks hellaswag --limit 100",
        go_on="what is finished stands in --out; ask for the rest.",
    )(evaluate)


def _measured(name: str, model: Any, tokenizer: Any, work: Work, options: dict[str, Any]) -> Result:
    from .. import evaluation

    if name == "tasks":
        trust = bool(options["trust_remote_code"])
        given = {"max_length": work.max_length, "limit": work.limit, "trust_remote_code": trust}
        return evaluation.task_scores(model, tokenizer, work.tasks, **given)  # type: ignore[arg-type]
    if name == "decoding":
        return evaluation.decoding(model, contexts=work.lengths)
    if name in ("perplexity", "positions", "fidelity"):
        return _on_text(name, model, tokenizer, work, options)
    by_depth = evaluation.find_task(name).by_depth
    text = None if work.text is None else "\n".join(_read(work.text))
    return evaluation.retrieval(
        model,
        tokenizer,
        task=name,
        lengths=work.lengths,
        depths=work.depths if by_depth else None,
        samples=work.samples,
        text=text,
        chat=work.chat,
    )


def _on_text(name: str, model: Any, tokenizer: Any, work: Work, options: dict[str, Any]) -> Result:
    import torch

    from .. import evaluation
    from ..errors import AttnPatchError

    longest, bos = max(work.lengths), _first_token(tokenizer)
    documents = _documents(tokenizer, work, longest - (bos is not None))
    if name == "perplexity":
        targets = work.targets or max(1, min(128, min(work.lengths) // 2))
        return evaluation.perplexity(model, documents, lengths=work.lengths, targets=targets, bos_token_id=bos)
    rows = {key: torch.tensor([*([] if bos is None else [bos]), *ids]) for key, ids in documents.items()}
    if name == "positions":
        return evaluation.loss_by_position(model, rows, bins=min(16, longest - 1))
    if work.original is None:
        raise AttnPatchError("--suite fidelity: nothing to compare with; add --original MODEL.")
    batches = [{"input_ids": ids[None]} for ids in rows.values()]
    return evaluation.fidelity(Source(name=work.original, **options).model(), model, batches)


def _documents(tokenizer: Any, work: Work, length: int) -> dict[str, list[int]]:
    """Return documents of ``length`` tokens: the ends of documents spread evenly, or windows of a single text."""
    from ..embedded import heldout
    from ..errors import AttnPatchError

    where = "the embedded text" if work.text is None else str(work.text)
    texts = heldout() if work.text is None else _read(work.text)
    ids = [list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
    if len(ids) == 1:
        ids = [ids[0][start : start + length] for start in range(0, len(ids[0]) - length + 1, length)]
    for number, document in enumerate(ids, 1):
        if len(document) < length:
            raise AttnPatchError(f"{where}, document {number}: {len(document)} tokens, wanted {length}; take it out.")
    if len(ids) < work.documents:
        raise AttnPatchError(
            f"{where}: {len(ids)} documents of {length} tokens, wanted {work.documents}; give more text, or lower "
            "--documents or --lengths."
        )
    chosen = [number * len(ids) // work.documents for number in range(work.documents)]
    return {str(number + 1): ids[number][-length:] for number in chosen}


def _read(file: Path) -> list[str]:
    from .text import read

    return read(file, "--text")


def _first_token(tokenizer: Any) -> int | None:
    """Return the token that this tokenizer puts before every text, or None."""
    ids, bos = tokenizer("")["input_ids"], getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and list(ids[:1]) == [bos] else None


def _tokenizer(source: Source) -> Any:
    from ..errors import AttnPatchError

    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise AttnPatchError(f"{source.name} has no tokenizer to read text with; save one into its folder.")
    return tokenizer


def _names(suite: str | None, tasks: str | None) -> list[str]:
    """Return the selected measurements, in the order of the command.

    Raises:
        AttnPatchError: no such suite.
    """
    from ..errors import AttnPatchError

    words = _words(suite) or ([] if tasks else ["perplexity"])
    names = [name for word in words for name in _GROUPS.get(word, (word,))]
    known = (*_OTHERS, *RETRIEVAL, *RULER)
    for name in names:
        if name not in known:
            raise AttnPatchError(
                f"--suite {name}: there is no such suite; choose from {', '.join((*_GROUPS, *known))}."
            )
    return [*dict.fromkeys(names), *(["tasks"] if tasks else [])]


def _usual(model: Any) -> tuple[int, ...]:
    """Return a quarter, a half and all of the declared context, at most 2,048 tokens."""
    longest = min(2048, getattr(model.config, "max_position_embeddings", None) or 2048)
    return tuple(max(2, longest // part) for part in (4, 2, 1))


def _words(text: str | None) -> list[str]:
    return [] if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str | None, kind: Callable[[str], Any], option: str, least: int = 0) -> Any:
    """Return the numbers of an option, or None if it is not given.

    Raises:
        AttnPatchError: one is no number of this kind, or below ``least``.
    """
    from ..errors import AttnPatchError

    try:
        found: Sequence[Any] = tuple(kind(word) for word in _words(text))
    except ValueError as error:
        raise AttnPatchError(f"{option} {text}: {error}; wanted numbers with commas between.") from error
    if text is not None and (not found or any(not number >= least for number in found)):
        raise AttnPatchError(f"{option} {text}: wanted numbers from {least} up, with commas between.")
    return found or None
