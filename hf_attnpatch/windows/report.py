"""What windows cost each layer and what sinks gave back, as data, table and figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..plotting import import_pyplot, pictures
from ..showing import Shown, rendered
from .sinks import Gap

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class WindowReport(Shown):
    """What was measured before layers got their window; ``str()`` is a table, ``save_figure`` draws it.

    Attributes:
        paths: of the attention modules, by layer.
        window: in tokens.
        layers: numbers of the layers that got one.
        costs: of a window on each layer alone, KL of the logits in nats a token; empty where layers were given.
        gaps: number of a layer -> how far its output is from its own without a window; empty without sinks.
        first_tokens: how many first tokens the sinks stand for.
        share: of the cache that is left, at the length of the model's context.
    """

    paths: Sequence[str]
    window: int
    layers: Sequence[int]
    costs: Sequence[float] = ()
    gaps: Mapping[int, Gap] = field(default_factory=dict)
    first_tokens: int = 0
    share: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        gaps = {n: {"plain": g.plain, "closed": g.closed, "refined": g.refined} for n, g in self.gaps.items()}
        plain = {"window": self.window, "first_tokens": self.first_tokens, "share": self.share}
        return {**plain, "layers": list(self.layers), "costs": list(self.costs), "gaps": gaps}

    def __str__(self) -> str:
        return rendered(*self._tables())

    def _tables(self) -> Iterable[RenderableType]:
        from rich.table import Table  # takes a while to import

        heads = {"KL of a window here": self.costs, "error: plain, sinks, refined": self.gaps}
        table = Table("windows", "sees", *(head for head, there in heads.items() if there))
        for n, path in enumerate(self.paths):
            cells = [f"{self.costs[n]:.2e}"] if self.costs else []
            gap = self.gaps.get(n)
            if self.gaps:
                found = () if gap is None else (gap.plain, gap.closed, gap.refined)
                cells.append("  ".join("-" if each is None else f"{each:.4f}" for each in found))
            table.add_row(path, f"{self.window}" if n in self.layers else "all", *cells)
        yield table
        yield f"  {len(self.layers)} of {len(self.paths)} layers; {self.share:.3g} of the cache at the model's context"
        if self.costs:
            yield "  KL: of the logits beyond the window, nats a token, with a window on this layer alone"
        if self.gaps:
            yield "  error: squared, of the attention output, over its variance, on a row that no step has seen"

    def _in_short(self) -> str:
        return f"windows of {self.window} tokens in {len(self.layers)} of {len(self.paths)} layers"

    def _figures(self) -> Iterable[bytes]:
        return pictures(self.save_figure)

    def save_figure(self, path: str | Path | IO[bytes]) -> None:
        """Draw what a window costs each layer, and what sinks gave back.

        Args:
            path: of a file in any format of matplotlib, or a file that is open for writing, which gets a PNG.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        pyplot = import_pyplot("the figure of windows")
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
        at = range(len(self.paths))
        if self.costs:
            colours = ["#0072B2" if n in self.layers else "#D55E00" for n in at]
            axes[0].bar(at, [max(cost, 1e-9) for cost in self.costs], color=colours)
            axes[0].set(yscale="log")
        axes[0].set(title="a window here alone: KL of the logits (nats)", xlabel="layer (orange: sees all)")
        stages = (("plain", "v:", "#999999"), ("closed", "s--", "#D55E00"), ("refined", "o-", "#0072B2"))
        for name, mark, colour in stages if self.gaps else ():
            values = [getattr(gap, name) for gap in self.gaps.values()]
            numbers = [float("nan") if value is None else value for value in values]
            axes[1].plot(list(self.gaps), numbers, mark, color=colour, label=name)
        axes[1].set(title="output, squared error over variance", xlabel="layer")
        if self.gaps:
            axes[1].set(yscale="log")
            axes[1].legend()
        for axis in axes:
            axis.grid(alpha=0.3)
        figure.suptitle(self._in_short())
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
