"""Renders the results of `bench_decode` as tables, a figure and the README's part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decode_rows import alone, arithmetic, bandwidth, contexts, steps
from rich.table import Table

from hf_attnpatch.plotting import import_pyplot

Row = dict[str, Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by all eyes
MARKERS = "osD^vP"


def name(kv: int, found: Mapping[str, Any]) -> str:
    """What a count of key-value heads is called."""
    most = max(row["kv"] for row in found["variants"])
    return "multi-head" if kv == most else "multi-query" if kv == 1 else "grouped"


def tables(found: Mapping[str, Any]) -> list[Table]:
    """For the terminal."""
    made = []
    parts = {"bytes": found["variants"], "filled caches": found["prefilled"], "steps": steps(found)}
    for title, rows in {**parts, "attention alone": alone(found)}.items():
        if rows:
            columns = [column for column in rows[0] if column not in ("weight bytes", "cache bytes", "sdpa")]
            table = Table(*columns, title=title, title_justify="left")
            for row in rows:
                table.add_row(*[_text(row[column]) for column in columns])
            made.append(table)
    return made


def _text(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(f"{v:.2f}" for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- the figure -------------------------------------------------------------------------------------------------------


def figure(found: Mapping[str, Any], file: Path) -> None:
    """Tokens per second of every path below its limit, the cache, and the speed-up that bytes alone would give."""
    plt = import_pyplot()
    rows = steps(found)
    names = list(dict.fromkeys(row["path"] for row in rows))
    lines = -(-(len(names) + 2) // 3)
    whole = plt.figure(figsize=(10, 3.3 * lines), layout="constrained")
    panels = list(whole.subplots(lines, 3, squeeze=False).flat)
    low, high = min(row["tokens/s"] for row in rows), max(row["limit tokens/s"] for row in rows)
    for panel, path in zip(panels, names, strict=False):
        _speed(panel, [row for row in rows if row["path"] == path], found)
        panel.set(title=path, ylabel="tokens/s", ylim=(low / 1.3, high * 1.3))
    _cache(panels[len(names)], [row for row in rows if row["path"] == names[0]], found)
    _gain(panels[len(names) + 1], rows, names, found)
    for panel in panels[len(names) + 2 :]:
        panel.remove()
    whole.savefig(file, dpi=120)
    plt.close(whole)


def _axes(panel: Any, contexts: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n) for n in contexts])
    panel.set_xlabel("context, tokens")
    panel.grid(alpha=0.3, which="both")


def _by_kv(rows: list[Row]) -> list[tuple[int, list[Row]]]:
    return [(kv, [row for row in rows if row["kv"] == kv]) for kv in sorted({row["kv"] for row in rows}, reverse=True)]


def _speed(panel: Any, rows: list[Row], found: Mapping[str, Any]) -> None:
    for place, (kv, own) in enumerate(_by_kv(rows)):
        x, colour = [row["context"] for row in own], COLOURS[place]
        panel.plot(x, [row["tokens/s"] for row in own], color=colour, marker=MARKERS[place], label=_label(kv, found))
        panel.plot(x, [row["limit tokens/s"] for row in own], color=colour, linestyle="--")
    panel.plot([], [], color="0.4", linestyle="--", label="limit: bandwidth")
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(lambda value, _: "")
    _axes(panel, sorted({row["context"] for row in rows}))
    panel.legend(fontsize=8)


def _cache(panel: Any, rows: list[Row], found: Mapping[str, Any]) -> None:
    for place, (kv, own) in enumerate(_by_kv(rows)):
        mib = [row["cache bytes"] / 2**20 for row in own]
        panel.plot(
            [r["context"] for r in own], mib, color=COLOURS[place], marker=MARKERS[place], label=_label(kv, found)
        )
    panel.axhline(rows[0]["weight bytes"] / 2**20, color="0.4", linestyle=":", label="weights, multi-head")
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set(title="cache", ylabel="MiB")
    _axes(panel, sorted({row["context"] for row in rows}))
    panel.legend(fontsize=8)


def _gain(panel: Any, rows: list[Row], names: list[str], found: Mapping[str, Any]) -> None:
    few = min(row["kv"] for row in rows)
    for place, path in enumerate(names):
        own = [row for row in rows if row["path"] == path and row["kv"] == few]
        x, low, high = ([row["context"] for row in own], *zip(*[row["interval"] for row in own], strict=True))
        panel.plot(x, [row["speed-up"] for row in own], color=COLOURS[-1 - place], marker=MARKERS[place], label=path)
        panel.fill_between(x, low, high, color=COLOURS[-1 - place], alpha=0.25)
    panel.plot(x, [row["speed-up by bytes"] for row in own], color="black", linestyle="--", label="by bytes alone")
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set(title=f"{name(few, found)} against multi-head", ylabel="times as fast")
    _axes(panel, sorted({row["context"] for row in rows}))
    panel.legend(fontsize=8)


def _label(kv: int, found: Mapping[str, Any]) -> str:
    return f"{name(kv, found)}, {_heads(kv)}"


def _heads(kv: int) -> str:
    return f"{kv} key-value head{'s' * (kv > 1)}"


# -- the README -------------------------------------------------------------------------------------------------------

NOTE = """\
`of the limit`: the time in which this memory could deliver weights and cache once, by the time measured; `bytes`: the
speed-up that those bytes alone would give. `of the arithmetic`: the time of a large matrix product of as many
operations, by the time measured. Shared keys save bytes and no arithmetic: where the one limits less, the other more.
`dynamic` is the cache that `generate()` makes; it copies itself at every step, and fewer heads are less to copy.
`static` (`generate(cache_implementation="static")`) is written in place. `sdpa` is transformers' own attention;
`folded` moves the queries of a group into the query axis, so that each key-value head is read once for its group.
`glibc`: its allocator as it is, which maps fresh pages for every tensor of 32 MiB and more; elsewhere it keeps them."""


def markdown(found: Mapping[str, Any]) -> str:
    """The README's part: the shortest and the longest context, and the attention alone at the longest."""
    rows = steps(found)
    short, *_, long = contexts(found) * 2
    lines = [_conditions(found), "", *_steps_markdown([row for row in rows if row["context"] in (short, long)])]
    lines += ["", *_alone_markdown([row for row in alone(found) if row["context"] == long])]
    return "\n".join([*lines, "", NOTE, "", *_calls(rows)])


def _conditions(found: Mapping[str, Any]) -> str:
    chosen, best = found["settings"], [bandwidth(found, context) / 1e9 for context in contexts(found)]
    most = max(arithmetic(found, context) for context in contexts(found)) / 1e9
    rounds = chosen["passes"] * chosen["rounds"]
    sizes = [f"{row['bytes a token']:.0f} with {_heads(row['kv'])}" for row in found["variants"]]
    clock = "CPU time of one thread" if chosen["threads"] == 1 else f"wall time of {chosen['threads']} threads"
    return (
        f"{chosen['model']}; {chosen['dtype']}, batch {chosen['batch']}; {clock}, medians of {rounds} rounds "
        f"in turns; {chosen['cpu']}, which reads {min(best):.0f} to {max(best):.0f} GB/s and multiplies matrices at "
        f"{most:.0f} Gflop/s; torch {chosen['torch']}, transformers {chosen['transformers']}.\n"
        f"Bytes a token in the cache: {', '.join(sizes)}: exactly the group factor.\n"
        f"{_filled(found['prefilled'])}"
    )


def _filled(rows: list[Row]) -> str:
    ends = [f"{row['filled / prefilled']:.2f} ({_text(row['interval'])}, {_heads(row['kv'])})" for row in rows]
    return f"A step on a cache filled at random takes {' and '.join(ends)} of one on a prefilled cache." if rows else ""


def _steps_markdown(rows: list[Row]) -> list[str]:
    counts = sorted({row["kv"] for row in rows}, reverse=True)
    heads = [f"{_heads(kv)}: tokens/s, of the limit | speed-up (95 %), bytes" for kv in counts]
    heads[0] = heads[0].partition(" |")[0]
    lines = [f"| path | context | {' | '.join(heads)} |", "| --- " + "| ---: " * (2 * len(counts)) + "|"]
    for path, context in dict.fromkeys((row["path"], row["context"]) for row in rows):
        own = {row["kv"]: row for row in rows if (row["path"], row["context"]) == (path, context)}
        cells = [path, str(context)]
        for kv in counts:
            cells.append(f"{own[kv]['tokens/s']:.1f}, {own[kv]['of the limit']:.0%}")
            gain = f"{own[kv]['speed-up']:.2f} ({_text(own[kv]['interval'])})"
            cells += [f"{gain}, {own[kv]['speed-up by bytes']:.2f}"] * (kv != counts[0])
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _alone_markdown(rows: list[Row]) -> list[str]:
    counts = sorted({row["kv"] for row in rows}, reverse=True)
    heads = [f"{_heads(kv)}: ms, of the limit, of the arithmetic" for kv in counts]
    title = f"attention alone, {rows[0]['context']} tokens" if rows else "attention alone"
    lines = [f"| {title} | {' | '.join(heads)} |", "| --- " + "| ---: " * len(counts) + "|"]
    for how in dict.fromkeys(row["how"] for row in rows):
        own = [row for kv in counts for row in rows if (row["how"], row["kv"]) == (how, kv)]
        cells = [f"{row['ms']:.1f}, {row['of the limit']:.0%}, {row['of the arithmetic']:.0%}" for row in own]
        lines.append(f"| {how} | {' | '.join(cells)} |")
    return lines if rows else []


def _calls(rows: list[Row]) -> list[str]:
    """What torch's sdpa was seen to be given, for the grouped variants."""
    counts = sorted({row["kv"] for row in rows}, reverse=True)
    middle = counts[1] if len(counts) > 1 else counts[0]
    seen = dict.fromkeys((row["path"], row["sdpa"]) for row in rows if row["kv"] == middle)
    return [f"* `{path}` gives torch's sdpa {call}." for path, call in seen]
