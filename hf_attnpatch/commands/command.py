"""Common features of all commands: --json, --quiet, --config, examples, one-line errors, advice on resuming."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .. import progress
from . import voice
from .options import clear_errors

EXIT_CODES = (
    "Exit codes: 0 done; 1 refused, or something that was checked fails, and stderr says what; 2 the command line is "
    "wrong; 128 + N ended by signal N, as 130 by Ctrl-C."
)
_RUNNING: list[str] = []  # how to go on with the command that runs, should it be stopped

_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing beside the answer and errors.")]


def _configured(context: typer.Context, file: Path | None) -> Path | None:
    """Read options and arguments from a YAML file; the command line takes precedence."""
    if file is not None:
        with clear_errors():
            context.default_map = {**(context.default_map or {}), **_settings(context, file)}
    return file


_Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        is_eager=True,
        callback=_configured,
        help="YAML with arguments and options of this command by name; what stands on the command line wins.",
    ),
]
_COMMON = {"as_json": (_Json, False), "quiet": (_Quiet, False), "config": (_Config, None)}


def command(
    app: typer.Typer, name: str, *examples: str, go_on: str = "the same command starts anew.", help: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to an app as a command with the common features.

    Args:
        app: to add it to.
        name: of the command.
        examples: command lines, shown below the help.
        go_on: what to do after it was stopped.
        help: in the place of the docstring.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, as_json: bool, quiet: bool, config: Path | None, **options: Any) -> None:
            with clear_errors(), _stoppable(go_on), voice.speaking(as_json, quiet), progress.spoken(not quiet):
                function(*args, **options)

        hints = get_type_hints(function, include_extras=True)  # typer reads the options from them
        own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]
        more = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for key, (kind, default) in _COMMON.items()
        ]
        run.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *more)}
        shown = "\n\n".join(["Examples:", *examples])
        app.command(name, help=help, epilog=shown)(run)
        return function

    return register


def how_to_go_on() -> str:
    """Return advice on resuming the running command after it was stopped; empty if none runs."""
    return _RUNNING[-1] if _RUNNING else ""


@contextmanager
def _stoppable(go_on: str) -> Iterator[None]:
    _RUNNING.append(go_on)
    yield
    _RUNNING.pop()  # not after an error: a signal ends the command as one, and then it is asked for


def _settings(context: typer.Context, file: Path) -> dict[str, Any]:
    """Return the values of a YAML file under the command's names for them."""
    from ..errors import AttnPatchError
    from ..schema import LARGEST_YAML, brief, from_yaml, text_of

    found = from_yaml(text_of(file, LARGEST_YAML), str(file))
    if not isinstance(found, Mapping):
        raise AttnPatchError(f"--config {file}: found a {type(found).__name__}; wanted a mapping of options.")
    known = {_spelled(parameter): parameter for parameter in context.command.params if parameter.name != "config"}
    settings: dict[str, Any] = {}
    for key, value in found.items():
        word = str(key).replace("_", "-")
        if word == "trust-remote-code":
            raise AttnPatchError(f"--config {file}: trust_remote_code stands on the command line or nowhere.")
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise AttnPatchError(f"--config {file}: no option {brief(key, 40)}{meant}; wanted of {', '.join(known)}.")
        if word == "patch":
            value = voice.patches_of_a_file(context, value, f"--config {file}")
        settings[str(known[word].name)] = _value(value, known[word], f"--config {file}: {word}")
    return settings


def _spelled(parameter: Any) -> str:
    return str(max(parameter.opts, key=len)).lstrip("-").replace("_", "-").lower()


def _value(value: Any, parameter: Any, where: str) -> Any:
    """Return a value in command-line form, where numbers and paths are checked."""
    from ..errors import AttnPatchError
    from ..schema import brief

    if parameter.multiple:
        return [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, list) and parameter.param_type_name == "option":
        value = ",".join(map(str, value))
    if isinstance(value, Mapping) or isinstance(value, list):
        raise AttnPatchError(f"{where} is {brief(value)}; wanted one value.")
    return value if isinstance(value, bool) or value is None else str(value)
