"""The page and the figure of segment recurrence, from the results of two commands.

    python scripts/bench_recurrence.py --stream 200000 --out recipes/results/recurrence/bench.json
    python recipes/train_recurrent.py --config recipes/configs/train_recurrent_embedded.yaml
    python recipes/recurrence_page.py outputs/train_recurrent*/metrics.json

The last copies the metrics beside the bench, each under the name of its configuration, and writes README.md and a
figure for each there; without a file it writes them again from what is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.comparison.figures import finish, panels, save
from recipes.comparison.tables import markdown, write_page

OUT = Path(__file__).resolve().parent / "results/recurrence"
STYLE = (("#000000", "o"), ("#0072b2", "s"), ("#d55e00", "D"), ("#009e73", "^"))
WAYS = {"sliding": "sliding window at stride 16, recomputed", "plain": "plain segments", "recurrent": "recurrence"}
Json = dict[str, Any]


def interval(found: Json, form: str = ".3f") -> str:
    """A value with its interval."""
    return f"{found.get('nats', found.get('value')):{form}} ({found['low']:{form}} to {found['high']:{form}})"


def speed(bench: Json) -> Iterator[str]:
    """What evaluation by recurrence costs."""
    yield "## Evaluation by recurrence"
    yield (
        "`python scripts/bench_recurrence.py --stream 200000 --out recipes/results/recurrence/bench.json`: one thread, "
        "the embedded model on held-out prose, three ways in turns; medians of CPU time for each predicted token, 95 % "
        "intervals over rounds, losses of the same tokens. Recurrence has segments of half the greatest context and as "
        "much in memory."
    )
    rows, ratios = [], []
    for one in bench["comparisons"]:
        for way, name in WAYS.items():
            took, loss = one["microseconds_per_token"][way], one["loss"][way]
            rows.append((f"{one['window']}", name, f"{took:,.0f}", f"{loss:.3f}"))
        times, cost = one["sliding_over_recurrent"], one["recurrent_over_plain"]
        ratios.append((f"{one['window']}", *(_ratio(each) for each in (times, cost))))
    yield markdown(("greatest context", "way", "microseconds a token", "nats"), rows)
    wanted = ("wanted at 1,024", "at least 40", "at most 1.3")
    yield markdown(("greatest context", "times as fast as sliding", "cost, of plain segments"), [*ratios, wanted])
    yield (
        "The model was trained on 512 tokens: at 1,024 every way but the short beginnings of plain segments suffers "
        "from distances that it never saw."
    )
    stream = bench["stream"]
    resident = sorted({seen["resident_bytes"] for seen in stream["seen"]})
    yield (
        f"Streaming {stream['tokens']:,} tokens of one text: {resident[0]:,} to {resident[-1]:,} bytes are resident at "
        f"{len(stream['seen'])} samples, the first after {stream['seen'][0]['tokens']:,} tokens."
    )


def finding(bench: Json, runs: Sequence[Json]) -> str:
    """What a memory gains and costs, in a few sentences."""
    one = bench["comparisons"][0]
    gains = []
    for run in runs:
        *_, (segments, row) = run["memory_segments"].items()
        sinks = " with first tokens kept" if run["settings"]["recurrence"].get("num_sinks") else ""
        name = Path(run["settings"]["model"]).name + (
            " with Transformer-XL's positions" if "patches" in run["settings"] else sinks
        )
        gains.append(f"{row['after_less_none']['value']:+.2f} nats for {name} ({segments} segments)")
    return (
        f"**Reading by recurrence is {one['sliding_over_recurrent']['value']:.0f} times as fast as a sliding window of "
        f"{one['window']:,}, at {one['recurrent_over_plain']['value']:.2f} times the cost of plain segments. After a "
        f"short fine-tune a memory changes the loss by {', '.join(gains)}.**"
    )


def _ratio(found: Json) -> str:
    low, high = found["interval"]
    return f"{found['value']:.2f} ({low:.2f} to {high:.2f})"


def losses(metrics: Json) -> Iterator[str]:
    """What memory gives before and after the fine-tune."""
    settings, rows = metrics["settings"], metrics["memory_segments"]
    training, first = settings["train"], next(iter(rows.values()))
    tokens = first["log"][-1]["tokens"]
    patches = [f"`{each['patch']}`" for each in settings.get("patches", ())]
    sinks = settings["recurrence"].get("num_sinks", 0)
    patches += [f"the first {sinks} tokens kept"] if sinks else []
    yield f"## {settings['model']}{', '.join(['', *patches])}: before and after a short fine-tune"
    heldout, length = settings["heldout"], settings["recurrence"]["segment_length"]
    yield (
        f"`python recipes/train_recurrent.py --config recipes/configs/{metrics['config']}`: segments of {length}, "
        f"{training['steps']} steps on {tokens:,} tokens of `{settings['data']['source']}` at a rate of "
        f"{training['lr']:g}, all parameters; {first['before']['tokens']:,} tokens of {heldout['documents']} documents "
        f"of `{heldout['source']}`, read by recurrence. Intervals are over documents, differences paired."
    )
    head = ("segments in memory", "before", "after", "after, less before", "before, less none", "after, less none")
    keys = ("after_less_before", "before_less_none", "after_less_none")
    table = [
        (name, interval(row["before"]), interval(row["after"]), *(interval(row[key], "+.3f") for key in keys))
        for name, row in rows.items()
    ]
    yield markdown(head, table)
    yield f"![loss by memory and by context]({Path(metrics['config']).stem}.png)"
    yield "Loss of the same last tokens of each document after the fine-tune, by tokens of context before them:"
    contexts = list(first["loss_by_context"])
    yield markdown(
        ("segments in memory", *contexts),
        [(name, *(f"{row['loss_by_context'][c]:.3f}" for c in contexts)) for name, row in rows.items()],
    )
    yield (
        "Relative effective context in tokens (after 1901.02860, section 4.4): a lengthening counts while it lowers "
        "the loss of the hardest share of the targets by 1 % of it."
    )
    yield markdown(
        ("hardest share", *(f"{name} in memory" for name in rows)),
        [(share, *(str(found[name]) for name in rows)) for share, found in metrics["effective_context"].items()],
    )


def figure(metrics: Json, file: Path) -> None:
    """Losses before and after for each memory, and after by context."""
    rows = metrics["memory_segments"]
    drawn, (left, right) = panels(2, width=4.6, height=3.4, sharey=False)
    for place, stage in enumerate(("before", "after")):
        colour, marker = STYLE[place]
        for at, row in enumerate(rows.values()):
            found = row[stage]
            reach = [[found["nats"] - found["low"]], [found["high"] - found["nats"]]]
            label = f"{stage} the fine-tune" if at == 0 else None
            left.errorbar(
                at + 0.12 * (2 * place - 1), found["nats"], yerr=reach, fmt=marker, color=colour, capsize=4, label=label
            )
    left.set_xticks(range(len(rows)), list(rows))
    left.set(xlabel="segments in memory", ylabel="nats per token, 95 % over documents")
    left.legend(fontsize=8)
    for (name, row), (colour, marker) in zip(rows.items(), STYLE, strict=False):
        contexts = [int(c) for c in row["loss_by_context"]]
        right.plot(contexts, list(row["loss_by_context"].values()), marker=marker, color=colour, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(contexts, [f"{c:,}" for c in contexts])
    right.set(xlabel="tokens of context", ylabel="nats per token, after the fine-tune")
    right.legend(title="segments in memory", fontsize=8)
    finish(drawn, (left, right), "both", "Segments read with those before them in memory")
    save(drawn, file)


def main() -> None:
    """Write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="*", type=Path, help="metrics.json of runs of train_recurrent.py")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    for path in given.metrics:
        config = json.loads(path.read_text("utf-8"))["config"]
        shutil.copyfile(path, given.out / f"{Path(config).stem}.json")
    bench = json.loads((given.out / "bench.json").read_text("utf-8"))
    runs = [json.loads(path.read_text("utf-8")) for path in sorted(given.out.glob("train_recurrent*.json"))]
    for run in runs:
        figure(run, given.out / f"{Path(run['config']).stem}.png")
    write_page(
        given.out / "README.md",
        ["# Recurrence", finding(bench, runs), *speed(bench), *(part for run in runs for part in losses(run))],
    )
    print(f"written: {given.out}/README.md")


if __name__ == "__main__":
    main()
