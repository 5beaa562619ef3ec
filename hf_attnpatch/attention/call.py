"""One attention call: the only place with the signature of transformers' attention functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import AttnPatchError
from ..upstream import words
from ..upstream.calls import looks_back

Output = tuple[Tensor, Tensor | None]  # (batch, q, heads, d_v), and attention weights or None


class AttentionCall:
    """The arguments of one attention call.

    Args:
        kernel: transformers' name of the kernel, such as ``sdpa``.
        module: the attention module that makes the call.
        query: (batch, heads, q, d).
        key: (batch, kv heads, k, d).
        value: (batch, kv heads, k, d_v).
        mask: the attention mask in the kernel's form, from :mod:`.masks` or from the caller; or None.
        given: the other keyword arguments, under the names of :mod:`hf_attnpatch.upstream.words`.
        term: a term to add to the scores, where it is not one of the module's wrappers; see :class:`.wrapper.Term`.
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
    ):  # not a dataclass, so that torch.compile can construct it
        self.kernel, self.module, self.mask, self.given, self.term = kernel, module, mask, given, term
        self.query, self.key, self.value = query, key, value

    def but(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> AttentionCall:
        """Return the call with other queries, keys, values or keyword arguments."""
        states = (self.query if query is None else query, self.key if key is None else key)
        value, given = self.value if value is None else value, self.given if given is None else given
        return AttentionCall(self.kernel, self.module, *states, value, self.mask, given, self.term)

    def masked(self, mask: Any) -> AttentionCall:
        """Return the call with another mask, or with none."""
        states = (self.query, self.key, self.value)
        return AttentionCall(self.kernel, self.module, *states, mask, self.given, self.term)

    @property
    def scale(self) -> float:
        """The factor on the scores: as given, else 1 / sqrt(head_dim)."""
        given = self.given.get(words.SCALING)
        return self.query.shape[-1] ** -0.5 if given is None else float(given)

    @property
    def causal(self) -> bool:
        """Whether attention is causal: as given, else what the module says, else True."""
        return looks_back(self.module, self.given.get(words.IS_CAUSAL))

    @property
    def dropout(self) -> float:
        """The probability of dropping an attention weight."""
        return self.given.get(words.DROPOUT) or 0.0

    def refuse(self, what: str, *names: str) -> None:
        """Refuse keyword arguments that this kernel cannot compute together with ``what``.

        Raises:
            AttnPatchError: one of ``names`` was passed.
        """
        for name in names:
            if not (self.given.get(name) is None or (name == words.DROPOUT and not self.given[name])):
                raise AttnPatchError(
                    f"{type(self.module).__name__} passes {name} to its attention, which this kernel cannot compute "
                    f"together with {what}; backend='eager' takes softcap, s_aux and position_bias."
                )
