"""Shared keys, values and refits: optimal against data, brute force, SVD and least squares; exact where heads agree."""

import math

import pytest
import torch
from test_gauge import scores

from hf_attnpatch.functional.gauge import Frame, block_map, fixed, plane_map, random_gauge, rotary, unrotated
from hf_attnpatch.functional.merging import Sharing, calibrated_keys, calibrated_values, refit, roots

FRAMES = {
    "halves": rotary(6, 6, False),
    "interleaved": rotary(6, 6, True),
    "partial": rotary(8, 4, False),
    "partial interleaved": rotary(8, 4, True),
    "unrotated": unrotated(5),
}
TOKENS = 400


def data(members, dim, seed=0, tokens=TOKENS):
    """Correlated states (tokens, members, dim) with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(members * dim, members * dim, generator=generator, dtype=torch.float64)
    flat = torch.randn(tokens, members * dim, generator=generator, dtype=torch.float64) @ mix
    return (flat + 2 * torch.randn(members * dim, generator=generator, dtype=torch.float64)).view(tokens, members, dim)


def moments(keys, queries):
    """E[k k^T], E[k], E[q q^T] of (tokens, members, dim)."""
    return (
        torch.einsum("tia,tjb->iajb", keys, keys) / len(keys),
        keys.mean(0),
        torch.einsum("tja,tjb->jab", queries, queries) / len(queries),
    )


def stand_ins(found, keys):
    """What takes the place of each member's keys: a query q now reads reader q, so the score is q^T reader^T s."""
    shared = torch.einsum("jab,tjb->ta", found.shared, keys)
    return torch.einsum("jba,tb->tja", found.reader, shared)


def score_energy(frame, keys, queries):
    """Mean squared score of independent queries and keys, RoPE at every angle alike, constants left out; by loops."""
    total = 0.0
    for j in range(keys.shape[1]):
        for a, b in frame.planes.tolist():  # E (Re conj(c) z e^it)^2 over t is |c|^2 |z|^2 / 2
            c = queries[:, j, a].square().mean() + queries[:, j, b].square().mean()
            total += float(c * (keys[:, j, a].square().mean() + keys[:, j, b].square().mean())) / 2
        k, q = keys[:, j][:, frame.block], queries[:, j][:, frame.block]
        k = k - k.mean(0)
        total += float(((k.t() @ k / len(k)) * (q.t() @ q / len(q))).sum())
    return total


def lost(frame, found, keys, queries):
    return score_energy(frame, keys - stand_ins(found, keys), queries)


def perturbed(frame, found, size, generator):
    """Allowed maps near the given ones: a complex factor for each plane, a matrix for each block."""
    members, planes, block = len(found.shared), len(frame.planes), len(frame.block)

    def noise():
        phases = size * torch.randn(members, planes, 2, generator=generator, dtype=torch.float64)
        factors = plane_map(1 + torch.view_as_complex(phases), frame.planes, frame.dim)
        matrix = torch.eye(block, dtype=torch.float64) + size * torch.randn(
            members, block, block, generator=generator, dtype=torch.float64
        )
        return factors + block_map(matrix, frame.block, frame.dim)

    return Sharing(noise() @ found.shared, noise() @ found.reader)


@pytest.mark.parametrize("members", [2, 4])
@pytest.mark.parametrize("name", FRAMES)
def test_no_allowed_maps_keep_more_of_the_scores(name, members):
    """Against the data itself: 200 perturbations, small and large, of the shared key and of its readers."""
    frame = FRAMES[name]
    keys, queries = data(members, frame.dim), data(members, frame.dim, seed=1)
    found = calibrated_keys(frame, *moments(keys, queries))
    best = lost(frame, found, keys, queries)
    assert best > 1e-3 * score_energy(frame, keys, queries)  # there is something to lose
    generator = torch.Generator().manual_seed(2)
    for i in range(200):
        other = perturbed(frame, found, (0.01, 0.1, 1.0)[i % 3], generator)
        assert lost(frame, other, keys, queries) >= best * (1 - 1e-6)


@pytest.mark.parametrize("name", FRAMES)
def test_the_energy_is_the_share_of_the_scores_that_is_kept(name):
    frame = FRAMES[name]
    keys, queries = data(3, frame.dim), data(3, frame.dim, seed=1)
    found = calibrated_keys(frame, *moments(keys, queries))
    kept = 1 - lost(frame, found, keys, queries) / score_energy(frame, keys, queries)
    assert found.energy == pytest.approx(kept, abs=1e-6)


@pytest.mark.parametrize("name", FRAMES)
def test_better_than_the_first_key_and_the_mean(name):
    frame = FRAMES[name]
    keys, queries = data(3, frame.dim), data(3, frame.dim, seed=1)
    eye = torch.eye(frame.dim, dtype=torch.float64).expand(3, -1, -1)
    first = Sharing(torch.cat([eye[:1], 0 * eye[1:]]), eye)
    best = lost(frame, calibrated_keys(frame, *moments(keys, queries)), keys, queries)
    assert best < lost(frame, Sharing(eye / 3, eye), keys, queries)
    assert best < lost(frame, first, keys, queries)


def test_a_plane_of_real_numbers_is_an_svd():
    """With all second dimensions zero the plane is real, and the best rank one is that of the data's SVD."""
    frame, keys, queries = rotary(2, 2, False), data(4, 2), data(4, 2, seed=1)
    keys[..., 1] = 0
    found = calibrated_keys(frame, *moments(keys, queries))
    weights = queries.square().sum(-1).mean(0).sqrt()
    singular = torch.linalg.svdvals(keys[..., 0] * weights)
    assert found.energy == pytest.approx(float(singular[0] ** 2 / singular.square().sum()), rel=1e-9)


def test_a_block_is_an_svd_of_centred_weighted_keys():
    frame, keys, queries = unrotated(4), data(3, 4), data(3, 4, seed=1)
    found = calibrated_keys(frame, *moments(keys, queries))
    triangles = torch.linalg.cholesky(moments(keys, queries)[2])  # |L^T k| is the same as |Q^(1/2) k|
    weighted = torch.einsum("jba,tjb->tja", triangles, keys - keys.mean(0)).flatten(1)
    singular = torch.linalg.svdvals(weighted).square()
    assert found.energy == pytest.approx(float(singular[:4].sum() / singular.sum()), rel=1e-9)


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_keys_that_agree_up_to_allowed_transforms_share_one_exactly(name, spread):
    """Scores under RoPE, in loops, of three members whose keys are one key seen through random gauges."""
    frame = FRAMES[name]
    rotated, inside = 2 * len(frame.planes), "interleaved" in name
    generator = torch.Generator().manual_seed(3)
    common, queries = data(1, frame.dim), data(3, frame.dim, seed=1)
    gauges = [random_gauge(frame, generator, spread) for _ in range(3)]
    keys = torch.stack([common[:, 0] @ k.t() for k, _ in gauges], dim=1)
    queries = torch.stack([queries[:, j] @ q.t() for j, (_, q) in enumerate(gauges)], dim=1)
    found = calibrated_keys(frame, *moments(keys, queries))
    assert found.energy == pytest.approx(1, abs=1e-9)
    shared = torch.einsum("jab,tjb->ta", found.shared, keys)
    for j in range(3):
        wanted = (
            scores(queries[:6, j], keys[:6, j], rotated or 2, inside) if rotated else queries[:6, j] @ keys[:6, j].t()
        )
        read = queries[:6, j] @ found.reader[j].t()
        now = scores(read, shared[:6], rotated, inside) if rotated else read @ shared[:6].t()
        torch.testing.assert_close(now, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_constants_in_unrotated_keys_cost_nothing():
    """They add the same to all scores of a query, which no softmax sees."""
    frame, common, queries = unrotated(5), data(1, 5), data(3, 5, seed=1)
    keys = common + 10 * torch.randn(3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = calibrated_keys(frame, *moments(keys, queries))
    assert found.energy == pytest.approx(1, abs=1e-9)
    shared = torch.einsum("jab,tjb->ta", found.shared, keys)
    for j in range(3):
        wanted = (queries[:, j] @ keys[:, j].t()).softmax(-1)
        torch.testing.assert_close((queries[:, j] @ found.reader[j].t() @ shared.t()).softmax(-1), wanted)


@pytest.mark.parametrize("name", FRAMES)
def test_the_shared_key_is_as_large_as_its_members(name):
    """So that neither keys nor queries leave the range of bf16."""
    frame = FRAMES[name]
    keys, queries = 1e3 * data(3, frame.dim), 1e-4 * data(3, frame.dim, seed=1)
    keys = keys - keys.mean(0)
    found = calibrated_keys(frame, *moments(keys, queries))
    shared = torch.einsum("jab,tjb->ta", found.shared, keys).square().sum(-1).mean()
    assert float(shared / keys.square().sum(-1).mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("name", FRAMES)
def test_one_member_is_itself(name):
    frame = FRAMES[name]
    keys, queries = data(1, frame.dim), data(1, frame.dim, seed=1)
    found = calibrated_keys(frame, *moments(keys, queries))
    assert found.energy == pytest.approx(1)
    torch.testing.assert_close(stand_ins(found, keys), keys)


def test_what_averaging_loses_where_nothing_is_allowed():
    """Each dimension by the energy of what reads it: 1 - sum w E (k - mean)^2 / sum w E k^2."""
    frame, keys, queries = fixed(4), data(3, 4), data(3, 4, seed=1)
    weight = queries.square().mean(0)  # members, dimensions
    apart = (keys - keys.mean(1, keepdim=True)).square().mean(0)
    wanted = 1 - float((weight * apart).sum() / (weight * keys.square().mean(0)).sum())
    assert 0.01 < wanted < 0.99
    assert calibrated_keys(frame, *moments(keys, queries)).energy == pytest.approx(wanted)
    reading = torch.stack([torch.diag(w) for w in weight])
    assert calibrated_values(frame, moments(keys, keys)[0], reading).energy == pytest.approx(wanted)


def test_dimensions_that_allow_nothing_are_averaged():
    frame = Frame(torch.tensor([[0, 1]]), torch.empty(0, dtype=torch.int64), torch.tensor([2, 3]))
    keys, queries = data(3, 4), data(3, 4, seed=1)
    found = calibrated_keys(frame, *moments(keys, queries))
    shared = torch.einsum("jab,tjb->ta", found.shared, keys)
    torch.testing.assert_close(shared[:, 2:], keys[..., 2:].mean(1))
    torch.testing.assert_close(stand_ins(found, keys)[:, 1, 2:], shared[:, 2:])


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("which", ["keys", "queries", "both", "one key", "one query"])
def test_dead_heads_give_finite_maps(name, which):
    frame = FRAMES[name]
    keys, queries = data(3, frame.dim), data(3, frame.dim, seed=1)
    keys[:, {"one key": slice(1), "keys": slice(3), "both": slice(3)}.get(which, slice(0))] = 0
    queries[:, {"one query": slice(1), "queries": slice(3), "both": slice(3)}.get(which, slice(0))] = 0
    found = calibrated_keys(frame, *moments(keys, queries))
    assert found.shared.isfinite().all()
    assert (torch.einsum("jab,tjb->tja", found.reader, queries)).float().isfinite().all()
    assert math.isfinite(found.energy)
    assert lost(frame, found, keys, queries) <= score_energy(frame, keys, queries) + 1e-9


# values


def columns(members, dim, out=11, seed=5):
    """Output projections (members, out, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(members, out, dim, generator=generator, dtype=torch.float64)


def merged_values(values, weights):
    pairs = torch.einsum("tia,tjb->iajb", values, values) / len(values)
    return calibrated_values(unrotated(values.shape[-1]), pairs, weights.transpose(1, 2) @ weights)


def output_lost(found, values, weights):
    """Mean squared error of each member's part of the output, summed over members."""
    shared = torch.einsum("jab,tjb->ta", found.shared, values)
    now = torch.einsum("joa,jab,tb->tjo", weights, found.reader, shared)
    return float((torch.einsum("joa,tja->tjo", weights, values) - now).square().sum() / len(values))


@pytest.mark.parametrize("members", [2, 4])
def test_values_lose_what_the_svd_of_the_outputs_loses(members):
    values, weights = data(members, 4), columns(members, 4)
    found = merged_values(values, weights)
    outputs = torch.einsum("joa,tja->tjo", weights, values).flatten(1)
    singular = torch.linalg.svdvals(outputs).square() / len(values)
    assert output_lost(found, values, weights) == pytest.approx(float(singular[4:].sum()), rel=1e-6)
    assert found.energy == pytest.approx(float(singular[:4].sum() / singular.sum()), rel=1e-6)


def test_no_shared_value_gives_more_even_with_the_best_readers():
    """200 other shared values, each with the output projection that least squares gives it."""
    values, weights = data(3, 4), columns(3, 4)
    found = merged_values(values, weights)
    best, wanted = output_lost(found, values, weights), torch.einsum("joa,tja->tjo", weights, values).flatten(1)
    generator = torch.Generator().manual_seed(6)
    for i in range(200):
        noise = torch.randn(found.shared.shape, generator=generator, dtype=torch.float64)
        shared = torch.einsum("jab,tjb->ta", found.shared + (0.01, 0.3, 10.0)[i % 3] * noise, values)
        left = wanted - shared @ torch.linalg.lstsq(shared, wanted).solution
        assert float(left.square().sum() / len(values)) >= best * (1 - 1e-6)


@pytest.mark.parametrize("wide", [1, 3, 4])
def test_values_are_exact_where_the_rank_allows(wide):
    """Three members that see the same few numbers, each through a matrix of its own."""
    hidden = data(1, wide)[:, 0]
    mixes = torch.randn(3, 4, wide, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    values, weights = torch.einsum("jaw,tw->tja", mixes, hidden), columns(3, 4)
    found = merged_values(values, weights)
    total = float(torch.einsum("joa,tja->tjo", weights, values).square().sum() / len(values))
    assert output_lost(found, values, weights) < 1e-10 * total
    assert found.energy == pytest.approx(1, abs=1e-9)


def test_the_shared_value_is_as_large_as_its_members():
    values, weights = 1e3 * data(3, 4), 1e-4 * columns(3, 4)
    shared = torch.einsum("jab,tjb->ta", merged_values(values, weights).shared, values).square().sum(-1).mean()
    assert float(shared / values.square().sum(-1).mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dead", ["values", "weights", "one value", "one weight"])
def test_dead_values_give_finite_maps(dead):
    values, weights = data(3, 4), columns(3, 4)
    if "value" in dead:
        values[:, : 3 if dead == "values" else 1] = 0
    else:
        weights[: 3 if dead == "weights" else 1] = 0
    found = merged_values(values, weights)
    assert found.shared.isfinite().all()
    assert (weights @ found.reader).float().isfinite().all()
    assert math.isfinite(found.energy)
    assert (
        output_lost(found, values, weights) <= float((weights @ values[..., None]).square().sum() / len(values)) + 1e-9
    )


# refits and roots


@pytest.mark.parametrize("tokens", [TOKENS, 40])
def test_the_refit_is_least_squares_on_the_raw_data(tokens):
    heads, wanted = data(2, 4, tokens=tokens).flatten(1), data(3, 4, seed=8, tokens=tokens).flatten(1)
    weight = columns(1, 8, out=12)[0]
    residual = wanted - heads @ weight.t()
    more = refit(heads.t() @ heads, residual.t() @ heads, ridge=1e-13)
    solution = torch.linalg.lstsq(heads, wanted).solution.t()
    torch.testing.assert_close(weight + more, solution, rtol=1e-6, atol=1e-8)


def test_the_ridge_is_that_of_the_textbook():
    heads, residual = data(2, 4).flatten(1), data(3, 4, seed=8).flatten(1)
    penalty = (0.1 * heads.square().sum(0).mean()).sqrt() * torch.eye(8, dtype=torch.float64)
    augmented = torch.cat([heads, penalty]), torch.cat([residual, residual.new_zeros(8, 12)])
    wanted = torch.linalg.lstsq(*augmented).solution.t()
    torch.testing.assert_close(refit(heads.t() @ heads, residual.t() @ heads, ridge=0.1), wanted)


def test_a_refit_never_makes_the_output_worse():
    """Heads of too low a rank and fewer tokens than heads are wide: nothing is divided by zero, nothing gets worse."""
    heads = data(2, 4, tokens=5).flatten(1)
    heads[:, 4:] = heads[:, :4]
    residual = data(3, 4, seed=8, tokens=5).flatten(1)
    more = refit(heads.t() @ heads, residual.t() @ heads)
    assert more.isfinite().all()
    assert (residual - heads @ more.t()).square().sum() < residual.square().sum()
    assert torch.equal(refit(torch.zeros(8, 8).double(), torch.zeros(12, 8).double()), torch.zeros(12, 8).double())


def test_roots_are_roots():
    states = data(2, 4)
    for matrix in moments(states, states)[2]:
        root, inverse = roots(matrix)
        torch.testing.assert_close(root @ root, matrix, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(root @ inverse, torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(root, root.t())


def test_energy_that_was_not_measured_is_no_number():
    """As where heads were averaged without any text: 0 would say that nothing was kept."""
    assert math.isnan(Sharing(torch.eye(2)[None], torch.eye(2)[None]).energy)
