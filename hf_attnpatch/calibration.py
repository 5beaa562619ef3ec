"""What a conversion must know of a model: second moments of queries, keys and attended values, never activations.

One pass over the text for as many attention modules as fit in `MEMORY`; a deeper model takes more passes, not more
memory. Each forward is the model's own, seen through hooks, so kernels, ``device_map`` and offloading do not matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import AttnPatchError, CalibrationError
from .probe import input_device
from .progress import track
from .replay import Call, See, Socket, Streams, recording
from .sites import Site

MEMORY = 400_000_000  # bytes of statistics held at a time
VALUE_TOKENS = 8192  # enough for values, whose merge loses little; each needs attention once for every key-value head
ROOM = 200_000_000  # bytes that the values of one batch may take, seen by every head

Batch = Mapping[str, Tensor]


@dataclass
class Moments:
    """Sums over tokens, float64, on the CPU; divide by ``tokens``.

    Attributes:
        query: q q^T, (num_heads, head_dim, head_dim), before RoPE.
        key: k k^T, (num_kv_heads, head_dim, num_kv_heads, head_dim), before RoPE.
        mean: k, (num_kv_heads, head_dim).
        value: y y^T of all values averaged by a head's attention, (num_kv_heads * v_head_dim,) twice, over all heads.
        tokens: how many.
        attended: of how many the values were seen; a second moment of values needs fewer.
    """

    query: Tensor
    key: Tensor
    mean: Tensor
    value: Tensor
    tokens: int = 0
    attended: int = 0

    @classmethod
    def zeros(cls, site: Site) -> Moments:
        """Return the sums of no tokens."""
        h, kv, d, wide = site.num_heads, site.num_kv_heads, site.head_dim, site.num_kv_heads * site.v_head_dim
        return cls(_zeros(h, d, d), _zeros(kv, d, kv, d), _zeros(kv, d), _zeros(wide, wide))

    def add(self, query: Tensor, key: Tensor, attended: Tensor | None) -> None:
        """Add tokens: (tokens, num_heads, head_dim), (tokens, num_kv_heads, head_dim), (tokens * num_heads, wide)."""
        flat = key.flatten(1).float()
        self.key += (flat.t() @ flat).view(self.key.shape).to(self.key)
        self.mean += key.double().sum(0).to(self.mean)
        per_head = query.float().transpose(0, 1)
        self.query += (per_head.transpose(1, 2) @ per_head).to(self.query)
        self.tokens += len(key)
        if attended is not None:
            self.value += (attended.float().t() @ attended.float()).to(self.value)
            self.attended += len(key)

    def normalised(self) -> Moments:
        """Return the means."""
        n, seen = self.tokens, max(1, self.attended) * len(self.query)
        return Moments(self.query / n, self.key / n, self.mean / n, self.value / seen, n, self.attended)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


def batches(calibration: Any, tokenizer: Any, model: PreTrainedModel) -> list[Batch]:
    """Read what a user gave as calibration text.

    Args:
        calibration: token ids (sequences, length); an iterable of dictionaries of model inputs, padding masked; or
            strings, with ``tokenizer``.
        tokenizer: of the model.
        model: that the text is for.

    Raises:
        AttnPatchError: anything else, an empty one, ids out of range, strings without a tokenizer.
    """
    if isinstance(calibration, Tensor):
        found: list[Batch] = [{"input_ids": calibration}]
    elif isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise AttnPatchError(
            f"calibration is a {type(calibration).__name__}; pass token ids of shape (sequences, length), dictionaries "
            "of model inputs, or a list of strings with tokenizer=."
        )
    else:
        found = list(_items(list(calibration), tokenizer, model))
    for batch in found:
        _check_ids(batch, model)
    if not sum(b["input_ids"].numel() for b in found):
        raise AttnPatchError("calibration is empty; pass at least a few thousand tokens of ordinary text.")
    return found


def _items(items: list[Any], tokenizer: Any, model: PreTrainedModel) -> Iterator[Batch]:
    texts = [item for item in items if isinstance(item, str)]
    if texts and tokenizer is None:
        raise AttnPatchError("calibration holds strings; pass tokenizer= as well, the one of this model.")
    if texts:
        yield from _tokenized(texts, tokenizer, model)
    for item in items:
        if isinstance(item, Tensor):
            yield {"input_ids": item if item.dim() == 2 else item[None]}
        elif isinstance(item, Mapping) and isinstance(item.get("input_ids"), Tensor):
            yield {k: v for k, v in item.items() if isinstance(v, Tensor) and k != "labels"}
        elif not isinstance(item, str):
            raise AttnPatchError(
                f"calibration holds a {type(item).__name__}; its items are strings, token tensors or dictionaries with "
                "a tensor input_ids."
            )


def _tokenized(texts: list[str], tokenizer: Any, model: PreTrainedModel, longest: int = 512) -> Iterator[Batch]:
    """Cut every text into windows, stacked; what is left of a text at its end is a batch of its own."""
    config = model.config.get_text_config(decoder=True)
    limit = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    whole: list[Tensor] = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        parts = [ids[start : start + limit] for start in range(0, len(ids), limit)]
        whole += [part for part in parts if len(part) == limit]
        yield from ({"input_ids": part[None]} for part in parts if 1 < len(part) < limit)
    if whole:
        yield {"input_ids": torch.stack(whole)}


def _check_ids(batch: Batch, model: PreTrainedModel) -> None:
    ids, vocabulary = batch["input_ids"], model.config.get_text_config(decoder=True).vocab_size
    if ids.dim() != 2 or ids.is_floating_point():
        raise AttnPatchError(
            f"calibration: input_ids are {ids.dtype} {tuple(ids.shape)}; wanted int64 (batch, length)."
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise AttnPatchError(
            f"calibration: token ids from {int(ids.min())} to {int(ids.max())}, the vocabulary has {vocabulary}; "
            "tokenize with this model's own tokenizer."
        )


def check_amount(text: Sequence[Batch], sites: Sequence[Site]) -> None:
    """Refuse a text with fewer tokens than twice the rank of what is fitted on it.

    Raises:
        CalibrationError: too few tokens that are no padding.
    """
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in text]
    tokens, wanted = sum(int(m.sum()) for m in masks), 2 * max(s.num_heads * s.v_head_dim for s in sites)
    if tokens < wanted:
        raise CalibrationError(
            f"calibration has {tokens} tokens; output projections of {wanted // 2} inputs are fitted on it, which "
            f"takes {wanted} at the very least and 32768 to be good; pass more text, or fallback='principal'."
        )


def shuffled(found: Sequence[Batch], seed: int) -> list[Batch]:
    """Put batches, and the rows in each, in an order that the seed gives: some stages look at the first ones only."""
    generator = torch.Generator().manual_seed(seed)
    out: list[Batch] = []
    for number in torch.randperm(len(found), generator=generator).tolist():
        order = torch.randperm(len(found[number]["input_ids"]), generator=generator)
        out.append({name: tensor[order] for name, tensor in found[number].items()})
    return out


def first(found: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return as many of the first batches as hold so many tokens."""
    out: list[Batch] = []
    for batch in found:
        if sum(b["input_ids"].numel() for b in out) >= tokens:
            break
        out.append(batch)
    return out


def split(found: Sequence[Batch], sites: Sequence[Site]) -> list[Batch]:
    """Cut batches so that the values of one, as every head sees them, take no more than `ROOM`."""
    widest = max(s.num_heads * s.num_kv_heads * s.v_head_dim for s in sites)
    tokens = max(1, ROOM // (4 * widest))
    out: list[Batch] = []
    for batch in found:
        rows = max(1, tokens // batch["input_ids"].shape[1])
        for start in range(0, len(batch["input_ids"]), rows):
            out.append({name: tensor[start : start + rows] for name, tensor in batch.items()})
    return out


def chunks(sites: Sequence[Site], size: Callable[[Site], int], memory: int = MEMORY) -> Iterator[list[Site]]:
    """Yield runs of attention modules whose statistics fit in memory together; at least one at a time."""
    run: list[Site] = []
    for site in sites:
        if run and sum(map(size, (*run, site))) > memory:
            yield run
            run = []
        run.append(site)
    yield run


def moments_size(site: Site) -> int:
    """Return the bytes of a module's :class:`Moments`."""
    wide, keys = site.num_kv_heads * site.v_head_dim, site.num_kv_heads * site.head_dim
    return 8 * (wide**2 + keys**2 + site.num_heads * site.head_dim**2)


def stream(model: PreTrainedModel, sites: Sequence[Site], text: Sequence[Batch], see: See, what: str) -> None:
    """Run the model over a text and show every call of these modules."""
    runner = _runner(model, sites)
    device = input_device(model)
    with torch.no_grad(), recording(model, sites, see) as tell:
        for batch in track(text, what):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            tell(inputs.get("attention_mask"), inputs.get("decoder_attention_mask"))
            runner(**inputs)


def _runner(model: PreTrainedModel, sites: Sequence[Site]) -> Callable[..., Any]:
    """Return the forward without the head over the vocabulary, where all modules are below it."""
    base = model.base_model
    prefix = next((f"{name}." for name, child in model.named_children() if child is base), None)
    inner = base if prefix and all(s.path.startswith(prefix) for s in sites) else model

    def run(**inputs: Tensor) -> None:
        if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
            inputs = {**inputs, "decoder_input_ids": inputs["input_ids"]}
        inner(**inputs, use_cache=False) if _takes_cache(inner) else inner(**inputs)

    return run


def _takes_cache(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def measure(
    model: PreTrainedModel, sites: Sequence[Site], text: Sequence[Batch], offsets: Mapping[str, Tensor]
) -> dict[str, Moments]:
    """Collect the moments of some attention modules in one pass.

    Args:
        model: to run.
        sites: its modules.
        text: batches of its inputs.
        offsets: constants taken off the values, (num_kv_heads, v_head_dim) for each module.

    Raises:
        AttnPatchError: a module never ran, or its states are not finite.
    """
    sums = {site.path: Moments.zeros(site) for site in sites}

    def see(site: Site, call: Call, own: Streams) -> None:
        found = sums[site.path]
        attended = (
            _attended(Socket(model, site), call, own, offsets[site.path]) if found.attended < VALUE_TOKENS else None
        )
        if not all(part.isfinite().all() for part in (own.key, own.query, own.value)):
            raise CalibrationError(
                f"{site.path}: activations on the calibration text are not finite; check the weights and the dtype."
            )
        found.add(own.query, own.key, attended)

    stream(model, sites, text, see, "measuring heads")
    silent = next((path for path, found in sums.items() if not found.tokens), None)
    if silent is not None:
        raise AttnPatchError(f"{silent}: did not run on the calibration text, or on padding only.")
    return {path: found.normalised() for path, found in sums.items()}


def _rolled(shift: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda _, states: states.roll(-shift, dims=-2)


def _attended(socket: Socket, call: Call, own: Streams, offset: Tensor) -> Tensor:
    """Return all heads' values averaged by every query head's attention, (tokens * num_heads, num_kv_heads * dim).

    Attention is linear in its values: the module is run again with values moved by one head, two heads and so on.
    """
    site, kv = socket.site, socket.site.num_kv_heads
    offset = offset.to(own.heads)
    seen = [own.heads, *(socket.run(call, value=_rolled(shift)).heads for shift in range(1, kv))]
    attended = torch.stack(seen, dim=2)  # tokens, heads, shifts, dim: with shift s a head saw the value of own + s
    first = torch.arange(site.num_heads) // (site.num_heads // kv)
    shift = ((torch.arange(kv)[None] - first[:, None]) % kv).to(attended.device)  # heads, kv
    by_head = attended[:, torch.arange(site.num_heads)[:, None], shift]  # tokens, heads, kv, dim
    return (by_head - offset).flatten(2).flatten(0, 1)
