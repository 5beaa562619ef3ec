"""The models, caches and attention formulations that `bench_decode` measures.

A path is `CACHE+ATTENTION` or `CACHE+ATTENTION+glibc`:

* `dynamic`: the cache that `generate()` makes by default. It concatenates: every step copies all keys and values.
  `static`: `generate(cache_implementation="static")`, which writes the new token in place.
* `sdpa` and `eager`: transformers' own. `folded`: sdpa, with the queries of a group moved into the query axis, so that
  each key-value head is read once for its group. transformers 5.23 does that itself where it passes a mask, and a
  static cache has one (5.21 repeats the keys there); without a mask it passes `enable_gqa=True`.
* `glibc`: the allocator as it is, which returns tensors of 32 MiB and more to the system and maps fresh pages for the
  next ones. The other paths run with an allocator told to keep what it has, as a server's would.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import hf_attnpatch as ap
from hf_attnpatch.evaluation.cache import cache_bytes_per_token
from hf_attnpatch.evaluation.memory import weight_bytes
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.roles import run

CACHES, ATTENTIONS = ("dynamic", "static"), ("sdpa", "folded", "eager")
FOLDED = "grouped_folded"  # transformers reads meaning into names that contain "sdpa" or "flash"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


@dataclass(frozen=True)
class DecodePath:
    """A cache, an attention, and whether the allocator is left as glibc has it."""

    cache: str
    attention: str
    glibc: bool = False

    @classmethod
    def parse(cls, text: str) -> DecodePath:
        """From `CACHE+ATTENTION` or `CACHE+ATTENTION+glibc`."""
        cache, _, rest = text.partition("+")
        attention, _, allocator = rest.partition("+")
        if cache not in CACHES or attention not in ATTENTIONS or allocator not in ("", "glibc"):
            wanted = f"({' | '.join(CACHES)})+({' | '.join(ATTENTIONS)})"
            raise SystemExit(f"bench_decode: path {text!r} is not known; write {wanted}, `+glibc` after it or not.")
        return cls(cache, attention, allocator == "glibc")

    def __str__(self) -> str:
        return f"{self.cache}+{self.attention}" + "+glibc" * self.glibc


def keep_memory() -> None:
    """Tells glibc to keep freed memory: nothing is mapped, nothing given back. There is no way back in this process."""
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)):
        raise SystemExit("bench_decode: mallopt refused; only glibc has it. Choose paths that end in `+glibc`.")


# -- models -----------------------------------------------------------------------------------------------------------


def llama(hidden: int, heads: int, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A random multi-head Llama with a small vocabulary: at long context the cache outweighs the weights."""
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 2 * hidden, "vocab_size": 512}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 32768}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads_of)).to(dtype).eval()


def variants(counts: list[int], base: Any, dtype: torch.dtype) -> dict[int, PreTrainedModel]:
    """The model with each count of key-value heads, most first; what the weights are does not matter for speed.

    Args:
        counts: key-value heads; the first must be the model's query heads.
        base: a folder or hub name, or a function that makes the multi-head model.
        dtype: of weights and cache.
    """
    found = {}
    for count in counts:
        own = base() if callable(base) else AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        site = ap.describe(own).sites[0]
        if site.num_kv_heads != site.num_heads or counts[0] != site.num_heads:
            raise SystemExit(
                f"bench_decode: the model has {site.num_heads} query and {site.num_kv_heads} key-value heads, --kv "
                f"begins with {counts[0]}; a multi-head model is wanted, and its count first. For SmolLM2: "
                "`scripts/fetch_smollm2.py --expand FOLDER`, then `--model FOLDER --kv 9,3,1`."
            )
        if count != site.num_heads:
            ap.apply(own, ap.GroupedQuery(num_kv_heads=count, method="first"))
        found[count] = own
    return found


# -- bytes ------------------------------------------------------------------------------------------------------------


def byte_table(models: dict[int, PreTrainedModel], batch: int) -> list[dict[str, Any]]:
    """Bytes of weights a step and of the cache a token; stops unless these fall by exactly the group factor."""
    found = {count: cache_bytes_per_token(model) for count, model in models.items()}
    most = max(found)
    for count, size in found.items():
        if size * most != found[most] * count:
            raise SystemExit(f"bench_decode: {count} of {most} heads, but {size} of {found[most]} bytes a token.")
    return [
        {"kv": n, "weight bytes": weight_bytes(models[n], batch), "bytes a token": s, "group factor": found[most] / s}
        for n, s in found.items()
    ]


def attention_operations(model: PreTrainedModel) -> int:
    """Multiplications and additions of all layers' attention for one token of context."""
    return sum(2 * site.num_heads * (site.head_dim + site.head_dim) for site in ap.describe(model).sites)


# -- caches -----------------------------------------------------------------------------------------------------------


def filled(model: PreTrainedModel, path: DecodePath, context: int, batch: int) -> Cache:
    """A cache that holds `context` random keys and values, put there by its own `update`."""
    cache = _empty(model, path, context)
    for layer, site in enumerate(ap.describe(model).sites):
        shape = (batch, site.num_kv_heads, context, site.head_dim)
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def prefilled(model: PreTrainedModel, path: DecodePath, context: int, batch: int) -> Cache:
    """The same, filled by the model's forward over `context` tokens."""
    cache = _empty(model, path, context)
    tokens = torch.arange(context).expand(batch, -1) % 512
    run(model, {words.TOKENS: tokens, words.CACHE: cache, words.USE_CACHE: True})
    return cache


def _empty(model: PreTrainedModel, path: DecodePath, context: int) -> Cache:
    if path.cache == "static":  # with room for the one token of a step
        return StaticCache(config=model.config, max_cache_len=context + 1)
    return DynamicCache(config=model.config)


def take_back(cache: Cache) -> None:
    """Forget the last token, so that the next step sees the same context."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)  # the place is overwritten by the next step
    else:
        cache.crop(-1)


# -- attention --------------------------------------------------------------------------------------------------------


def fold(x: Tensor, kv_heads: int) -> Tensor:
    """batch, heads, 1, dim -> batch, kv_heads, group, dim; a view."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa, for one new token with the queries of a group in the query axis; arguments as transformers' attentions."""
    if query.shape[2] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None and attention_mask.shape[1] != 1:
        attention_mask = fold(attention_mask, key.shape[1])
    out = F.scaled_dot_product_attention(fold(query, key.shape[1]), key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(len(out), 1, -1, value.shape[-1]), None  # batch, 1, heads, dim


def choose_attention(model: PreTrainedModel, attention: str) -> None:
    """Makes the model attend by `sdpa`, `eager` or `folded`."""
    AttentionMaskInterface.register(FOLDED, sdpa_mask)
    AttentionInterface.register(FOLDED, folded_attention)
    model.set_attn_implementation(FOLDED if attention == "folded" else attention)


class _Watch(TorchFunctionMode):
    """Notes how torch's sdpa is called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            (heads, rows), kv = args[0].shape[1:3], args[1].shape[1]
            words = [f"{heads} x {rows} queries on {kv} heads"]
            words += ["enable_gqa"] * bool(kwargs.get("enable_gqa")) + ["mask"] * (kwargs.get("attn_mask") is not None)
            self.calls.append(", ".join(words))
        return func(*args, **kwargs)


def sdpa_call(work: Any) -> str:
    """How a step, run once here, calls torch's sdpa in its first layer."""
    work.before()
    with _Watch() as watch:
        work.run()
    work.after()
    return watch.calls[0] if watch.calls else "not called"


# -- attention alone --------------------------------------------------------------------------------------------------


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, repeat_kv(k, groups), repeat_kv(v, groups))


def _matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (fold(q, k.shape[1]) * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return (scores.softmax(-1) @ v).reshape(q.shape)


# q: batch, heads, 1, dim; k, v: batch, kv heads, context, dim; all give the same numbers
FORMULATIONS = {
    "sdpa, repeat_kv": _repeated,
    "sdpa, enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "sdpa, queries folded": lambda q, k, v: F.scaled_dot_product_attention(fold(q, k.shape[1]), k, v).reshape(q.shape),
    "matmul, queries folded": _matmul,
}


def keys_and_values(cache: Cache, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each layer's keys and values, without a place that is still free."""
    for layer in cache.layers:
        yield layer.keys[:, :, :context], layer.values[:, :, :context]


def through(attend: Any, query: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
    """The attention of every layer, one after the other."""
    for keys, values in layers:
        attend(query, keys, values)
