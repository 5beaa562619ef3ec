"""A study's configuration: its cells, each with a model, its patches, and a training if there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.patch import from_spec
from recipes import settings
from recipes.comparison.cells import Cell
from recipes.data import DataConfig
from recipes.schedule import TrainConfig
from recipes.settings import SettingsError

STRENGTH = "strength_warmup"


@dataclass(frozen=True, kw_only=True)
class Passkey:
    """How often a passkey is asked for.

    Args:
        depths: of the key, 0 to 1.
        samples: prompts for each length and depth.
    """

    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    samples: int = 2


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What every cell is measured on.

    Args:
        text: source of the documents, such as `data.source`; those that are shorter than the longest length are left
            out.
        documents: at most so many; None for all.
        lengths: tokens of context, ascending; the first one is the trained context.
        targets: last tokens of each document that count, the same ones at every length.
        bins: of positions, at the longest length.
        batch_tokens: in a forward pass, at most.
        sliding: targets that the sliding window predicts before it moves on; measured where a cell says `baseline`.
        passkey: how often, or None for not at all.
    """

    text: str
    documents: int | None = None
    lengths: tuple[int, ...] = (512, 1024, 2048)
    targets: int = 511
    bins: int = 16
    batch_tokens: int = 4096
    sliding: int = 128
    passkey: Passkey | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell as the configuration writes it.

    Args:
        name: path-like; what follows the first part says what was done.
        model: as in `recipes.sources`.
        patches: in order.
        train: changes to the study's `train`; `{}` to train just so. Without it nothing is trained.
        data: changes to the study's `data`.
        strength_warmup: share of the steps over which the slopes of ALiBi rise from 0.
        baseline: whether windows of the trained context are measured as well.
    """

    name: str
    model: str
    patches: tuple[Mapping[str, Any], ...] = ()
    train: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    strength_warmup: float = 0.0
    baseline: bool = False


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        title: of its page.
        output: folder of the results.
        cells: in the order in which they are run.
        lengths: tokens of context.
        note: how the settings of the trainings were chosen, for the page.
        config: path of the file that it stands in, as it was given.
        unseen: what the documents are to the models.
    """

    title: str
    output: str
    cells: tuple[Cell, ...]
    lengths: tuple[int, ...]
    note: str
    config: str
    unseen: str


def read(path: str, overrides: list[str]) -> Study:
    """Reads a study and checks all of it before anything runs.

    Raises:
        SettingsError: a key, a patch or a value that cannot be.
    """
    values = settings.read(path, overrides)
    known = {"title", "output", "note", "unseen", "measure", "train", "data", "cells"}
    if set(values) - known:
        raise SettingsError(f"{path}: unknown {', '.join(sorted(set(values) - known))}; choose from {sorted(known)}.")
    measure = dict(values["measure"])
    passkey = measure.pop("passkey", None)
    measuring = dataclasses.replace(
        settings.build(Measuring, measure, "measure"),
        passkey=None if passkey is None else settings.build(Passkey, passkey, "measure.passkey"),
    )
    if not 0 < measuring.targets < min(measuring.lengths):
        raise SettingsError(f"measure.targets: {measuring.targets}, for lengths {measuring.lengths}; wanted fewer.")
    entries = [settings.build(Entry, each, f"cells[{n}]") for n, each in enumerate(values["cells"])]
    cells = tuple(_cell(entry, dataclasses.asdict(measuring), values) for entry in entries)
    if len({cell.name for cell in cells}) < len(cells):
        twice = next(cell.name for n, cell in enumerate(cells) if cell.name in [each.name for each in cells[:n]])
        raise SettingsError(f"cells: two have the name {twice!r}; give each its own.")
    unseen = values.get("unseen", "which no model was trained on" if measuring.text.startswith("embedded/") else "")
    note = values.get("note", "")
    return Study(values["title"], values["output"], cells, measuring.lengths, note, path, unseen)


def _cell(entry: Entry, measure: Mapping[str, Any], values: Mapping[str, Any]) -> Cell:
    """The cell of an entry; its settings are checked, so that a slip ends the run before the first cell."""
    for spec in entry.patches:
        try:
            from_spec(spec)
        except AttnPatchError as error:
            raise SettingsError(f"{entry.name}: {error}") from error
    spec = {"model": entry.model, "patches": list(entry.patches), "measure": measure, "baseline": entry.baseline}
    if entry.train is None:
        if entry.data is not None or entry.strength_warmup:
            raise SettingsError(f"{entry.name}: `data` and `{STRENGTH}` belong to a training; add `train: {{}}`.")
        return Cell(entry.name, "measure", _plain(spec))
    train = {"output": "", **values["train"], **entry.train}
    data = {**values["data"], **(entry.data or {})}
    if not 0 <= entry.strength_warmup <= 1:
        raise SettingsError(f"{entry.name}: {STRENGTH} is {entry.strength_warmup}; wanted a share of the steps.")
    if entry.strength_warmup and not any(spec["patch"] == "alibi" for spec in entry.patches):
        raise SettingsError(f"{entry.name}: {STRENGTH} is of ALiBi's slopes, and no patch of this cell is alibi.")
    spec |= {
        "train": dataclasses.asdict(settings.build(TrainConfig, train, f"{entry.name}: train")),
        "data": dataclasses.asdict(settings.build(DataConfig, data, f"{entry.name}: data")),
        STRENGTH: entry.strength_warmup,
    }
    return Cell(entry.name, "train", _plain(spec))


def _plain(spec: Any) -> Any:
    """The same as JSON gives it back, so that digests agree."""
    if isinstance(spec, Mapping):
        return {key: _plain(value) for key, value in spec.items()}
    return [_plain(each) for each in spec] if isinstance(spec, (tuple, list)) else spec
