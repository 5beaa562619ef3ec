"""Calibration text for patches that are fitted to text, such as grouped heads."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_attnpatch import OwnText, Patch
from hf_attnpatch.patches.grouped_query import CALIBRATED
from recipes.data import DataConfig, DataError, load_blocks
from recipes.settings import SettingsError
from recipes.sources import resolve

FIELD = "calibration"  # of the patches that take text; no record keeps it
SELF = "self"  # the source that is the model itself


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(DataConfig):
    """Text that patches are fitted on: the keys of `data`, and how much of it. Source `self`: the model writes it.

    Args:
        sequences: how many blocks of `block` tokens.
        seed: which.
        own: blocks that the model writes itself, beside those of the source: they hold elsewhere too.
    """

    section: ClassVar[str] = "calibration"

    sequences: int = 64
    seed: int = 0
    own: int = 0

    def written(self) -> OwnText | None:
        """The text that the model will generate."""
        rows = self.sequences if self.source == SELF else self.own
        return OwnText(sequences=rows, length=self.block, seed=self.seed) if rows else None


@dataclass(frozen=True)
class Calibration:
    """What patches are fitted on.

    Attributes:
        ids: (sequences, block), int64; None where the model writes all.
        source: where they are from.
        own: what the model writes.
    """

    ids: torch.Tensor | None
    source: str
    own: OwnText | None = None

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share: the tokens themselves, or how they are generated."""
        own = None if self.own is None else dataclasses.asdict(self.own)
        if self.ids is None:
            return {"source": self.source, "own": own}
        digest = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:24]
        return {"source": self.source, "shape": list(self.ids.shape), "tokens": digest, "own": own}

    def give(self, patches: Sequence[Patch]) -> list[Patch]:
        """Returns the patches, with their text where they take some."""
        parts = [part for part in (self.ids, self.own) if part is not None]
        text = parts[0] if len(parts) == 1 else parts
        return [dataclasses.replace(p, **{FIELD: text}) if takes_text(p) else p for p in patches]


def takes_text(patch: Patch) -> bool:
    """Whether a patch can be fitted to text."""
    return any(field.name == FIELD for field in dataclasses.fields(patch))


def load(config: CalibrationConfig, tokenizer: Any) -> Calibration:
    """Draws blocks from a text; call it before loading a model.

    Raises:
        DataError: the source is missing or empty, or shorter than `sequences` blocks.
    """
    if config.source == SELF:
        return Calibration(None, SELF, config.written())
    plain = {field.name: getattr(config, field.name) for field in dataclasses.fields(DataConfig)}
    blocks = load_blocks(resolve(DataConfig(**plain)), tokenizer)  # one cache, whatever is drawn from it
    if len(blocks) < config.sequences:
        raise DataError(
            f"{config.source}: found {len(blocks)} blocks of {config.block} tokens, wanted {config.sequences}; give "
            "more text, or lower calibration.sequences or calibration.block."
        )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(config.seed))
    ids = torch.stack([blocks[int(index)]["input_ids"] for index in order[: config.sequences]])
    return Calibration(ids, config.source, config.written())


def check(patches: Sequence[Patch], config: CalibrationConfig | None) -> None:
    """Refuses a section that nothing reads, and patches that lack it.

    Raises:
        SettingsError: says which.
    """
    taking = [patch for patch in patches if takes_text(patch)]
    if config is not None and not taking:
        raise SettingsError("calibration: none of the patches is fitted on text; remove the section.")
    if config is not None and config.sequences < 1:
        raise SettingsError(f"calibration.sequences: expected at least 1, found {config.sequences}.")
    if config is not None and (config.own < 0 or (config.own and config.source == SELF)):
        raise SettingsError(
            f"calibration.own: expected 0 or more blocks beside those of a text, found {config.own} beside source "
            f"{config.source!r}; with source `self`, sequences says how many."
        )
    for patch in taking:
        if getattr(patch, FIELD) is not None:
            raise SettingsError(
                f"{patch.name}.calibration: name the text in a section `calibration: {{source: ...}}` of the job."
            )
        if getattr(patch, "method", None) in CALIBRATED and config is None:
            raise SettingsError(
                f"{patch.name}: method {getattr(patch, 'method', None)!r} is fitted on text; add a section "
                "`calibration: {source: ...}`."
            )
