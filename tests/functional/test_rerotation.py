"""States turned further, plane by plane in Python's complex numbers; with gradients and, some at a time, without."""

import cmath

import pytest
import torch

from hf_attnpatch.functional import rerotation
from hf_attnpatch.functional.rerotation import RotaryPlanes

FREQUENCIES = torch.tensor([1.0, 0.1, 0.01])
BY = torch.tensor([[0.0, 3.0, -7.0, 100.5, 5.0, 11.0, 2.0], [1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0]])


def states(width, dtype=torch.float32):
    return torch.randn(2, 3, 9, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def turned(given, by, interleaved, first, count):
    """The first ``count`` states by so many positions, (batch, n), the others as they are; fp64."""
    found = given.double().clone()
    for row in range(2):
        for n in range(count):
            for p, frequency in enumerate(FREQUENCIES.double().tolist()):
                a, b = (first + 2 * p, first + 2 * p + 1) if interleaved else (first + p, first + p + 3)
                for head in range(3):
                    z = complex(given[row, head, n, a], given[row, head, n, b])
                    z *= cmath.exp(1j * frequency * float(by[row, n]))
                    found[row, head, n, a], found[row, head, n, b] = z.real, z.imag
    return found


SHAPES = pytest.mark.parametrize(("width", "first"), [(6, 0), (8, 0), (8, 2), (9, 1)])
PAIRS = pytest.mark.parametrize("interleaved", [False, True])


@SHAPES
@PAIRS
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_turned_by_a_number_of_positions(width, first, interleaved, rows, dtype):
    turning, given = RotaryPlanes(FREQUENCIES, interleaved, first), states(width, dtype)[:, :, :7]
    by = BY if rows == 2 else BY[0]
    table = turning.table(by, dtype)
    assert table[0].dtype == table[1].dtype == torch.promote_types(dtype, torch.float32)
    found = turning.turn(given, table)
    wanted = turned(given, BY if rows == 2 else BY[:1].expand(2, -1), interleaved, first, 7)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype), rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


@SHAPES
@PAIRS
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("count", [0, 1, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_states_alone(width, first, interleaved, rows, gradients, count, dtype, monkeypatch):
    monkeypatch.setattr(rerotation, "_BLOCK", 3)
    turning, given = RotaryPlanes(FREQUENCIES, interleaved, first), states(width, dtype)
    kept, by = given.clone(), (BY if rows == 2 else BY[0])[..., :count]
    with torch.set_grad_enabled(gradients):
        found = turning.turn_first(given, turning.table(by, dtype))
    wanted = turned(given, BY if rows == 2 else BY[:1].expand(2, -1), interleaved, first, count)
    assert found.dtype == dtype
    assert found.shape == given.shape
    torch.testing.assert_close(found, wanted.to(dtype), rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(found[:, :, count:], given[:, :, count:])
    assert torch.equal(given, kept)


def test_blocks_of_their_usual_size_without_gradients():
    turning, given = RotaryPlanes(FREQUENCIES), torch.randn(1, 1, 600, 6)
    table = turning.table(torch.arange(520))
    with torch.no_grad():
        found = turning.turn_first(given, table)
    torch.testing.assert_close(found, turning.turn_first(given, table), rtol=0, atol=1e-6)
