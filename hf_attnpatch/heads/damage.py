"""The damage of a conversion in each layer, as data, table and figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..plotting import import_pyplot, pictures
from ..showing import Shown, rendered
from .refine import Gap

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class LayerDamage:
    """One attention module.

    Attributes:
        path: of the module.
        groups: original key-value heads that share one; empty where a latent took the place of all.
        key_energy: share of the scores' energy that the keys keep; nan where not estimated.
        value_energy: the same of the heads' output.
        gaps: stage (`merged`, `refitted`, `refined`) -> distance from the original on calibration text that no
            refinement saw; empty without calibration text.
        frame: what may be done to its heads without changing attention.
        latent: what takes the place of the heads, in words; empty for shared heads.
    """

    path: str
    groups: tuple[tuple[int, ...], ...]
    key_energy: float
    value_energy: float
    gaps: Mapping[str, Gap]
    frame: str
    latent: str = ""

    @property
    def adjacent(self) -> bool:
        """Whether groups consist of adjacent heads."""
        heads = [head for group in self.groups for head in group]
        return heads == sorted(heads)


@dataclass(frozen=True)
class DamageReport(Shown):
    """What shared or compressed key-value heads cost, layer by layer; ``str()`` is a table, ``save_figure`` draws it.

    Attributes:
        layers: in order.
        method: that made the new weights.
        notes: what was decided on the way, and why.
        seconds: stage -> wall time.
        chosen: fields of the patch that were left open, as they were chosen.
    """

    layers: Sequence[LayerDamage]
    method: str
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages that were measured, in order."""
        return tuple(dict.fromkeys(stage for layer in self.layers for stage in layer.gaps))

    @property
    def grouping(self) -> str:
        """``similar`` if any module's groups are not of adjacent heads, else ``adjacent``."""
        return "adjacent" if all(layer.adjacent for layer in self.layers) else "similar"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        layers = [
            {
                "path": x.path,
                "groups": [list(g) for g in x.groups],
                "key_energy": x.key_energy,
                "value_energy": x.value_energy,
                "gaps": {s: {"output": g.output, "attention": g.attention} for s, g in x.gaps.items()},
                "frame": x.frame,
                **({"latent": x.latent} if x.latent else {}),
            }
            for x in self.layers
        ]
        return {"method": self.method, "notes": list(self.notes), "seconds": dict(self.seconds), "layers": layers}

    def __str__(self) -> str:
        return rendered(*self._tables())

    def _tables(self) -> Iterable[RenderableType]:
        from rich.table import Table  # takes a while to import

        columns = (f"{stage}: error, KL" for stage in self.stages)
        what = "latent" if any(layer.latent for layer in self.layers) else "groups"
        table = Table("damage", what, "energy kept: keys, values", *columns)
        for layer in self.layers:
            groups = "adjacent" if layer.adjacent else " ".join("+".join(map(str, g)) for g in layer.groups)
            groups = layer.latent or groups
            gaps = (layer.gaps[stage] for stage in self.stages)
            cells = [f"{g.output:.4f}  {'-' if g.attention is None else f'{g.attention:.4f}'}" for g in gaps]
            table.add_row(layer.path, groups, f"{layer.key_energy:.3f}  {layer.value_energy:.3f}", *cells)
        yield table
        if self.stages:
            yield "  error: squared, of the attention output, over its variance; KL: of the attention weights, in nats"
        yield from (f"  {note}" for note in self.notes)

    def _in_short(self) -> str:
        return f"{self.method}, {len(self.layers)} layers, stages: {', '.join(self.stages) or 'none measured'}"

    def _figures(self) -> Iterable[bytes]:
        return pictures(self.save_figure)

    def save_figure(self, path: str | Path | IO[bytes]) -> None:
        """Draw retained energy, attention divergence and output error by layer.

        Args:
            path: file in any format of matplotlib, or a file open for writing, which gets a PNG.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        pyplot = import_pyplot("the damage figure")
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
        at = range(len(self.layers))
        axes[0].plot(at, [x.key_energy for x in self.layers], "o-", color="#0072B2", label="keys")
        axes[0].plot(at, [x.value_energy for x in self.layers], "s--", color="#D55E00", label="values")
        axes[0].set(title="retained energy", xlabel="layer", ylim=(None, 1.005))
        for stage, mark, colour in zip(
            self.stages, ("v:", "s--", "o-"), ("#999999", "#D55E00", "#0072B2"), strict=False
        ):
            for axis, name in ((axes[1], "attention"), (axes[2], "output")):
                values = [getattr(x.gaps[stage], name) if stage in x.gaps else None for x in self.layers]
                axis.plot(at, [float("nan") if v is None else v for v in values], mark, color=colour, label=stage)
        axes[1].set(title="attention, KL to the original (nats)", xlabel="layer", yscale="log")
        axes[2].set(title="output, squared error over variance", xlabel="layer", yscale="log")
        for axis in axes:
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
        figure.suptitle(f"{self.method}: {self._sharing()}")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)

    def _sharing(self) -> str:
        first = self.layers[0].groups
        if self.layers[0].latent:
            return self.layers[0].latent
        return f"{sum(map(len, first))} key-value heads to {len(first)}"
