"""All errors of the package, subclasses of ``ValueError``.

Every message says where, what was found, what was wanted and what to do.
"""


class AttnPatchError(ValueError):
    """Base of every error that this package raises for its user."""


class UnsupportedArchitecture(AttnPatchError):
    """The model has no place where this patch could act, or one that cannot be read safely."""


class NoWeights(UnsupportedArchitecture):
    """The model has to run, but its weights are on the meta device."""


class UpstreamChanged(UnsupportedArchitecture):
    """The installed transformers lacks something, or behaves unlike every known release."""


class PatchConflict(AttnPatchError):
    """Two patches write to the same place, or a revert would undo a later patch."""


class SelfCheckFailed(AttnPatchError):
    """The patched model did not do what the patch promises; every edit has been undone."""


class CalibrationError(AttnPatchError):
    """The calibration text cannot be used: too little of it, or activations on it that are not finite."""


class EvaluationError(AttnPatchError):
    """The measurement is impossible: no such task, too short a text, no cache, non-finite logits."""


class MissingExtra(AttnPatchError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""


def missing_extra(module: str, extra: str, purpose: str) -> MissingExtra:
    """Build the error for an optional dependency that is not installed.

    Args:
        module: the import name that failed.
        extra: the extra of ``hf_attnpatch`` that installs it.
        purpose: what it is needed for, as the subject of a sentence.
    """
    return MissingExtra(f"{purpose} needs `{module}`, which is not installed: pip install 'hf_attnpatch[{extra}]'.")
