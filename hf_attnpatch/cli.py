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

from .commands import compare as cli_compare
from .commands import diagnose as cli_diagnose
from .commands import docs as cli_docs
from .commands import doctor as cli_doctor
from .commands import evaluate as cli_eval
from .commands import models as cli_models
from .commands import publish as cli_publish
from .commands import search as cli_search
from .commands import specs as cli_specs
from .commands import text as cli_text
from .commands.options import (
    Device,
    Dtype,
    Length,
    Model,
    Patches,
    PlanFile,
    Sequences,
    Text,
    Trust,
    clear_errors,
    show,
)
from .commands.replacing import ended_by_signals
from .errors import NoWeights
from .publishing import confidential
from .showing import line, visible

app = typer.Typer(
    name="attnpatch",
    help="Swap the attention or the positions of a pretrained transformers model, and say what happened.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def describe(model: Model, trust_remote_code: Trust = False) -> None:
    """Say where a model attends and how it knows positions. Reads the config only; no weights are loaded."""
    with clear_errors():
        import hf_attnpatch as ap

        show(ap.describe(cli_models.Source(name=model, trust_remote_code=trust_remote_code).skeleton()))


@app.command()
def plan(
    model: Model,
    patch: Patches = [],  # noqa: B006 - typer copies it
    plan_file: PlanFile = None,
    calibration: Text = None,
    sequences: Sequences = 64,
    length: Length = 512,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Say what `apply` would do, and do nothing. Weights are loaded only for what is tried or measured to choose."""
    with clear_errors():
        import hf_attnpatch as ap

        patches = cli_specs.patches(plan_file, patch, trusted=trust_remote_code)
        source = cli_models.Source(name=model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        patches = cli_text.with_text(patches, calibration, source, sequences, length)
        measured = any(getattr(patch, "num_kv_heads", 0) == "auto" for patch in patches)
        try:
            found = ap.plan(source.model() if measured else source.skeleton(), *patches)
        except NoWeights:
            found = ap.plan(source.model(), *patches)
        show(found)


@app.command()
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
    trust_remote_code: Trust = False,
) -> None:
    """Patch a checkpoint and save it to OUT, with its tokenizer; OUT appears whole or not at all."""
    with clear_errors():
        import hf_attnpatch as ap

        from .commands.place import check_room
        from .commands.replacing import replacing
        from .commands.rewriting import Rewriting, reread

        patches = cli_specs.patches(plan_file, patch, trusted=trust_remote_code)
        if damage is not None:
            cli_text.check_figure(damage)
        source = cli_models.Source(name=model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        patches = cli_text.with_text(patches, calibration, source, sequences, length)
        inputs = {"MODEL": model, "--plan": plan_file, "--calibration": calibration, "--damage": damage}
        with replacing(out, overwrite, inputs) as folder:
            work = Rewriting(source)
            check_room(out, cli_models.size_of(work.model))
            report = ap.apply(work.model, *patches)
            if damage is not None:
                cli_text.draw(report, damage)
            said = [str(report), *work.save(report, folder, cli_specs.spelled(context))]
            del report  # which holds what was replaced
            reread(folder, work.release(), source)
        show("\n".join(said))
        show(f"saved {out}{'' if work.tokenizer is not None else ' (no tokenizer in the source)'}")


@app.command()
def verify(model: Model, dtype: Dtype = "auto", device: Device = "cpu", trust_remote_code: Trust = False) -> None:
    """Probe a checkpoint, patched or not, and pass or fail each invariant; exit with 1 if one fails."""
    with clear_errors():
        from .verify import verify as probe

        source = cli_models.Source(name=model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        outcome = probe(source.model())
    show(outcome)
    raise typer.Exit(0 if outcome.passed else 1)


@app.command()
def demo(output: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("outputs/demo")) -> None:
    """Patch, uptrain and evaluate the embedded model; prints a table and where the figures are."""
    with clear_errors():
        from .demo import run

        run(output)


app.command()(cli_compare.compare)
app.command()(cli_publish.push)
app.command()(cli_diagnose.diagnose)
app.command(help=cli_doctor.HELP)(cli_doctor.doctor)
app.command()(cli_docs.docs)
app.command("eval")(cli_eval.evaluate)
app.command("search-rope")(cli_search.search_rope)


def main() -> None:
    """Run the command line; asked to end, it ends as after an error: nothing half-made stays."""
    try:
        with ended_by_signals():
            code = app(standalone_mode=False)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, of a class that it keeps to itself
            _say_usage(error)
        sys.excepthook = _say_bug  # typer has put its own there
        raise
    raise SystemExit(code or 0)


def _say_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, in which names of a checkpoint or tokens may be quoted."""
    told = "".join(traceback.format_exception(kind, error, trace))
    typer.echo(visible(confidential.hidden(told)), err=True)


def _say_usage(error: Any) -> NoReturn:
    """Say in one line what is wrong with a command line, what was wanted, and how it is used."""
    said, parameter, context = error.format_message(), getattr(error, "param", None), getattr(error, "ctx", None)
    if said.startswith("Missing") and parameter is not None:
        name = parameter.opts[0] if parameter.param_type_name == "option" else (parameter.metavar or parameter.name)
        said = f"{name.upper() if name == parameter.name else name} is missing: {parameter.help or ''}"
    usage = "" if context is None else f" {' '.join(context.get_usage().split())}"
    typer.secho(f"attnpatch: {line(said)}{usage}", fg=typer.colors.RED, err=True)
    raise SystemExit(error.exit_code)


if __name__ == "__main__":
    main()
