"""What do windows cost a pretrained model, and how much do sinks and the choice of layers give back?

    python recipes/windowed.py --model embedded
    python recipes/windowed.py --model data/smollm2 --window 256 --length 1024 --rows 3 --calibrate 3

Two tables and a figure. First: all layers see a window; alone, with the first tokens kept as StreamingLLM keeps them
(which no stock checkpoint can say), with sinks in closed form, and with refined sinks. Then half of the layers do:
those that lose least, as measured on calibration text, against every other layer, the first half and the last half.
Losses are of the tokens beyond the window; intervals are over rows, paired with full attention. Calibration and
evaluation take different documents of the held-out text that ships with the package.

Writes `NAME.json`, `NAME.png` and `README.md` (of all models measured so far) into `--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.attention.registry import set_kernel
from hf_attnpatch.attention.wrapper import AddWrapper
from hf_attnpatch.edits import tried
from hf_attnpatch.evaluation.logits import token_losses
from hf_attnpatch.evaluation.memory import held_bytes
from hf_attnpatch.evaluation.score import difference, summarise
from hf_attnpatch.plotting import import_pyplot
from hf_attnpatch.probe import quiet
from hf_attnpatch.windows import choice, sinks
from hf_attnpatch.windows.attention import Narrowed

OUT = Path(__file__).parent / "results" / "windowed"
Row = dict[str, Any]


def load(name: str) -> tuple[PreTrainedModel, Any]:
    """A model by folder or name, or the embedded one, with its tokenizer."""
    if name == "embedded":
        return embedded.load_model().eval(), embedded.load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(name)


def texts(tokenizer: Any, length: int, rows: int, calibrate: int) -> tuple[list[Tensor], list[Tensor]]:
    """Rows to calibrate on and rows to measure on, of different documents."""
    ids = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in embedded.heldout()]
    long = [row[:length] for row in ids if len(row) >= length]
    if len(long) < rows + calibrate:
        raise SystemExit(f"windowed: {len(long)} documents have {length} tokens; wanted {rows + calibrate}.")
    return long[1::2][:calibrate], long[::2][:rows]


class Study:
    """One model and its rows."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Tensor], window: int):
        self.model, self.rows, self.window = model, rows, window
        self.paths = ap.describe(model).attending
        self.full = self.losses({})

    def losses(self, narrowed: Mapping[str, Narrowed]) -> dict[str, tuple[float, int]]:
        """Losses beyond the window of each row, with windows on some modules."""
        edits = [*(AddWrapper(path, each) for path, each in narrowed.items()), set_kernel("sdpa")]
        found = {}
        with quiet(self.model), torch.no_grad(), tried(self.model, edits):
            for n, row in enumerate(self.rows):
                targets = len(row) - self.window - 1
                found[f"row {n}"] = _summed(token_losses(self.model, row[None, :], row[None, -targets:]))
        return found

    def measured(self, name: str, narrowed: Mapping[str, Narrowed]) -> Row:
        """The loss and how much more that is than with full attention."""
        found = summarise(self.losses(narrowed))
        apart = difference(summarise(self.full), found)
        print(f"{name}: {found.nats:.4f} nats, {apart.value:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}]", flush=True)
        return {"name": name, "nats": found.nats, "more": apart.value, "low": apart.low, "high": apart.high}

    def everywhere(self, calibration: Sequence[Tensor], first: int, steps: int) -> Row:
        """All layers see a window."""
        w, paths = self.window, self.paths
        rows = [self.measured("window", {p: Narrowed(w) for p in paths})]
        rows.append(self.measured(f"first {first} tokens kept", {p: Narrowed(w, first) for p in paths}))
        closed = sinks.find(self.model, paths, w, first, calibration)
        rows.append(self.measured("sinks, closed form", {p: Narrowed(w, 0, closed[p]) for p in paths}))
        sites = [site for site in ap.describe(self.model).sites if site.path in paths]
        better, gaps = sinks.refined(self.model, sites, w, closed, calibration, steps)
        if steps and len(calibration) > 1:
            rows.append(self.measured("sinks, refined", {p: Narrowed(w, 0, better[p]) for p in paths}))
        said = {p: {"plain": g.plain, "closed": g.closed, "refined": g.refined} for p, g in gaps.items()}
        return {"rows": rows, "gaps": said, "sinks": {p: v.tolist() for p, v in better.items()}}

    def chosen(self, calibration: Sequence[Tensor]) -> Row:
        """Half of the layers see a window."""
        start = time.process_time()
        costs = choice.costs(self.model, self.paths, self.window, calibration)
        seconds, count = time.process_time() - start, len(self.paths)
        half = count // 2
        best = sorted(sorted(range(count), key=costs.__getitem__)[:half])
        ways = {
            "measured": best,
            "every other layer": list(range(1, count, 2))[:half],
            "first half": list(range(half)),
            "last half": list(range(count - half, count)),
        }
        rows = [
            {**self.measured(name, {self.paths[n]: Narrowed(self.window) for n in layers}), "layers": layers}
            for name, layers in ways.items()
        ]
        return {"costs": costs, "rows": rows, "seconds": seconds}


def _summed(losses: Tensor) -> tuple[float, int]:
    return float(losses.double().sum()), losses.numel()


def stock(model: PreTrainedModel, layers: Sequence[int], study: Study, context: int) -> Row:
    """The same through a stock type: its loss, and what its cache holds."""
    before = _held(model, study.rows[0])
    with ap.patched(model, ap.Windowed(window=study.window, layers=list(layers), home="cwm")):
        found = {}
        with torch.no_grad():
            for n, row in enumerate(study.rows):
                targets = len(row) - study.window - 1
                found[f"row {n}"] = _summed(token_losses(model, row[None, :], row[None, -targets:]))
        after = _held(model, study.rows[0])
    return {"nats": summarise(found).nats, "bytes": after, "bytes before": before, "tokens": len(study.rows[0])}


@torch.no_grad()
def _held(model: PreTrainedModel, row: Tensor) -> int:
    out = model(row[None, :], use_cache=True, logits_to_keep=1)
    return held_bytes(next(value for name, value in out.items() if hasattr(value, "layers")))


def figure(found: Row, path: Path) -> None:
    """What each layer loses, and what each choice of half of them costs."""
    pyplot = import_pyplot("the figure of windows")
    drawn, axes = pyplot.subplots(1, 3, figsize=(14, 3.8), constrained_layout=True)
    for axis, rows, title in (
        (axes[0], found["everywhere"]["rows"], "all layers see a window"),
        (axes[2], found["half"]["rows"], "half of the layers do"),
    ):
        at = range(len(rows))
        errors = [[r["more"] - r["low"] for r in rows], [r["high"] - r["more"] for r in rows]]
        axis.barh(at, [r["more"] for r in rows], xerr=errors, color="#0072B2", capsize=3)
        axis.set_yticks(at, [r["name"] for r in rows])
        axis.set(title=title, xlabel="nats more than full attention")
        axis.invert_yaxis()
    costs, best = found["half"]["costs"], set(found["half"]["rows"][0]["layers"])
    axes[1].bar(range(len(costs)), costs, color=["#0072B2" if n in best else "#D55E00" for n in range(len(costs))])
    axes[1].set(yscale="log", title="a window on one layer: KL (nats)", xlabel="layer (orange: keeps full attention)")
    for axis in axes:
        axis.grid(alpha=0.3)
    drawn.savefig(path, dpi=120)
    pyplot.close(drawn)


def page(results: Sequence[Row]) -> str:
    """The README."""
    lines = [
        "# Windows: which layers, and what stands for the first tokens",
        "",
        "`python recipes/windowed.py`; losses of the tokens beyond the window, nats more than full attention with 95 % "
        "over rows, paired.",
        "",
    ]
    for found in results:
        lines += [f"## {found['model']}", "", f"`{found['command']}`, torch {found['torch']}, transformers "]
        lines[-1] += (
            f"{found['transformers']}: a window of {found['window']} tokens, {found['rows']} rows of {found['length']} "
            f"tokens, {found['calibrate']} others to calibrate on. Full attention: {found['full']:.4f} nats."
        )
        lines += [
            "",
            "| all layers with a window | nats | more | |",
            "| --- | ---: | ---: | --- |",
            *_rows(found["everywhere"]),
        ]
        closed = _share(found["everywhere"]["rows"])
        if closed is not None:
            said = ", ".join(f"{name} {100 * share:.0f} %" for name, share in closed.items())
            lines += ["", f"Of the gap between the window and first tokens kept, sinks close: {said}."]
        if "half" not in found:
            lines.append("")
            continue
        lines += ["", "| half of the layers | nats | more | those with a window |", "| --- | ---: | ---: | --- |"]
        lines += _rows(found["half"])
        held = found["stock"]
        lines += [
            "",
            f"As a stock checkpoint (`cwm`) the measured choice gives {held['nats']:.4f} nats; its cache holds "
            f"{held['bytes']:,} bytes of {held['bytes before']:,} after {held['tokens']:,} tokens. Measuring the "
            f"layers took {found['half']['seconds']:.0f} seconds of CPU.",
            "",
            f"![windows]({found['name']}.png)",
            "",
        ]
    return "\n".join(lines)


def _rows(part: Row) -> list[str]:
    return [
        f"| {r['name']} | {r['nats']:.4f} | {r['more']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}] | "
        f"{', '.join(map(str, r.get('layers', [])))} |"
        for r in part["rows"]
    ]


def _share(rows: Sequence[Row]) -> dict[str, float] | None:
    """How much of the gap sinks close; None where keeping the first tokens helps by less than its interval."""
    window, kept, *others = rows
    gap = window["more"] - kept["more"]
    if gap < 0.005:
        return None
    return {row["name"].removeprefix("sinks, "): (window["more"] - row["more"]) / gap for row in others}


def main() -> None:
    """Measure one model, and write the page of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--calibrate", type=int, default=4)
    parser.add_argument("--first", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--everywhere", action="store_true", help="the first table only")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--name", help="of the files; the model's by default")
    given = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load(given.model)
    calibration, rows = texts(tokenizer, given.length, given.rows, given.calibrate)
    study = Study(model, rows, given.window)
    name = given.name or Path(given.model).name
    more = f" --steps {given.steps}" + (" --everywhere" if given.everywhere else "")
    options = f"--window {given.window} --length {given.length} --rows {given.rows} --calibrate {given.calibrate}"
    found: Row = {
        **{"model": name, "name": name, "command": f"python recipes/windowed.py --model {given.model} {options}{more}"},
        **{"torch": torch.__version__, "transformers": transformers.__version__},
        **{"window": given.window, "length": given.length, "rows": given.rows, "calibrate": given.calibrate},
        "full": summarise(study.full).nats,
    }
    print(f"full attention: {found['full']:.4f} nats", flush=True)
    found["everywhere"] = study.everywhere(calibration, given.first, given.steps)
    if not given.everywhere:
        found["half"] = study.chosen(calibration)
        found["stock"] = stock(model, found["half"]["rows"][0]["layers"], study, given.length)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if not given.everywhere:
        figure(found, given.out / f"{name}.png")
    results = [json.loads(file.read_text()) for file in sorted(given.out.glob("*.json"))]
    (given.out / "README.md").write_text(page(results))


if __name__ == "__main__":
    main()
