"""A function for each patch: ``patch_flash(model, backend="sdpa")`` applies ``Flash(backend="sdpa")``.

Written by ``scripts/write_signatures.py`` from the patches' fields and docstrings; change those, then run it.
"""

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedModel

from .api import apply
from .patch import by_any_name
from .patches import (
    Alibi,
    AttentionSinks,
    DualChunk,
    Flash,
    GroupedQuery,
    JetLong,
    Latent,
    NoPosition,
    PositionTable,
    RelativeXl,
    ReRope,
    RopeScaling,
    Rotary,
    ScoreTemperature,
    SegmentRecurrence,
    SelfExtend,
    Sinusoidal,
    Windowed,
)
from .report import Report

__all__ = [
    "patch_alibi",
    "patch_attention_sinks",
    "patch_dual_chunk",
    "patch_flash",
    "patch_grouped_query",
    "patch_jet_long",
    "patch_latent",
    "patch_no_position",
    "patch_position_table",
    "patch_re_rope",
    "patch_relative_xl",
    "patch_rope_scaling",
    "patch_rotary",
    "patch_score_temperature",
    "patch_segment_recurrence",
    "patch_self_extend",
    "patch_sinusoidal",
    "patch_windowed",
]


@by_any_name
def patch_alibi(
    model: PreTrainedModel,
    *,
    slopes: Literal["paper"] | Sequence[float] = "paper",
    backend: Literal[
        "auto", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4", "eager"
    ] = "auto",
    exact: bool = True,
    distance_clip: int | None = None,
    strength: float = 1.0,
    training: bool | None = None,
) -> Report:
    """Attention with linear biases (ALiBi, 2108.12409, 3): a bias linear in distance replaces the model's positions.

    Rotary modules are fixed at position 0, and position tables are removed together with the length limit they set. A
    fused kernel applies the bias as a few extra dimensions of queries and keys (or as ``alibi_slopes``, or as flex
    attention's ``score_mod``), in linear memory. A model that was not trained with ALiBi has to be trained; its slopes
    may be warmed up (:func:`hf_attnpatch.set_alibi_strength`), which gave no better result in our studies. Stock
    transformers cannot express the result, so checkpoints have this package's model type. BLOOM, MPT and Falcon, which
    have ALiBi, can be given other slopes or clipped distances.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        slopes: ``"paper"``, or one number for each query head.
        backend: ``auto`` (the fastest that runs here and matches the reference on a probe), ``sdpa``,
            ``flex_attention``, ``flash_attention_2``, ``_3``, ``_4``, or ``eager``, the dense reference.
        exact: compute positions and slopes exactly in every dtype; False rounds slope times position to the model's
            dtype, as BLOOM does.
        distance_clip: larger distances, in tokens, count as this one; None does not clip.
        strength: factor on the slopes.
        training: whether a backward pass is needed; None reads ``model.training``.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: positions are computed inside the attention modules, or no backend runs.
        AttnPatchError: the number of slopes differs from the number of heads, or an argument is out of range.
    """
    return apply(
        model,
        Alibi(
            slopes=slopes,
            backend=backend,
            exact=exact,
            distance_clip=distance_clip,
            strength=strength,
            training=training,
        ),
    )


@by_any_name
def patch_attention_sinks(
    model: PreTrainedModel,
    *,
    num_sinks: int = 4,
    window: int | None = None,
    trained_length: int | None = None,
    backend: Literal["auto", "sdpa", "eager"] = "auto",
) -> Report:
    """Attention sinks with a window (StreamingLLM, 2309.17453, 3.2): unbounded text in a cache of fixed size.

    This does not extend the context: a token sees ``num_sinks + window`` others and nothing in between. The gain is
    fluent text of any length in a cache of fixed size. ``generate``, and forwards with a dynamic cache, keep only the
    sinks, the longest padding before them, and the window; other kinds of caches are unchanged. Inputs of at most
    ``num_sinks + window`` tokens give the same logits, bit for bit. Assisted decoding, which rolls a cache back, is
    refused once tokens were evicted. Angles are transformers' own, in fp32, which are wrong by a thousandth of a turn
    beyond about 10^5 tokens. Stock transformers cannot express it: checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        num_sinks: number of first tokens that are always kept.
        window: number of last tokens that a query sees, itself included; None takes the rest of the trained length.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
    """
    return apply(
        model, AttentionSinks(num_sinks=num_sinks, window=window, trained_length=trained_length, backend=backend)
    )


@by_any_name
def patch_dual_chunk(
    model: PreTrainedModel,
    *,
    chunk: int | None = None,
    local: int | None = None,
    start: int | None = None,
    trained_length: int | None = None,
    backend: Literal["auto", "sdpa", "eager"] = "auto",
) -> Report:
    """Dual chunk attention (2402.17463, 3): longer context without training, by positions within and between chunks.

    Within its own chunk a token sees true distances. In the previous chunk distances are exact for the first ``local``
    tokens and then stay at ``chunk + local``, the largest one, which all earlier chunks have as well. So every distance
    is one that the model knows, and order among far chunks is lost. Flash calls are merged by log-sum-exp. Queries
    before ``start`` attend as before, so that inputs within the trained length give the same logits, bit for bit.
    Positions are counted from the first token of a row that is not padding. Stock transformers cannot express it:
    checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        chunk: tokens in a chunk; None takes three quarters of the trained length, as in the paper.
        local: tokens for which the distance to the previous chunk is exact; None takes the rest of the trained length.
        start: first query whose distances are remapped; None takes the trained length.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
    """
    return apply(
        model, DualChunk(chunk=chunk, local=local, start=start, trained_length=trained_length, backend=backend)
    )


@by_any_name
def patch_flash(model: PreTrainedModel, *, backend: str = "auto", training: bool | None = None) -> Report:
    """Fused attention kernel (FlashAttention, SDPA, flex attention) that runs here and leaves the logits unchanged.

    ``auto`` takes the first backend, in the order of :func:`hf_attnpatch.backends.ranked`, that runs here and matches
    the model's present attention on a probe; the report names it and says why others were passed over. A backend that
    was requested by name and cannot run is an error. Checkpoints do not record this patch.

    Families that compute attention themselves (BLOOM, MPT, Falcon, GPT-J, CodeGen) get torch's kernels, with memory
    linear in length; their own ALiBi, with its own rounding, is applied as extra dimensions of queries and keys.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        backend: ``auto``, ``sdpa``, ``flex_attention``, ``flash_attention_2``, ``_3``, ``_4`` or a kernels-hub
            repository (``owner/name``).
        training: whether a backward pass is needed; None reads ``model.training``.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no backend runs; the message has every reason.
        AttnPatchError: the named backend does not exist or cannot run here.
    """
    return apply(model, Flash(backend=backend, training=training))


@by_any_name
def patch_grouped_query(
    model: PreTrainedModel,
    *,
    num_kv_heads: int | Literal["auto"],
    method: Literal["first", "mean", "mean_rescaled", "procrustes", "principal", "calibrated", "refined"] | None = None,
    grouping: Literal["adjacent", "similar"] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
    refine_steps: int = 150,
    refine_seconds: float | None = None,
    fallback: Literal["first", "mean", "mean_rescaled", "procrustes", "principal"] | None = None,
    cache_target: float | int | None = None,
) -> Report:
    """Grouped-query or multi-query attention (2305.13245, 1911.02150): query heads share key-value heads.

    The cache then holds ``num_kv_heads`` heads. Heads are merged, or replicated if the number grows, which leaves the
    logits unchanged. All but the first three methods also transform the queries and the output projection to fit the
    shared heads: see :mod:`hf_attnpatch.functional.merging`. If the family's config has a field for the number, the
    result is a stock model and a stock checkpoint. Otherwise (GPT-2, GPT-NeoX, OPT, GPT-J, BLOOM, MPT, BERT ...) the
    projections are replaced by shared ones and the cache becomes narrower; such a checkpoint loads once this package is
    imported.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        num_kv_heads: key-value heads after the patch; a divisor of the query heads, and a divisor or multiple of the
            present number. ``"auto"`` takes the number that fits ``cache_target`` with the least predicted loss.
        method: how heads are merged. From the weights: ``first``; ``mean`` (Ainslie et al., section 2.1);
            ``mean_rescaled``, which restores row norms; ``procrustes``, which first rotates heads towards each other
            (Jin et al., 2412.20677); ``principal``, principal components of keys weighted by their queries and of
            values weighted by their output. From calibration text: ``calibrated``, the same with measured covariances
            and a refitted output projection; ``refined``, then improved layer by layer by gradient descent. The default
            is ``refined`` with calibration and ``principal`` without; ``mean`` if heads cannot be aligned, which the
            report says.
        grouping: ``adjacent`` heads share, or the most ``similar`` ones, whose merge keeps the most energy. The default
            is
            ``similar`` with ``principal``, ``calibrated`` and ``refined`` in modules whose heads can be reordered, and
            ``adjacent`` elsewhere.
        calibration: token ids (sequences, length), an iterable of dictionaries of model inputs, or strings with
            ``tokenizer``. About 64 sequences of 512 tokens of ordinary text suffice. ``"self"`` or :class:`OwnText`,
            alone or among them, is text that the model writes itself: no file is needed, and no domain is favoured.
        tokenizer: for strings in ``calibration``.
        seed: for the selection of refinement batches.
        refine_steps: steps of Adam for each layer.
        refine_seconds: time limit for the refinement of all layers together, in seconds.
        fallback: the data-free method to use if the calibration text is unusable (too short, activations not finite);
            None
            makes that an error.
        cache_target: for ``"auto"``: at most this share of the present cache (up to 1.0), or this many bytes per token
            (an int).

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no attention module with keys and values of its own (state-space, latent attention).
        CalibrationError: unusable calibration text.
        AttnPatchError: a number of heads that does not divide, an unknown method, or a method without its text.
    """
    return apply(
        model,
        GroupedQuery(
            num_kv_heads=num_kv_heads,
            method=method,
            grouping=grouping,
            calibration=calibration,
            tokenizer=tokenizer,
            seed=seed,
            refine_steps=refine_steps,
            refine_seconds=refine_seconds,
            fallback=fallback,
            cache_target=cache_target,
        ),
    )


@by_any_name
def patch_jet_long(
    model: PreTrainedModel,
    *,
    window: int | None = None,
    trained_length: int | None = None,
    backend: Literal["auto", "sdpa", "eager"] = "auto",
) -> Report:
    """Jet-Long (2607.07740): longer context without training, by a window and groups that grow with the text.

    Distances up to ``window`` are unchanged; others are i // G - j // G with G = ceil(length / trained), as in the
    authors' code, at one temperature. Their G follows the length of the text so far, so that a cached token was read
    with another G than a later one. Here each query takes G from its own position. That is the same for the last query,
    leaves queries within the trained length unchanged (bit for bit), and makes cached decoding equal the full forward.
    Flash calls over disjoint pieces are merged by log-sum-exp; the authors' A + B - C is not needed. With gradients,
    keys are kept once for each G. Stock transformers cannot express it: checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        window: largest distance that is unchanged; None takes a quarter of the trained length, at most 2048, the
            authors' value for a model trained at 32768.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
    """
    return apply(model, JetLong(window=window, trained_length=trained_length, backend=backend))


@by_any_name
def patch_latent(
    model: PreTrainedModel,
    *,
    rank: int | None = None,
    rope_dim: int | None = None,
    cache_target: float | int | None = None,
    method: Literal["principal", "calibrated", "refined"] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
    refine_steps: int = 150,
    refine_seconds: float | None = None,
    grade: Literal["exact"] = "exact",
    home: str = "auto",
) -> Report:
    """Multi-head latent attention (MLA; DeepSeek-V2, 2405.04434): one latent and one rotary key serve all heads.

    The cache then holds ``rank + rope_dim`` numbers a token and layer. The model becomes a stock one (``youtu``, or a
    ``deepseek_v3`` without experts), and so does its checkpoint. Without a budget nothing is lost: every plane of every
    key head goes into the rotary key, all values into the latent; the frequencies, repeats included, are written as
    LongRoPE factors, and a constant channel of the latent keeps its norm from doing anything. With a budget, the
    components of keys that lose most without their rotation stay rotated (TransMLA, 2502.07864, keeps one of each
    frequency), and the rest of the keys is compressed together with the values.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        rank: width of the latent, the constant channel included; with ``rope_dim``.
        rope_dim: width of the rotary key, an even number; with ``rank``, or with ``cache_target``, which leaves the
            rest to the latent. By default the best of three shares of the budget, as tried on the text.
        cache_target: at most this share of the present cache (a float), or this many bytes per token (an int).
        method: how a budget is met. ``principal``: from the weights, as if attention fell with the distance.
            ``calibrated``: from covariances and attention on text; then output projections are refitted. ``refined``,
            the default: then improved layer by layer by gradient descent.
        calibration: token ids (sequences, length), an iterable of dictionaries of model inputs, or strings with
            ``tokenizer``; ``"self"`` or :class:`OwnText` for text that the model writes. Some 64 sequences of 512 do.
        tokenizer: for strings.
        seed: of the order of the text.
        refine_steps: of Adam, for each layer.
        refine_seconds: stops refinement of a layer early, so that all layers together take about so long.
        grade: ``exact``: transformers reads the checkpoint. Other engines take no bias before the latent and no table
            of frequencies.
        home: stock model type that is to hold the model; ``auto`` for the first that fits.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: q/k norms, windows, partial rotary, frequencies that change with the length, or layers
            that are not those of a Llama.
        CalibrationError: unusable calibration text.
        AttnPatchError: a budget that is too small, or a method that lacks its text.
    """
    return apply(
        model,
        Latent(
            rank=rank,
            rope_dim=rope_dim,
            cache_target=cache_target,
            method=method,
            calibration=calibration,
            tokenizer=tokenizer,
            seed=seed,
            refine_steps=refine_steps,
            refine_seconds=refine_seconds,
            grade=grade,
            home=home,
        ),
    )


@by_any_name
def patch_no_position(
    model: PreTrainedModel, *, layers: Sequence[int] | None = None, home: str | None = "auto"
) -> Report:
    """No position encoding (NoPE, 2305.19466; DroPE, 2512.12167): removes whatever the model knows positions by.

    A Llama-like model becomes a stock type whose layers may go without rotation (``smollm3``, ``granite_swa``), if one
    holds it bit for bit: its checkpoints load without this package. Otherwise rotary modules are fixed at position 0,
    position tables are removed, ALiBi biases are left out, and positions added by another patch of this package are
    removed, too; such checkpoints have this package's model type. DroPE does this late in training and recalibrates at
    the old length. An encoder without positions reads a bag of words; the report says so.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        layers: indices of the layers that lose their positions (RNoPE, SWAN); None takes all. Needs a home.
        home: stock model type for the result: ``auto`` takes the first that fits, a name takes that type, None keeps
            the
            model's own type.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: the model has positions that are not recognised or cannot be removed, or no home can
            express the layers.
        AttnPatchError: no such layer or home.
    """
    return apply(model, NoPosition(layers=layers, home=home))


@by_any_name
def patch_position_table(
    model: PreTrainedModel,
    *,
    target_length: int | None = None,
    factor: float | None = None,
    method: Literal["tile", "interpolate", "hierarchical"] | None = None,
    init: Literal["zeros", "sinusoidal"] | None = None,
) -> Report:
    """Learned absolute position embeddings for ``target_length`` tokens: a longer table, or a new one.

    An existing table keeps its rows and more are made from them. The config's maximum and the buffers of that length
    (BERT's position and segment ids, GPT-Neo's masks) grow with it, rows before position 0 (OPT, RoBERTa) stay, and
    stock transformers loads the result. A model without a table (rotary, ALiBi, fixed sinusoid, none) loses its
    positions, and a new trainable table is added to the token embeddings; positions are ``position_ids`` if passed,
    otherwise counted from the attention mask. Such checkpoints hold the table and have this package's model type.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        target_length: number of positions, in tokens; at least those of the present table.
        factor: the same as a multiple of the positions that the model has; give one of the two.
        method: for an existing table: ``tile`` (Longformer, 2004.05150), ``interpolate`` (trained positions spaced
            evenly
            from end to end: every row changes) or ``hierarchical`` (Su, 2020, alpha 0.4: up to the square of the old
            length). None takes ``hierarchical``; it and ``tile`` change nothing within the old length.
        init: for a new table: ``zeros``, which starts as a model without positions, or ``sinusoidal``, the rows of
            ``patch_sinusoidal``. None takes ``zeros``.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        AttnPatchError: a length below the trained one or above its square, or an option for the other case.
        UnsupportedArchitecture: another tensor has the table's length, or the old positions cannot be removed.
    """
    return apply(model, PositionTable(target_length=target_length, factor=factor, method=method, init=init))


@by_any_name
def patch_re_rope(
    model: PreTrainedModel,
    *,
    window: int | None = None,
    leak: float | None = None,
    target_length: int | None = None,
    factor: float | None = None,
    start: int | None = None,
    trained_length: int | None = None,
    backend: Literal["auto", "sdpa", "eager"] = "auto",
) -> Report:
    """Rectified rotary positions (ReRoPE, Su, 2023): longer context without training; distances end at a window.

    With ``leak`` they keep growing, by that much for each token (Leaky ReRoPE, same source). Flash calls are merged by
    log-sum-exp. Queries before ``start`` attend as before, so that inputs within the trained length give the same
    logits, bit for bit. Positions are counted from the first token of a row that is not padding. Stock transformers
    cannot express it: checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        window: distances below it are unchanged; None takes half of the trained length.
        leak: growth of distance per token beyond the window, in [0, 1); None takes 0, or with ``target_length`` what
            reaches the trained length there.
        target_length: length to reach with a leak, in tokens; None for any length.
        factor: the same as a multiple of the trained length; give one of the two.
        start: first query whose distances are remapped; None takes the trained length.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
    """
    return apply(
        model,
        ReRope(
            window=window,
            leak=leak,
            target_length=target_length,
            factor=factor,
            start=start,
            trained_length=trained_length,
            backend=backend,
        ),
    )


@by_any_name
def patch_relative_xl(
    model: PreTrainedModel,
    *,
    size: int | None = None,
    theta: float = 10000.0,
    init: Literal["recency", "zero"] = "recency",
    backend: Literal[
        "auto", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4", "eager"
    ] = "auto",
    training: bool | None = None,
) -> Report:
    """Relative positions of Transformer-XL (1901.02860, 3.3): scores are (q + u) k + (q + v) W R(i - j).

    R is the sinusoid of the distance; u, v and W are new trainable parameters, for each query head of each layer. The
    model's old positions are removed. A fused kernel computes the position term as extra dimensions of queries and
    keys, in linear memory, where the paper shifts a matrix of scores; backend ``eager`` is dense. There is no longest
    distance. A model that was not trained with these terms has to be (under LoRA, with
    ``modules_to_save=["relative_xl"]``). Stock transformers cannot express the result, so checkpoints have this
    package's model type. Together with :class:`SegmentRecurrence` this is Transformer-XL.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        size: dimensions of R, even; the kernel's heads grow by as much (FlashAttention takes 256 in all). None takes
            the
            size of a head. The paper uses the width of the model.
        theta: base of R's wavelengths.
        init: ``recency`` starts with ALiBi's preference for near tokens, encoded in v W by least squares within the
            trained length; ``zero`` starts as a model without positions. Both leave u at zero.
        backend: ``auto`` (the fastest that runs here and matches the reference on a probe), ``sdpa``,
            ``flex_attention``, ``flash_attention_2``, ``_3``, ``_4``, or ``eager``, the dense reference.
        training: whether a backward pass is needed; None reads ``model.training``.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: old positions cannot be removed, an attention module is unknown, or no backend runs.
        AttnPatchError: an argument out of range.
    """
    return apply(model, RelativeXl(size=size, theta=theta, init=init, backend=backend, training=training))


@by_any_name
def patch_rope_scaling(
    model: PreTrainedModel,
    *,
    kind: Literal[
        "linear", "ntk", "ntk_by_parts", "yarn", "llama3", "resonance", "clipped", "longrope", "dynamic", "dynamic_yarn"
    ],
    factor: float | None = None,
    target_length: int | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    long_factor: Sequence[float] | None = None,
    short_factor: Sequence[float] | None = None,
    attention_factor: float | None = None,
    truncate: bool = True,
    clip_frequencies: int | None = None,
    layer_types: Sequence[str] | None = None,
    per_request: bool = False,
    trained_length: int | None = None,
) -> Report:
    """Rotary scaling (position interpolation, NTK, YaRN, LongRoPE ...): a longer context by lower rotary frequencies.

    ``rope_theta`` and partial rotation are kept. An existing scaling is multiplied, not replaced: the same kind gets
    the product of the factors; another (static) kind is composed frequency by frequency and written as ``longrope``,
    which stock transformers can express. Config and rotary modules change together. In models with rotary parameters
    per layer type, only layers that attend to the whole context are scaled.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        kind: ``linear`` (2306.15595), ``ntk`` (another ``rope_theta``), ``ntk_by_parts`` (``yarn`` that leaves cos and
            sin alone), ``yarn`` (2309.00071), ``llama3``, ``longrope`` (2402.13753), ``dynamic`` (NTK by the length so
            far, as transformers computes it), ``resonance`` (2403.00071: wavelengths below the trained window rounded
            to whole tokens), ``clipped`` (2602.05258: the lowest frequencies tapered to zero) or ``dynamic_yarn``
            (``yarn`` with ``per_request``). Resonance and clipping stretch nothing by themselves: put them on top of
            another kind.
        factor: new context over old, at least 1; 1 changes nothing, except for ``resonance`` and ``clipped``.
        target_length: the same as a context in tokens, relative to the config's; give one of the two.
        beta_fast: for ``yarn``: frequencies with more turns than this in the old window are kept.
        beta_slow: for ``yarn``: frequencies with fewer turns than this are interpolated.
        low_freq_factor: for ``llama3``: wavelengths above old / low are divided.
        high_freq_factor: for ``llama3``: wavelengths below old / high are kept.
        long_factor: for ``longrope``: a divisor for each rotated frequency beyond the old window; None takes YaRN's.
        short_factor: for ``longrope``: the same within the old window; None takes 1.
        attention_factor: for ``yarn`` and ``longrope``: factor on cos and sin; None takes the paper's.
        truncate: for ``yarn`` and ``ntk_by_parts``: whether the ramp begins and ends at whole frequency indices.
        clip_frequencies: for ``clipped``: how many are tapered; None takes the paper's share, 20 of 64.
        layer_types: for models with parameters per layer type: which to scale; None takes those that are not local.
        per_request: choose a factor for each row of a batch when its request begins: 1 if prompt and ``max_new_tokens``
            fit into the trained window (the row then has the bits of the unscaled model), otherwise their length over
            the window. It is kept while the text is decoded, see :func:`hf_attnpatch.request`; ``factor`` is what the
            config declares, not a limit. With ``dynamic``, it is that formula with the final length; a model that
            already has ``dynamic`` or ``longrope`` scaling is converted by the same kind and a factor of 1. Checkpoints
            have this package's model type.
        trained_length: for ``per_request``: the window in tokens; None takes what the config declares.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no rotary module built from ``config.rope_parameters``.
        AttnPatchError: an unknown kind, a factor below 1, or a scaling that cannot be multiplied.
    """
    return apply(
        model,
        RopeScaling(
            kind=kind,
            factor=factor,
            target_length=target_length,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            low_freq_factor=low_freq_factor,
            high_freq_factor=high_freq_factor,
            long_factor=long_factor,
            short_factor=short_factor,
            attention_factor=attention_factor,
            truncate=truncate,
            clip_frequencies=clip_frequencies,
            layer_types=layer_types,
            per_request=per_request,
            trained_length=trained_length,
        ),
    )


@by_any_name
def patch_rotary(
    model: PreTrainedModel,
    *,
    theta: float = 10000.0,
    kind: Literal["default", "linear", "yarn", "llama3"] = "default",
    factor: float | None = None,
    target_length: int | None = None,
    partial: float | None = None,
    interleaved: bool | None = None,
    layer_types: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    home: str | None = "auto",
) -> Report:
    """Rotary position embedding (RoPE, 2104.09864): rotates queries and keys by position, instead of the old positions.

    If the model has rotary modules built from its config, they get another base and kind, config and modules together,
    and stock transformers loads the result. Otherwise keys are rotated once, at their own position, when they enter the
    cache, and queries in a wrapper around the model's attention kernel; families that compute attention themselves
    (BLOOM, MPT, Falcon, GPT-J, CodeGen) use torch's fused kernel instead. Positions are the ``position_ids`` that reach
    attention, otherwise indices in the cache: only differences count, so that left padding changes nothing. Such
    checkpoints have this package's model type, and the model has to be fine-tuned. Another base in some layers, or
    rotation in layers that have none, needs a home: a stock type that holds the model bit for bit and can express it.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        theta: base of the frequencies.
        kind: ``default``, ``linear``, ``yarn`` or ``llama3`` with its usual numbers; replaces an existing scaling.
            For other kinds, or to multiply a scaling, use ``patch_rope_scaling`` on top (rotary models only).
        factor: factor of the scaling, new context over old, at least 1; None takes 1.
        target_length: the same as a context in tokens, relative to the config's; give one of the two.
        partial: share of each head that is rotated; None keeps the model's, or takes all.
        interleaved: whether adjacent dimensions form a pair; None keeps the model's layout, or takes halves, as in
            Llama.
        layer_types: for models with rotary parameters per layer type: which get the base; None takes those that attend
            to
            the whole context.
        layers: indices of the layers that get the base (``kind="default"`` only); None takes those that rotate, or all
            if
            none does.
        home: for ``layers``, and for models whose layers do not rotate: the stock model type for the result, ``auto``
            for
            the first that fits, or None.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: the old positions cannot be removed, or attention cannot be reached.
        AttnPatchError: an argument is out of range, or fixed by the model's own rotary modules.
    """
    return apply(
        model,
        Rotary(
            theta=theta,
            kind=kind,
            factor=factor,
            target_length=target_length,
            partial=partial,
            interleaved=interleaved,
            layer_types=layer_types,
            layers=layers,
            home=home,
        ),
    )


@by_any_name
def patch_score_temperature(
    model: PreTrainedModel, *, slope: float, step: int | None = None, home: str = "auto"
) -> Report:
    """Position-dependent temperature: queries at t are multiplied by 1 + slope * log(1 + floor(t / step)).

    Attention over more tokens than a model was trained on spreads out; larger scores concentrate it again (SWAN-GPT,
    2504.08719; Llama 4). Queries before ``step`` are unchanged, bit for bit. A Llama-like model becomes a stock type
    that computes this (``ministral3``), if that type holds the model bit for bit, alone or on top of YaRN.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        slope: beta of the paper, at least 0; 0.1 in Llama 4. 0 changes nothing.
        step: in tokens; None takes the context that the model was trained on.
        home: stock model type for the result; ``auto`` takes the first that fits.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no stock type can express this for the model.
        AttnPatchError: an argument out of range.
    """
    return apply(model, ScoreTemperature(slope=slope, step=step, home=home))


@by_any_name
def patch_segment_recurrence(
    model: PreTrainedModel,
    *,
    segment_length: int,
    memory_length: int,
    positions: Literal["bounded", "running"] = "bounded",
    num_sinks: int = 0,
) -> Report:
    """Segment-level recurrence (Transformer-XL, 1901.02860, 3.2): attention to a memory of earlier keys and values.

    A token sees its own segment up to itself and ``memory_length`` tokens before the segment, in every layer.
    Information therefore travels up to depth times memory back, while cost per token and memory stay constant at any
    length. Longer calls are read segment by segment. Nothing is carried between calls, unless the caller decodes with
    the returned cache (as ``generate`` does) or opens a stream (:func:`hf_attnpatch.stream`). Gradients stop at the
    border of a segment. The model keeps its attention kernel, with this package's ALiBi or Transformer-XL terms if it
    has them. Families that compute attention themselves (BLOOM, MPT, Falcon, GPT-J, CodeGen) keep their forwards for
    calls of one segment; with a memory, torch's kernel attends inside them, with their own ALiBi. A layer with a
    sliding window sees no more of its memory than that window.

    Without memory and within one segment the model is unchanged, bit for bit. Stock transformers cannot express the
    patch, so checkpoints have this package's model type; the weights stay as they are.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        segment_length: in tokens.
        memory_length: tokens before the segment that it attends to; 0 for none.
        positions: ``bounded``: positions restart in each segment, and cached keys are rotated back by the segments that
            have passed since, which is exact for rotary angles; a learned table is read from its first row in every
            segment, so that cached tokens keep the positions that they had. ``running``: positions continue, as far as
            the model can.
        num_sinks: number of first tokens of a text that every query sees, however far back (2309.17453, section 3):
            pretrained models put attention on them and lose quality once they leave the memory. With bounded positions
            their keys are rotated to stand just before the memory.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: a layer caches something other than keys and values, attends in chunks, or rotates its
            keys in an unknown way; the model has an encoder, or differs with a memory of the whole past.
        AttnPatchError: an argument is out of range, or a learned table has fewer rows than the segment has tokens.
    """
    return apply(
        model,
        SegmentRecurrence(
            segment_length=segment_length, memory_length=memory_length, positions=positions, num_sinks=num_sinks
        ),
    )


@by_any_name
def patch_self_extend(
    model: PreTrainedModel,
    *,
    window: int | None = None,
    group: int | None = None,
    target_length: int | None = None,
    factor: float | None = None,
    start: int | None = None,
    trained_length: int | None = None,
    backend: Literal["auto", "sdpa", "eager"] = "auto",
) -> Report:
    """Self-Extend (2401.01325, 3): longer context without training; beyond a window, ``group`` tokens share a position.

    A token sees the ``window`` tokens before it at their true distance and those further back at i // G - j // G + w -
    w // G, so that no distance is new to the model. Flash calls over disjoint pieces are merged by log-sum-exp: linear
    memory, and about the time of plain attention. Queries before ``start`` attend as before, so that inputs within the
    trained length give the same logits, bit for bit; the paper has ``start=0``. Positions are counted from the first
    token of a row that is not padding. Keys stay in the cache as the model rotated them. Stock transformers cannot
    express it: checkpoints have this package's model type.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        window: distances below it are unchanged; None takes half of the trained length.
        group: tokens that share a position beyond the window; None takes the smallest that reaches ``target_length``.
        target_length: length to reach, in tokens; None takes four times the trained length.
        factor: the same as a multiple of the trained length; give one of the two.
        start: first query whose distances are remapped; None takes the trained length.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
    """
    return apply(
        model,
        SelfExtend(
            window=window,
            group=group,
            target_length=target_length,
            factor=factor,
            start=start,
            trained_length=trained_length,
            backend=backend,
        ),
    )


@by_any_name
def patch_sinusoidal(
    model: PreTrainedModel,
    *,
    theta: float = 10000.0,
    amplitude: float = 1.0,
    embedding_scale: float | Literal["paper"] = 1.0,
) -> Report:
    """Sinusoidal absolute positions (Attention Is All You Need, 1706.03762, 3.5), added to the token embeddings.

    PE(p, 2i) = sin(p / theta^(2i/d)) and PE(p, 2i+1) the cosine, alternating as in the paper, computed for any
    position: no table and no longest length. Positions are ``position_ids`` if passed, otherwise counted from the
        attention mask, so
    that left padding changes nothing. The sinusoid is added to the output of the token embedding, before anything else
    that the model does to it (Gemma's factor, BERT's norm). The old positions are removed. A model that was not trained
    with it has to be fine-tuned: the sinusoid is as large as the paper's embeddings, which are scaled by the root of
    the width, and most models' are far smaller; ``amplitude`` makes it smaller, ``embedding_scale="paper"`` scales the
    embeddings. Stock transformers cannot express the result, so checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        theta: base of the wavelengths.
        amplitude: factor on the sinusoid.
        embedding_scale: factor on the token embeddings, or ``"paper"`` for the root of their width.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: the old positions cannot be removed, or the model needs token ids beside embeddings.
        AttnPatchError: an argument out of range.
    """
    return apply(model, Sinusoidal(theta=theta, amplitude=amplitude, embedding_scale=embedding_scale))


@by_any_name
def patch_windowed(
    model: PreTrainedModel,
    *,
    window: int,
    layers: Literal["auto"] | Sequence[int] | None = None,
    cache_target: float | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    first_tokens: int = 4,
    refine_steps: int = 60,
    home: str = "auto",
) -> Report:
    """Sliding windows in the place of full attention, in all layers or in some (hybrids; KL-guided: 2512.20569).

    A layer with a window keeps the last ``window`` tokens in its cache, and no more. The model becomes a stock type
    with ``layer_types``, or stays what it is where its own type has them: transformers, and the engines that the report
    names, load the checkpoint without this package and allocate its cache by window.

    Which layers lose least is measured on text: the divergence of the logits with a window on one layer at a time, then
    as few layers as ``cache_target`` takes. Pretrained heads rest on a text's first tokens (2309.17453), which a window
    loses. With text, and a type that has learned sinks (``granite_swa``), sinks stand for them: in closed form from the
    scores of the first tokens, then refined layer by layer towards each module's own output. A model with sinks is run
    by :class:`Flash` at a flash kernel's speed; transformers alone computes it eagerly.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        model: a transformers model with its weights in memory; changed in place.
        window: last tokens that a layer sees, the query's own among them.
        layers: numbers of the layers that get a window, from 0; None for all; ``"auto"`` for those that lose least.
        cache_target: for ``"auto"``: the share of the cache that is to be left at the length of the model's context.
        calibration: token ids (sequences, length), an iterable of dictionaries of model inputs, or strings with
            ``tokenizer``; rows longer than the window, several times as long to be good. The first row is held out.
        tokenizer: for strings.
        first_tokens: how many first tokens sinks stand for, where there is text and a home with sinks; 0 for no sinks.
        refine_steps: of Adam, for each layer's sinks; 0 leaves the closed form.
        home: stock model type that is to hold the model: ``auto`` takes ``granite_swa`` where sinks are wanted, else
            the model's own type if it can say windows, else the first that fits; a name takes that one.

    Returns:
        What changed where and what was checked; ``str()`` is a table, ``revert()`` puts everything back.

    Raises:
        UnsupportedArchitecture: no stock type can say this of the model.
        CalibrationError: text too short for the window.
        AttnPatchError: a window no shorter than the context, layers that are not there, an argument out of range.
    """
    return apply(
        model,
        Windowed(
            window=window,
            layers=layers,
            cache_target=cache_target,
            calibration=calibration,
            tokenizer=tokenizer,
            first_tokens=first_tokens,
            refine_steps=refine_steps,
            home=home,
        ),
    )
