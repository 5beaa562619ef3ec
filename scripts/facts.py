"""Every measured figure that README and pages quote, by name, as it is written there; read from `recipes/results/`.

No torch, no package: `make pages` must be quick. A name without a result is an error, never an empty place.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes/results"
GIB = 2**30

Row = Mapping[str, Any]
Fact = tuple[str, str]


@cache
def result(name: str) -> Any:
    """A result file, read once: JSON, or lines of JSON by their cell."""
    file = RESULTS / name
    if file.suffix == ".jsonl":
        rows = map(json.loads, file.read_text("utf-8").splitlines())
        return {row["cell"]: row for row in rows}
    return json.loads(file.read_text("utf-8"))


def facts() -> dict[str, str]:
    """All of them; two of one name are an error."""
    found: dict[str, str] = {}
    sources = (
        _survey,
        _diagnoses,
        _grouped,
        _peers,
        _extension,
        _passkeys,
        _switches,
        _position_costs,
        _recurrence,
        _speed,
    )
    for source in sources:
        for name, value in source():
            assert name not in found, name
            found[name] = value
    return found


def nats(losses: Mapping[str, tuple[float, int]]) -> float:
    """The mean loss of all tokens of all documents."""
    return sum(total for total, _ in losses.values()) / sum(count for _, count in losses.values())


def _survey() -> Iterator[Fact]:
    found = result("survey/survey.json")
    rows = found["rows"]
    masked = sum(name.endswith("(masked)") for name in rows)
    yield "survey.causal", str(len(rows) - masked)
    yield "survey.masked", str(masked)
    yield "survey.types", str(len(rows))
    yield "survey.invariants", str(len(found["invariants"]))
    yield "survey.transformers", found["versions"]["transformers"]
    for case in next(iter(rows.values())):
        count = Counter(row[case]["status"] for row in rows.values() if case in row)
        name = case.replace(" ", "_")
        yield f"survey.{name}", str(count["native"] + count["own type"])
        yield f"survey.{name}.stock", str(count["native"])
    yield "survey.fails", str(sum(cell["status"] == "FAILED" for row in rows.values() for cell in row.values()))


def _diagnoses() -> Iterator[Fact]:
    found = result("diagnose/seven_billion.json")
    yield "7b.cache", f"{found['cache_bytes'] / GIB:.0f}"
    yield "7b.weights", f"{found['weight_bytes'] / GIB:.1f}"
    yield "7b.share", f"{100 * found['cache_share']:.0f} %"
    page = (RESULTS / "diagnose/README.md").read_text("utf-8")
    within = re.search(r"^(\d+) of (\d+) are within 25%", page, re.MULTILINE)
    assert within, "recipes/results/diagnose/README.md does not say how many predictions are within 25%"
    yield from zip(("diagnose.within", "diagnose.all"), within.groups(), strict=True)


def grouped_excess(cell: str) -> float:
    """Nats a token above the unconverted model's."""
    rows = result("grouped_query/metrics.jsonl")
    return nats(rows[cell]["losses"]) - nats(rows[f"{cell.partition('/')[0]}/original"]["losses"])


def damage_elsewhere(cell: str, domain: str, worse: str) -> float:
    """The damage of a conversion over that of a worse one, on documents of all domains but one."""
    rows = result("grouped_query/metrics.jsonl")

    def loss(name: str) -> float:
        return nats({k: v for k, v in rows[name]["losses"].items() if not k.startswith(f"{domain}/")})

    return (loss(cell) - loss("embedded/original")) / (loss(worse) - loss("embedded/original"))


def _grouped() -> Iterator[Fact]:
    rows = result("grouped_query/metrics.jsonl")
    for name in ("on-prose", "on-self+prose"):
        share = damage_elsewhere(f"embedded/8-1/refined/{name}", "prose", "embedded/8-1/mean")
        yield f"grouped.elsewhere.{name}", f"{share:.2f}"
    for cell in rows:
        model, _, rest = cell.partition("/")
        if model in ("embedded", "smollm2") and rest.count("/") == 1:
            yield f"grouped.{model}.{rest.replace('/', '.')}", f"{grouped_excess(cell):.2f}"
    yield "grouped.embedded.original", f"{nats(rows['embedded/original']['losses']):.2f}"
    for method in ("principal", "calibrated", "refined"):
        yield f"grouped.seconds.{method}", f"{rows[f'embedded/8-2/{method}']['conversion']['seconds']:.0f}"
    yield "grouped.smollm2.seconds.refined", f"{rows['smollm2/3-1/refined']['conversion']['seconds'] / 60:.0f}"
    for heads in ("8-4", "8-2", "8-1"):
        yield (
            f"grouped.trained.{heads}",
            f"{rows[f'uptraining/{heads}/refined']['differences']['uptrained']['value']:.3f}",
        )


def peer_excess(heads: str, method: str) -> float:
    """Nats a token above the same model with its whole cache, on the same targets."""
    rows = result("peers/peers.json")["cache"][f"embedded, {heads.replace('-', ' -> ')}"]["rows"]
    whole = rows["whole cache"]["nats"]
    return sum(a - b for a, b in zip(rows[method]["nats"], whole, strict=True)) / len(whole)


def _peers() -> Iterator[Fact]:
    found = result("peers/peers.json")
    yield "peers.kvpress", found["survive"]["kvpress"]["versions"]["kvpress"]
    yield "peers.kvpress.transformers", found["survive"]["kvpress"]["versions"]["transformers"]
    for heads in ("8-4", "8-2"):
        for method in found["cache"][f"embedded, {heads.replace('-', ' -> ')}"]["rows"]:
            short = method.replace("grouped query, ", "").replace("kvpress ", "kvpress.").replace(" ", "_")
            yield f"peers.{heads}.{short}", f"{peer_excess(heads, method):.3f}"


def _extension() -> Iterator[Fact]:
    for study, lengths in (("extend_context", (512, 2048)), ("extend_context_smollm2", (8192, 16384))):
        rows = result(f"{study}/metrics.jsonl")
        short = "smollm2" if study.endswith("smollm2") else "embedded"
        for cell, row in rows.items():
            for length in lengths:
                if str(length) in row["lengths"]:
                    name = cell.replace(" ", "_").replace(",", "")
                    yield f"extend.{short}.{name}.{length}", f"{nats(row['lengths'][str(length)]['losses']):.2f}"
        yield f"extend.{short}.sliding", f"{nats(rows['original']['baselines']['sliding']['losses']):.2f}"


def _passkeys() -> Iterator[Fact]:
    for cell, row in result("extend_context_passkey/metrics.jsonl").items():
        for length in ("512", "2048"):
            if length in row["passkey"]:
                name = f"passkey.{cell.replace(' ', '_').replace(',', '')}.{length}"
                yield name, f"{row['passkey'][length]['mean'][0]:.0f} %"


def _switches() -> Iterator[Fact]:
    rows = result("switch_positions/metrics.jsonl")
    for cell, row in rows.items():
        if "512" in row["lengths"]:
            name = cell.replace("/", ".").replace(" ", "_").replace(",", "")
            yield f"switch.{name}", f"{nats(row['lengths']['512']['losses']):.2f}"


def _position_costs() -> Iterator[Fact]:
    """Above the original after the training, each at the better of the rates that were tried."""
    rows = result("switch_positions/metrics.jsonl")

    def loss(cell: str) -> float:
        return nats(rows[cell]["lengths"]["512"]["losses"])

    for name in ("original", "relative", "alibi", "none"):
        tried = [f"rope/{name}/trained", f"rope/{name}/trained, lr 3e-4"]
        best = min(loss(cell) for cell in tried if cell in rows)
        yield f"switched.{name}", f"{best - loss('rope/original'):.2f}"
    within = [
        nats(result(f"{study}/metrics.jsonl")[cell]["lengths"][length]["losses"])
        for study, length in (("extend_context", "512"), ("extend_context_smollm2", "8192"))
        for cell in ("yarn", "original")
    ]
    costs = sorted((within[0] - within[1], within[2] - within[3]))
    yield "extend.yarn.within", f"{costs[0]:.2f} to {costs[1]:.2f}"


def _recurrence() -> Iterator[Fact]:
    bench = result("recurrence/bench.json")["comparisons"][0]
    yield "recurrence.faster", f"{bench['sliding_over_recurrent']['value']:.0f}"
    yield "recurrence.cost", f"{bench['recurrent_over_plain']['value']:.2f}"
    for name in ("embedded", "smollm2", "smollm2_sinks", "xl"):
        for segments, row in result(f"recurrence/train_recurrent_{name}.json")["memory_segments"].items():
            for stage in ("before", "after"):
                yield f"recurrence.{name}.{segments}.{stage}", f"{row[stage]['nats']:.2f}"


def _speed() -> Iterator[Fact]:
    bench = result("alibi/bench_alibi.json")
    long = next(row for row in bench["attention"] if row["length"] == 8192 and row["dtype"] == "float32")["seconds"]
    plain, columns = long["plain causal"]["cpu"], long["ALiBi, columns"]["cpu"]
    yield "alibi.over_plain", f"{columns / plain:.1f}"
    yield "alibi.matrix_over_columns", f"{long['ALiBi, matrix kept']['cpu'] / columns:.1f}"
    for family in ("bloom", "mpt"):
        (row,) = [r for r in bench["prefill"] if (r["family"], r["length"]) == (family, 8192)]
        yield f"flash.{family}", f"{row['seconds']['stock']['cpu'] / row['seconds']['fused']['cpu']:.1f}"
    relative = result("relative/bench_relative.json")
    last = next(r for r in relative["rows"] if (r["length"], r["dtype"], r["backward"]) == (4096, "float32", False))
    yield "relative.over_plain", f"{last['seconds']['columns']['cpu'] / last['seconds']['plain']['cpu']:.1f}"
    peaks = relative["peaks"]
    yield "relative.memory", f"{peaks['shifted']['4096'] / peaks['columns']['4096']:.0f}"
    yield "relative.matrix_over_columns", f"{last['seconds']['shifted']['cpu'] / last['seconds']['columns']['cpu']:.1f}"
    extend = result("extend_speed/bench_extend.json")
    for part in ("prefill", "step"):
        row = next(r for r in extend[part] if r["length"] == 8192)["seconds"]
        for method, seconds in row.items():
            if method != "plain":
                yield f"speed.{part}.{method}", f"{seconds['cpu'] / row['plain']['cpu']:.1f}"
