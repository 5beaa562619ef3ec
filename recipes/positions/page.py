"""Common parts of the pages of both studies: scores by cell and length, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_attnpatch.evaluation import Interval, Score, difference, summarise
from recipes.comparison.store import Store
from recipes.comparison.tables import MISSING, conditions, markdown
from recipes.positions.study import Study

TRAINED = "/trained"


def score(store: Store, name: str, length: int) -> Score | None:
    """The loss of a cell at a length; None if it was refused or not measured."""
    row = store.get(name)
    found = (row or {}).get("lengths", {}).get(str(length), {})
    return summarise({k: tuple(v) for k, v in found["losses"].items()}) if "losses" in found else None


def sliding(store: Store, name: str) -> Score | None:
    """The loss of the window that moves on with the targets."""
    found = (store.get(name) or {}).get("baselines")
    return None if found is None else summarise({k: tuple(v) for k, v in found["sliding"]["losses"].items()})


def above(reference: Score | None, found: Score | None) -> Interval | None:
    """How much more is lost than by a reference, paired by document; None where one was not measured."""
    return None if reference is None or found is None else difference(reference, found)


def loss(found: Score | None) -> str:
    """A loss with its interval."""
    return MISSING if found is None else f"{found.nats:.3f} ({found.low:.3f} to {found.high:.3f})"


def signed(found: Interval | None) -> str:
    """A difference with its interval."""
    return MISSING if found is None else f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def losses(store: Store, name: str, lengths: Sequence[int]) -> list[str]:
    """A cell's losses at all lengths, for a row of a table."""
    row = store.get(name) or {}
    if "refused" in row:
        return ["refused"] * len(lengths)
    refused = {n for n in lengths if "refused" in row.get("lengths", {}).get(str(n), {})}
    return ["refused" if n in refused else loss(score(store, name, n)) for n in lengths]


def refusals(store: Store, names: Sequence[str]) -> str:
    """Why cells, or some of their lengths, were refused."""
    lines = []
    for name in names:
        row = store.get(name) or {}
        found = {length: each["refused"] for length, each in row.get("lengths", {}).items() if "refused" in each}
        lines += [f"* `{name}`: {row['refused']}"] if "refused" in row else []
        lines += [f"* `{name}` at {' and '.join(found)} tokens: {next(iter(found.values()))}"] if found else []
    return "## Refused\n\n" + "\n".join(lines) if lines else ""


def passkeys(study: Study, store: Store, reference: str) -> str:
    """Points of 100 by length and depth."""
    asked = [store.rows[name] for name in by_passkey(study, store, reference)]
    if not asked:
        return ""
    spec = asked[0]["spec"]["measure"]["passkey"]
    depths = ", ".join(f"{depth:g}" for depth in spec["depths"])
    table = [[f"`{row['cell']}`", *(_points(row["passkey"], n) for n in study.lengths)] for row in asked]
    found = [each.get("points", []) for row in asked for each in row["passkey"].values()]
    within = [row["passkey"][str(study.lengths[0])].get("points", []) for row in asked if row["cell"] == reference]
    text = (
        f"Points of 100, the mean with its 95 % interval over keys and those at depths {depths} each; keys for each "
        f"length, the same ones at every depth: {spec['samples']}."
    )
    if not any(map(any, found)):
        text += " **No model finds one key at any length or depth**"
        text += (
            ", the unpatched one within its context no more than the others: it is too small for the task, which so "
            "says nothing about the methods; `recipes/configs/extend_context_passkey.yaml` asks one that learned it."
            if within
            else "."
        )
    picture = "\n\n![passkeys](passkey.png)" if any(map(any, found)) else ""
    return f"## Passkey\n\n{text}\n\n" + markdown(["", *(f"{n:,}" for n in study.lengths)], table) + picture


def by_passkey(study: Study, store: Store, reference: str) -> list[str]:
    """The cells that were asked for keys: the reference, then those that find most at the longest length."""

    def order(name: str) -> tuple[bool, float]:
        points = store.rows[name]["passkey"].get(str(study.lengths[-1]), {}).get("points", [])
        return name != reference, -sum(points)

    return sorted((cell.name for cell in study.cells if (store.get(cell.name) or {}).get("passkey")), key=order)


def _points(found: dict[str, dict[str, list[float]]], length: int) -> str:
    points, mean = (found.get(str(length), {}).get(key) for key in ("points", "mean"))
    if points is None:
        return "refused"
    return ("" if mean is None else "**{:.0f}** ({:.0f} to {:.0f}): ".format(*mean)) + " / ".join(
        f"{each:.0f}" for each in points
    )


def about(study: Study, store: Store, command: str) -> list[str]:
    """What both pages say first: how it is measured, on what, and what is missing."""
    measure = study.cells[0].spec["measure"]
    count = next((row["documents"] for row in store.rows.values() if "documents" in row), None)
    lines = [
        f"`{command} --config {_shown(study.config)}` measures all this and writes it; `metrics.jsonl` has "
        "every figure, a line for each cell.",
        f"Losses are nats per token on the last {measure['targets'] + 1} tokens of {count} held-out documents "
        f"(`{measure['text']}`){', ' if study.unseen else ''}{study.unseen}: the same targets at every length, with "
        "more and more text before them. Intervals are 95 %, resampling documents; differences are paired by document, "
        "and much narrower than the intervals of the losses suggest.",
    ]
    missing = [f"`{cell.name}`" for cell in study.cells if not store.has(cell)]
    if missing:
        lines.append(f"**{len(missing)} of {len(study.cells)} cells are not measured yet**: {', '.join(missing)}.")
    return lines


def _shown(config: str) -> str:
    """A path from where the command is run, which is the project's root."""
    path = Path(config).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def closing(store: Store) -> str:
    """Where it was measured, and in which dtypes."""
    if not store.rows:
        return ""
    kinds = {row["spec"]["train"]["mixed_precision"] for row in store.rows.values() if "training" in row}
    names = sorted("float32" if kind == "no" else f"{kind} autocast" for kind in kinds)
    trained = f"; training in {' and '.join(names)}" if names else ""
    return f"## Conditions\n\n{conditions(store)} Weights and measurements in float32{trained}."


def training_line(study: Study, store: Store) -> str:
    """What the trainings had in common, as they were."""
    rows = [store.get(cell.name) for cell in study.cells if cell.kind == "train"]
    done = [row for row in rows if row is not None and "training" in row]
    if not done:
        return ""
    train, data = done[0]["spec"]["train"], done[0]["spec"]["data"]
    tokens = sorted({row["training"]["tokens"] for row in done})
    return (
        f"All parameters, {train['steps']} steps, {' or '.join(f'{n:,}' for n in tokens)} tokens of "
        f"`{data['source']}`, AdamW at {train['lr']:g} with {train['warmup']} steps of warm-up and cosine decay: one "
        f"setting for all. {study.note}"
    ).strip()


def dash(text: str) -> str:
    """A cell's name in words: `yarn/trained, skipping` -> `yarn`, trained, skipping."""
    base, _, trained = text.partition(TRAINED)
    return f"`{base}`" + (f", trained{trained}" if TRAINED in text else "")
