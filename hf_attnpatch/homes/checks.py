"""What patches that need a home ask of their arguments and of a model."""

from __future__ import annotations

from ..anatomy import Anatomy
from ..errors import AttnPatchError, UnsupportedArchitecture
from .rows import HOMES

_MOST = 4096  # layers


def checked_layers(layers: object) -> tuple[int, ...] | None:
    """Return numbers of layers, sorted, or None.

    Raises:
        AttnPatchError: they are no list of whole numbers from 0, each once.
    """
    if layers is None:
        return None
    found = tuple(layers) if isinstance(layers, (list, tuple, range)) else ()
    if not found or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < _MOST for n in found):
        raise AttnPatchError(
            f"layers is {layers!r}; give a list of layer numbers from 0, such as [0, 2], or None for all."
        )
    if len(set(found)) != len(found):
        raise AttnPatchError(f"layers is {list(found)}, which names one twice.")
    return tuple(sorted(found))


def named(home: object) -> None:
    """Refuse what is no home.

    Raises:
        AttnPatchError: so, with the ones there are.
    """
    choices = ("auto", *(row.model_type for row in HOMES))
    if home is not None and home not in choices:
        raise AttnPatchError(f"home is {home!r}; choose from: {', '.join(choices)}, or None.")


def rotary_alone(anatomy: Anatomy) -> None:
    """Refuse models that know positions otherwise than by rotary modules; no home says how.

    Raises:
        UnsupportedArchitecture: so.
    """
    if (
        anatomy.positions != "rotary"
        or anatomy.turned
        or anatomy.inner
        or any(s.cross or s.tower for s in anatomy.sites)
    ):
        raise UnsupportedArchitecture(f"{anatomy.architecture}: positions here are: {anatomy.positions}")
