"""Callbacks of transformers' ``Trainer`` and of TRL's trainers, which are built on it."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import record
from .api import apply
from .errors import AttnPatchError
from .patch import Patch
from .positions.strength import set_alibi_strength
from .report import Report
from .writing import write

REPORT = "attnpatch_report.json"  # in the trainer's output folder


class PatchCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Patch the model of a trainer before it is wrapped and its optimizer is made.

    Experimental: its arguments may get other names or defaults between minor versions.

    ``Trainer(model, args, callbacks=[PatchCallback(GroupedQuery(num_kv_heads=2))])`` trains the patched model, and its
    checkpoints carry the record, so that they resume and load anywhere. A model that already has these patches, because
    it was loaded from such a checkpoint, is left unchanged. The report is logged at step 0 (``state.log_history``) and
    written to ``attnpatch_report.json`` in the output folder. A trainer with a ``model_init`` builds another model when
    training begins: there, ``model_init`` has to return a patched one.

    Args:
        patches: see :func:`hf_attnpatch.apply`.

    Attributes:
        report: the result of ``apply``; None before the trainer is made, or if the model was patched already.

    Raises:
        AttnPatchError: see :func:`hf_attnpatch.apply`; or the model has some of the patches and lacks others, or has
            them with other settings; or, when training begins, the trainer has built another model.
    """

    def __init__(self, *patches: Patch):
        self.patches, self.report, self._model = patches, None, None

    report: Report | None
    _model: weakref.ref[PreTrainedModel] | None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Patch."""
        model: PreTrainedModel = given["model"]
        if not self._patched_already(model):
            self.report = apply(model, *self.patches)
        self._model = weakref.ref(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Log the report, once and in the main process."""
        self._check_trained(given["model"])
        if self.report is None or not state.is_world_process_zero or state.global_step:
            return
        found = self.report.to_dict()
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / REPORT, json.dumps(found, indent=1) + "\n")
        state.log_history.append({"attnpatch": found["patches"], **_worst(self.report), "step": 0})

    def _check_trained(self, model: Any) -> None:
        """Refuse to train a model that was not patched: ``model_init`` builds one for each run."""
        mine = None if self._model is None else self._model()
        if any(module is mine for module in model.modules()) or self._patched_already(model):
            return
        raise AttnPatchError(
            f"{type(model).__name__}: the trainer has built this model after another one was patched (model_init); "
            "let model_init apply the patches to the model that it returns."
        )

    def _patched_already(self, model: PreTrainedModel) -> bool:
        held = record.read(getattr(model, "config", None))
        names = [] if held is None else [spec["patch"] for spec in held.patches]
        wanted = [patch.name for patch in self.patches if patch.recorded]
        there = [name for name in wanted if name in names]
        if there and len(there) < len(wanted):
            absent = next(name for name in wanted if name not in names)
            raise AttnPatchError(
                f"{type(model).__name__}: has {', '.join(there)} already and lacks {absent}; load the unpatched "
                "model, or one that has all patches of this callback."
            )
        for spec in () if held is None else held.patches:
            for patch in (patch for patch in self.patches if patch.name == spec["patch"]):
                _check_same(model, patch, spec)
        return bool(wanted) and len(there) == len(wanted)


def _check_same(model: PreTrainedModel, patch: Patch, held: Mapping[str, Any]) -> None:
    """Refuse a patch that is there with another setting than the one that is asked for; a default asks for nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(patch)}
    for name, value in patch.to_record().items():
        wanted, found = (list(each) if isinstance(each, tuple) else each for each in (value, held.get(name)))
        if value != defaults.get(name) and found not in (None, "auto", wanted):
            raise AttnPatchError(
                f"{type(model).__name__}: has {patch.name} already with {name}={found!r}, and this callback asks for "
                f"{name}={wanted!r}; load the unpatched model, or ask for what is there."
            )


class AlibiWarmup(TrainerCallback):  # type: ignore[misc]
    """Raise the slopes of :class:`Alibi` from 0 to full strength over the first steps; see ``set_alibi_strength``.

    Experimental: its arguments may get other names or defaults between minor versions.

    Args:
        steps: optimizer steps until the slopes are full, at least 1.

    Raises:
        AttnPatchError: ``steps`` is not a number of steps; or, when training begins, the model has no ALiBi.
    """

    def __init__(self, steps: int):
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise AttnPatchError(f"steps is {steps!r}; it must be a number of optimizer steps, at least 1.")
        self.steps = steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Set the strength for this step, while it still grows."""
        if state.global_step <= self.steps:
            set_alibi_strength(given["model"], state.global_step / self.steps)


def _worst(report: Report) -> dict[str, float]:
    """Return the largest damage of a layer, if heads were shared and it was measured."""
    layers = report.damage.layers if report.damage is not None else ()
    gaps = [gap.output for layer in layers for gap in list(layer.gaps.values())[-1:]]
    return {"attnpatch_damage_output": max(gaps)} if gaps else {}
