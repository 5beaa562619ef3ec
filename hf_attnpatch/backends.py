"""Attention backends: which there are, what each needs, and the only writer of transformers' registries."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .errors import missing_extra
from .fused.sight import key_mask, present_key_mask
from .positions import alibi_attention, alibi_flash, relative, relative_attention, turning
from .positions.modules import PREFIX
from .upstream.calls import (
    attention_registered,
    eager_mask,
    flash_attention_mask,
    flex_attention,
    flex_attention_mask,
    mask_registered,
    sdpa_attention,
    sdpa_mask,
)

# backend -> the class flag by which a transformers model says that it dispatches to it
FLAG = {
    "sdpa": "_supports_sdpa",
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
    """What a backend is asked to serve: a model, its dtype, its largest head and whether gradients are needed."""

    model: PreTrainedModel
    dtype: torch.dtype
    head_dim: int
    training: bool


def register(key: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention function and its mask function under one key; alone, either is silently wrong.

    Args:
        key: new name; names that contain ``flash``, ``sdpa`` or ``flex_attention`` get transformers' checks for those.
        attention: as in ``transformers.AttentionInterface``, in the words of :mod:`.upstream.calls`.
        mask: as in ``transformers.AttentionMaskInterface``, likewise.

    Raises:
        UpstreamChanged: the installed transformers calls such functions in a way that is not recognised.
    """
    AttentionMaskInterface.register(key, mask_registered(mask))  # first: interrupted here, the name is not known
    AttentionInterface.register(key, attention_registered(attention))


FUSED = "fused_by_hf_attnpatch"  # no attention function of this name: the families that get it do not ask for one


def register_fused() -> None:
    """Make masks in linear memory known, for families that compute attention by themselves and only ask for masks.

    There is no attention function beside it on purpose: ``from_pretrained(attn_implementation=...)`` then refuses the
    name, and nobody gets these masks without the hooks that understand them.
    """
    AttentionMaskInterface.register(FUSED, mask_registered(present_key_mask))


def register_alibi() -> None:
    """Make the attention functions that add ALiBi known, each with the masks that it understands."""
    flash = {name: (alibi_flash.flash(name), flash_attention_mask) for name in _PACKAGE}
    pairs = {
        "sdpa": (alibi_attention.sdpa, key_mask),
        "eager": (alibi_attention.eager, eager_mask),
        "flex_attention": (alibi_attention.flex, alibi_attention.flex_mask),
        **flash,
    }
    for name, (attention, mask) in pairs.items():
        register(PREFIX + name, attention, mask)


def register_relative() -> None:
    """Make the attention functions with Transformer-XL's position terms known, each with the masks it understands."""
    flash = {name: (relative_attention.flash(name), flash_attention_mask) for name in _PACKAGE}
    pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "sdpa": (relative_attention.sdpa, key_mask),
        "eager": (relative_attention.eager, eager_mask),
        "flex_attention": (relative_attention.flex, alibi_attention.flex_mask),
        **flash,
    }
    for name, (attention, mask) in pairs.items():
        register(relative.PREFIX + name, attention, mask)


def register_rotary() -> None:
    """Make the attention functions that rotate known; masks are those of the kernel that each calls."""
    flash = {name: (alibi_flash.flash(name), flash_attention_mask) for name in _PACKAGE}
    pairs = {
        "sdpa": (sdpa_attention, sdpa_mask),
        "eager": (alibi_attention.eager, eager_mask),
        "flex_attention": (flex_attention, flex_attention_mask),
        **flash,
    }
    for name, (attention, mask) in pairs.items():
        register(turning.PREFIX + name, turning.turning(attention), mask)


def kernel_of(implementation: str) -> str:
    """Return the kernel that an attention implementation of this package calls, or the implementation itself."""
    for prefix in (PREFIX, turning.PREFIX, relative.PREFIX):
        implementation = implementation.removeprefix(prefix)
    return implementation


def dense(implementation: str) -> str:
    """Return the implementation that computes every score, with what this package's prefixes add to it."""
    kernel = next((name for name in (*FLAG, "eager") if implementation.endswith(name)), implementation)
    return implementation.removesuffix(kernel) + "eager"


def ranked(device: torch.device) -> tuple[str, ...]:
    """Return backends to try on this device, fastest first."""
    if device.type == "cuda":
        return ("flash_attention_4", "flash_attention_3", "flash_attention_2", "sdpa", "flex_attention")
    return ("sdpa", "flex_attention")


def obstacle(name: str, want: Candidate) -> str | None:
    """Say what keeps a backend from running here, or None; nothing is run.

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
    if not getattr(want.model, FLAG[name], False):
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
