"""Longer tables against their definitions, row by row."""

import pytest
import torch

from hf_attnpatch.functional.tables import METHODS, lengthened

TABLE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def _row(method, i, length):
    old, n = TABLE.double(), len(TABLE)
    if method == "tile":
        return old[i % n]
    if method == "hierarchical":
        first, second = ((old[k] - 0.4 * old[0]) / 0.6 for k in divmod(i, n))
        return 0.4 * first + 0.6 * second
    where = i * (n - 1) / (length - 1)
    low = min(int(where), n - 2)
    return old[low] + (where - low) * (old[low + 1] - old[low])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [6, 13, 25])
def test_rows_are_as_defined(method, length):
    found = lengthened(TABLE, length, method)
    wanted = torch.stack([_row(method, i, length) for i in range(length)])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
    if method != "interpolate":
        assert torch.equal(found[:5], TABLE)  # bitwise
    else:
        assert torch.equal(found[[0, -1]], TABLE[[0, -1]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_no_longer_is_the_same(method, dtype, rows):
    table = TABLE[:rows].to(dtype)
    found = lengthened(table, rows, method)
    assert torch.equal(found, table)
    assert found.data_ptr() != table.data_ptr()
    assert lengthened(TABLE.to(dtype), 9, method).dtype == dtype


def test_double_precision_is_kept():
    found = lengthened(TABLE.double(), 12, "interpolate")
    wanted = torch.stack([_row("interpolate", i, 12) for i in range(12)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_the_methods_are_those_of_the_docstring():
    assert all(f"``{method}`` " in lengthened.__doc__ for method in METHODS)


def test_all_rows_of_a_hierarchical_table_differ():
    found = lengthened(TABLE, 25, "hierarchical")
    assert len(torch.unique(found, dim=0)) == 25
