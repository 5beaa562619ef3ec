"""New parameters of a projection whose key-value heads are merged or replicated, for any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..layouts import blocks, is_transposed, weight_rows
from ..sites import Site

# (0 query, 1 key, 2 value; rows (heads, head_dim, ...)) -> the new rows
Resize = Callable[[int, Tensor], Tensor]


def projection(site: Site, child: str, old: nn.Module, num_kv_heads: int, resize: Resize) -> dict[str, Tensor]:
    """Return weight and bias of a projection, packed and stored as its family does.

    Args:
        site: the attention module it belongs to.
        child: its path below the site.
        old: the present module.
        num_kv_heads: new number of heads.
        resize: maps the present heads to the new ones; also called for queries.
    """
    before, after = site.rows(), site.rows(num_kv_heads)
    new = {
        name: _rows(site, child, rows, before, after, resize)
        for name, rows in (("weight", weight_rows(old)), ("bias", getattr(old, "bias", None)))
        if isinstance(rows, Tensor)
    }
    if is_transposed(old):
        new["weight"] = new["weight"].t().contiguous()
    return new


def shared(
    site: Site, child: str, old: nn.Module, num_kv_heads: int, resize: Resize
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the parameters of shared heads, packed in blocks, and which block each block of the old output repeats.

    The weight is (rows, in_features) however the old one was stored; the index counts blocks of ``head_dim``.
    """
    packing = blocks if site.layout.fused else site.layout.packing
    before, after = site.rows(), replace(site, layout=replace(site.layout, packing=packing)).rows(num_kv_heads)
    parameters = {
        name: _rows(site, child, rows.detach(), before, after, resize)
        for name, rows in (("weight", weight_rows(old).contiguous()), ("bias", getattr(old, "bias", None)))
        if isinstance(rows, Tensor)
    }
    groups = site.num_heads // num_kv_heads
    sources = (after[0], *(a.repeat_interleave(groups, dim=0) for a in after[1:]))
    which = range(3) if site.layout.fused else (_which(site, child),)
    index = torch.empty(sum(before[w].numel() for w in which), dtype=torch.int64, device="cpu")
    for w in which:
        index[before[w].flatten()] = sources[w].flatten()
    dim = block(site, child)
    return parameters, index[::dim] // dim


def num_rows(site: Site, child: str, num_kv_heads: int) -> int:
    """Return how many output rows a projection has with this many key-value heads."""
    rows = site.rows(num_kv_heads)
    return sum(r.numel() for r in (rows if site.layout.fused else (rows[_which(site, child)],)))


def block(site: Site, child: str) -> int:
    """Return how many rows of this projection belong to one head."""
    return site.v_head_dim if child == site.layout.value else site.head_dim


def per_head(
    site: Site, old: nn.Module, twin: nn.Module, resize: Callable[[Tensor], Tensor]
) -> dict[str, Tensor] | None:
    """Return per-key-head parameters (a norm over all key heads, one norm per head) resized like the heads.

    None if heads do not explain the twin's shapes.
    """
    wanted = {name: p.shape for name, p in twin.named_parameters()}
    new: dict[str, Tensor] = {}
    for name, stack in _stacks(old, site.num_kv_heads).items():
        for key, tensor in _unstack(name, resize(stack)):
            fits = key in wanted and tensor.numel() == wanted[key].numel()
            new[key] = tensor.reshape(wanted[key]) if fits else tensor
    return new if {k: v.shape for k, v in new.items()} == wanted else None


def _which(site: Site, child: str) -> int:
    return (site.layout.query, site.layout.key, site.layout.value).index(child)


def _rows(
    site: Site, child: str, rows: Tensor, before: Sequence[Tensor], after: Sequence[Tensor], resize: Resize
) -> Tensor:
    if not site.layout.fused:
        which = _which(site, child)
        return resize(which, _take(rows, before[which])).flatten(0, 1) if which else _queries(site, rows, resize)
    new = rows.new_empty(sum(a.numel() for a in after), *rows.shape[1:])
    for which, (old_index, new_index) in enumerate(zip(before, after, strict=True)):
        new[_where(new_index)] = resize(which, _take(rows, old_index)).flatten(0, 1)
    return new


def _queries(site: Site, rows: Tensor, resize: Resize) -> Tensor:
    """Return a query projection's new rows; rows between the heads' queries (gates) stay."""
    index, new = query_rows(site, len(rows)), rows.clone()
    new[_where(index)] = resize(0, _take(rows, index)).flatten(0, 1)
    return new


def query_rows(site: Site, width: int) -> Tensor:
    """Return the rows of each head's queries, (num_heads, head_dim); some families keep a gate behind each head's."""
    if site.layout.fused or width == site.num_heads * site.head_dim:
        return site.rows().query
    return torch.arange(width, device="cpu").view(site.num_heads, -1)[:, : site.head_dim]


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows of an index, (heads, dim, ...): a view if they are contiguous, as they usually are."""
    return rows[_where(index)].view(*index.shape, *rows.shape[1:])


def _where(index: Tensor) -> slice | Tensor:
    """Return an index, flattened, as a slice if it is contiguous."""
    flat, start = index.flatten(), int(index[0, 0])
    run = torch.equal(flat, torch.arange(start, start + len(flat), device="cpu"))
    return slice(start, start + len(flat)) if run else flat


def _stacks(module: nn.Module, num_heads: int) -> dict[str, Tensor]:
    """Return per-head parameters as (num_heads, ...): one tensor over all heads, or one module per head stacked."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    listed = {name.partition(".")[2] for name in parameters if name.split(".")[0].isdigit()}
    if listed:
        return {f"*.{n}": torch.stack([parameters[f"{h}.{n}"] for h in range(num_heads)]) for n in listed}
    return {name: p.reshape(num_heads, -1) for name, p in parameters.items() if p.numel() % num_heads == 0}


def _unstack(name: str, merged: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name.startswith("*."):
        yield from ((f"{h}.{name[2:]}", row) for h, row in enumerate(merged))
    else:
        yield name, merged.flatten()
