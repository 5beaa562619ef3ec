"""Which parameters learn: the attention modules, everything, or low-rank adapters that are merged at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch.errors import missing_extra


def choose(model: PreTrainedModel, trainable: str, lora: Mapping[str, Any] | None) -> nn.Module:
    """Sets which parameters require a gradient.

    Args:
        model: patched already; frozen where it is not to learn.
        trainable: `attention` (every parameter inside the attention modules, full rank), `all` or `lora`.
        lora: fields of `peft.LoraConfig`.

    Returns:
        The module to train: `model`, or for `lora` peft's wrapper of it.
    """
    if trainable == "lora":
        peft = import_peft()
        values = {"task_type": "CAUSAL_LM", **(lora or {})}
        wrapped: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**values))
        return wrapped
    model.requires_grad_(trainable == "all")
    if trainable == "attention":
        for site in ap.describe(model).sites:
            model.get_submodule(site.path).requires_grad_(True)
    return model


def merge(model: Any, adapter: Path | None, base: str) -> PreTrainedModel:
    """Returns the plain model: adapters are saved to a folder and then merged into the weights.

    Args:
        model: what `choose` returned.
        adapter: the folder for the adapter, if there is one; None where another process saves it.
        base: where the patched model lies that the adapter belongs on.
    """
    if not hasattr(model, "merge_and_unload"):
        plain: PreTrainedModel = model.requires_grad_(True)
        return plain
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    if adapter is not None:
        model.save_pretrained(adapter)
    merged: PreTrainedModel = model.merge_and_unload()
    return merged.requires_grad_(True)


def sizes(model: nn.Module) -> dict[str, int]:
    """How many parameters there are and how many of them learn."""
    parameters = list(model.parameters())
    learn = sum(each.numel() for each in parameters if each.requires_grad)
    return {"parameters": sum(each.numel() for each in parameters), "trainable_parameters": learn}


def import_peft() -> Any:
    """Imports peft.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise missing_extra("peft", "recipes", "`trainable: lora`") from error
    return peft
