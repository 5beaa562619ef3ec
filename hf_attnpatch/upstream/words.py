"""Transformers' vocabulary: every name that its releases use or have used, newest first.

No other module of the package contains these names. If a model can be run, :mod:`.roles`, :mod:`.caches` and
:mod:`.calls` find the roles by running it and use this list only as a first guess, so that names of later releases are
found as well. Without weights, the list is all there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# Roles of a forward's arguments.
TOKENS: Final = "tokens"  # ids, (batch, length)
EMBEDDINGS: Final = "embeddings"  # in the place of ids, (batch, length, width)
SEGMENTS: Final = "segments"  # BERT's segment ids, (batch, length)
MASK: Final = "mask"  # (batch, keys) at a model, whatever the kernel takes at an attention module
POSITIONS: Final = "positions"  # (batch, length), int64
CACHE: Final = "cache"  # a transformers Cache
USE_CACHE: Final = "use_cache"  # bool: return a cache
STATES: Final = "states"  # what a layer reads, (batch, length, width)
ANGLES: Final = "angles"  # cosine and sine
BIAS: Final = "bias"  # added to the scores by distance (BLOOM, MPT)
WEIGHTS: Final = "weights"  # bool: return attention weights
DECODER_TOKENS: Final = "decoder_tokens"  # ids of the second sequence

ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    TOKENS: ("input_ids",),
    EMBEDDINGS: ("inputs_embeds",),
    SEGMENTS: ("token_type_ids",),
    MASK: ("attention_mask",),
    POSITIONS: ("position_ids",),
    CACHE: ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params"),
    USE_CACHE: ("use_cache",),
    STATES: ("hidden_states",),
    ANGLES: ("position_embeddings",),
    BIAS: ("alibi", "position_bias"),
    WEIGHTS: ("output_attentions",),
    DECODER_TOKENS: ("decoder_input_ids",),
}

# Roles that a forward with ``**kwargs`` passes to its attention modules without declaring them.
HANDED_ON: Final = frozenset({"position_ids", "output_attentions"})
# Arguments of forwards that have none of these roles.
OTHER_ARGUMENTS: Final = frozenset(
    {
        *("labels", "return_dict", "output_hidden_states", "output_router_logits", "logits_to_keep", "cache_position"),
        *("encoder_outputs", "encoder_hidden_states", "encoder_attention_mask", "decoder_attention_mask", "head_mask"),
        *("decoder_inputs_embeds", "pixel_values", "next_sentence_label", "num_logits_to_keep"),
        *("perm_mask", "target_mapping", "input_mask", "use_mems", "mems"),  # XLNet
    }
)

# Output fields from which older families continue, which hold no key-value cache.
OTHER_STATES: Final = ("state", "past_buckets_states", "mems")

# Columns of tokenizers and datasets that are not inputs of any model.
INPUT_IDS: Final = "input_ids"
ATTENTION_MASK: Final = "attention_mask"
DECODER_MASK: Final = "decoder_attention_mask"

# Fields of a model's output that hold what it predicts, most wanted first.
PREDICTIONS: Final = ("logits", "prediction_logits", "last_hidden_state")

# Keywords of transformers' attention functions.
DROPOUT: Final = "dropout"
SCALING: Final = "scaling"
IS_CAUSAL: Final = "is_causal"
SOFTCAP: Final = "softcap"
SINKS: Final = "s_aux"
SCORE_BIAS: Final = "position_bias"
WINDOW: Final = "sliding_window"
PACKED: Final = "cu_seq_lens_q"
PACKED_KEYS: Final = "cu_seq_lens_k"
PAGED: Final = "block_table"
ATTENTION: Final[Mapping[str, tuple[str, ...]]] = {
    name: (name,)
    for name in (DROPOUT, SCALING, IS_CAUSAL, SOFTCAP, SINKS, SCORE_BIAS, WINDOW, PACKED, PACKED_KEYS, PAGED)
}
# The method of a model by which every kind of continuous batching begins, ``transformers serve``'s too.
BATCHING: Final = "init_continuous_batching"
# Keywords of transformers' mask functions.
MASKS: Final = (
    *("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask", "local_size"),
    *("allow_is_causal_skip", "allow_is_bidirectional_skip", "dtype", "config", "use_vmap", "device"),
)

# What a processor makes beside text. A forward's argument for pictures or sound, and what else goes with it; the ids
# in whose places features are put, and the parts of a config, by words in their names.
PICTURES: Final = ("pixel_values", "image_pixel_values", "flattened_patches")
SOUNDS: Final = ("input_features", "input_values", "audio_input_features", "audio_values")
OTHER_MEDIA: Final = ("image_patches", "pixel_values_videos", "audio_input_ids", "inputs", "bbox", "protein_input_ids")
GRID: Final = ("image_grid_thw", "image_grid_hw")  # patches along time, height and width, (pictures, 3 or 2)
SIZES: Final = ("image_sizes", "target_sizes")  # height and width in pixels, (pictures, 2)
PATCH_SHAPES: Final = ("spatial_shapes",)  # patches along height and width, (pictures, 2)
PATCH_PLACES: Final = ("image_position_ids",)  # (pictures, patches, 2)
PATCH_MASK: Final = ("pixel_attention_mask", "pixel_mask")
SOUND_MASK: Final = ("input_features_mask", "feature_attention_mask", "padding_mask", "input_values_mask")
KINDS_OF_TOKENS: Final = ("mm_token_type_ids",)  # 0 for text, 1 for a picture, 3 for sound, (batch, length)
MEDIA_CONFIGS: Final[Mapping[str, tuple[str, ...]]] = {
    "an image": ("vision", "image", "visual", "vit"),
    "sound": ("audio", "speech", "sound", "encoder"),
}
PLACEHOLDERS: Final[Mapping[str, tuple[str, ...]]] = {
    "an image": ("image_token_id", "image_token_index", "media_placeholder_token_id", "img_context_token_id"),
    "sound": ("audio_token_id", "audio_token_index", "audio_soft_token_id", "speech_token_id"),
}
FEATURES: Final[Mapping[str, tuple[str, ...]]] = {"an image": ("get_image_features",), "sound": ("get_audio_features",)}
POOLED: Final = ("pooler_output", "last_hidden_state")  # fields of what those return, most wanted first
AXES: Final = "mrope"  # in the name of a field of ``rope_parameters``, where positions have several axes

# Methods of a cache.
UPDATE: Final = ("update",)
LENGTH: Final = ("get_seq_length",)
MOVES: Final = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")

# Buffers of a rotary module: radians per position, as now and as of the original window.
FREQUENCIES: Final = "inv_freq"
ORIGINAL_FREQUENCIES: Final = "original_inv_freq"

# What attention modules call things of their own.
LAYER_NUMBER: Final = ("layer_idx", "layer_number", "layer_id")
CROSS_ATTENTION: Final = ("is_cross_attention",)

# The class attribute by which a family says that it dispatches to torch's kernels.
DECLARES_SDPA: Final = "_supports_sdpa"

# Fields of a config which every constructor of a model asks whether it knows them, and no constructor of a config.
SEALED: Final = ("_attn_implementation", "_experts_implementation")
