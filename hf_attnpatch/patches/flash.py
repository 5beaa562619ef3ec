"""Replaces eager attention by a fused kernel."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.registry import FUSED, chosen, kernel_of
from ..backends import FLAG, Candidate, obstacle, ranked
from ..configs import config_at
from ..edits import Edit
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..media import probes
from ..patch import Patch, Proposal
from ..positions.fusing import variants
from ..positions.sinks import passes_sinks
from ..probe import Inputs, default_inputs, input_device, largest_difference, logits_under, trace, trial
from ..upstream import words
from ..upstream.roles import roles_of

# transformers' syntax for a repository of the kernels hub: owner/name, optionally with a revision and a function
_REPOSITORY = re.compile(r"^[^/:@\s]+/[^/:@\s]+(?:@[^/:\s]+)?(?::[^/:\s]+)?$")

TOKENS = 256  # length of the probe that separates a bias counted once from one counted twice
LIMITS = ("max_position_embeddings", "max_seq_len", "seq_length")  # of tokens, in configs

_HOOKED = (
    "the forwards stay: keys and values from the cache only take notes of what is done with them, and the kernel "
    "computes it at once, from the model's own bias; no attention weights come out"
)


@dataclass(frozen=True, kw_only=True)
class Flash(Patch):
    """Fused attention kernel (FlashAttention, SDPA, flex attention) that runs here and leaves the logits unchanged.

    ``auto`` takes the first backend, in the order of :func:`hf_attnpatch.backends.ranked`, that runs here and matches
    the model's present attention on a probe; the report names it and says why others were passed over. A backend that
    was requested by name and cannot run is an error. Checkpoints do not record this patch.

    Families that compute attention themselves (BLOOM, MPT, Falcon, GPT-J, CodeGen) get torch's kernels, with memory
    linear in length; their own ALiBi, with its own rounding, is applied as extra dimensions of queries and keys.

    Args:
        backend: ``auto``, ``sdpa``, ``flex_attention``, ``flash_attention_2``, ``_3``, ``_4`` or a kernels-hub
            repository (``owner/name``).
        training: whether a backward pass is needed; None reads ``model.training``.

    Raises:
        UnsupportedArchitecture: no backend runs; the message has every reason.
        AttnPatchError: the named backend does not exist or cannot run here.
    """

    name: ClassVar[str] = "flash"
    wraps: ClassVar[bool] = True
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
        """Return the edits that select a backend; see :meth:`Patch.propose`."""
        training = model.training if self.training is None else self.training
        head_dim = max((s.head_dim for s in anatomy.sites), default=0)
        if model.config._attn_implementation == FUSED and self.backend not in ("auto", "sdpa"):
            raise AttnPatchError(
                f"{anatomy.architecture}: has torch's kernels inside of its own forwards, which take no other backend."
            )
        if model.config._attn_implementation == FUSED:
            return Proposal(
                (), (), ("already in use: a fused kernel inside forwards that do not dispatch",), preserves=True
            )
        wanted = ranked(model.device) if self.backend == "auto" else (self.backend,)
        request = Candidate(model, model.dtype, head_dim, training, passes_sinks(model, anatomy.dispatching))
        reasons: list[str] = []
        for name, found in self._tried(request, anatomy, wanted):
            if not isinstance(found, str):
                return self._chosen(request, anatomy, name, found, reasons)
            reasons.append(f"{name}: {found}")
        if self.backend != "auto":
            raise AttnPatchError(f"{anatomy.architecture}: {reasons[0]}. Choose another backend, or backend='auto'.")
        raise UnsupportedArchitecture(f"{anatomy.architecture}: no fused attention runs here: {'; '.join(reasons)}.")

    def _tried(
        self, request: Candidate, anatomy: Anatomy, wanted: tuple[str, ...]
    ) -> Iterator[tuple[str, tuple[Edit, ...] | str]]:
        """Yield each backend with the edits that passed on a probe, or with the reason why none did."""
        asked: list[tuple[str, Inputs, Tensor]] = []
        for name in wanted:
            ways = _ways(request, anatomy, name)
            found: tuple[Edit, ...] | str = ways if isinstance(ways, str) else ""
            for edits in () if isinstance(ways, str) else _nearest_first(request.model, ways):
                asked = asked or _asked(request.model)
                why = _differs(request, edits, asked)
                found = edits if why is None else found or why  # the reason of the first variant is the most useful one
                if why is None:
                    break
            yield name, found

    def _chosen(
        self, request: Candidate, anatomy: Anatomy, name: str, edits: tuple[Edit, ...], reasons: list[str]
    ) -> Proposal:
        model, dtype = request.model, str(request.dtype).removeprefix("torch.")
        kernel = "forward and backward" if request.training else "forward"
        passed = f"; passed over {'; '.join(reasons)}" if reasons else ""
        note = f"{name} on {model.device.type} in {dtype}, {kernel} proved on a probe{passed}"
        used = {config_at(model, s.config)._attn_implementation for s in anatomy.sites if s.dispatches}
        if len(edits) == 1 and {*map(kernel_of, used), kernel_of(model.config._attn_implementation)} == {name}:
            return Proposal((), (), (f"already in use: {note}",), preserves=True)
        hooked = tuple(edit.path for edit in edits if edit.path)
        sites = hooked or tuple(s.path for s in anatomy.sites if s.dispatches) or anatomy.attending
        return Proposal(edits, sites, (note, *([_HOOKED] if hooked else [])), preserves=True)


def _asked(model: PreTrainedModel) -> list[tuple[str, Inputs, Tensor]]:
    """Return the probes: what each contains, its inputs, and the logits before the patch."""
    found = probes(model, default_inputs)
    every = {"": found.main, **{f"with {what}: ": inputs for what, inputs in found.more.items()}}
    return [(what, inputs, trace(model, inputs).logits) for what, inputs in every.items()]


def _differs(request: Candidate, edits: tuple[Edit, ...], asked: list[tuple[str, Inputs, Tensor]]) -> str | None:
    for what, inputs, reference in asked:
        why = trial(request.model, edits, inputs, reference, request.training)
        if why is not None:
            return f"{what}{why}"
    return None


def _ways(request: Candidate, anatomy: Anatomy, name: str) -> list[tuple[Edit, ...]] | str:
    """Return the edits to try for a backend, or the reason why there are none."""
    why = obstacle(name, request)
    if name == "sdpa" and not any(site.dispatches for site in anatomy.sites):
        ways = variants(request.model, anatomy)
        return ways if not isinstance(ways, str) or why is not None else [(chosen(request.model, name),)]
    return [(chosen(request.model, name),)] if why is None else why


def _nearest_first(model: PreTrainedModel, ways: list[tuple[Edit, ...]]) -> list[tuple[Edit, ...]]:
    """Sort variants by their difference in logits: on a short probe several agree within the rounding of the dtype."""
    if len(ways) < 2:
        return ways
    inputs = _longer(model)
    reference = trace(model, inputs).logits
    return sorted(ways, key=lambda edits: _distance(model, edits, inputs, reference))


def _longer(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return one row of tokens, long enough to tell an ALiBi bias from twice that bias."""
    config = model.config.get_text_config(decoder=True)
    limit = next((n for name in LIMITS if isinstance(n := getattr(config, name, None), int)), TOKENS)
    ids = torch.arange(min(TOKENS, limit), device=input_device(model))[None]
    return roles_of(model).call(**{words.TOKENS: (ids * 7 + 5) % config.vocab_size})


def _distance(model: PreTrainedModel, edits: tuple[Edit, ...], inputs: Inputs, reference: Tensor) -> float:
    try:
        found = largest_difference(reference, logits_under(model, edits, inputs))
    except (AttnPatchError, RuntimeError, ValueError, TypeError):  # the trial reports the reason
        return math.inf
    return math.inf if math.isnan(found) else found
