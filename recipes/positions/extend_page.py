"""The page of `extend_context.py`: the question, methods without training, with training, passkeys."""

from __future__ import annotations

from pathlib import Path

from hf_attnpatch.evaluation import Interval, Score
from recipes.comparison.store import Store
from recipes.comparison.tables import markdown, write_page
from recipes.positions import draw, heat, page
from recipes.positions.page import TRAINED
from recipes.positions.study import Study

ORIGINAL = "original"
STATIC = ("yarn", "ntk")  # what the best method is held against, beside the truncated window
WINDOWED = ("attention_sinks",)  # these see no more than a window
LINES = 8  # in a panel; the tables have all
ALLOWED = 0.05  # nats above the loss within context


def write(study: Study, store: Store, out: Path) -> None:
    """Writes README.md and the figures."""
    untrained = [cell.name for cell in study.cells if cell.kind == "measure"]
    trained = [cell.name for cell in study.cells if cell.kind == "train"]
    longest = study.lengths[-1]
    order = sorted(untrained, key=lambda name: _nats(page.score(store, name, longest)))
    methods = [name for name in order if name != ORIGINAL]
    best = sorted(trained, key=lambda name: _nats(page.score(store, name, longest)))
    drawn = {"without training": methods, "after a short training": best}
    groups = {group: [ORIGINAL, *names[: LINES - 1]] for group, names in drawn.items()}
    _figures(study, store, out, groups)
    write_page(
        out / "README.md",
        [
            f"# {study.title}\n",
            found(study, store),
            "\n".join(f"* {line}" for line in _about(study, store)),
            _pictures(out, longest),
            f"## Without training, best at {longest:,} first\n\n" + _table(study, store, order),
            _trained(study, store, trained),
            page.passkeys(study, store, ORIGINAL),
            page.refusals(store, [cell.name for cell in study.cells]),
            asked(study, store),
            page.closing(store),
        ],
    )


def _figures(study: Study, store: Store, out: Path, groups: dict[str, list[str]]) -> None:
    within = page.score(store, ORIGINAL, study.lengths[0])
    above = None if within is None else within.nats
    draw.by_length(store, groups, study.lengths, out / "length.png", "Loss by context", above=above)
    draw.by_position(store, groups, (study.lengths[0], "trained context"), out / "position.png", "Loss by position")
    heat.passkeys(store, page.by_passkey(study, store, ORIGINAL), study.lengths, out / "passkey.png")


def _pictures(out: Path, longest: int) -> str:
    """The figures that there are."""
    said = {
        "length": "",
        "position": f"\n\nAll tokens of one pass over the last {longest:,}, which are other ones at each position.",
    }
    return "\n\n".join(f"![{n}]({n}.png){text}" for n, text in said.items() if (out / f"{n}.png").is_file())


def _about(study: Study, store: Store) -> list[str]:
    first = study.lengths[0]
    return [
        *page.about(study, store, "python recipes/extend_context.py"),
        f"`truncated`: the unpatched model on the last {first:,} tokens, in one pass; `sliding`: windows of {first:,} "
        "that move on with the targets, which costs as many passes.",
    ]


def _nats(found: Score | None) -> float:
    return float("inf") if found is None else found.nats


def best(study: Study, store: Store, *, whole: bool = False) -> str | None:
    """The method without training that loses least at the longest length.

    Args:
        study: the cells.
        store: what is measured of them.
        whole: leaves out those that see no more than a window.
    """
    left_out = {ORIGINAL, *(WINDOWED if whole else ())}
    names = [cell.name for cell in study.cells if cell.kind == "measure" and cell.name not in left_out]
    found = [name for name in names if page.score(store, name, study.lengths[-1])]
    return min(found, key=lambda name: _nats(page.score(store, name, study.lengths[-1])), default=None)


def found(study: Study, store: Store) -> str:
    """The finding in a few sentences."""
    name, whole = best(study, store), best(study, store, whole=True)
    if name is None:
        return "Not measured yet."
    last = study.lengths[-1]
    said = (
        f"**Of the methods without training `{name}` loses least at {last:,} tokens, "
        f"{page.loss(page.score(store, name, last))} nats**; unpatched, the model loses "
        f"{page.loss(page.score(store, ORIGINAL, last))}. It was chosen on these documents."
    )
    if name not in WINDOWED or whole is None:
        return said
    return (
        f"{said} Its layers see a window: it reads on without end and is not meant to gain from what lies further "
        f"back. **Of the methods that see the whole context `{whole}` loses least, "
        f"{page.loss(page.score(store, whole, last))} nats.**"
    )


def asked(study: Study, store: Store) -> str:
    """What the best methods must achieve, with paired intervals."""
    names = dict.fromkeys((best(study, store), best(study, store, whole=True)))
    tables = [_held(study, store, name) for name in names if name is not None]
    return "\n\n".join(["## What was asked", *tables]) if tables else ""


def _held(study: Study, store: Store, name: str) -> str:
    """A method held against what it must beat."""
    first, last = study.lengths[0], study.lengths[-1]
    found, within = page.score(store, name, last), page.score(store, ORIGINAL, first)
    rows = [_row(f"unpatched at {first:,}, its trained context", page.above(within, found), ALLOWED)]
    rows += [_row(f"`{each}` at {last:,}", page.above(page.score(store, each, last), found), 0) for each in STATIC]
    rows.append(_row(f"truncated to the last {first:,}", page.above(within, found), 0))
    rows.append(_row(f"sliding window of {first:,} (not asked)", page.above(page.sliding(store, ORIGINAL), found), 0))
    return markdown(["compared with", f"`{name}` at {last:,}, nats above", "wanted", "met"], rows)


def _row(against: str, found: Interval | None, limit: float) -> list[str]:
    wanted = f"at most {limit:+.2f}" if limit else "below 0"
    if found is None:
        return [against, "-", wanted, "not measured"]
    met = found.value <= limit if limit else found.value < 0
    sure = found.high <= limit if limit else found.high < 0
    return [against, page.signed(found), wanted, ("yes" if sure else "yes, interval beyond it") if met else "**no**"]


def _table(study: Study, store: Store, names: list[str]) -> str:
    first, last = study.lengths[0], study.lengths[-1]
    within = page.score(store, ORIGINAL, first)
    rows = []
    for name in names:
        if store.get(name):
            over = page.signed(page.above(within, page.score(store, name, last)))
            rows.append([page.dash(name), *page.losses(store, name, study.lengths), over])
    slid = page.sliding(store, ORIGINAL)
    dashes = ["-"] * (len(study.lengths) - 1)
    rows.append(["truncated", *dashes, page.loss(within), "0"])
    rows.append(["sliding", *dashes, page.loss(slid), page.signed(page.above(within, slid))])
    head = ["method", *(f"{n:,}" for n in study.lengths), f"{last:,}, above unpatched at {first:,}"]
    return markdown(head, rows)


def _trained(study: Study, store: Store, names: list[str]) -> str:
    done = [name for name in names if store.get(name)]
    if not done:
        return ""
    bases = [base for base in dict.fromkeys(name.partition(TRAINED)[0] for name in done)]
    shown = [each for base in bases for each in (base, *(n for n in done if n.partition(TRAINED)[0] == base))]
    return (
        "## After a short training\n\n"
        + " ".join([page.training_line(study, store), *_blocks(store, done)])
        + "\n\n"
        + _table(study, store, shown)
    )


def _blocks(store: Store, names: list[str]) -> list[str]:
    """What the trainings read, in sentences."""
    read = [store.rows[name]["spec"]["data"] for name in names]
    gaps = sorted({(data["block"], data["skip_to"]) for data in read if data["skip_to"]})
    whole = sorted({data["block"] for data in read if not data["skip_to"]})
    said = [
        f"`skipping`: blocks of {block:,} tokens whose positions have gaps, up to {to:,} (PoSE)." for block, to in gaps
    ]
    if whole:
        said.append(f"{'The others' if gaps else 'They'} read blocks of {' or '.join(f'{n:,}' for n in whole)} tokens.")
    return said
