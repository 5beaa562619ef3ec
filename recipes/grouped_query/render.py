"""The tables of the comparison, from the results in the store; missing results are marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hf_attnpatch.embedded import DOMAINS
from hf_attnpatch.evaluation import Interval, difference
from recipes.comparison.cells import Cell
from recipes.comparison.tables import MISSING, conditions, markdown, number, write_page
from recipes.grouped_query import targets
from recipes.grouped_query.cells import CORPUS, DATA_FREE, FITTED, HEADS, RATES, SEEDS, SORTED, STARTS
from recipes.grouped_query.ratios import damage_ratio
from recipes.grouped_query.store import Store

CLOSING = " Weights and arithmetic in float32; uptraining under bfloat16 autocast."
METHODS = (*DATA_FREE, *FITTED, *(f"{method}-adjacent" for method in SORTED))


def write(store: Store, cells: Sequence[Cell], path: Path) -> None:
    """Writes the Markdown file.

    Args:
        store: the results.
        cells: all there are, to say which are missing.
        path: where it goes.
    """
    parts = [
        "# Sharing key-value heads: what it loses\n",
        _finding(store),
        _about(store, cells),
        *(_conversions(store, model) for model in HEADS if store.get(f"{model}/original")),
        _uptraining(store),
        _domains(store),
        _own(store),
        _seeds(store),
        "## Targets\n\n" + targets.table(store),
        "## Conditions\n\n" + conditions(store) + CLOSING if store.rows else "",
    ]
    write_page(path, parts)


def excess(store: Store, name: str, domain: str | None = None) -> Interval | None:
    """The loss of a conversion above the original, paired by document; None if one was not measured."""
    before, after = store.score(f"{name.partition('/')[0]}/original", domain), store.score(name, domain)
    return None if before is None or after is None or name.endswith("/original") else difference(before, after)


def ratio(store: Store, better: str, worse: str, domains: Iterable[str | None] = (None,)) -> Interval | None:
    """The damage of one cell over that of another, on all documents or those of some domains."""
    model = better.partition("/")[0]
    scores = [store.merged(name, domains) for name in (f"{model}/original", better, worse)]
    if any(score is None for score in scores):
        return None
    return damage_ratio(*scores)  # type: ignore[arg-type]


def signed(found: Interval | None) -> str:
    """An excess loss with its interval."""
    return MISSING if found is None else f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def share(found: Interval | None) -> str:
    """A ratio with its interval."""
    return MISSING if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _finding(store: Store) -> str:
    """The findings, in a few sentences; empty if they were not measured."""
    found = {m: excess(store, f"embedded/8-2/{m}") for m in ("mean", "procrustes", "principal", "refined")}
    real = excess(store, "smollm2/3-1/refined")
    if any(each is None for each in found.values()):
        return ""
    values = {method: f"{each.value:.2f}" for method, each in found.items() if each is not None}
    said = (
        f"**At a quarter of the cache the embedded model loses {values['refined']} nats per token when its heads are "
        f"refined on text, and {values['mean']} when they are averaged** ({values['procrustes']} when they are "
        f"rotated first; {values['principal']} by principal components, which need no text)."
    )
    if real is None:
        return said
    return (
        f"{said} A real model with few heads pays more: SmolLM2, from 3 heads to 1, loses {real.value:.2f} nats "
        "refined, and has to be trained."
    )


def _about(store: Store, cells: Sequence[Cell]) -> str:
    missing = [cell.name for cell in cells if store.get(cell.name) is None]
    lines = [
        "`make results-grouped-query` (`python recipes/results_grouped_query.py`) measures all this and writes it; "
        "`metrics.jsonl` has every figure, a line for each cell, with its settings.",
        "Losses are nats per token on whole documents that no model was trained on and no conversion has seen "
        "(`embedded/evaluation`). `excess` is the loss above the unconverted model's; intervals are 95 %, resampling "
        "documents, paired. Ratios divide one excess by another on the same documents.",
        "Calibration: 64 sequences of 512 tokens from `embedded/uptrain`, other documents of the same domains; no "
        "gradient goes through the model. Seeds draw the sequences and order refinement.",
    ]
    if missing:
        lines.append(f"**{len(missing)} of {len(cells)} cells are not measured yet**: {', '.join(missing)}.")
    return "\n".join(f"* {line}" for line in lines)


def _conversions(store: Store, model: str) -> str:
    present, counts = HEADS[model]
    original = store.score(f"{model}/original")
    assert original is not None
    title = "Embedded model" if model == "embedded" else "SmolLM2-135M"
    out = [
        f"## {title}, no training\n",
        f"Original: {original.nats:.4f} nats ({original.low:.3f} to {original.high:.3f}), perplexity "
        f"{original.perplexity:.2f}, on {original.tokens:,} tokens of {len(original.losses)} documents. `peak`: "
        "resident memory during the conversion above that of the loaded model; `CPU s`: of all threads.\n",
    ]
    if model == "embedded":
        out.append("![excess loss by method](zero_shot.png)\n")
    head = ["method", "loss", "excess", "perplexity", "of `mean`", "of `procrustes`", "seconds", "CPU s", "peak MB"]
    for kv in counts:
        place = f"{model}/{present}-{kv}"
        out.append(f"### {present} to {kv}\n")
        out.append(markdown(head, [_row(store, place, method) for method in METHODS if _shown(store, place, method)]))
        out.append("")
    return "\n".join(out)


def _shown(store: Store, place: str, method: str) -> bool:
    return store.get(f"{place}/{method}") is not None


def caption(method: str, form: str = "{}") -> str:
    """A method in words; `form` is put around its name."""
    name, _, adjacent = method.partition("-")
    return form.format(name) + (", neighbours" if adjacent else "")


def _row(store: Store, place: str, method: str) -> list[str]:
    name = f"{place}/{method}"
    found, row = store.score(name), store.get(name)
    assert found is not None
    assert row is not None
    took = row["conversion"]
    return [
        caption(method, "`{}`"),
        f"{found.nats:.4f}",
        signed(excess(store, name)),
        f"{found.perplexity:.2f}",
        share(ratio(store, name, f"{place}/mean")),
        share(ratio(store, name, f"{place}/procrustes")),
        f"{took['seconds']:.1f}",
        f"{took['cpu_seconds']:.1f}",
        number(took["peak_mb"], ".0f"),
    ]


def _uptraining(store: Store) -> str:
    rows = []
    for present, kv in ((8, 4), (8, 2), (8, 1), (3, 1)):
        for start in STARTS:
            row = store.get(f"uptraining/{present}-{kv}/{start}")
            if row is not None:
                before, after = (Interval(**row["differences"][stage]) for stage in ("converted", "uptrained"))
                loss, tokens = f"{row['scores']['uptrained']['nats']:.4f}", f"{row['trained_tokens']:,}"
                figures = [signed(before), signed(after), loss, tokens, f"{row['spec']['lr']:g}"]
                model = "embedded" if row["spec"]["model"] == "embedded" else "SmolLM2"
                rows.append([f"{model}, {present} to {kv}, from `{start}`", *figures])
    if not rows:
        return ""
    first = next(store.rows[name] for name in store.rows if name.startswith(("uptraining/8-", "uptraining/3-")))
    head = ["conversion", "excess before", "excess after", "loss after", "tokens", "lr"]
    return "\n".join(
        [
            "## Uptrained\n",
            "`recipes/uptrain.py` with `configs/grouped_query_refined.yaml`: distillation from the unconverted self, "
            "logits and attention outputs half and half, attention only, on "
            f"{_text(first['spec']['data']['source'])}. No evaluation document is in it. 532,480 tokens are 5 % of the "
            "embedded model's pretraining; SmolLM2's are next to nothing.\n",
            "![excess loss against uptraining tokens](uptraining.png)\n",
            markdown(head, rows),
            "",
            _trials(store),
        ]
    )


def _text(source: str) -> str:
    return f"`{source}`, the text of the embedded model's pretraining" if source == CORPUS else f"`{source}`"


def _trials(store: Store) -> str:
    rows = []
    for start in RATES:
        tried = {rate: store.get(f"uptraining/rates/8-2/{start}/{rate:g}") for rate in RATES[start]}
        found = {rate: row["differences"]["uptrained"]["value"] for rate, row in tried.items() if row is not None}
        rows += [[f"`{start}`", f"{rate:g}", f"{value:+.4f}"] for rate, value in found.items()]
    if not rows:
        return ""
    said = (
        "Learning rates were chosen at 8 to 2 with half of the tokens, and for `refined` a third of its steps, on "
        "`embedded/uptrain`, whose documents are in no figure above:\n\n"
    )
    return said + markdown(["start", "lr", "excess after the trial"], rows)


def _domains(store: Store) -> str:
    rows = []
    for kv in HEADS["embedded"][1]:
        for method in FITTED:
            for domain in DOMAINS:
                name, place = f"embedded/8-{kv}/{method}/on-{domain}", f"embedded/8-{kv}"
                if store.get(name) is None:
                    continue
                others = [each for each in DOMAINS if each != domain]
                cells = [
                    share(ratio(store, name, f"{place}/{worse}", where))
                    for worse in ("mean", "procrustes")
                    for where in ([domain], others)
                ]
                rows.append([f"8 to {kv}, `{method}` on {domain}", *cells])
    if not rows:
        return ""
    head = ["calibrated on", "of `mean`, same domain", "other domains", "of `procrustes`, same domain", "other domains"]
    about = (
        f"Calibration text of one domain only ({', '.join(DOMAINS)}); measured on held-out documents of it, and of "
        "the two others.\n\n![ratios in and out of the calibration's domain](domains.png)\n\n"
    )
    return "## Text that the calibration never saw\n\n" + about + markdown(head, rows)


def _own(store: Store) -> str:
    rows = []
    for kv in HEADS["embedded"][1]:
        place = f"embedded/8-{kv}"
        if store.get(f"{place}/refined/on-self") is not None:
            alone = share(ratio(store, f"{place}/refined/on-self", f"{place}/mean"))
            rows.append([f"8 to {kv}, own text alone", "-", "-", alone, alone])
        for domain in DOMAINS:
            others = [each for each in DOMAINS if each != domain]
            names = [f"{place}/refined/on-{text}" for text in (domain, f"self+{domain}")]
            if store.get(names[1]) is None:
                continue
            found = [
                share(ratio(store, name, f"{place}/mean", where)) for name in names for where in ([domain], others)
            ]
            rows.append([f"8 to {kv}, {domain}", *found])
    if not rows:
        return ""
    head = ["calibrated on", "same domain", "other domains", "and own text: same domain", "other domains"]
    about = (
        "`calibration=[text, ap.OwnText()]`: as many tokens again, sampled from the unpatched model. Damage of "
        "`refined` as a share of `mean`'s; own text alone is measured on all domains.\n\n"
    )
    return "## Text that the model writes itself\n\n" + about + markdown(head, rows)


def _seeds(store: Store) -> str:
    rows = []
    for kv in HEADS["embedded"][1]:
        for method in FITTED:
            place = f"embedded/8-{kv}/{method}"
            found = [excess(store, name) for name in (place, *(f"{place}/seed-{seed}" for seed in SEEDS))]
            if any(found[1:]):
                rows.append([f"8 to {kv}, `{method}`", *(signed(each) for each in found)])
    if not rows:
        return ""
    head = ["excess", *(f"seed {seed}" for seed in (0, *SEEDS))]
    return "## Seeds\n\n" + markdown(head, rows)
