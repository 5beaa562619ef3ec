"""The result of ``compare``: metrics, tables, figures and pages in one folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import PreTrainedModel

from ..errors import AttnPatchError
from ..publishing.card import Evaluation
from ..publishing.confidential import cleaned, shortened
from ..schema import from_json, text_of
from ..showing import Shown, line, prose
from ..writing import write
from . import figures, page, tables, text
from .digest import model_digest
from .metrics import check

METRICS = "metrics.json"
FILES = {METRICS, "report.md", "report.html", *(figure[1] for figure in figures.FIGURES)}


@dataclass(frozen=True)
class Comparison(Shown):
    """A finished comparison of two models; ``str()`` is its summary.

    Attributes:
        folder: holds ``report.md``, ``report.html``, ``metrics.json`` and the figures.
        metrics: what ``metrics.json`` says.
    """

    folder: Path
    metrics: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read the folder that ``compare`` wrote.

        Raises:
            AttnPatchError: there is none, or it is damaged or of another version.
        """
        file = Path(folder) / METRICS
        if not file.is_file():
            raise AttnPatchError(f"{folder}: no comparison there (no {METRICS}); `attnpatch compare` writes one.")
        try:
            found = from_json(text_of(file), str(file))
            check(found, str(file))
        except AttnPatchError as error:
            raise AttnPatchError(f"{str(error).rstrip('.')}; run the comparison again.") from error
        return cls(Path(folder), found)

    def check_model(self, model: PreTrainedModel) -> None:
        """Check that a model is the patched one of this comparison.

        Raises:
            AttnPatchError: its weights or its config are others.
        """
        found, wanted = model_digest(model), self.metrics["patched"]["digest"]
        if found != wanted:
            raise AttnPatchError(
                f"{self.folder}: the report is not of this model (digest {found[:12]}, the report's is {wanted[:12]}); "
                "compare this model, or give the report of it."
            )

    def save(self) -> None:
        """Write the folder: metrics first, then tables, figures and pages.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        write(self.folder / METRICS, json.dumps(self.metrics, indent=1) + "\n")
        drawn = figures.draw(self.metrics)
        for figure in drawn:
            write(self.folder / figure.file, figure.drawn["light"])
        report = text.render(self.metrics, drawn)
        write(self.folder / "report.md", report)
        write(self.folder / "report.html", page.render(report, drawn))

    def for_card(self, folder: Path, path: str) -> Evaluation:
        """Copy figures, report and metrics into a folder and return their text for a model card.

        Paths of this machine that stand in the metrics are shortened to their last part.

        Args:
            folder: of this disk.
            path: of that folder in the repository.
        """
        folder.mkdir(parents=True, exist_ok=True)
        metrics = cleaned(self.metrics)
        drawn = figures.draw(metrics)
        for figure in drawn:
            write(folder / figure.file, figure.drawn["light"])
        write(folder / "report.html", page.render(text.render(metrics, drawn), drawn))
        write(folder / METRICS, json.dumps(metrics, indent=1) + "\n")
        notes = [text.explain(metrics, part) for part in metrics["parts"] if part in text.WHAT]
        found = [tables.summary(metrics), tables.loss_by_length(metrics) or ""]
        return Evaluation(
            table="\n\n".join(part for part in found if part),
            figures={figure.alt: f"{path}/{figure.file}" for figure in drawn},
            results=self._results(),
            notes=" ".join([f"Compared with {prose(metrics['original']['name'])}.", *notes]),
            command=metrics["command"],
        )

    def _results(self) -> list[EvalResult]:
        found = tables.losses(self.metrics)
        if found is None:
            return []
        patched = found["patched"]
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=line(f"{shortened(self.metrics['text'])}, {length} tokens of context"),
                dataset_config=f"{length}",  # what tells results of one metric apart
                metric_type="perplexity",
                metric_value=round(score.perplexity, 4),
            )
            for length, score in zip(patched.lengths, patched.scores, strict=True)
            if math.isfinite(score.perplexity)  # the Hub reads numbers only
        ]

    def _in_short(self) -> str:
        names = (self.metrics[which].get("name", which) for which in ("original", "patched"))
        return f"{' and '.join(map(str, names))}, in {self.folder}"

    def _figures(self) -> Iterable[bytes]:
        files = (self.folder / figure[1] for figure in figures.FIGURES)
        return [file.read_bytes() for file in files if file.is_file()]

    def __str__(self) -> str:
        return f"{tables.summary(self.metrics)}\n\nreport: {self.folder / 'report.html'}"
