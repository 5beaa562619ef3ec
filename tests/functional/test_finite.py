"""One pass says whether numbers are finite, as torch's `isfinite` says it."""

from __future__ import annotations

import pytest
import torch

from hf_attnpatch.functional.finite import all_finite

WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.0])
@pytest.mark.parametrize("place", [0, 7, 16])
def test_as_isfinite_says(dtype, value, place):
    tensor = torch.randn(3, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[1, place] = value
    assert all_finite(tensor) == bool(tensor.isfinite().all())
    assert all_finite(tensor.t()) == bool(tensor.isfinite().all())


def test_the_largest_finite_numbers_are_finite():
    assert all(all_finite(torch.full((2, 2), torch.finfo(dtype).max, dtype=dtype)) for dtype in WIDE)


@pytest.mark.parametrize(("value", "fine"), [(float("nan"), False), (3.0, True)])
def test_eight_bits(value, fine):
    assert all_finite(torch.tensor([1.0, value]).to(torch.float8_e4m3fn)) is fine


@pytest.mark.parametrize("tensor", [torch.empty(0), torch.empty(2, 0), torch.arange(3), torch.tensor([True])])
def test_nothing_and_whole_numbers(tensor):
    assert all_finite(tensor)


def test_parameters_that_train():
    assert not all_finite(torch.nn.Parameter(torch.tensor([float("nan")])))
