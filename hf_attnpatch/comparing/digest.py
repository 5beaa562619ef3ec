"""Digests of models, settings and texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor
from transformers import PreTrainedModel

from .. import record
from ..errors import AttnPatchError

# of where a model came from and how it is held, not of what it computes
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map", "model_type"}


def model_digest(model: PreTrainedModel) -> str:
    """Return a digest of the weights' values and the config: the same before saving and after loading.

    Floating point values count as float32, so that bfloat16 weights loaded into float32 are the same model.

    Raises:
        AttnPatchError: weights are neither in memory nor where Accelerate offloads them.
    """
    seen = hashlib.sha256(digest_of(_structure(model)).encode())
    for name, tensor in sorted(_tensors(model).items()):
        values = tensor.detach().to("cpu", torch.float32) if tensor.is_floating_point() else tensor.detach().cpu()
        seen.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        seen.update(values.contiguous().reshape(-1).numpy().data)
    return seen.hexdigest()


def digest_of(settings: Any) -> str:
    """Return a digest of JSON data."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def tokens_digest(documents: Sequence[Tensor]) -> str:
    """Return a digest of token ids."""
    seen = hashlib.sha256()
    for ids in documents:
        seen.update(f"{len(ids)} ".encode())
        seen.update(ids.to(torch.int64).contiguous().numpy().data)
    return seen.hexdigest()


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return weights and buffers by name, including those that Accelerate offloads."""
    found: dict[str, Tensor] = model.state_dict()
    absent = [name for name, tensor in found.items() if tensor.is_meta]
    if absent and any(map(has_offloaded_params, model.modules())):
        found = {**found, **get_state_dict_offloaded_model(model)}
        absent = [name for name in absent if found[name].is_meta]
    if absent:
        raise AttnPatchError(f"{absent[0]} has no data (on the meta device); load the weights of the model.")
    return found


def _structure(model: PreTrainedModel) -> dict[str, Any]:
    """Return the config as the next process reads it, and the patches of its record, without volatile fields."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    patches = (config.pop(record.FIELD, None) or {}).get("patches")
    kept = {key: value for key, value in config.items() if key not in _VOLATILE and not key.startswith("_")}
    return {**kept, "patches": patches, "class": type(model).__name__.removeprefix("Patched")}
