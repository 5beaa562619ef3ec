"""A slice of `make drift`: two copies of transformers, three families, every patch."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import rehearse_drift
from drifting import report
from drifting.cells import UNPATCHED
from drifting.mutations import Mutation, together
from drifting.rehearsal import Reference, installed, rehearse

import hf_attnpatch.patches
from hf_attnpatch.patch import Patch

FAMILIES = ("llama", "gpt2", "gemma3_text")
CASES = (
    *("grouped_2_principal", "rope_yarn_per_request", "alibi", "relative_xl", "rotary", "sinusoidal", "no_position"),
    *("position_table", "self_extend", "dual_chunk", "re_rope", "jet_long", "attention_sinks", "recurrence"),
    *("no_position_some", "score_temperature", "windowed", "latent", "flash_auto"),
)
# each copy has several changes; `make drift` tells which of them it was
COPIES = (
    together("cache", "position_embeddings", "scaling", "get_seq_length"),
    together("mask by keyword", "layer_idx", "module cache_utils"),
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folders = rehearse_drift.folders(FAMILIES)
    assert folders == {"llama": "llama", "gpt2": "gpt2", "gemma3_text": "gemma3"}
    models = rehearse_drift.changed_models(FAMILIES)
    outputs = tmp_path_factory.mktemp("drift")
    return Reference(installed(), limit=120, outputs=outputs, models=models, folders=folders)


@pytest.fixture(scope="module")
def release(reference):
    """What the release makes of the cells."""
    cells = [(family, case) for family in FAMILIES for case in (UNPATCHED, *CASES)]
    return dict(reference.ask(cells, Mutation("", ()).vocabulary))


def test_every_patch_is_rehearsed():
    own = rehearse_drift.kinds()
    there_are = {kind.name for kind in vars(hf_attnpatch.patches).values() if _is_patch(kind)}
    assert {own[case] for case in CASES} == {own[case] for case in rehearse_drift.CASES} == there_are


def _is_patch(kind):
    return isinstance(kind, type) and issubclass(kind, Patch) and kind is not Patch


def test_the_release_has_cells(release):
    assert not [(cell, found) for cell, found in release.items() if found["status"] == "crash"]
    there = Counter(case for (_, case), found in release.items() if found["status"] == "same")
    assert there[UNPATCHED] == len(FAMILIES)
    assert set(CASES) <= set(there)
    assert sum(there.values()) >= 30


@pytest.mark.parametrize("mutation", COPIES, ids=lambda mutation: mutation.name)
def test_a_change_of_transformers_does_not_matter(mutation, reference, release):
    cells = [cell for cell, found in release.items() if found["status"] == "same"]
    found = {(mutation.name, cell): answer for cell, answer in rehearse(mutation, cells, reference, {})}
    assert len(found) == len(cells), report.failures(found)
    assert report.passed(found), "\n".join([report.summary(found), *report.failures(found)])
