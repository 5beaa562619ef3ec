"""Where a patch refuses, with words of its reason; where transformers itself breaks an invariant.

Both are files that ``record.py`` writes and that the tests assert cell by cell, in both directions: what is listed and
works fails, and so does the reverse.
"""

import collections
from pathlib import Path

REFUSED_FILE = Path(__file__).with_name("refused.txt")
UPSTREAM_FILE = Path(__file__).with_name("upstream.txt")
MOOT_FILE = Path(__file__).with_name("moot.txt")
NOTHING = "nothing to do"  # not an error: the model is already what the patch makes

# What a refusal may say; a message with none of these stands in the file whole, and should get its words here.
WORDS = (
    "rope scaling needs a rotary module built from config.rope_parameters",
    "keeps a private copy of its config",
    "scaling, which 'dynamic' cannot multiply",
    "'proportional' scaling, which",
    "has tensors as long as the context",
    "several configs with rotary parameters; per_request needs one",
    "stands inside a layer, where the length of a request is not known",
    "cannot be built from the changed config",
    "heads of no known dimensions",
    "has no rotary base that all layers share",
    "only a stock type can leave single layers without positions",
    "no stock type can say this",
    "is no stock model any more",
    "no attention module was read whose heads could be rotated",
    "reads two sequences",
    "has no inner model that takes inputs_embeds",
    "decodes from a state that does not say how many tokens it has seen",
    "does not do with embeddings alone what it does with token ids",
    "is not built from config.rope_parameters alone",
    "its own way to compute attention cannot be followed",
    "does not run without the positions that it has",
    "max_position_embeddings is None; no field says how long it is",
    "no single length fits them all",
    "does not say how long it is; it cannot be lengthened",
    "distances are remapped by rotating rotary states further",
    "no layer attends to the whole past",
    "flash calls cannot be merged here",
    "its keys rotate with position in no known way",
    "no fused attention runs here",
    "no fused kernel adds ALiBi here",
    "no fused kernel adds Transformer-XL's terms here",
    "the terms need heads of queries and keys to stand beside",
    "computes its scores by itself and dispatches to no attention function",
    "has layers that see a chunk only, or keep something else",
    "does not run with a memory instead of its mask",
    "attention is bidirectional; segment recurrence needs a causal model",
    "read in segments with a memory of the whole past",
    "must run once, with its own memory",
    "its own forward stays, which takes backend='sdpa' only",
    "is no self-attention with a cache that computes its scores by itself",
    "no attention module was read",
    "device of scores of attention, which is computed fused",
    "device of keys of attention, which is computed fused",
    "tells positions apart by something that was not recognised",
    "tells positions apart by a learned bias by distance",
    "takes no position_ids, so that its angles cannot be taken out",
    "no self-attention module was read",
    "does not dispatch to it in this release of transformers",
    "does not support an attention implementation through torch's flex_attention",
    "Attention sinks cannot be run on CPU",
    "when it is built",
    "logits differ by",
    "latent attention caches a compressed vector",
    "linear attention keeps a state, not keys and values",
    "one projection gives keys and values",
    "keys pass a convolution of their own",
    "neither the module nor its config says how many heads there are",
    "its config declares a context of",
    "passes no gradient to the query projection",
    "needs a context length to multiply",
    "segment memory holds one text",
    "does not run with a memory instead of its mask",
    "attention is bidirectional; segment recurrence needs a causal model",
    "read in segments with a memory of the whole past",
    "must run once, with its own memory",
    "by which it is told what is new",
    "ran on the probe before the patch and does not after it",
    "no module has key and value heads",
    "checkpoints hold it fused with others",
    "shares its weights with",
    "matches no row",
    "has no output projection that could be adapted",
    "does not run on the probe",
    "cannot be run twice on the same inputs",
    "does not run, or its attention cannot be run again",
    "reads a row of ids for each codebook",
    "already shares",
    "2 key-value heads under 2 query heads do not become 4",
    "positions here are: ",
    "has layers of ",
    "is no decoder of text alone",
    "and no stock latent type has windows",
    "no stock latent type holds it",
    "divides every key by its own size after the projection",
    "dimensions of a head are rotated; a head of which all are",
    "does to its keys and values is not known",
    "in a stock latent type one rotary table serves all layers",
    "takes keys and values from an earlier layer",
)
# Invariants that transformers' own scalings break on every model where the text outgrows the original window: dynamic
# recomputes its angles from the length so far, longrope switches them; cached keys and shorter rows keep others.
_SWITCHES = {
    *("cached decoding, token by token", "cached decoding, two chunks", "cached decoding after padding"),
    "alone or in a batch",
}
UPSTREAM_OF_A_KIND = {
    "rope_dynamic": {*_SWITCHES, "first request or after a longer one"},
    "rope_longrope": _SWITCHES,
}
# What a patch may turn from pass to "not applicable".
_KERNELS = {"eager attention agrees", "sdpa agrees", "flex attention agrees"}
MAY_STOP_APPLYING = {
    **dict.fromkeys(("self_extend", "dual_chunk", "re_rope", "jet_long", "attention_sinks"), _KERNELS),
    **dict.fromkeys(("rotary_some", "no_position_some", "windowed_sinks"), _KERNELS),  # homes with sinks run eagerly
    **dict.fromkeys(("alibi", "relative_xl"), {*_KERNELS, "gradients reach the attention", "gradient checkpointing"}),
    "flash": {
        *("eager attention agrees", "sdpa agrees", "flex attention agrees"),  # one of them is the present one now
        *("gradients reach the attention", "gradient checkpointing"),  # flex has no backward on CPU
    },
}


def _lines(file):
    return [line.split(" | ") for line in file.read_text().splitlines()] if file.exists() else []


def _refused():
    table = collections.defaultdict(dict)
    for cases, reason, types in _lines(REFUSED_FILE):
        for case in cases.split():
            table[case].update(dict.fromkeys(types.split(), reason))
    return table


# What every type must pass, unpatched and patched: "not applicable" is allowed where moot.txt says why only.
# A check that finds nothing has failed.
HELD = (
    *("cached decoding, token by token", "cached decoding, two chunks", "cached decoding after padding"),
    *("padding does not matter", "alone or in a batch", "saved and loaded", "saved in shards and loaded"),
)


def _moot():
    table = collections.defaultdict(dict)
    for name, invariant, why in _lines(MOOT_FILE):
        table[name][invariant] = why
    return table


def _upstream(marginal):
    """Model type -> invariants; ``marginal`` ones miss by so little that another processor may pass them."""
    table = collections.defaultdict(set)
    for name, invariant, found in _lines(UPSTREAM_FILE):
        size = found.partition(":")[0]
        if (size != "raises" and float(size) < MARGIN) is marginal:
            table[name].add(invariant)
    return table


MARGIN = 1e-4
REFUSED, MOOT = _refused(), _moot()
UPSTREAM, UPSTREAM_MARGINAL = _upstream(False), _upstream(True)


def refusal(model_type, encoder, case):
    """Words of the reason for which this cell is refused, ``NOTHING``, or None where the patch applies."""
    key = model_type + ("-masked" if encoder else "")
    return REFUSED[case.name].get(key) or REFUSED[case.kind].get(key)
