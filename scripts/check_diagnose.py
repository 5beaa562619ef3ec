"""The error of `diagnose`: predicted against measured prefill and decoding, and the gains of its prescriptions.

    python scripts/check_diagnose.py                            # half an hour on one core, 9 GB
    python scripts/check_diagnose.py --quick --out /tmp/check   # does it run

One process, one thread. For every model, variant and context the rates that its operations need are measured anew,
then the prediction is made, then the model itself is run; so neighbours on the machine slow both. Both sides are
medians. The rates are of single operations, never of the models. A row that is in the JSON already is
kept with `--resume`. Writes `diagnose.json`, `diagnose.png` and `README.md` into `--out`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from decode_report import COLOURS, MARKERS
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.evaluation.decoding import prefill, step
from hf_attnpatch.evaluation.hardware import measured_here, processor
from hf_attnpatch.evaluation.memory import held_bytes
from hf_attnpatch.evaluation.operations import Phantom
from hf_attnpatch.evaluation.roofline import cost
from hf_attnpatch.plotting import import_pyplot

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "recipes/results/diagnose"
WANTED = 0.25
PHASES = ("prefill", "decode")
STEPS, FILLS = 16, 3
LONG = 4096  # beyond, one round and one prefill

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, a variant of it, and a context."""

    model: str
    variant: str
    context: int

    def __str__(self) -> str:
        return f"{self.model}, {self.variant}, {self.context}"


# -- what is compared -------------------------------------------------------------------------------------------------


def models(quick: bool) -> dict[str, Callable[[], PreTrainedModel]]:
    """Name -> what loads it."""
    if quick:
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 512}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        return {"tiny": lambda: LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()}
    return {
        "embedded": embedded.load_model,
        "SmolLM2-135M": lambda: ap.load(ROOT / "data/smollm2", dtype=torch.float32),
    }


def variants(model: PreTrainedModel) -> dict[str, Callable[[PreTrainedModel], object]]:
    """Name -> what makes it of the model: as it is, with fewer key-value heads, with eager attention."""
    heads = ap.describe(model).sites[0].num_kv_heads
    fewer = {n: f"{n} key-value head{'s' * (n > 1)}" for n in (heads // 4, 1) if 0 < n < heads}
    return {
        "as it is": lambda m: None,
        **{name: lambda m, n=n: ap.patch_grouped_query(m, num_kv_heads=n, method="first") for n, name in fewer.items()},
        "eager": lambda m: m.set_attn_implementation("eager"),
    }


def cases(chosen: argparse.Namespace) -> Iterator[Case]:
    """Every model as it is and with fewer heads at every context; eager where its scores fit into memory."""
    for name, load in models(chosen.quick).items():
        model = load()
        sites = ap.describe(model).sites
        for variant in variants(model):
            for context in chosen.contexts:
                scores = 4 * sites[0].num_heads * context**2
                if variant != "eager" or 4 * scores < chosen.gib * 2**30:
                    yield Case(name, variant, context)


# -- predicting and measuring -----------------------------------------------------------------------------------------


def check(case: Case, quick: bool, rounds: int) -> Row:
    """Predict, then measure, as often as there are rounds; medians of each."""
    model = models(quick)[case.model]()
    variants(model)[case.variant](model)
    passes = Phantom(model).decode(1, case.context)
    rounds = 1 if case.context > LONG else rounds
    found = [_round(model, passes, case.context) for _ in range(rounds)]
    size = found[0].pop("cache bytes")[0]
    pooled = {name: statistics.median(t for each in found for t in each[name]) for name in found[0]}
    return {
        **asdict(case),
        "rounds": rounds,
        "predicted cache bytes": passes[0].cache_bytes,
        "cache bytes": size,
        **pooled,
    }


def _round(model: PreTrainedModel, passes: Any, context: int) -> dict[str, list[Any]]:
    machine = measured_here(passes, model.device)
    found: dict[str, list[Any]] = {
        f"predicted {n}": [cost(machine, p).seconds] for n, p in zip(PHASES, passes, strict=True)
    }
    fills, steps = [], []
    with torch.no_grad():
        for _ in range(FILLS if context <= LONG else 1):
            seconds, cache = prefill(model, context, 1)
            fills.append(seconds)
        size = held_bytes(cache)
        steps = [step(model, cache, 1) for _ in range(STEPS)]
    return {**found, "prefill": fills, "decode": steps, "cache bytes": [size]}


def ratios(rows: list[Row]) -> Iterator[Row]:
    """Yield what is predicted beside what is measured: times and cache bytes of every case, and the gains."""
    for row in rows:
        name = {key: row[key] for key in ("model", "variant", "context")}
        for phase in PHASES:
            yield {**name, "what": phase, "predicted": row[f"predicted {phase}"], "measured": row[phase]}
        yield {**name, "what": "cache bytes", "predicted": row["predicted cache bytes"], "measured": row["cache bytes"]}
    for row in rows:
        base = next((r for r in rows if _same(r, row) and r["variant"] == "as it is"), None)
        if base is None or row is base:
            continue
        for phase in PHASES:
            slow, fast = (row, base) if row["variant"] == "eager" else (base, row)
            gain = {
                "predicted": slow[f"predicted {phase}"] / fast[f"predicted {phase}"],
                "measured": slow[phase] / fast[phase],
            }
            patch = "flash" if row["variant"] == "eager" else f"grouped query, {row['variant']}"
            yield {
                "model": row["model"],
                "variant": patch,
                "context": row["context"],
                "what": f"gain in {phase}",
                **gain,
            }


def _same(a: Row, b: Row) -> bool:
    return (a["model"], a["context"]) == (b["model"], b["context"])


def good(row: Row) -> bool:
    """Whether a ratio is within what was wanted: exact for bytes."""
    if row["what"] == "cache bytes":
        return row["predicted"] == row["measured"]
    return abs(row["predicted"] / row["measured"] - 1) <= WANTED


# -- the report -------------------------------------------------------------------------------------------------------


def markdown(found: Row) -> str:
    """The table, with what missed marked."""
    rows = list(ratios(found["rows"]))
    within, rounds = sum(map(good, rows)), sorted({row["rounds"] for row in found["rows"]})
    lines = [
        "# Predicted against measured",
        "",
        f"`python scripts/check_diagnose.py` (`make check-diagnose`) wrote this. {found['machine']}, one thread, "
        f"float32, batch 1; torch {found['torch']}, transformers {found['transformers']}; medians. In each of the "
        f"{' or '.join(map(str, rounds))} rounds of a case rates are measured anew, then it is predicted, then run.",
        "",
        f"{within} of {len(rows)} are within {WANTED:.0%} (cache bytes: exact).",
        "",
        "Times of decoding move most on a busy machine: a step is short, and waits for memory that neighbours share.",
        "",
        "![predicted over measured](diagnose.png)",
        "",
        "| model | variant or patch | context | what | predicted | measured | predicted / measured |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        name = f"{row['model']} | {row['variant']} | {row['context']} | {row['what']}"
        values = [_text(row["what"], row[side]) for side in ("predicted", "measured")]
        ratio = f"{row['predicted'] / row['measured']:.2f}"
        lines.append(f"| {name} | {' | '.join(values)} | {ratio if good(row) else f'**{ratio}**'} |")
    return "\n".join([*lines, ""])


def _text(what: str, value: float) -> str:
    if what == "cache bytes":
        return f"{value:,}"
    return f"{value:.2f} times" if "gain" in what else f"{1e3 * value:.2f} ms"


def figure(found: Row, file: Path) -> None:
    """Predicted over measured against context, a panel for each thing predicted."""
    plt = import_pyplot()
    rows = [row for row in ratios(found["rows"]) if row["what"] != "cache bytes"]
    panels = list(dict.fromkeys(row["what"] for row in rows))
    names = list(dict.fromkeys((row["model"], row["variant"]) for row in rows))
    down = -(-len(panels) // 2)
    whole, axes = plt.subplots(down, 2, figsize=(9.6, 4.2 * down), layout="constrained", squeeze=False)
    for idle in axes.flat[len(panels) :]:
        idle.remove()
    contexts = sorted({row["context"] for row in rows})
    for axis, what in zip(axes.flat, panels, strict=False):
        for place, name in enumerate(names):
            own = [row for row in rows if row["what"] == what and (row["model"], row["variant"]) == name]
            if own:
                style = {"color": (*COLOURS, "black")[place % 7], "marker": f"{MARKERS}X"[place % 7]}
                line = "-" if place < 7 else "--"
                points = [row["predicted"] / row["measured"] for row in own]
                axis.plot([row["context"] for row in own], points, linestyle=line, label=", ".join(name), **style)
        axis.axhspan(1 - WANTED, 1 + WANTED, color="0.9", zorder=0)
        axis.axhline(1, color="0.4", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [str(n) for n in contexts])
        axis.set(title=what, xlabel="context, tokens", ylim=(0.4, 1.6))
        axis.legend(fontsize=7)
    axes.flat[0].set_ylabel("predicted / measured")
    whole.savefig(file, dpi=120)
    plt.close(whole)


# -- the run ----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Check every case, save after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--contexts", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--gib", type=float, default=6, help="eager attention only where it needs less memory")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the JSON of --out")
    parser.add_argument("--quick", action="store_true", help="a tiny model, short contexts")
    chosen = parser.parse_args()
    chosen.contexts = chosen.contexts or ([32, 64] if chosen.quick else [512, 2048, 8192])
    torch.set_num_threads(1)
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "diagnose.json"
    found: Row = json.loads(file.read_text("utf-8")) if chosen.resume and file.is_file() else {"rows": []}
    found |= {"machine": processor(torch.device("cpu"))}
    found |= {"torch": torch.__version__, "transformers": transformers.__version__}
    done = {str(Case(row["model"], row["variant"], row["context"])) for row in found["rows"]}
    for case in sorted(cases(chosen), key=lambda each: each.context):
        if str(case) not in done:
            found["rows"].append(check(case, chosen.quick, chosen.rounds))
            file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            row = found["rows"][-1]
            off = {p: f"{row[f'predicted {p}'] / row[p]:.2f}" for p in PHASES}
            print(f"{case}: predicted / measured {off}", flush=True)
            gc.collect()
    (chosen.out / "README.md").write_text(markdown(found), "utf-8")
    figure(found, chosen.out / "diagnose.png")
    table = Table("model", "variant", "context", "what", "predicted / measured")
    for row in ratios(found["rows"]):
        table.add_row(
            row["model"], row["variant"], str(row["context"]), row["what"], f"{row['predicted'] / row['measured']:.2f}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
