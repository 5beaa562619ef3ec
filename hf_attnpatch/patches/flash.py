"""A fused attention kernel in the place of an eager one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..backends import FLAG, Candidate, obstacle, ranked
from ..edits import SetAttention
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..patch import Patch, Proposal
from ..probe import Inputs, default_inputs, trace, trial

# what transformers takes for a repository of the kernels hub: owner/name, then a revision and a function if wanted
_REPOSITORY = re.compile(r"^[^/:@\s]+/[^/:@\s]+(?:@[^/:\s]+)?(?::[^/:\s]+)?$")


@dataclass(frozen=True, kw_only=True)
class Flash(Patch):
    """Use a fused kernel that this machine, dtype and model allow, after proving that the logits stay.

    ``auto`` takes the first backend, in the order of :func:`hf_attnpatch.backends.ranked`, that runs here and agrees
    with the model's present attention on a probe; the report says which and why the others were passed over. A backend
    asked for by name that cannot run is an error. A checkpoint remembers nothing of it.

    Args:
        backend: ``auto``, ``sdpa``, ``flex_attention``, ``flash_attention_2``, ``_3``, ``_4`` or a kernels-hub
            repository (``owner/name``).
        training: whether a backward pass is needed; None asks the model (``model.training``).

    Raises:
        UnsupportedArchitecture: no backend runs; every reason is given.
        AttnPatchError: the named backend does not exist or cannot run here.
    """

    name: ClassVar[str] = "flash"
    recorded: ClassVar[bool] = False

    backend: str = "auto"
    training: bool | None = None

    def __post_init__(self) -> None:
        known = isinstance(self.backend, str) and (self.backend in ("auto", *FLAG) or _REPOSITORY.match(self.backend))
        if not known:
            choices = ", ".join(("auto", *FLAG))
            raise AttnPatchError(
                f"backend {self.backend!r} does not exist; choose from {choices}, or a repository owner/name."
            )
        if self.training is not None and not isinstance(self.training, bool):
            raise AttnPatchError(f"training is {self.training!r}; it must be True, False, or None to ask the model.")

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say which backend would be used; see :meth:`Patch.propose`."""
        training = model.training if self.training is None else self.training
        head_dim = max((s.head_dim for s in anatomy.sites), default=0)
        dtype = model.dtype
        wanted = ranked(model.device) if self.backend == "auto" else (self.backend,)
        request = Candidate(model, dtype, head_dim, training)
        reasons: list[str] = []
        for name, why_not in self._tried(request, wanted):
            if why_not is None:
                return self._chosen(request, anatomy, name, reasons)
            reasons.append(f"{name}: {why_not}")
        if self.backend != "auto":
            raise AttnPatchError(f"{anatomy.architecture}: {reasons[0]}. Choose another backend, or backend='auto'.")
        raise UnsupportedArchitecture(f"{anatomy.architecture}: no fused attention runs here: {'; '.join(reasons)}.")

    def _tried(self, request: Candidate, wanted: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
        inputs = default_inputs(request.model)
        reference = None
        for name in wanted:
            why = obstacle(name, request)
            if why is None:
                reference = trace(request.model, inputs).logits if reference is None else reference
                why = _disagrees(request, name, inputs, reference)
            yield name, why

    def _chosen(self, request: Candidate, anatomy: Anatomy, name: str, reasons: list[str]) -> Proposal:
        model, dtype = request.model, str(request.dtype).removeprefix("torch.")
        kernel = "forward and backward" if request.training else "forward"
        passed = f"; passed over {'; '.join(reasons)}" if reasons else ""
        note = f"{name} on {model.device.type} in {dtype}, {kernel} proved on a probe{passed}"
        if model.config._attn_implementation == name:
            return Proposal((), (), (f"already in use: {note}",), preserves=True)
        sites = tuple(s.path for s in anatomy.sites if s.dispatches)
        return Proposal((SetAttention("", name),), sites, (note,), preserves=True)


def _disagrees(request: Candidate, name: str, inputs: Inputs, reference: torch.Tensor) -> str | None:
    return trial(request.model, SetAttention("", name), inputs, reference, request.training)
