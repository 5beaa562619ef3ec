"""Selects the fastest kernel for new positions that passes on a probe."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.registry import set_kernel
from ..backends import FLAG, Candidate, obstacle, ranked
from ..edits import Edit
from ..errors import UnsupportedArchitecture
from ..few import on_few_layers
from ..probe import default_inputs, logits_under, trial
from ..upstream import words
from ..upstream.roles import roles_of
from .removal import check_blind

BACKENDS = ("eager", *FLAG)


def choose(
    anatomy: Anatomy,
    request: Candidate,
    backend: str,
    common: Sequence[Edit],
    what: str,
) -> tuple[str, str]:
    """Try kernels, fastest first; return the first one that matches the dense reference, and a note on it.

    Args:
        anatomy: the model's anatomy.
        request: the conditions under which the kernel must work.
        backend: the requested one, or ``auto`` for the fastest.
        common: edits that add the positions, except for the attention function.
        what: name of the positions in messages.

    Raises:
        UnsupportedArchitecture: no kernel matches, or the model has other positions as well.
    """
    model: PreTrainedModel = request.model
    reference = [*common, set_kernel("eager")]
    check_blind(model, anatomy, reference)
    if backend == "eager":
        return "eager", "dense, with every score in memory"
    return on_few_layers(model, anatomy.attending, lambda cut: _fastest(anatomy, request, backend, common, what, cut))


def _fastest(
    anatomy: Anatomy,
    request: Candidate,
    backend: str,
    common: Sequence[Edit],
    what: str,
    cut: tuple[Edit, ...],
) -> tuple[str, str]:
    """Choose on the model that the edit ``cut`` may have shortened; other arguments as for :func:`choose`."""
    model: PreTrainedModel = request.model
    reference = [*common, set_kernel("eager"), *cut]
    inputs = default_inputs(model)
    bare = {
        name: tensor for name, tensor in inputs.items() if name != roles_of(model).names.get(words.MASK)
    }  # inputs with other masks, or none
    probes = [(given, logits_under(model, reference, given)) for given in (inputs, bare)]
    reasons: list[str] = []
    for name in ranked(model.device) if backend == "auto" else (backend,):
        why = obstacle(name, request)
        runs = why is None
        for given, wanted in probes:
            why = why or trial(model, [*common, set_kernel(name), *cut], given, wanted, request.training)
        if why is None:
            passed = f"; passed over {'; '.join(reasons)}" if reasons else ""
            return name, f"{name} on {model.device.type}, equal to the reference on a probe{passed}"
        if cut and runs:
            raise UnsupportedArchitecture(f"{name}: {why}")  # holds for these layers; the whole model decides
        reasons.append(f"{name}: {why.rstrip('.')}")
    raise UnsupportedArchitecture(
        f"{anatomy.architecture}: no fused kernel adds {what} here: {'; '.join(reasons)}. backend='eager' computes it "
        "densely."
    )
