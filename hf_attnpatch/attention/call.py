"""One call of attention, as a module makes it: the only place that knows how transformers passes its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import AttnPatchError
from ..upstream import words
from ..upstream.calls import looks_back

Output = tuple[Tensor, Tensor | None]  # (batch, q, heads, d_v), and attention weights or None


class AttentionCall:
    """What one attention module asks of its kernel.

    Args:
        kernel: that computes it, by transformers' name: ``sdpa``, say.
        module: that asks.
        query: (batch, heads, q, d).
        key: (batch, kv heads, k, d).
        value: (batch, kv heads, k, d_v).
        mask: an attention mask in the kernel's form, made by :mod:`.masks` or the caller's own; or None.
        given: the other keywords, under the names of :mod:`hf_attnpatch.upstream.words`.
        term: added to the scores where the module's own wrappers do not say what is; see :class:`.wrapper.Term`.
    """

    def __init__(
        self,
        kernel: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        given: Mapping[str, Any],
        term: Any = None,
    ):  # no dataclass: torch.compile builds this one
        self.kernel, self.module, self.mask, self.given, self.term = kernel, module, mask, given, term
        self.query, self.key, self.value = query, key, value

    def but(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> AttentionCall:
        """Return the call with other states or keywords."""
        states = (self.query if query is None else query, self.key if key is None else key)
        value, given = self.value if value is None else value, self.given if given is None else given
        return AttentionCall(self.kernel, self.module, *states, value, self.mask, given, self.term)

    def masked(self, mask: Any) -> AttentionCall:
        """Return the call with another mask, which may be None."""
        states = (self.query, self.key, self.value)
        return AttentionCall(self.kernel, self.module, *states, mask, self.given, self.term)

    @property
    def scale(self) -> float:
        """What scores are multiplied by: one over the root of the head's width unless given."""
        given = self.given.get(words.SCALING)
        return self.query.shape[-1] ** -0.5 if given is None else float(given)

    @property
    def causal(self) -> bool:
        """Whether queries look back only: what is passed, else what the module says, else yes."""
        return looks_back(self.module, self.given.get(words.IS_CAUSAL))

    @property
    def dropout(self) -> float:
        """Probability of dropping an attention weight."""
        return self.given.get(words.DROPOUT) or 0.0

    def refuse(self, what: str, *names: str) -> None:
        """Refuse keywords that this kernel cannot compute together with ``what``.

        Raises:
            AttnPatchError: one of ``names`` is given.
        """
        for name in names:
            if not (self.given.get(name) is None or (name == words.DROPOUT and not self.given[name])):
                raise AttnPatchError(
                    f"{type(self.module).__name__} passes {name} to its attention, which this kernel cannot compute "
                    f"together with {what}; backend='eager' takes softcap, s_aux and position_bias."
                )
