"""Asks cells in front of one copy: a job as JSON on the command line, a line of JSON for each cell on the output.

    PYTHONPATH=COPY:scripts:tests:. python -m drifting.worker '{"cells": [["llama", "alibi"]], ...}'

With `keep` it is the release itself that is asked: its numbers are written to `reference`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file

from .cells import is_refusal, numbers, speakers, stages_of, told, unlike

MARK = "@drift "  # before each line of ours, since libraries print, too
Found = dict[str, Any]


def stem(reference: str, family: str, case: str) -> str:
    """Where the release's numbers of a cell lie, without the suffix."""
    return f"{reference}/{family}/{case}"


def kept(family: str, case: str, job: Mapping[str, Any]) -> Found:
    """Ask the release, and keep its numbers."""
    place = Path(stem(job["reference"], family, case))
    place.parent.mkdir(parents=True, exist_ok=True)
    tensors, omitted = {}, {}
    try:
        for name, speaker in speakers(family, case, job["words"]):
            for stage in stages_of(speaker):
                label = f"{name} {stage}".strip()
                try:
                    tensors[label] = numbers(speaker, stage)
                except Exception as error:  # whatever it is, this stage has no numbers to compare with
                    omitted[label] = told(error)["detail"]
    except Exception as error:  # a cell that the release does not have
        found = {"status": "refused" if is_refusal(error) else "crash", **told(error)}
    else:
        found = {"status": "same" if tensors else "refused", "stages": sorted(tensors), "omitted": omitted}
        save_file(tensors, f"{place}.safetensors")
    Path(f"{place}.json").write_text(json.dumps(found), "utf-8")
    return found


def asked(family: str, case: str, job: Mapping[str, Any]) -> Found:
    """Ask a copy, and compare."""
    place = stem(job["reference"], family, case)
    wanted, stage = load_file(f"{place}.safetensors"), "apply"
    different = {}
    try:
        for name, speaker in speakers(family, case, job["words"]):
            for stage in stages_of(speaker):
                label = f"{name} {stage}".strip()
                if label in wanted:
                    how = unlike(wanted.pop(label), numbers(speaker, stage))
                    different.update({label: how} if how else {})
    except Exception as error:  # the outcome of the cell
        return {"status": "refused" if is_refusal(error) else "crash", "stage": stage, **told(error)}
    different.update({label: "not there" for label in wanted})
    if different:
        return {"status": "silent", "detail": "; ".join(f"{label}: {how}" for label, how in different.items())}
    return {"status": "same"}


def main() -> None:
    """Answers all cells of the job in order."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # flex attention without its compiler
    import transformers

    assert Path(transformers.__file__).is_relative_to(job["root"]), f"{transformers.__file__} is not in {job['root']}"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family, case in job["cells"]:
        print(MARK + json.dumps({"start": [family, case]}), flush=True)
        found = (kept if job["keep"] else asked)(family, case, job)
        print(MARK + json.dumps({"cell": [family, case], **found}), flush=True)


if __name__ == "__main__":
    main()
