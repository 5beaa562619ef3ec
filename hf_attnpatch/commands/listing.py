"""``attnpatch patches`` and ``attnpatch env``: lists patches and versions without importing them."""

from __future__ import annotations

import dataclasses
import difflib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import catalogue, voice
from .command import command

if TYPE_CHECKING:
    from rich.console import RenderableType

PACKAGES = (
    *("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "typer", "rich"),
    *("peft", "trl", "datasets", "matplotlib", "lm_eval", "kernels", "flash-attn", "deepspeed", "bitsandbytes"),
)
VARIABLES = (  # that change what is loaded, from where and on what; none of them is a secret
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "NO_COLOR", "COLUMNS"),
)


def versions() -> dict[str, str]:
    """Return the installed packages, this one and Python first."""
    from .. import __version__

    found = {"hf_attnpatch": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def env() -> None:
    """Print versions, machine and settings, for an issue report; nothing is imported or tried (`doctor` does that)."""
    found: dict[str, Any] = {
        "versions": versions(),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "gpus": _gpus(),
        "executable": os.path.basename(sys.executable),
        "variables": {name: _harmless(os.environ[name]) for name in VARIABLES if name in os.environ},
    }
    lines = [f"{name:<18} {value}" for name, value in found["versions"].items()]
    lines += ["", f"{'machine':<18} {found['machine']}", f"{'GPUs':<18} {', '.join(found['gpus']) or 'none seen'}"]
    lines += [f"{name:<18} {value}" for name, value in found["variables"].items()]
    voice.answer("\n".join(lines), found)


def _harmless(value: str) -> str:
    """Return a setting without private parts: a name in a path, a password in an address."""
    return re.sub(r"//[^/@]*@", "//...@", value.replace(os.path.expanduser("~"), "~"))


def _gpus() -> list[str]:
    """Return the output of the driver's own tool; importing torch would take seconds."""
    if shutil.which("nvidia-smi") is None:
        return []
    ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []


Name = Annotated[
    str | None,
    typer.Argument(
        help="One patch, with its fields.",
        show_default=False,
        autocompletion=lambda incomplete: [e.name for e in catalogue.entries() if e.name.startswith(incomplete)],
    ),
]


def patches(name: Name = None) -> None:
    """List the patches, or the fields of one with their meaning, default and unit."""
    entries = catalogue.entries()
    if name is None:
        answered = _table(entries)
    else:
        entries = tuple(entry for entry in entries if entry.name == name.replace("-", "_"))
        if not entries:
            raise _unknown(name)
        answered = _page(entries[0])
    voice.answer(answered, {"patches": [dataclasses.asdict(entry) for entry in entries]})


def _unknown(name: str) -> Exception:
    from ..errors import AttnPatchError
    from ..schema import brief

    known = [entry.name for entry in catalogue.entries()]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return AttnPatchError(f"patch {brief(name, 40)} does not exist{meant}; choose from: {', '.join(known)}.")


def _table(entries: tuple[catalogue.Entry, ...]) -> str:
    from rich.table import Table

    from ..showing import rendered

    table = Table("patch", "what it does", "fields")
    for entry in entries:
        what = entry.what + (" (experimental)" if entry.experimental else "")
        table.add_row(entry.name, what, ", ".join(field.name for field in entry.fields))
    return rendered(table, "one with its fields: attnpatch patches NAME")


def _page(entry: catalogue.Entry) -> str:
    from rich.table import Table

    from ..showing import rendered

    table = Table("field", "default", "what it is")
    for field in entry.fields:
        default = "must be given" if field.default is None else field.default
        table.add_row(field.name, default, f"{field.what} ({field.type})")
    more = "Experimental: fields may get other names or defaults between minor versions." if entry.experimental else ""
    given = [f"{field.name}=..." for field in entry.fields if field.default is None]
    example = f"attnpatch apply MODEL OUT --patch {entry.name}{':' + ','.join(given) if given else ''}"
    parts: list[RenderableType] = [entry.what, *([more] if more else []), *([table] if entry.fields else []), example]
    return rendered(*parts)


def add(app: typer.Typer) -> None:
    """Add the commands to an app."""
    command(app, "patches", "attnpatch patches", "attnpatch patches self_extend", "attnpatch patches --json")(patches)
    command(app, "env", "attnpatch env", "attnpatch env --json")(env)
