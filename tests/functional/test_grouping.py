"""Merging and replicating heads against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import LOOPS

from hf_attnpatch.functional.grouping import METHODS, group_heads, replicate_heads, resize_heads

DTYPES = (torch.float64, torch.float32)


def loops(rows, num_groups, method):
    """Head by head and row by row, in Python's own numbers."""
    members = rows.shape[0] // num_groups
    heads = rows.double().tolist()
    merged = []
    for group in range(num_groups):
        inside = heads[group * members : (group + 1) * members]
        merged.append([_merge([head[r] for head in inside], method) for r in range(rows.shape[1])])
    return torch.tensor(merged, dtype=torch.float64)


def _merge(rows, method):
    if method == "first":
        return rows[0]
    if not isinstance(rows[0], list):
        return sum(rows) / len(rows)
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    if method == "mean":
        return mean
    wanted = sum(sum(x * x for x in row) ** 0.5 for row in rows) / len(rows)
    found = sum(x * x for x in mean) ** 0.5
    return [x * wanted / found for x in mean] if found else mean


@settings(max_examples=60)
@given(
    groups=st.integers(1, 4),
    members=st.integers(1, 4),
    dim=st.integers(1, 5),
    width=st.integers(0, 6),
    method=st.sampled_from(METHODS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_merging_is_what_plain_loops_do(groups, members, dim, width, method, dtype, seed):
    shape = (groups * members, dim, *([width] if width else []))  # without a width: a bias
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    found = group_heads(rows, groups, method)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), loops(rows, groups, method), rtol=0, atol=LOOPS[dtype])


def test_opposite_heads_have_no_direction_to_restore():
    row = torch.full((1, 2, 3), 100.0)
    assert not group_heads(torch.cat([row, -row]), 1, "mean_rescaled").any()


def test_half_precision_is_rounded_once():
    rows = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found, wanted = group_heads(rows, 2, "mean_rescaled"), loops(rows, 2, "mean_rescaled")
    assert found.dtype == torch.bfloat16
    assert ((found.double() - wanted).abs() <= 1.01 * 2**-8 * wanted.abs()).all()  # half of its last bit


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_merge_returns_the_very_rows(method):
    rows = torch.randn(4, 3, 5)
    assert group_heads(rows, 4, method) is rows
    assert resize_heads(rows, 4, method) is rows


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2])
def test_equal_heads_merge_to_themselves(method, groups):
    head = torch.randn(1, 3, 5, dtype=torch.float64)
    found = group_heads(head.repeat(4, 1, 1), groups, method)
    torch.testing.assert_close(found, head.expand(groups, 3, 5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_shares_no_memory(method):
    rows = torch.randn(4, 3, 5)
    before = rows.clone()
    group_heads(rows, 2, method).zero_()
    assert torch.equal(rows, before)


def test_rescaling_restores_the_mean_norm_of_every_row():
    rows = torch.randn(6, 4, 7, dtype=torch.float64)
    found = group_heads(rows, 2, "mean_rescaled").norm(dim=-1)
    torch.testing.assert_close(found, rows.norm(dim=-1).view(2, 3, 4).mean(1))
    assert (group_heads(rows, 2, "mean").norm(dim=-1) < found).all()


def test_opposite_heads_do_not_divide_by_zero():
    rows = torch.randn(1, 3, 5)
    assert torch.equal(group_heads(torch.cat([rows, -rows]), 1, "mean_rescaled"), torch.zeros(1, 3, 5))


def test_bf16_is_merged_in_fp32():
    rows = torch.full((4, 1, 1), 1.0, dtype=torch.bfloat16)
    rows[0] = 256.0  # 256 + 1 is 256 in bf16: a sum in bf16 would be 64
    assert group_heads(rows, 1, "mean").item() == torch.tensor(64.75).to(torch.bfloat16).item() != 64.0


@settings(max_examples=30)
@given(kv=st.integers(1, 4), repeats=st.integers(1, 4), dim=st.integers(1, 4), method=st.sampled_from(METHODS))
def test_replicating_follows_repeat_kv_and_merging_takes_it_back(kv, repeats, dim, method):
    from transformers.models.llama.modeling_llama import repeat_kv

    rows = torch.randn(kv, dim, 3, dtype=torch.float64)
    found = replicate_heads(rows, kv * repeats)
    assert torch.equal(found, repeat_kv(rows[None], repeats)[0])
    torch.testing.assert_close(resize_heads(found, kv, method), rows, rtol=1e-12, atol=0)
    assert torch.equal(resize_heads(rows, kv * repeats, method), found)


@pytest.mark.parametrize(("heads", "groups"), [(4, 3), (4, 8), (5, 2)])
def test_counts_that_do_not_divide_are_a_bug_of_the_caller(heads, groups):
    with pytest.raises(AssertionError):
        group_heads(torch.zeros(heads, 1, 1), groups, "mean")
