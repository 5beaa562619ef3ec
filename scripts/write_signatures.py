"""Write hf_attnpatch/one_liners.py: a ``patch_*`` function for each patch, with the patch's fields as its arguments.

Type checkers and completion read source, so the functions stand there in full; what they say is taken from the patches'
dataclasses and docstrings. ``--check`` writes nothing and exits with 1 where the file is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

from hf_attnpatch import patches
from hf_attnpatch.patch import Patch, fields_of

FILE = Path(__file__).resolve().parents[1] / "hf_attnpatch/one_liners.py"
_HEAD = '''"""A function for each patch: ``patch_flash(model, backend="sdpa")`` applies ``Flash(backend="sdpa")``.

Written by ``scripts/write_signatures.py`` from the patches' fields and docstrings; change those, then run it.
"""

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedModel

from .api import apply
from .patch import by_any_name
from .patches import {names}
from .report import Report

__all__ = [{functions}]
'''
_FUNCTION = '''

@by_any_name
def patch_{name}({arguments}) -> Report:
    """{doc}
    """
    return apply(model, {kind}({values}))
'''
_MODEL = "    model: a transformers model with its weights in memory; changed in place."
_RETURNS = (
    "Returns:\n    What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back."
)


def text() -> str:
    """Return the file as it has to be."""
    kinds: list[type[Patch]] = [getattr(patches, name) for name in patches.__all__]
    kinds.sort(key=lambda kind: kind.name)
    names = ", ".join(sorted((kind.__name__ for kind in kinds), key=str.lower))
    functions = ", ".join(f'"patch_{kind.name}"' for kind in kinds)
    written = _HEAD.format(names=names, functions=functions) + "".join(map(_function, kinds))
    for command in (["check", "--select", "I", "--fix", "--quiet"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(FILE), "-"]
        written = subprocess.run(ruff, input=written, capture_output=True, text=True, check=True).stdout
    return written


def _function(kind: type[Patch]) -> str:
    fields = fields_of(kind).values()
    arguments = ["model: PreTrainedModel", *(["*"] if fields else []), *map(_argument, fields)]
    lines = _doc(kind).splitlines()
    doc = "\n".join([lines[0], *(f"    {line}" if line else "" for line in lines[1:])])
    values = ", ".join(f"{field.name}={field.name}" for field in fields)
    made = {"name": kind.name, "kind": kind.__name__, "arguments": ", ".join(arguments), "doc": doc, "values": values}
    return _FUNCTION.format(**made)


def _argument(field: dataclasses.Field[object]) -> str:
    default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
    return f"{field.name}: {field.type}{default}"


def _doc(kind: type[Patch]) -> str:
    """Return a patch's docstring as that of a function."""
    said, _, raises = (inspect.getdoc(kind) or "").partition("\nRaises:\n")
    said, _, fields = said.partition("\nArgs:\n")
    arguments = "\n".join([_MODEL, *([fields.rstrip("\n")] if fields else [])])
    return f"{said.rstrip()}\n\nArgs:\n{arguments}\n\n{_RETURNS}\n\nRaises:\n{raises.rstrip()}"


def main() -> None:
    """Write the file, or say that it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    wanted = text()
    if parser.parse_args().check:
        if FILE.read_text("utf-8") != wanted:
            sys.exit(f"{FILE} is out of date; run python scripts/write_signatures.py")
    else:
        FILE.write_text(wanted, "utf-8")


if __name__ == "__main__":
    main()
