"""The picture of a rehearsal: for each mutation and patch, the share of cells that work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .cells import UNPATCHED
from .rehearsal import Cell, Found

_FAILED = ("silent", "crash", "invalid")


def draw(path: Path, answers: Mapping[tuple[str, Cell], Found], kinds: Mapping[str, str]) -> None:
    """Draw it: a row for each mutation, a column for each patch; a cross where a cell crashed or was silent.

    Args:
        path: of the picture.
        answers: of all cells.
        kinds: the patch of each case.
    """
    from hf_attnpatch.plotting import import_pyplot

    pyplot = import_pyplot("the picture of a rehearsal")
    mutations = list(dict.fromkeys(mutation for mutation, _ in answers))
    patches = list(dict.fromkeys(kinds.values()))
    cells: dict[tuple[str, str], list[str]] = {}
    for (mutation, (_, case)), found in answers.items():
        if case != UNPATCHED:
            cells.setdefault((mutation, kinds[case]), []).append(found["status"])
    shares = [[_share(cells.get((mutation, patch), [])) for patch in patches] for mutation in mutations]
    figure, axes = pyplot.subplots(
        figsize=(2.5 + 0.42 * len(patches), 1.6 + 0.23 * len(mutations)), layout="constrained"
    )
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    failed = [key for key, found in cells.items() if set(found) & set(_FAILED)]
    axes.scatter(
        [patches.index(p) for _, p in failed], [mutations.index(m) for m, _ in failed], marker="x", color="red"
    )
    axes.set_xticks(range(len(patches)), patches, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(mutations)), mutations, fontsize=8)
    figure.colorbar(image, label="share of cells with the same numbers; the rest is refused")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _share(found: list[str]) -> float:
    return found.count("same") / len(found) if found else float("nan")
