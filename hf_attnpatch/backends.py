"""The attention backends, fastest first, and what each needs to run here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .errors import missing_extra
from .upstream import words

# backend -> the class flag by which a transformers model says that it dispatches to it
FLAG = {
    "sdpa": words.DECLARES_SDPA,
    "flex_attention": "_supports_flex_attn",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
    "flash_attention_4": "_supports_flash_attn",
}
_PACKAGE = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
_CAPABILITY = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0), "flash_attention_4": (9, 0)}


@dataclass(frozen=True)
class Candidate:
    """What a backend is asked to serve.

    Attributes:
        model: as it is.
        dtype: of the model.
        head_dim: of its largest head.
        training: whether gradients are needed.
        sinks: whether its modules pass learned sinks, which this package computes by torch's kernels and transformers
            does not.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    head_dim: int
    training: bool
    sinks: bool = False


def ranked(device: torch.device) -> tuple[str, ...]:
    """Return the backends to try on this device, fastest first."""
    if device.type == "cuda":
        return ("flash_attention_4", "flash_attention_3", "flash_attention_2", "sdpa", "flex_attention")
    return ("sdpa", "flex_attention")


def obstacle(name: str, want: Candidate) -> str | None:
    """Return what keeps a backend from running here, or None; nothing is run.

    Args:
        name: a backend or a kernels-hub repository.
        want: what it is to serve.

    Raises:
        MissingExtra: a kernels-hub repository without the ``kernels`` package.
    """
    if "/" in name:
        if importlib.util.find_spec("kernels") is None:
            raise missing_extra("kernels", "kernels", f"backend {name!r}")
        return None if getattr(want.model, "_supports_flash_attn", False) else _unsupported(name, want.model)
    if not getattr(want.model, FLAG[name], False) and not (name == "sdpa" and want.sinks):
        return _unsupported(name, want.model)
    if name == "sdpa" and _softcap(want.model):
        return "torch's sdpa has no soft-capping of scores, which this model uses"
    if name == "flex_attention" and want.training and want.model.device.type == "cpu":
        return "flex_attention has no backward on CPU"
    return _flash_obstacle(name, want) if name in _PACKAGE else None


def _unsupported(name: str, model: PreTrainedModel) -> str:
    return f"{type(model).__name__} does not dispatch to it in this release of transformers ({name})"


def _softcap(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None))


def _flash_obstacle(name: str, want: Candidate) -> str | None:
    device = want.model.device
    if device.type != "cuda":
        return f"needs a CUDA device, the model is on {device}"
    if torch.cuda.get_device_capability(device) < _CAPABILITY[name]:
        return f"needs compute capability {'.'.join(map(str, _CAPABILITY[name]))}"
    if want.dtype not in (torch.float16, torch.bfloat16):
        return f"needs fp16 or bf16, the model is in {str(want.dtype).removeprefix('torch.')}"
    if want.head_dim > 256:
        return f"takes heads up to 256, the model has {want.head_dim}"
    if importlib.util.find_spec(_PACKAGE[name].partition(".")[0]) is None:
        return f"{_PACKAGE[name]} is not installed: pip install 'hf_attnpatch[flash]'"
    return None
