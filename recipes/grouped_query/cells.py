"""The cells of the comparison: what is converted, how, and on what it is measured. Each is independent of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_attnpatch.embedded import DOMAINS
from recipes.comparison.cells import Cell, matches

SMOLLM2 = "data/smollm2"
CORPUS = "data/corpus/train"
DATA_FREE = ("first", "mean", "mean_rescaled", "procrustes", "principal")
FITTED = ("calibrated", "refined")
SORTED = ("principal", *FITTED)  # by default similar heads share
HEADS = {"embedded": (8, (4, 2, 1)), "smollm2": (3, (1,))}  # model -> present key-value heads, those to measure
SEEDS = (1, 2)  # beside 0
STARTS = ("refined", "mean", "procrustes", "calibrated", "first")  # of uptraining
RATES = {"refined": (5e-4, 1.5e-3), "mean": (1.5e-3, 3e-3)}  # learning rates tried, from two starts
TRIED = {start: "refined" if start in FITTED else "mean" for start in STARTS}  # whose trials decide
SMOLLM2_RATE = 3e-4  # not tuned


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything.

    Attributes:
        sequences: of calibration text.
        block: tokens in a sequence and in a window.
        windows: of each evaluation document, for the embedded model; SmolLM2 gets one.
        documents: of each domain to measure on; None for all.
        refine_steps: of Adam for each layer.
        steps: of uptraining, of `batch` blocks each; 520 of 2 are 5 % of the embedded model's pretraining tokens.
        smollm2_steps: the same for SmolLM2, whose tokens cost 30 times as much.
        trial_steps: the same where learning rates are tried, on heads refined for a third of the steps.
        batch: blocks in a step; many small steps end lower than few large ones.
        evaluate: uptraining steps between evaluations.
    """

    sequences: int = 64
    block: int = 512
    windows: int = 4
    documents: int | None = None
    refine_steps: int = 150
    steps: int = 520
    smollm2_steps: int = 64
    trial_steps: int = 130
    batch: int = 2
    evaluate: int = 52


FULL = Scale()
QUICK = Scale(
    sequences=8,
    block=128,
    windows=1,
    documents=2,
    refine_steps=2,
    steps=2,
    smollm2_steps=2,
    trial_steps=1,
    batch=2,
    evaluate=1,
)


def all_cells(models: tuple[str, ...], scale: Scale, text: str) -> list[Cell]:
    """The cells in the order they are run: those that answer most first.

    Args:
        models: `embedded`, `smollm2`.
        scale: how much of everything.
        text: source of the uptraining text.
    """
    found = []
    if "embedded" in models:
        found += [*_conversions("embedded", scale), *_uptrainings(scale, text)]
    if "smollm2" in models:
        found += [*_conversions("smollm2", scale), *_smollm2_uptrainings(scale, text)]
    if "embedded" in models:
        found += [*_domains(scale), *_seeds(scale), *_own(scale)]
    return found


def quick_cells(cells: list[Cell]) -> list[Cell]:
    """A few of each kind, all that the tables and figures need."""
    patterns = ("embedded/original", "embedded/8-2/*", "uptraining/8-2/*", "uptraining/rates/*/*/0.0015")
    slow = (
        "*/seed-2",
        "*on-docs",
        "*on-prose",
        "*/on-self+docs",
        "*/on-self+prose",
        "*-adjacent",
        "*/first",
        "*/mean_rescaled",
        "*/principal",
    )
    return [c for c in cells if matches(c, patterns) and not matches(c, slow)]


def _convert(model: str, scale: Scale, name: str, **settings: Any) -> Cell:
    small = model == "embedded"
    text = {f"embedded/evaluation/{domain}": domain for domain in DOMAINS}
    base = {
        "model": "embedded" if small else SMOLLM2,
        "evaluation": text,
        "windows": scale.windows if small else 1,
        "documents": scale.documents,
        "block": scale.block,
        "batch": 8 if small else 2,
        "patch": None,
        "calibration": None,
    }
    return Cell(f"{model}/{name}", "convert", {**base, **settings})


def _conversion(
    model: str,
    scale: Scale,
    kv: int,
    method: str,
    name: str,
    *,
    seed: int = 0,
    source: str = "",
    grouping: str = "",
    own: bool = False,
) -> Cell:
    patch: dict[str, Any] = {"patch": "grouped_query", "num_kv_heads": kv, "method": method}
    calibration = None
    if method in SORTED and kv > 1:  # one group has nothing to choose
        patch["grouping"] = grouping or "similar"
    if method in FITTED:
        patch |= {"seed": seed, "refine_steps": scale.refine_steps}
        source = source or "embedded/uptrain"
        calibration = {"source": source, "sequences": scale.sequences, "block": scale.block, "seed": seed}
        calibration |= {"own": scale.sequences} if own else {}
    return _convert(model, scale, f"{HEADS[model][0]}-{kv}/{name}", patch=patch, calibration=calibration)


def _conversions(model: str, scale: Scale) -> Iterator[Cell]:
    yield _convert(model, scale, "original")
    for method in (*DATA_FREE, *FITTED):
        for kv in HEADS[model][1]:
            yield _conversion(model, scale, kv, method, method)
    if model == "embedded":
        for method in SORTED:
            for kv in HEADS[model][1][:-1]:
                yield _conversion(model, scale, kv, method, f"{method}-adjacent", grouping="adjacent")


def _domains(scale: Scale) -> Iterator[Cell]:
    for kv in (2, 4, 1):
        for method in FITTED:
            for domain in DOMAINS:
                source = f"embedded/uptrain/{domain}"
                yield _conversion("embedded", scale, kv, method, f"{method}/on-{domain}", source=source)


def _own(scale: Scale) -> Iterator[Cell]:
    """On what the model writes itself, alone and beside the text of one domain."""
    for kv in (2, 4, 1):
        yield _conversion("embedded", scale, kv, "refined", "refined/on-self", source="self")
        for domain in DOMAINS:
            source = f"embedded/uptrain/{domain}"
            yield _conversion("embedded", scale, kv, "refined", f"refined/on-self+{domain}", source=source, own=True)


def _seeds(scale: Scale) -> Iterator[Cell]:
    for kv in (2, 4, 1):
        for seed in SEEDS:
            for method in FITTED:
                yield _conversion("embedded", scale, kv, method, f"{method}/seed-{seed}", seed=seed)


def _uptraining(scale: Scale, text: str, **settings: Any) -> dict[str, Any]:
    base = {
        "model": "embedded",
        "loss": "layerwise_distillation",
        "data": {"source": text, "block": scale.block},
        "calibration": {"source": "embedded/uptrain", "sequences": scale.sequences, "block": scale.block},
        "heldout": "embedded/evaluation",
        "windows": scale.windows,
        "documents": None if scale.documents is None else 3 * scale.documents,
        "refine_steps": scale.refine_steps,
        "steps": scale.steps,
        "batch_size": scale.batch,
        "eval_every": scale.evaluate,
    }
    return {**base, **settings}


def _uptrainings(scale: Scale, text: str) -> Iterator[Cell]:
    for start, rates in RATES.items():
        for rate in rates:
            trial = {"num_kv_heads": 2, "method": start, "lr": rate, "steps": scale.trial_steps}
            trial |= {"heldout": "embedded/uptrain", "windows": 1, "refine_steps": max(1, scale.refine_steps // 3)}
            yield Cell(f"uptraining/rates/8-2/{start}/{rate:g}", "uptrain", _uptraining(scale, text, **trial))
    for start in STARTS:
        for kv in HEADS["embedded"][1]:
            run = {"num_kv_heads": kv, "method": start, "lr": None}
            yield Cell(f"uptraining/8-{kv}/{start}", "uptrain", _uptraining(scale, text, **run))


def _smollm2_uptrainings(scale: Scale, text: str) -> Iterator[Cell]:
    """On the little text that takes minutes, not hours; windows and evaluations as few."""
    few = {"model": SMOLLM2, "windows": 1, "steps": scale.smollm2_steps, "eval_every": max(1, scale.smollm2_steps // 4)}
    for start in ("refined", "mean"):
        run = {"num_kv_heads": 1, "method": start, "lr": SMOLLM2_RATE, **few}
        yield Cell(f"uptraining/3-1/{start}", "uptrain", _uptraining(scale, text, **run))
