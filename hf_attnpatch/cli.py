"""``attnpatch describe | plan | apply | verify | eval | diagnose | doctor | compare | push | search-rope | docs ...``.

torch and transformers are imported by the commands, not by this file: ``attnpatch --help`` must be quick.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .commands import compare as cli_compare
from .commands import diagnose as cli_diagnose
from .commands import docs as cli_docs
from .commands import doctor as cli_doctor
from .commands import evaluate as cli_eval
from .commands import listing as cli_listing
from .commands import models as cli_models
from .commands import publish as cli_publish
from .commands import search as cli_search
from .commands import specs as cli_specs
from .commands import text as cli_text
from .commands import voice
from .commands.command import EXIT_CODES, command, how_to_go_on
from .commands.options import (
    Device,
    Dtype,
    Length,
    Model,
    NewShards,
    Patches,
    PlanFile,
    Revision,
    Sequences,
    Text,
    Trust,
)
from .commands.replacing import ended_by_signals
from .errors import NoWeights
from .publishing import confidential
from .showing import line, visible

app = typer.Typer(
    name="attnpatch",
    help="Swap the attention or the positions of a pretrained transformers model, and say what happened.",
    epilog="\n\n".join(
        (
            "Examples:",
            "attnpatch patches grouped_query",
            "attnpatch plan embedded --patch grouped_query:num_kv_heads=2",
            "attnpatch apply embedded out --patch grouped_query:num_kv_heads=2",
            EXIT_CODES,
        )
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        found = cli_listing.versions()
        typer.echo(f"hf_attnpatch {__version__}, transformers {found.get('transformers')}, torch {found.get('torch')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Handle the options before the command."""


@command(app, "describe", "attnpatch describe embedded", "attnpatch describe openai-community/gpt2 --json")
def describe(model: Model, revision: Revision = None, trust_remote_code: Trust = False) -> None:
    """Describe where a model attends and how it encodes positions. Reads the config only; no weights are loaded."""
    import hf_attnpatch as ap

    source = cli_models.Source(name=model, revision=revision, trust_remote_code=trust_remote_code)
    voice.answer(ap.describe(source.skeleton()))


@command(
    app,
    "plan",
    "attnpatch plan embedded --patch rope_scaling:kind=yarn,factor=4",
    "attnpatch plan embedded --plan plan.yaml --json",
)
def plan(
    context: typer.Context,
    model: Model,
    patch: Patches = [],  # noqa: B006 - typer copies it
    plan_file: PlanFile = None,
    calibration: Text = None,
    sequences: Sequences = 64,
    length: Length = 512,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show what `apply` would do, and do nothing. Weights are loaded only if a choice has to be tried or measured."""
    import hf_attnpatch as ap

    kept = voice.kept_patches(context)
    patches = cli_specs.patches(plan_file, patch, trusted=trust_remote_code, kept=kept)
    where = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    source = cli_models.Source(name=model, **where)  # type: ignore[arg-type]  # options by name
    patches = cli_text.with_text(patches, calibration, source, sequences, length)
    measured = any(getattr(patch, "num_kv_heads", 0) == "auto" for patch in patches)
    try:
        found = ap.plan(source.model() if measured else source.skeleton(), *patches)
    except NoWeights:
        found = ap.plan(source.model(), *patches)
    voice.answer(found)


@command(
    app,
    "apply",
    "attnpatch apply embedded out --patch grouped_query:num_kv_heads=2",
    "attnpatch apply embedded out -p grouped_query:num_kv_heads=2 --calibration text.txt --damage damage.png",
    "attnpatch apply --config run.yaml --overwrite",
    go_on="OUT is what it was; the same command starts anew.",
)
def apply(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the patched checkpoint.", show_default=False)],
    patch: Patches = [],  # noqa: B006 - typer copies it
    plan_file: PlanFile = None,
    calibration: Text = None,
    sequences: Sequences = 64,
    length: Length = 512,
    damage: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw what it costs each layer.")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    max_shard_size: NewShards = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Patch a checkpoint and save it to OUT, with its tokenizer; OUT appears whole or not at all."""
    from .commands.rewriting import job_of
    from .convert import written

    kept = voice.kept_patches(context)
    patches = cli_specs.patches(plan_file, patch, trusted=trust_remote_code, kept=kept)
    if damage is not None:
        cli_text.check_figure(damage)
    where = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    source = cli_models.Source(name=model, **where)  # type: ignore[arg-type]  # options by name
    patches = cli_text.with_text(patches, calibration, source, sequences, length)
    inputs = {"MODEL": model, "--plan": plan_file, "--calibration": calibration, "--damage": damage}
    done = written(
        source,
        out,
        patches,
        overwrite=overwrite,
        size=max_shard_size,
        inputs=inputs,
        job=job_of({**context.params, "patches": [each.to_record() for each in patches]}),
        command=cli_specs.spelled(context),
        see=lambda report: None if damage is None else cli_text.draw(report, damage),
    )
    voice.note(done)
    voice.answer_for_machines({**done.to_dict(), "saved": out})


@command(app, "verify", "attnpatch verify out", "attnpatch verify out --json > verification.json")
def verify(
    model: Model,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Run a checkpoint, patched or not, and pass or fail each invariant; the exit code is 1 if one fails."""
    from .verify import verify as probe

    where = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    outcome = probe(cli_models.Source(name=model, **where).model())  # type: ignore[arg-type]  # options by name
    voice.answer(outcome)
    raise typer.Exit(0 if outcome.passed else 1)


@command(app, "demo", "attnpatch demo", "attnpatch demo --output /tmp/demo --json")
def demo(output: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("outputs/demo")) -> None:
    """Diagnose, convert, compare, stretch and train the model that ships here, in minutes; ends with one HTML page."""
    from .demo import run

    said = run(output)
    voice.answer(said, {"output": output, "page": output / "demo.html", "metrics": output / "metrics.json"})


cli_compare.add(app)
cli_publish.add(app)
cli_diagnose.add(app)
cli_doctor.add(app)
cli_docs.add(app)
cli_eval.add(app)
cli_search.add(app)
cli_listing.add(app)


def main() -> None:
    """Run the command line; a signal ends it like an error: nothing unfinished stays."""
    try:
        with ended_by_signals():
            code = app(prog_name="attnpatch", standalone_mode=False)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, of a class that it keeps to itself
            _say_usage(error)
        sys.excepthook = _say_bug  # typer has put its own there
        raise
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:
            voice.complain(f"attnpatch: stopped; {how_to_go_on() or 'nothing was begun.'}")
        raise
    raise SystemExit(code or 0)


def _say_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, which may quote names in a checkpoint or tokens."""
    told = "".join(traceback.format_exception(kind, error, trace))
    typer.echo(visible(confidential.hidden(told)), err=True)


def _say_usage(error: Any) -> NoReturn:
    """Return one line on what is wrong with a command line, what was wanted, and how it is used."""
    said, parameter, context = error.format_message(), getattr(error, "param", None), getattr(error, "ctx", None)
    if said.startswith("Missing") and parameter is not None:
        name = parameter.opts[0] if parameter.param_type_name == "option" else (parameter.metavar or parameter.name)
        said = f"{name.upper() if name == parameter.name else name} is missing: {parameter.help or ''}"
    usage = "" if context is None else f" {' '.join(context.get_usage().split())}"
    voice.complain(f"attnpatch: {line(said)}{usage}")
    raise SystemExit(error.exit_code)


if __name__ == "__main__":
    main()
