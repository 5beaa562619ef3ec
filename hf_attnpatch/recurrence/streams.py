"""Streams: carry the memory of a model across calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import AttnPatchError
from ..interruption import complete
from .memory import Memory
from .modules import MemoryHook, recalling_of
from .state import check_state


class Stream(contextlib.ExitStack):
    """A memory that is carried across calls within its ``with`` block; see :func:`stream`."""

    def __init__(self, hook: MemoryHook, memory: Memory):
        super().__init__()
        self._hook, self._memory = hook, memory

    def __enter__(self) -> Stream:
        if self._hook.stream is not None:
            raise AttnPatchError(
                "this thread has an open stream on the model; its rows would be mixed up with those of another."
            )
        try:
            for _ in range(2):  # twice: the stack continues if one is interrupted, which an `__exit__` here could not
                self.callback(complete, self._close)
            self._hook.open(self._memory)
            return self
        except BaseException:
            complete(self._close)
            raise

    def _close(self) -> None:
        self._hook.close(self._memory)

    def reset(self, rows: Iterable[int] | Tensor | None = None) -> None:
        """Start another document in some rows.

        Args:
            rows: indices, or bool of shape (batch,); None for all, after which the batch may have another size.

        Raises:
            AttnPatchError: there is no such row.
        """
        self._memory.reset(rows)

    @property
    def tokens(self) -> list[int]:
        """How many tokens each row has read since its document began."""
        return [int(n) for n in self._memory.count]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the memory as named tensors; together with the model's, all that a resumed run needs."""
        return {**self._memory.state_dict(), "segments": self._sizes}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the result of :meth:`state_dict`.

        Raises:
            AttnPatchError: not a state, or one of other segments, another memory or another model.
        """
        state = check_state(state)
        found, layers = state.get("segments"), sum(name.endswith(".k") and name[0].isdigit() for name in state)
        if found is None or found.tolist() != self._sizes.tolist() or layers not in (0, self._hook.layers):
            said = "no sizes" if found is None else f"segments, memory and sinks of {found.tolist()}, {layers} layers"
            raise AttnPatchError(
                f"the state has {said}; this model has {self._sizes.tolist()}, {self._hook.layers} layers: load what a "
                "stream of the same model returned."
            )
        self._memory.load_state_dict(state)

    @property
    def _sizes(self) -> Tensor:
        cut = self._hook.segments
        return torch.tensor([cut.length, cut.memory, cut.sinks])


def stream(model: nn.Module) -> Stream:
    """Carry the memory of a model with segment recurrence across calls.

    Experimental: its arguments may get other names or defaults between minor versions.

    ``with ap.stream(model) as stream:`` every call continues where the last one stopped, row by row, at any length;
    ``stream.reset([2])`` starts another document in row 2. Padding goes after a document. Within the block the memory
    may be left and entered again. A stream belongs to the thread that opens it: other threads may open their own, and
    cannot run the model without one.

    Args:
        model: patched by ``patch_segment_recurrence``; wrappers (DDP, PEFT) are unwrapped.

    Raises:
        AttnPatchError: the model has no memory, or more than one.
    """
    found = [hook for module in model.modules() if (hook := recalling_of(module)) is not None]
    if len(found) != 1:
        raise AttnPatchError(
            f"{type(model).__name__}: {len(found)} of its modules have a memory, wanted one; apply "
            "patch_segment_recurrence first."
        )
    return Stream(found[0], Memory())
