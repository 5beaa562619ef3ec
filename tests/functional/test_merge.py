"""Merged attention against attention over all keys at once."""

import pytest
import torch

from hf_attnpatch.functional import reference
from hf_attnpatch.functional.merge import merge


def _pair(query, key, value, dtype):
    """Attention over some keys, and the log of the sum of its exponentiated scores."""
    out, _ = reference.attention(query, key, value, scale=0.3)
    return out.to(dtype), (0.3 * query.double() @ key.double().mT).logsumexp(-1).float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_sets_of_keys_are_as_one(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, generator=generator) * 2 for n in (4, 9, 9))
    parts = [_pair(query, key[:, :, some], value[:, :, some], dtype) for some in (slice(0, 2), slice(2, None))]
    out, total = merge(*parts)
    wanted, log = _pair(query, key, value, dtype)
    assert out.dtype == dtype
    assert total.dtype == torch.float32
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    torch.testing.assert_close(total, log, rtol=0, atol=1e-5)


def test_what_sees_no_key_counts_nothing():
    some, none = torch.ones(1, 2, 3), torch.full((1, 2, 3), 7.0)
    empty = torch.full((1, 2), -torch.inf)
    for pairs in (((some, torch.zeros(1, 2)), (none, empty)), ((none, empty), (some, torch.zeros(1, 2)))):
        out, total = merge(*pairs)
        assert torch.equal(out, some)
        assert torch.equal(total, torch.zeros(1, 2))
    out, total = merge((none, empty), (none, empty))
    assert not out.any()
    assert torch.equal(total, empty)
