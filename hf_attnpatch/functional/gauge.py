"""Linear transforms of a head's queries, keys and values that leave attention unchanged.

Where nothing rotates, keys and queries may be multiplied by any invertible matrix and its inverse transpose; where RoPE
rotates, by one complex number per plane, which commutes with the rotation. RoPE never touches values: any invertible
matrix, undone by the output projection. A :class:`Frame` tells which dimensions are of which kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """The dimensions of a head by their allowed transforms.

    Attributes:
        planes: (number of planes, 2), the pairs of dimensions that RoPE rotates, each free up to a complex factor.
        block: (size,), dimensions that nothing rotates, free up to an invertible matrix.
        fixed: (size,), dimensions for which no transform is known.
    """

    planes: Tensor
    block: Tensor
    fixed: Tensor

    @property
    def dim(self) -> int:
        """Dimensions of the head."""
        return self.planes.numel() + self.block.numel() + self.fixed.numel()


def unrotated(dim: int) -> Frame:
    """Return the frame of a head without rotation: values in general; keys with learned positions, ALiBi or none."""
    return Frame(_none().view(0, 2), _range(0, dim), _none())


def fixed(dim: int) -> Frame:
    """Return the frame of a head for which no transform is known."""
    return Frame(_none().view(0, 2), _none(), _range(0, dim))


def rotary(dim: int, rotated: int, interleaved: bool) -> Frame:
    """Return the frame of a head whose first ``rotated`` dimensions RoPE rotates.

    Args:
        dim: of the head.
        rotated: even; partial rotary leaves the other dimensions alone.
        interleaved: pairs (0, 1), (2, 3) ... as GPT-J has them, instead of (p, p + rotated / 2) as Llama has.
    """
    first = _range(0, rotated)
    planes = first.view(-1, 2) if interleaved else first.view(2, -1).t()
    return Frame(planes, _range(rotated, dim), _none())


def complex_planes(moments: Tensor, planes: Tensor) -> Tensor:
    """Return second moments of complex plane coordinates z = k[first] + i k[second].

    Args:
        moments: real second moments E[k_a k_b], (heads, dim, heads, dim).
        planes: (number of planes, 2).

    Returns:
        E[z_a conj(z_b)] of each plane, (planes, heads, heads), complex.
    """
    x, y = planes[:, 0], planes[:, 1]
    xx, yy, yx, xy = (moments[:, a, :, b] for a, b in ((x, x), (y, y), (y, x), (x, y)))  # (planes, heads, heads) each
    return torch.complex(xx + yy, yx - xy)


def plane_map(factors: Tensor, planes: Tensor, dim: int) -> Tensor:
    """Return the real matrices (..., dim, dim) that multiply each plane by a complex factor (..., planes).

    Other dimensions are mapped to zero.
    """
    out = factors.real.new_zeros(*factors.shape[:-1], dim, dim)
    x, y = planes[:, 0], planes[:, 1]
    out[..., x, x] = out[..., y, y] = factors.real
    out[..., y, x], out[..., x, y] = factors.imag, -factors.imag
    return out


def block_map(matrices: Tensor, block: Tensor, dim: int) -> Tensor:
    """Return (..., dim, dim) with ``matrices`` (..., size, size) on the dimensions of ``block``, zero elsewhere."""
    out = matrices.new_zeros(*matrices.shape[:-2], dim, dim)
    out[..., block[:, None], block[None, :]] = matrices
    return out


def random_gauge(frame: Frame, generator: torch.Generator, spread: float = 0.5) -> tuple[Tensor, Tensor]:
    """Draw an allowed transform of keys, and the transform of queries that undoes it.

    Args:
        frame: of the head.
        generator: of random numbers.
        spread: standard deviation of the logarithm of the factors; 0 draws unit phases and orthogonal matrices.

    Returns:
        (dim, dim) maps of keys and of queries in float64; their product, one transposed, is the identity.
    """
    phases = 6.283185307179586 * _uniform(len(frame.planes), generator)
    sizes = (spread * torch.randn(len(frame.planes), generator=generator, dtype=torch.float64)).exp()
    size = frame.block.numel()
    u, _, v = torch.linalg.svd(torch.randn(size, size, generator=generator, dtype=torch.float64))
    scales = (spread * torch.randn(size, generator=generator, dtype=torch.float64)).exp()
    keep = torch.eye(len(frame.fixed), dtype=torch.float64)
    rest = block_map(keep, frame.fixed, frame.dim)
    key = plane_map(torch.polar(sizes, phases), frame.planes, frame.dim) + rest
    query = plane_map(torch.polar(1 / sizes, phases), frame.planes, frame.dim) + rest
    return key + block_map((u * scales) @ v, frame.block, frame.dim), query + block_map(
        (u / scales) @ v, frame.block, frame.dim
    )


def _uniform(size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _range(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, device="cpu")


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")
