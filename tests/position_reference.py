"""Models of fourteen families with their attention written out and their positions given from outside, in fp64.

Only the projections, norms and feed-forward parts are transformers'. Nothing of how the package takes positions out or
puts them in is used: tables are zeroed, attention is the formula, angles are complex numbers, biases are matrices.
"""

import copy
import functools
import math

import torch

import hf_attnpatch as ap

PRESCALED = ("opt", "xglm")  # these hand scaled queries to their attention


def sinusoid(places, width):
    """Attention Is All You Need, section 3.5, entry by entry."""
    table = torch.zeros(*places.shape, width, dtype=torch.float64)
    for i in range(width):
        angle = places.double() / 10000 ** (2 * (i // 2) / width)
        table[..., i] = angle.sin() if i % 2 == 0 else angle.cos()
    return table


def slopes(heads):
    """ALiBi's, for a power of two."""
    return torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64)


def rotate(states, places, theta, width, interleaved):
    """RoPE as multiplication of complex numbers; states (batch, length, heads, d)."""
    spin = places.double()[..., None] * theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    spin = torch.polar(torch.ones_like(spin), spin)[:, :, None]
    part = states[..., :width]
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else torch.stack(part.chunk(2, -1), -1)
    spun = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * spin)
    whole = spun.flatten(-2) if interleaved else torch.cat(spun.unbind(-1), -1)
    return torch.cat([whole, states[..., width:]], -1)


def rotary_of(model):
    """Rotated dimensions of a head, and whether neighbours are pairs; all of the head where the family has no RoPE."""
    config = model.config
    if config.model_type in ("gptj", "codegen"):
        return config.rotary_dim, True
    head = ap.describe(model).sites[0].head_dim
    if config.model_type == "gpt_neox":
        return int(head * config.rope_parameters["partial_rotary_factor"]), False
    return head, False


def logits(model, ids, scheme, *, keep=None, places=None, theta=10000.0, table=None, terms=None):
    """What the model computes with these positions and no others.

    Args:
        model: of transformers, unpatched.
        ids: (batch, length).
        scheme: ``rotary``, ``alibi``, ``sinusoidal``, ``none``, ``relative``, ``table`` (the rows of ``table`` are
            added to the embeddings) or ``own table``.
        keep: (batch, length), bool: tokens that are no padding.
        places: positions, (batch or 1, length); counted by default.
        theta: of rotary positions.
        table: (rows, width).
        terms: path of each attention module -> Transformer-XL's u, v and W, (heads, d), (heads, d), (heads, d, size).
    """
    twin = copy.deepcopy(model).double()
    anatomy = ap.describe(twin)
    places = torch.arange(ids.shape[1])[None] if places is None else places
    if scheme != "own table":
        for path in anatomy.tables:
            for tensor in (*twin.get_submodule(path).parameters(), *twin.get_submodule(path).buffers()):
                tensor.data.zero_()
    for site in anatomy.sites:
        forward = functools.partial(
            _attention, twin.get_submodule(site.path), twin, site, scheme, places, keep, theta, rotary_of(model)
        )
        if scheme == "relative":
            forward.keywords["terms"] = terms[site.path]
        twin.get_submodule(site.path).forward = forward
    embeddings = twin.get_input_embeddings()(ids)
    if scheme == "sinusoidal":
        embeddings = embeddings + sinusoid(places, embeddings.shape[-1])
    if scheme == "table":
        embeddings = embeddings + table.double()[places]
    given = {"position_ids": places.expand_as(ids)} if scheme == "own table" and anatomy.max_positions else {}
    with torch.no_grad():
        return twin(inputs_embeds=embeddings, **given).logits


def distant(query, key, u, v, weight):
    """Transformer-XL's u k + (q + v) W R(i - j) for (batch, length, heads, d), distance by distance."""
    length, size = query.shape[1], weight.shape[-1]
    spin = torch.arange(-length + 1, length).double()[:, None] / 10000 ** (torch.arange(0, size, 2).double() / size)
    known = torch.einsum("hds,ns->nhd", weight.double(), torch.cat([spin.sin(), spin.cos()], -1))
    gaps = torch.arange(length)[:, None] - torch.arange(length) + length - 1
    by_place = torch.einsum("bqhd,qkhd->bhqk", query + v.double(), known[gaps])
    return by_place + torch.einsum("hd,bkhd->bhk", u.double(), key)[:, :, None]


def _attention(module, model, site, scheme, places, keep, theta, rotary, hidden_states, *args, terms=None, **kwargs):
    layout = site.layout
    parts = [module.get_submodule(p)(hidden_states) for p in (layout.query, layout.key, layout.value)]
    query, key, value = (part[..., rows] for part, rows in zip(parts, site.rows(), strict=True))
    if scheme == "rotary":
        query, key = (rotate(states, places, theta, *rotary) for states in (query, key))
    scale = 1.0 if model.config.model_type == "gpt_neo" else 1 / math.sqrt(site.head_dim)
    groups = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(groups, 2) for t in (key, value))
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    length = torch.arange(hidden_states.shape[1])
    if scheme == "relative":
        u, v, weight = terms
        if model.config.model_type in PRESCALED:  # what is added to queries is added to scaled ones
            u, v = u / scale, v / scale
        scores = scores + scale * distant(query, key, u, v, weight)
    if scheme == "alibi":
        bias = slopes(query.shape[2])[:, None, None] * (length[:, None] - length).abs()
        scores = scores - bias
    if site.causal is not False:
        scores = scores.masked_fill(length[:, None] < length, -torch.inf)
    if getattr(module, "attention_type", "") == "local":  # GPT-Neo
        scores = scores.masked_fill(length[:, None] - length >= model.config.window_size, -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -1e30)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
    if site.output.startswith(site.path + "."):
        out = model.get_submodule(site.output)(out)
    if model.config.model_type == "bloom":  # adds the residual itself
        out = out + args[0]
    return out, None
