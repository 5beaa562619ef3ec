"""Architectures times cases, as pytest parameters; the fast slice is unmarked, the rest is `full`."""

import functools

import pytest
from architectures import FAST, FAST_ENCODERS, causal_lm_types, encoder_types
from outcomes import NOTHING, refusal
from patches import CASES, ONE_EACH, build

import hf_attnpatch as ap

ARCHITECTURES = [*((t, False) for t in causal_lm_types()), *((t, True) for t in encoder_types())]
_FAST = {*((t, False) for t in FAST), *((t, True) for t in FAST_ENCODERS)}


# every fast decoder has a cache of keys and values: where one is missed, the test looks in the wrong place
MUST_CACHE = {(t, False) for t in FAST}


def is_fast(model_type, encoder, case=None):
    """Whether this cell belongs to the fast slice."""
    if (model_type, encoder) not in _FAST:
        return False
    return case is None or case.everywhere or model_type in ONE_EACH


def architectures():
    """Every architecture."""
    return [_cell(t, e, marks=() if is_fast(t, e) else pytest.mark.full) for t, e in ARCHITECTURES]


def applicable(*kinds, only=lambda case: True):
    """Every cell in which the patch applies; `outcomes` says which those are."""
    return [cell for cell in _cells(kinds, only) if refusal(*cell.values) is None]


def refused():
    """Every cell in which it is refused."""
    return [cell for cell in _cells((), lambda case: True) if refusal(*cell.values) not in (None, NOTHING)]


def idle():
    """Every cell in which there is nothing to do."""
    return [cell for cell in _cells((), lambda case: True) if refusal(*cell.values) == NOTHING]


def _cells(kinds, only):
    for model_type, encoder in ARCHITECTURES:
        for case in CASES:
            if not case.product and model_type not in ONE_EACH:
                continue
            if (not kinds or case.kind in kinds) and only(case):
                fast = is_fast(model_type, encoder, case)
                yield _cell(model_type, encoder, case, marks=() if fast else pytest.mark.full)


def _cell(model_type, encoder, *rest, marks):
    name = "-".join([model_type, *(["masked"] if encoder else []), *(case.name for case in rest)])
    return pytest.param(model_type, encoder, *rest, marks=marks, id=name)


@functools.lru_cache(maxsize=1024)
def verified(model_type, encoder, case=CASES[0]):
    """The findings on the model of a case, unpatched; cases with equal overrides share them."""
    first = next(c for c in CASES if c.overrides == case.overrides and c.kind == case.kind)
    if first is not case:
        return verified(model_type, encoder, first)
    return ap.verify(build(model_type, encoder, case), ways=False)
