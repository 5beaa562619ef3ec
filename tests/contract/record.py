"""Writes refused.txt, upstream.txt and moot.txt: review the diff.

    PYTHONPATH=.:tests python -W ignore tests/contract/record.py [refused|upstream|moot] [CASE ...]

With cases, only those refusals are asked for again.

The tests assert these files cell by cell, so a change of behaviour shows either there or as a failure.
"""

import collections
import sys

import matrix
import torch
from outcomes import HELD, MOOT_FILE, NOTHING, REFUSED_FILE, UPSTREAM_FILE, WORDS, refusal
from patches import CASES, build

import hf_attnpatch as ap
from hf_attnpatch.verify import FAIL, NOT_APPLICABLE


def refused(cases):
    """Lines ``case | words of the reason | types``, cases with equal lines joined."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for model_type, encoder in matrix.ARCHITECTURES:
        for case in CASES:
            ask = _reason if not cases or {case.name, case.kind} & cases else refusal
            reason = ask(model_type, encoder, case)
            if reason is not None:
                found[reason][model_type + "-masked" * encoder].append(case.name)
    for reason, types in found.items():
        for together, names in _inverted(types).items():
            yield f"{' '.join(_by_kind(together))} | {reason} | {' '.join(names)}"


def upstream(_):
    """Lines ``type | invariant | what was measured``."""
    for model_type, encoder in matrix.ARCHITECTURES:
        for finding in matrix.verified(model_type, encoder).findings:
            if finding.outcome == FAIL:
                size = "raises" if finding.measured is None else f"{finding.measured:.0e}"
                yield f"{model_type + '-masked' * encoder} | {finding.invariant} | {size}: {finding.note[:80]}"


def moot(_):
    """Lines ``type | invariant | why it does not arise``, of the invariants that every type must pass.

    Those of ``type+case`` are of ``test_ways.py``, written by hand, and stay.
    """
    yield from (line for line in MOOT_FILE.read_text().splitlines() if "+" in line.split(" | ")[0])
    for model_type, encoder in matrix.ARCHITECTURES:
        for finding in matrix.verified(model_type, encoder).findings:
            if finding.outcome == NOT_APPLICABLE and finding.invariant in HELD:
                yield f"{model_type + '-masked' * encoder} | {finding.invariant} | {finding.note}"


def _reason(model_type, encoder, case):
    model = build(model_type, encoder, case)
    try:
        return None if ap.apply(model, case.patch).changed else NOTHING
    except ap.AttnPatchError as error:
        text = " ".join(str(error).split())
        return next((words for words in WORDS if words in text), text)
    except Exception as error:  # noqa: BLE001 - recorded as what it is, and fails the test that asserts the file
        return f"CRASH {type(error).__name__}: {error}"


def _by_kind(names):
    """Write all cases of a kind as that kind."""
    for kind in dict.fromkeys(case.kind for case in CASES):
        all_of_it = [case.name for case in CASES if case.kind == kind]
        mine = [name for name in all_of_it if name in names]
        yield from [kind] if mine == all_of_it else mine


def _inverted(types):
    groups = collections.defaultdict(list)
    for name, cases in types.items():
        groups[tuple(cases)].append(name)
    return groups


def main():
    torch.set_num_threads(1)
    files = {"upstream": (upstream, UPSTREAM_FILE), "moot": (moot, MOOT_FILE), "refused": (refused, REFUSED_FILE)}
    wanted = [word for word in sys.argv[1:] if word in files] or list(files)
    cases = {*sys.argv[1:]} - {*files}
    with torch.compiler.set_stance("force_eager"):
        for lines, file in (files[name] for name in files if name in wanted):
            file.write_text("\n".join(sorted(lines(cases))) + "\n")


if __name__ == "__main__":
    main()
