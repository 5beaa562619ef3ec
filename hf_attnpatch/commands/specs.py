"""Patches in command-line form: ``name:field=value,field=[1,2]`` or a YAML list of specs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..publishing.confidential import command

if TYPE_CHECKING:
    import typer

    from ..patch import Patch

_COMMA = re.compile(r",(?![^\[]*\])")  # a comma that stands in no list


def patches(
    plan: Path | None, texts: Sequence[str], *, trusted: bool = False, kept: Sequence[Mapping[str, Any]] = ()
) -> list[Patch]:
    """Build the patches of ``--plan``, then those of a ``--config`` file, then those of ``--patch``.

    Args:
        plan: a file, which somebody else may have written.
        texts: what the user typed, which may name a repository of kernels.
        trusted: whether the files may, too.
        kept: specs of a ``--config`` file.

    Raises:
        AttnPatchError: nothing given, a spec that cannot be read, an unknown patch or field.
        OSError: the plan cannot be opened.
    """
    from ..errors import AttnPatchError
    from ..patch import from_spec

    written = [*(read_plan(plan) if plan else ()), *kept]
    specs = [*((spec, trusted) for spec in written), *((parse(text), True) for text in texts)]
    if not specs:
        raise AttnPatchError("no patch given; add --patch grouped_query:num_kv_heads=2, or --plan plan.yaml.")
    frozen = (({key: _frozen(value) for key, value in spec.items()}, trust) for spec, trust in specs)
    return [from_spec(spec, trust_remote_code=trust) for spec, trust in frozen]


def parse(text: str) -> dict[str, Any]:
    """Read ``name`` or ``name:field=value,...`` as a spec; values are YAML, so ``4`` is a number and ``[1,2]`` a list.

    Raises:
        AttnPatchError: a part that does not read ``field=value``.
    """
    from ..errors import AttnPatchError
    from ..schema import brief, from_yaml

    name, _, rest = text.partition(":")
    spec: dict[str, Any] = {"patch": name.strip()}
    for part in filter(None, _COMMA.split(rest)):
        field, sign, value = part.partition("=")
        if not sign or not field.strip():
            raise AttnPatchError(
                f"--patch {brief(text, 200)}: {brief(part)!r} does not read field=value, as in "
                f"{brief(name, 40)}:field=1,other=[1,2]."
            )
        spec[field.strip()] = from_yaml(value, f"--patch {brief(text, 200)}: {brief(field.strip(), 40)}")
    return spec


def read_plan(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the specs of a YAML file.

    Raises:
        AttnPatchError: not a list of mappings that name a patch.
    """
    from ..errors import AttnPatchError
    from ..schema import LARGEST_YAML, brief, from_yaml, text_of

    found = from_yaml(text_of(path, LARGEST_YAML), str(path))
    if not isinstance(found, list) or not found:
        raise AttnPatchError(f"{path}: found {type(found).__name__}; wanted a list such as `- patch: flash`.")
    for i, spec in enumerate(found):
        if not isinstance(spec, Mapping) or "patch" not in spec:
            said = brief(spec)
            raise AttnPatchError(f"{path}: entry {i} is {said}; wanted a mapping with a `patch:` and its fields.")
        yield spec


def spelled(context: typer.Context) -> str:
    """Return the command line of a command: its arguments, then the options that are not at their default.

    It is written into checkpoints and reports, so of a path from the root of this machine only the last part is told.
    """
    words, options = ["attnpatch", str(context.info_name)], []
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value is True:
            options.append(parameter.opts[0])
        elif value not in (None, False, parameter.default, ()) and value != []:
            each = value if isinstance(value, (list, tuple)) else [value]
            options += [word for item in each for word in (parameter.opts[0], str(item))]
    return command(shlex.join([*words, *options]))


def _frozen(value: Any) -> Any:
    """Return lists as tuples: patches are frozen."""
    return tuple(value) if isinstance(value, list) else value
