"""The results of grouped-query conversions: losses by document, and what they sum up to."""

from __future__ import annotations

from collections.abc import Iterable

from hf_attnpatch.evaluation import Score, summarise
from recipes.comparison import store


class Store(store.Store):
    """The lines of `metrics.jsonl`; documents are called `domain/number`."""

    def score(self, name: str, domain: str | None = None) -> Score | None:
        """The loss of a converted model, on all documents or those of a domain; None if it was not measured."""
        return self.merged(name, (domain,))

    def merged(self, name: str, domains: Iterable[str | None]) -> Score | None:
        """The same over several domains; None among them means all documents."""
        row, wanted = self.rows.get(name), tuple(domains)
        if row is None:
            return None
        keep = {
            document: tuple(pair)
            for document, pair in row["losses"].items()
            if None in wanted or document.partition("/")[0] in wanted
        }
        return summarise(keep)
