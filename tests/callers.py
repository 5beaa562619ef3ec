"""Every way in which a caller may hold a cache, pack documents or give positions: what was found, and what is right.

Each function returns the logits (or tokens) that a model computed in that way, and those that it computes where
nothing of the kind is asked for: one full forward of the same text, documents alone, rows alone, a text without gaps.
"""

import torch
from caches import CACHE
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache

N, SPLIT = 15, 9
IDS = torch.randint(5, 99, (2, N), generator=torch.Generator().manual_seed(1))
OTHER = IDS.flip(0).flip(1)
DOCUMENTS = (6, 4, 5)
GAP, AT = 7, 8


def logits(model, ids, cache=None, **given):
    with torch.no_grad():
        more = {"use_cache": False} if cache is None else {CACHE: cache, "use_cache": True}
        return model(input_ids=ids, **more, **given).logits


def written(model, ids, **how):
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, **asked, **how)


def two_turns(model):
    cache = DynamicCache(config=model.config)
    logits(model, IDS[:, :SPLIT], cache)
    return logits(model, IDS[:, SPLIT:], cache), logits(model, IDS)[:, SPLIT:]


def chat(model):
    cache, ids = DynamicCache(config=model.config), IDS[:1, :5]
    turn = torch.cat([written(model, ids, **{CACHE: cache}), IDS[1:, :3]], 1)
    return written(model, turn, **{CACHE: cache}), written(model, turn)


def crop(model):
    cache = DynamicCache(config=model.config)
    logits(model, torch.cat([IDS[:, :SPLIT], OTHER[:, :4]], 1), cache)
    cache.crop(-4)
    return logits(model, IDS[:, SPLIT:], cache), logits(model, IDS)[:, SPLIT:]


def reset(model):
    cache = DynamicCache(config=model.config)
    logits(model, OTHER[:, :SPLIT], cache)
    cache.reset()
    return logits(model, IDS, cache), logits(model, IDS)


def _rows(model, move, rows):
    cache = DynamicCache(config=model.config)
    logits(model, IDS[:, :SPLIT], cache)
    move(cache)
    return logits(model, IDS[rows, SPLIT:], cache), logits(model, IDS[rows])[:, SPLIT:]


def reorder(model):
    return _rows(model, lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0])


def select(model):
    return _rows(model, lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])


def repeat(model):
    return _rows(model, lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])


def static(model):
    cache = StaticCache(config=model.config, max_cache_len=N + 3)
    logits(model, IDS[:, :SPLIT], cache)
    return logits(model, IDS[:, SPLIT:], cache), logits(model, IDS)[:, SPLIT:]


def by_other_hands(model):
    """A cache made of tensors, as prefix tuning makes one: here those that the model itself computed."""
    cache, first = DynamicCache(config=model.config), 4
    logits(model, IDS[:, :first], cache)
    made = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
    return logits(model, IDS[:, first:], made, attention_mask=torch.ones_like(IDS)), logits(model, IDS)[:, first:]


def quantized(model):
    """What a layer of the cache makes of its keys and values in 8 bits, and the same in a plain cache."""
    cache, plain = QuantizedCache("fp8", config=model.config), DynamicCache()
    logits(model, IDS[:, :4], cache), logits(model, IDS[:, :4], plain)
    found = logits(model, IDS[:, 4:], cache)
    rounded = [tuple(map(_in_8_bits, (layer.keys, layer.values))) for layer in plain.layers]
    return found, logits(model, IDS[:, 4:], DynamicCache(rounded))


def _in_8_bits(states):
    scale = states.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    return (states / scale).to(torch.float8_e4m3fn).float() * scale


def _generated(model, ids=IDS[:, :8], **how):
    return written(model, ids, **how), written(model, ids, use_cache=False, num_beams=how.get("num_beams", 1))


def beams(model):
    return _generated(model, num_beams=2)


def assisted(model):
    return _generated(model, IDS[:1, :8], prompt_lookup_num_tokens=3)


def chunked(model):
    return _generated(model, prefill_chunk_size=3)


def chunked_static(model):
    return _generated(model, prefill_chunk_size=3, cache_implementation="static")


def _apart(model):
    return torch.cat([logits(model, part) for part in IDS[:1].split(DOCUMENTS, 1)], 1)


def _places():
    return torch.cat([torch.arange(n) for n in DOCUMENTS])[None]


def _bounds(*sizes):
    bounds = torch.tensor([0, *sizes]).cumsum(0).int()
    given = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
    return given | dict.fromkeys(("max_length_q", "max_length_k"), max(sizes))


def packed(model):
    return logits(model, IDS[:1], position_ids=_places()), _apart(model)


def packed_with_bounds(model):
    return logits(model, IDS[:1], position_ids=_places(), **_bounds(*DOCUMENTS)), _apart(model)


def one_document(model):
    return logits(model, IDS[:1], position_ids=torch.arange(N)[None], **_bounds(N)), logits(model, IDS[:1])


def packed_by_mask(model):
    number = torch.arange(3).repeat_interleave(torch.tensor(DOCUMENTS))
    seen = ((number[:, None] == number) & torch.ones(N, N, dtype=torch.bool).tril())[None, None]
    return logits(model, IDS[:1], position_ids=_places(), attention_mask=seen), _apart(model)


def in_order(model):
    mask = torch.ones_like(IDS)
    return logits(model, IDS, position_ids=torch.arange(N)[None], attention_mask=mask), logits(model, IDS)


def left_padded(model):
    ids, mask = pad(IDS[:, :8], (3, 0)), pad(torch.ones_like(IDS[:, :8]), (3, 0))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return logits(model, ids, attention_mask=mask, position_ids=places)[:, 3:], logits(model, IDS[:, :8])


def left_padded_steps(model):
    """Rows padded by different lengths, positions as generate gives them, a prefill and the rest at once."""
    short, cache = IDS[:1, 3:], DynamicCache(config=model.config)
    ids = torch.cat([IDS[1:], pad(short, (3, 0))])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits(model, ids[:, :SPLIT], cache, attention_mask=mask[:, :SPLIT], position_ids=places[:, :SPLIT])
    found = logits(model, ids[:, SPLIT:], cache, attention_mask=mask, position_ids=places[:, SPLIT:])
    return found, torch.cat([logits(model, IDS[1:])[:, SPLIT:], logits(model, short)[:, SPLIT - 3 :]])


def rows_shifted(model):
    """Each row from another position on: what it is alone."""
    places = torch.stack([torch.arange(N), torch.arange(N) + 3])
    mask = torch.ones_like(IDS)
    alone = [logits(model, IDS[n : n + 1], attention_mask=mask[:1], position_ids=places[n : n + 1]) for n in (0, 1)]
    return logits(model, IDS, attention_mask=mask, position_ids=places), torch.cat(alone)


def _filled(model):
    """The text with tokens in its gap that nobody sees: they stand where the positions left something out."""
    ids = torch.cat([IDS[:, :AT], torch.full((2, GAP), 7), IDS[:, AT:]], 1)
    mask = torch.ones_like(ids)
    mask[:, AT : AT + GAP] = 0
    seen = (mask[:, None, None].bool()) & torch.ones(N + GAP, N + GAP, dtype=torch.bool).tril()
    seen = seen | torch.eye(N + GAP, dtype=torch.bool)
    places = torch.arange(N + GAP)[None].expand(2, -1)
    found = logits(model, ids, attention_mask=seen, position_ids=places)
    return torch.cat([found[:, :AT], found[:, AT + GAP :]], 1)


def _skipping():
    order = torch.arange(N)
    return torch.where(order < AT, order, order + GAP)[None].expand(2, -1)


def a_gap(model):
    return logits(model, IDS, attention_mask=torch.ones_like(IDS), position_ids=_skipping()), _filled(model)


def a_gap_between_calls(model):
    cache, mask = DynamicCache(config=model.config), torch.ones_like(IDS)
    logits(model, IDS[:, :AT], cache, attention_mask=mask[:, :AT], position_ids=_skipping()[:, :AT])
    found = logits(model, IDS[:, AT:], cache, attention_mask=mask, position_ids=_skipping()[:, AT:])
    return found, _filled(model)[:, AT:]


def a_gap_without_a_mask(model):
    """Transformers takes it for the border of two documents."""
    found, rest = logits(model, IDS[:1], position_ids=_skipping()[:1]), IDS[:1, AT:]
    behind = {"attention_mask": torch.ones_like(rest), "position_ids": _skipping()[:1, AT:]}
    return found, torch.cat([logits(model, IDS[:1, :AT]), logits(model, rest, **behind)], 1)


WAYS = (
    *(two_turns, chat, crop, reset, reorder, select, repeat, static, by_other_hands, quantized),
    *(beams, assisted, chunked, chunked_static),
    *(packed, packed_with_bounds, one_document, packed_by_mask),
    *(in_order, left_padded, left_padded_steps, rows_shifted, a_gap, a_gap_between_calls, a_gap_without_a_mask),
)
