"""The targets of the comparison: figures that must not exceed a limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hf_attnpatch.embedded import DOMAINS
from hf_attnpatch.evaluation import Interval
from recipes.comparison.tables import markdown
from recipes.grouped_query.store import Store


@dataclass(frozen=True)
class Target:
    """A figure that must not be larger than a limit.

    Attributes:
        claim: in words.
        value: with its interval over documents, or a plain number; None where it was not measured.
        limit: the largest value that will do.
        form: of the numbers.
    """

    claim: str
    value: Interval | float | None
    limit: float
    form: str = ".3f"

    def row(self) -> list[str]:
        """Its line in the table."""
        limit = f"at most {self.limit:{self.form}}"
        if self.value is None:
            return [self.claim, "-", limit, "not measured"]
        value, found = self.value, ""
        if isinstance(value, Interval):
            found = f" ({value.low:{self.form}} to {value.high:{self.form}})"
            value = value.value
        return [self.claim, f"{value:{self.form}}{found}", limit, "yes" if value <= self.limit else "**no**"]


def table(store: Store) -> str:
    """All targets as Markdown."""
    return markdown(["figure", "measured", "target", "met"], [target.row() for target in every(store)])


def every(store: Store) -> Iterator[Target]:
    """All targets, with what is in the store."""
    yield from _ratios(store)
    yield from _other_domains(store)
    yield from _uptraining(store)
    yield from _costs(store)


def _ratios(store: Store) -> Iterator[Target]:
    from recipes.grouped_query.render import ratio

    for kv, limit in ((4, 0.08), (2, 0.10), (1, 0.10)):
        place = f"embedded/8-{kv}"
        found = ratio(store, f"{place}/refined", f"{place}/mean")
        yield Target(f"embedded 8 to {kv}: `refined` / `mean`", found, limit)
    for kv in (4, 2, 1):
        place = f"embedded/8-{kv}"
        found = ratio(store, f"{place}/refined", f"{place}/procrustes")
        yield Target(f"embedded 8 to {kv}: `refined` / `procrustes`", found, 0.25)
    for kv in (4, 2):
        place = f"embedded/8-{kv}"
        found = ratio(store, f"{place}/calibrated", f"{place}/mean")
        yield Target(f"embedded 8 to {kv}: `calibrated` / `mean`", found, 0.15)
    found = ratio(store, "smollm2/3-1/refined", "smollm2/3-1/mean")
    yield Target("SmolLM2 3 to 1: `refined` / `mean`", found, 0.20)


def _other_domains(store: Store) -> Iterator[Target]:
    from recipes.grouped_query.render import ratio

    for kv, limit in ((4, 0.08), (2, 0.10), (1, 0.10)):
        for domain in DOMAINS:
            others = [each for each in DOMAINS if each != domain]
            place = f"embedded/8-{kv}"
            for text, said in ((domain, domain), (f"self+{domain}", f"{domain} and the model's own text")):
                for worse, most in (("mean", limit), ("procrustes", 0.25)):
                    found = ratio(store, f"{place}/refined/on-{text}", f"{place}/{worse}", others)
                    claim = f"embedded 8 to {kv}, calibrated on {said}, measured elsewhere: `refined` / `{worse}`"
                    yield Target(claim, found, most)


def _uptraining(store: Store) -> Iterator[Target]:
    for kv, limit in ((4, 0.02), (1, 0.06)):
        row = store.get(f"uptraining/8-{kv}/refined")
        found = None if row is None else Interval(**row["differences"]["uptrained"])
        yield Target(f"embedded 8 to {kv}, `refined`, uptrained on 5 %: nats above the original", found, limit, ".4f")


def _costs(store: Store) -> Iterator[Target]:
    claims = {"calibrated": ("`calibrated`, all of it", 180), "refined": ("`refined`, refinement alone", 900)}
    for method, (claim, limit) in claims.items():
        row = store.get(f"smollm2/3-1/{method}")
        took = None if row is None else row["conversion"]
        if took is not None and method == "refined":
            took = {"seconds": took["damage"]["seconds"]["refinement"]}
        yield Target(f"SmolLM2 3 to 1: {claim}, seconds", None if took is None else took["seconds"], limit, ".0f")
    row = store.get("smollm2/3-1/calibrated")
    took = None if row is None else row["conversion"]
    peak = None if took is None or took["peak_mb"] is None else took["peak_mb"] / 1e3
    yield Target("SmolLM2 3 to 1: `calibrated`, peak GB above the loaded model", peak, 1.5, ".2f")
