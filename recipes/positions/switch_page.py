"""The page of `switch_positions.py`: each model before, right after the switch, and after training."""

from __future__ import annotations

from pathlib import Path

from hf_attnpatch.evaluation import Score
from recipes.comparison.store import Store
from recipes.comparison.tables import markdown, write_page
from recipes.positions import draw, heat, page
from recipes.positions.study import STRENGTH, Study

ORIGINAL = "original"
LEFT_OUT = "The drawings leave out other seeds, rates, starts and warm-ups; the tables have them."


def write(study: Study, store: Store, out: Path) -> None:
    """Writes README.md and the figures."""
    groups: dict[str, list[str]] = {}
    for cell in study.cells:
        groups.setdefault(cell.name.partition("/")[0], []).append(cell.name)
    drawn = {group: [name for name in names if _main(name)] for group, names in groups.items()}
    draw.by_length(store, drawn, study.lengths, out / "length.png", "Loss by context, the same targets")
    block = next((cell.spec["data"]["block"] for cell in study.cells if cell.kind == "train"), study.lengths[0])
    draw.by_position(store, drawn, (block, "blocks of the training"), out / "position.png", "Loss by position")
    draw.curves(store, drawn, out / "training.png", "After the switch")
    reference = f"{next(iter(groups))}/{ORIGINAL}"
    heat.passkeys(store, page.by_passkey(study, store, reference), study.lengths, out / "passkey.png")
    figures = [f"![{name}]({name}.png)" for name in ("length", "position", "training")]
    there = [each for each in figures if (out / each.partition("(")[2][:-1]).is_file()]
    write_page(
        out / "README.md",
        [
            f"# {study.title}\n",
            "\n".join(_finding(study, store, group, names) for group, names in groups.items()),
            "\n".join(f"* {line}" for line in _about(study, store)),
            *(_group(study, store, group, names) for group, names in groups.items()),
            "\n\n".join([*there, LEFT_OUT] if there else []),
            page.passkeys(study, store, reference),
            page.refusals(store, [cell.name for cell in study.cells]),
            page.closing(store),
        ],
    )


def _main(name: str) -> bool:
    """Whether a cell is no variant of another: another seed, rate, start or warm-up."""
    return "," not in name and " from " not in name


def _finding(study: Study, store: Store, group: str, names: list[str]) -> str:
    """What the switches of one model cost after the training, each at the best of what was tried, in a sentence."""
    length = study.lengths[0]
    before = page.score(store, f"{group}/{ORIGINAL}", length)
    tried: dict[str, list[float]] = {}
    for name in names:
        found = page.score(store, name, length)
        if page.TRAINED in name and found is not None:
            tried.setdefault(name.partition("/")[2].partition(page.TRAINED)[0], []).append(found.nats)
    if before is None or not tried:
        return ""
    costs = sorted((min(losses) - before.nats, name) for name, losses in tried.items())
    said = ", ".join(f"`{name}` {cost:+.2f}" for cost, name in costs)
    return f"**From {group}, after the training, nats above the original before it, at {length:,} tokens: {said}.**\n"


def _about(study: Study, store: Store) -> list[str]:
    found = [*page.about(study, store, "python recipes/switch_positions.py"), page.training_line(study, store)]
    warm = {cell.spec[STRENGTH] for cell in study.cells if cell.spec.get(STRENGTH)}
    if warm:
        shares = " or ".join(f"{100 * share:g} %" for share in sorted(warm))
        found.append(
            f"`warm`: the slopes of ALiBi rise from 0 to their full size over the first {shares} of the steps."
        )
    if any(f"/{ORIGINAL}{page.TRAINED}" in cell.name for cell in study.cells):
        found.append(
            "`original`, trained, had the same training with the positions it came with: what a switch costs is the "
            "distance to it, not to the original. Where a rate is named, both had it."
        )
    return [line for line in found if line]


def _group(study: Study, store: Store, group: str, names: list[str]) -> str:
    done = [name for name in names if store.get(name)]
    if not done:
        return f"## {group}\n\nNot measured yet."
    first = study.lengths[0]
    original = page.score(store, f"{group}/{ORIGINAL}", first)
    rows = []
    for name in done:
        found = page.score(store, name, first)
        over = [page.signed(page.above(reference, found)) for reference in (original, _kept(store, group, name, first))]
        rows.append([page.dash(name.partition("/")[2]), *page.losses(store, name, study.lengths), *over])
    head = ["positions", *(f"{n:,}" for n in study.lengths), f"above the original, {first:,}"]
    head.append(f"above the original trained as long, {first:,}")
    return f"## From {group}\n\n" + markdown(head, rows)


def _kept(store: Store, group: str, name: str, length: int) -> Score | None:
    """What the model that kept its positions loses after the training that a cell had; None for an untrained cell."""
    _, trained, how = name.partition(page.TRAINED)
    names = [f"{group}/{ORIGINAL}{trained}{how}", f"{group}/{ORIGINAL}{trained}"] if trained else []
    return next((found for each in names if (found := page.score(store, each, length))), None)
