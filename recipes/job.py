"""What an uptraining is, as data: the YAML file of `uptrain.py`, read and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from hf_attnpatch import Patch, from_spec
from recipes import settings
from recipes.calibration import CalibrationConfig, check
from recipes.data import DataConfig
from recipes.schedule import TrainConfig
from recipes.settings import SettingsError

LEARNING_RATES = {
    "attention": 1e-4,
    "lora": 1e-4,
    "all": 2e-5,
}  # for models of a billion parameters; tiny ones bear more
WARMUP = 0.02  # share of the steps


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig(DataConfig):
    """Text to measure on: the keys of `data`, and how much of it.

    Args:
        documents: measures the first so many documents; None for all.
        windows: windows of `block` tokens from each document, spread evenly over it.
        batch: windows in a forward pass.
        during: documents measured during training, every `train.eval_every` steps.
    """

    section: ClassVar[str] = "heldout"

    documents: int | None = None
    windows: int = 4
    batch: int = 8
    during: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {"windows": self.windows, "batch": self.batch, "during": self.during}
        settings.at_least(1, self.section, **counts, documents=self.documents)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One uptraining.

    Args:
        model: a folder, a hub name, or `embedded`.
        patches: what to apply, in order; in the file each is `{patch: NAME, FIELD: VALUE, ...}`.
        data: text to train on; `embedded/uptrain` is a part of what ships with the package.
        heldout: text to measure on; `embedded/evaluation` is the other part.
        train: how to train; `lr` and `warmup` have defaults that follow `trainable` and `steps`.
        calibration: text for patches that are fitted on some; `block` is that of `data` unless given.
        loss: `distillation` learns the unpatched model's distribution, `layerwise_distillation` that and the outputs of
            its attention modules, half and half, `cross_entropy` the text.
        trainable: what learns: every parameter of the attention modules, all parameters, or LoRA.
        lora: fields of `peft.LoraConfig`, with `trainable: lora`.
        dtype: of the weights; `auto` is the checkpoint's own.
        processes: an error if the run has another number; None accepts any.
        threads: of each process on CPU; None shares the usable cores out (`accelerate launch` alone would give one).
    """

    model: str
    patches: tuple[Patch, ...]
    data: DataConfig
    heldout: HeldoutConfig
    train: TrainConfig
    calibration: CalibrationConfig | None = None
    loss: Literal["distillation", "layerwise_distillation", "cross_entropy"] = "distillation"
    trainable: Literal["attention", "all", "lora"] = "attention"
    lora: Mapping[str, Any] | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    processes: int | None = None
    threads: int | None = None

    @property
    def output(self) -> Path:
        """The folder that everything is written to."""
        return Path(self.train.output)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share beside `train` and the data."""
        patches = [patch.to_record() for patch in self.patches]
        lora = None if self.lora is None else {key: self.lora[key] for key in sorted(self.lora)}
        chosen = {"model": self.model, "patches": patches, "loss": self.loss, "trainable": self.trainable}
        return {**chosen, "lora": lora, "dtype": self.dtype}


def read(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Reads a configuration; see `settings.read` for the overrides.

    Raises:
        SettingsError: a key is unknown or missing, or a value cannot be used.
        AttnPatchError: a patch or one of its fields does not exist.
    """
    return build(settings.read(path, overrides), str(path))


def build(values: dict[str, Any], path: str) -> Job:
    """Makes the job from the sections of a configuration, however they were read.

    Raises:
        SettingsError: a key is unknown or missing, or a value cannot be used.
        AttnPatchError: a patch or one of its fields does not exist.
    """
    settings.check_keys(Job, values, path)
    trainable = values.get("trainable", "attention")
    data = settings.build(DataConfig, values["data"], "data")
    patches = _patches(values["patches"])
    calibration = values.get("calibration")
    if calibration is not None:
        calibration = settings.build(CalibrationConfig, _with_block(calibration, data.block), "calibration")
    check(patches, calibration)
    built = {
        "patches": patches,
        "data": data,
        "calibration": calibration,
        "heldout": settings.build(HeldoutConfig, _with_block(values["heldout"], data.block), "heldout"),
        "train": settings.build(TrainConfig, _with_defaults(values["train"], trainable), "train"),
        "lora": _lora(values.get("lora"), trainable),
    }
    job = settings.build(Job, {**values, **built}, path)
    timed = next((patch.name for patch in patches if getattr(patch, "refine_seconds", None) is not None), None)
    if timed and job.train.save_every:
        raise SettingsError(
            f"{timed}.refine_seconds: what a clock stops comes out differently each time, so a resumed run would be "
            "another; set refine_steps, or train.save_every: 0."
        )
    return job


def _patches(specs: Any) -> tuple[Patch, ...]:
    if not isinstance(specs, list) or not specs or not all(isinstance(spec, Mapping) for spec in specs):
        raise SettingsError(
            f"patches: expected a list such as [{{patch: grouped_query, num_kv_heads: 2}}], got {specs}."
        )
    return tuple(from_spec(spec) for spec in specs)


def _with_block(section: Any, block: int) -> Any:
    return {"block": block, **section} if isinstance(section, dict) else section


def _with_defaults(train: Any, trainable: str) -> Any:
    if not isinstance(train, dict) or not isinstance(train.get("steps"), int):
        return train  # for `settings.build` to refuse
    warmup = math.ceil(WARMUP * train["steps"])
    return {"lr": LEARNING_RATES.get(trainable, 0.0), "warmup": warmup, **train}


def _lora(lora: Any, trainable: str) -> dict[str, Any] | None:
    """Checks the keys of the `lora` section against peft's own."""
    if (trainable == "lora") != (lora is not None):
        raise SettingsError("`trainable: lora` and a section `lora` belong together; give both or neither.")
    if lora is None:
        return None
    from recipes.trainable import import_peft

    settings.check_keys(import_peft().LoraConfig, lora, "lora")
    return dict(lora)


def plain(job: Job) -> dict[str, Any]:
    """The job as JSON-able data, defaults filled in."""
    fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    sections = {key: dataclasses.asdict(fields[key]) for key in ("data", "heldout", "train")}
    if job.calibration is not None:
        sections["calibration"] = dataclasses.asdict(job.calibration)
    return {**fields, **sections, "patches": [patch.to_record() for patch in job.patches]}
