"""A tiny random model of every model type transformers can build: offline, in milliseconds.

One generic builder fills a config class from `_SMALL` by field name and cuts per-layer lists to one layer of each kind;
`_ROWS` holds what one type needs beside that. Ordinary token ids are 5..98 everywhere: special ids lie outside.

    tiny_model("llama")                            # plain multi-head, 4 heads of 16
    tiny_model("llama", num_key_value_heads=2)     # grouped natively
    tiny_model("bert", encoder=True)               # the masked-LM class of a type that has both
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

VOCAB = 128  # ids 5..98 are ordinary tokens; 0..4 and 99..127 are left to padding, image markers and the like

_HEADS, _HEAD_DIM = 4, 16
_WIDTH = _HEADS * _HEAD_DIM

# Field name -> small value. A field is set only where the config class has it and its default is not None,
# `_EVEN_IF_NONE` excepted: None often means "off" or "derive it".
_SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim"], _WIDTH),
    "hidden_size_global": _WIDTH,
    **dict.fromkeys(["embedding_size", "input_embedding_size", "output_embedding_size"], _WIDTH),
    **dict.fromkeys(["n_layer", "n_layers", "num_layers", "num_hidden_layers"], 2),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], _HEADS),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"], _HEADS),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], _HEADS),
    **dict.fromkeys(
        ["num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads", "kv_n_heads"], _HEADS
    ),
    **dict.fromkeys(["head_dim", "swa_head_dim", "global_head_dim", "dim_head", "kv_channels", "d_head"], _HEAD_DIM),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"], _WIDTH),
    **dict.fromkeys(["d_inner", "ffn_hidden_size", "hidden_dim", "feed_forward_size", "intermediate_size_mlp"], _WIDTH),
    **dict.fromkeys(["dense_intermediate_size", "prefix_dense_intermediate_size", "prediction_head_size"], _WIDTH),
    **dict.fromkeys(["vocab_size", "unpadded_vocab_size"], VOCAB),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 128),
    **dict.fromkeys(["max_target_positions", "max_source_positions"], 128),
    "rotary_dim": 8,
    # windows
    **dict.fromkeys(["sliding_window", "attention_window_size", "window_size", "attention_chunk_size"], 8),
    **dict.fromkeys(["sliding_window_size", "attention_window", "local_attention"], 8),
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"], 2),
    **dict.fromkeys(["n_shared_experts", "moe_num_shared_experts", "num_shared_experts", "n_group", "topk_group"], 1),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["shared_intermediate_size", "router_hidden_size"], 32),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"], 1),
    "zero_expert_num": 2,
    # latent attention
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "v_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim"], 8),
    "index_head_dim": 16,
    "index_topk": 64,  # fewer than the tokens would select among ties, and cached decoding would then differ
    **dict.fromkeys(["index_n_heads", "o_groups"], 2),
    # linear attention and state spaces
    **dict.fromkeys(["linear_num_key_heads"], 2),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads"], _HEADS),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8),
    "linear_head_dim": _HEAD_DIM,
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], _HEAD_DIM),
    **dict.fromkeys(["mamba_n_groups", "mamba_ngroups", "n_groups"], 1),
    "mamba_d_ssm": 2 * _WIDTH,
    # extra tables
    **dict.fromkeys(["vocab_size_per_layer_input", "entity_vocab_size", "max_2d_position_embeddings"], VOCAB),
    **dict.fromkeys(["pronunciation_vocab_size", "shape_vocab_size", "audio_vocab_size"], VOCAB),
    **dict.fromkeys(["hidden_size_per_layer_input", "entity_emb_size", "laurel_rank", "adapter_rank"], 8),
    **dict.fromkeys(["pronunciation_embed_dim", "shape_embed_dim"], 16),
    "encoder_hash_byte_group_vocab": 64,
    "num_centroids": 16,
    "centroid_intermediate_top_k": 4,
    # scales that were chosen for wide models
    "query_pre_attn_scalar": _HEAD_DIM,
    "attention_multiplier": 0.25,
    "logit_scale": 1.0,
    "logits_mup_width_multiplier": 1.0,
    "dim_model_base": _WIDTH,
}
_EVEN_IF_NONE = {"num_key_value_heads", "num_kv_heads", "num_attention_heads", "num_hidden_layers"}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

# What one type needs beside `_SMALL`. A dict value is merged into the sub-config of that name.
_ROWS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},  # fails in 5.23 without either
    "blt": {"num_hidden_layers": 2},  # a cache of 5.23 asks the outer config
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        **{"swa_num_attention_heads": _HEADS, "swa_num_key_value_heads": _HEADS, "swa_q_lora_rank": 16},
        **{
            "sliding_window": 8,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 16,
        },
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": _WIDTH, "adapter_out_dim": _WIDTH},
    "dots3_note_audio_encoder": {"adapter_input_size": _WIDTH, "adapter_out_dim": _WIDTH, "downsample_hidden_size": 8},
    "esm": {"vocab_size": VOCAB, "mask_token_id": 99, "pad_token_id": 1},
    "falcon": {"multi_query": False},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_bigcode": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "got_ocr2": {"vision_config": {"output_channels": 16, "mlp_dim": _WIDTH, "image_size": 128}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": _HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": _HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "laguna": {
        **{"num_attention_heads_per_layer": [_HEADS, 2 * _HEADS], "num_hidden_layers": 2},
        **{"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "longcat_flash": {"head_dim": 8},  # the rotary dimensions of a head: equal to qk_rope_head_dim
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2},
    # head_dim times its partial rotary factor of 0.334 is 8; sliding layers have twice num_key_value_heads
    "mimo_v2_flash": {"head_dim": 24, "num_key_value_heads": _HEADS // 2},
    "ministral": {"head_dim": _HEAD_DIM},
    "moshi": {"sliding_window": 128},  # a shorter one makes cached decoding differ from the full forward in 5.23
    "musicgen": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}},
    "musicgen_melody": {
        "text_encoder": {"model_type": "t5"},
        "audio_encoder": {"model_type": "encodec"},
        "decoder": {},
    },
    "perceiver": {
        **{"num_latents": 8, "d_latents": _WIDTH, "num_self_attends_per_block": 2, "num_self_attention_heads": _HEADS},
        **{"num_cross_attention_heads": _HEADS, "qk_channels": _WIDTH, "v_channels": _WIDTH},
    },
    "phi4_multimodal": {"vision_config": {}, "audio_config": {}},
    "phi4_multimodal_audio": {"num_blocks": 2, "nemo_conv_channels": 8, "ext_pw_out_channel": _WIDTH},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        **{"attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
        **{"attention_head_size": _HEAD_DIM, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "hash_seed": 0},
    },
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"chunk_size": 64, "qk_dim_factor": 1.0},
    "zamba": {
        **{"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "use_mamba_kernels": False},
    },
    "zamba2": {"use_mem_rope": True},
    "zaya": {"num_experts_per_tok": 1},
}

# Types that cannot be built here, each with its reason, checked.
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs timm, an optional dependency of transformers (gemma3n_text is built)",
    "gemma4_assistant": "no config builds: all its layers share keys and values, and `kv_sharing_modes` then raises",
    "gemma4_unified_assistant": "as gemma4_assistant",
}

# A slice with one type of each anatomy, for the fast run.
FAST = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "stablelm", "gpt2", "gpt_neox"),
    *("gptj", "codegen", "opt", "bloom", "mpt", "falcon", "gpt_bigcode", "cohere2", "gpt_oss", "phi", "persimmon"),
    *("starcoder2", "mixtral", "qwen3_next"),
]
FAST_ENCODERS = ["bert", "roberta", "distilbert", "modernbert"]


def causal_lm_types() -> list[str]:
    """Every causal-LM model type of the installed transformers, less `UNBUILDABLE`."""
    return [t for t in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if t not in UNBUILDABLE]


def encoder_types() -> list[str]:
    """Every masked-LM model type of the installed transformers, less `UNBUILDABLE`; some are causal-LM types too."""
    return [t for t in sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES) if t not in UNBUILDABLE]


def tiny_config(model_type: str, *, encoder: bool | None = None, **overrides: Any) -> PreTrainedConfig:
    """A small config of this type.

    Args:
        model_type: a key of transformers' auto mappings.
        encoder: for a type with both a causal and a masked class, whether the masked one is meant.
        overrides: config fields, by the config's own name or a name of its `attribute_map`; a field that only the
            text sub-config has goes there; a dict is merged into the sub-config of that name.
    """
    config_class = CONFIG_MAPPING[model_type]
    row = dict(_ROWS.get(model_type, {}))
    if not _is_encoder(model_type, encoder) and "is_decoder" in _fields(config_class):
        row.setdefault("is_decoder", True)
    return config_class(**_tiny_kwargs(config_class, _merge(row, overrides)))


def tiny_model(
    model_type: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    encoder: bool | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny model of this type in eval mode with no parameter at its initial value; arguments as in `tiny_config`."""
    config = tiny_config(model_type, encoder=encoder, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_config(model_type, encoder, config, dtype)
    randomise(model, seed)
    return model.eval()


def tiny_inputs(model: PreTrainedModel, batch: int = 2, length: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ordinary token ids the model takes; musicgen reads one row per codebook."""
    rows = batch * getattr(model.config, "num_codebooks", 1) if "Musicgen" in type(model).__name__ else batch
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(5, 99, (rows, length), generator=generator)}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Moves every parameter away from its initial value; the same values for a seed whatever the dtype.

    Matrices get a spread of 1/sqrt(fan-in), so that attention is not uniform and logits are O(1); vectors (norm
    weights, biases, sinks, decay rates) keep their initial value and get noise of 0.2 on top.
    """
    generator = torch.Generator().manual_seed(seed)
    owners = {f"{m}.{p}" if m else p: module for m, module in model.named_modules() for p in module._parameters}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" in name and not parameter.requires_grad:
                continue  # a fixed sinusoidal table: not in checkpoints, computed again on loading
            noise = torch.randn(parameter.shape, generator=generator)
            spread = _spread(owners[name], name, parameter)
            if spread is None:
                parameter.copy_(parameter.float() + 0.2 * noise)
            else:
                parameter.copy_(noise * spread)


def _spread(owner: nn.Module, name: str, parameter: torch.Tensor) -> float | None:
    shape = parameter.shape
    if sum(size > 1 for size in shape) < 2 or name.endswith(("A_log", ".D", "dt_bias")):
        return None
    if isinstance(owner, (nn.Embedding, nn.Linear)):
        return shape[-1] ** -0.5
    if isinstance(owner, Conv1D):
        return shape[0] ** -0.5
    if isinstance(owner, nn.modules.conv._ConvNd):
        return math.prod(shape[1:]) ** -0.5
    return (shape[-1] * shape[-2]) ** -0.25  # stacked experts, either way round


def _from_config(
    model_type: str, encoder: bool | None, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    masked = _is_encoder(model_type, encoder)
    names = MODEL_FOR_MASKED_LM_MAPPING_NAMES if masked else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model_class = getattr(transformers, names[model_type])
    if not isinstance(config, model_class.config_class):  # the causal class of a multimodal type takes the text part
        config = next((c for c in vars(config).values() if isinstance(c, model_class.config_class)), config)
    return model_class._from_config(config, dtype=dtype)


def _is_encoder(model_type: str, encoder: bool | None) -> bool:
    return encoder if encoder is not None else model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _fields(config_class: type) -> dict[str, Any]:
    parameters = inspect.signature(config_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _tiny_kwargs(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    parts = getattr(config_class, "sub_configs", {})
    default = config_class(**{name: value for name, value in overrides.items() if name in parts})
    fields = _fields(config_class)
    kwargs: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _SMALL and (value is not None or name in _EVEN_IF_NONE):
            kwargs[name] = _SMALL[name]
        elif "drop" in name and isinstance(value, float):
            kwargs[name] = 0.0
        elif name.endswith(("_token_id", "_token_index", "_index")) and _outside(getattr(default, name, None)):
            kwargs[name] = _inside(name, getattr(default, name))
    renamed = getattr(config_class, "attribute_map", {})
    overrides = {name if name in fields else renamed.get(name, name): value for name, value in overrides.items()}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # some classes of some versions forget one they read
        if "vocab_size" in fields and not hasattr(default, name):
            kwargs[name] = None
    subs = {n: getattr(default, n, None) for n in parts}
    subs = {n: s for n, s in subs.items() if isinstance(s, PreTrainedConfig)}
    text = next((n for n in ("text_config", "decoder") if n in subs), None)
    for name in [n for n in overrides if n not in fields and text is not None and n in _fields(type(subs[text]))]:
        overrides = _merge(overrides, {text: {name: overrides.pop(name)}})
    for name, sub in subs.items():
        part = overrides.pop(name, {})
        own = _tiny_kwargs(type(sub), _merge(_ROWS.get(sub.model_type, {}), part))
        kwargs[name] = {**own, "model_type": sub.model_type} if parts[name] is AutoConfig else own
    kwargs.update({k: v for k, v in _cut(default, kwargs, overrides).items() if k in fields})
    kwargs.update(overrides)
    return kwargs


def _cut(default: PreTrainedConfig, kwargs: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Per-layer lists of the default config, cut to one layer of each kind, and the number of layers that leaves."""
    count = next((n for n in _LAYER_COUNTS if n in kwargs), None)
    if count is None or count in overrides:
        return {}
    depth = getattr(default, count)
    fields = _fields(type(default))
    lists = {
        name: value
        for name, value in vars(default).items()
        if isinstance(value, (list, tuple))
        and len(value) == depth
        and name not in {*overrides, *_SMALL}
        and not _is_range(value)
        # a list that the config derives and that is all alike it derives again, perhaps from an override
        and (fields.get(name) is not None or any(kind != value[0] for kind in value))
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    keep = sorted({kinds.index(kind) for kind in kinds})
    keep = sorted({*keep, *range(2)}) if len(keep) < 2 else keep
    return {count: len(keep), **{name: [value[i] for i in keep] for name, value in lists.items()}}


def _is_range(value: Any) -> bool:
    return len(value) > 2 and all(isinstance(v, int) for v in value) and len(set(value)) == len(value)


def _outside(value: Any) -> bool:
    return any(isinstance(v, int) and v >= VOCAB for v in (value if isinstance(value, (list, tuple)) else [value]))


def _inside(name: str, value: Any) -> Any:
    known = {"pad": 0, "bos": 1, "eos": 2, "unk": 3}
    own = known.get(name[:3], 99 + sum(map(ord, name)) % (VOCAB - 99))
    return own if not isinstance(value, (list, tuple)) else [own]


def _merge(base: dict[str, Any], over: dict[str, Any] | Iterable[Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for name, value in dict(over).items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged
