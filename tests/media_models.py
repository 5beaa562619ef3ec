"""Tiny models that take more than text: images, sound, types of tokens, positions of several axes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from architectures import _fields, _merge, randomise, tiny_config
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

_TABLES = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)
_IMAGE = {"image_size": 32, "patch_size": 8}
_ROWS: dict[str, dict[str, Any]] = {
    "paligemma": {"projection_dim": 64},
    "gemma3": {"mm_tokens_per_image": 4},
    "qwen2_vl": {
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
    },
}
_AUDIO = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 16}


def media_model(model_type: str, attention: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A tiny model of this type with no parameter at its initial value, in eval mode."""
    found = next(table[model_type] for table in _TABLES if model_type in table)
    cls = getattr(transformers, found[0] if isinstance(found, tuple) else found)
    kind = CONFIG_MAPPING[model_type]
    known = {**_IMAGE, **_AUDIO, "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2}
    over = {name: value for name, value in known.items() if name in _fields(kind)}
    over |= {"vision_config": dict(_IMAGE)} if "vision_config" in getattr(kind, "sub_configs", {}) else {}
    config = tiny_config(model_type, encoder=False, **_merge(over, _ROWS.get(model_type, {})))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = cls._from_config(config, attn_implementation=attention)
    randomise(model, seed)
    return model.eval()
