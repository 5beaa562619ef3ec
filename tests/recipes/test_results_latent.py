"""A latent beside shared heads: the same documents and text, ratios of damages, what is missing is said."""

import json

import pytest

from recipes import results_latent as command
from recipes.grouped_query.store import Store
from recipes.settings import SettingsError

ENVIRONMENT = {
    **dict.fromkeys(("cpu", "python", "torch", "transformers", "hf_attnpatch", "code", "date"), "some"),
    **{"cores": 2, "threads": 1, "load": 1.5},
}
DOCUMENTS = ("python/0", "python/1", "prose/0", "docs/0")


def row(cell, above, **more):
    losses = {name: [100.0 * (3 + above * (1 + number / 10)), 100] for number, name in enumerate(DOCUMENTS)}
    return {"cell": cell, "digest": "", "spec": {"model": "embedded", "calibration": {"source": "text"}}, **more} | {
        "losses": losses,
        "environment": ENVIRONMENT,
    }


def conversion(**more):
    return {"cpu_seconds": 9.0, "peak_mb": 7.0, "damage": {"layers": [{"latent": "rank 80, rotary 48"}]}, **more}


@pytest.fixture
def grouped(tmp_path):
    path = tmp_path / "grouped.jsonl"
    rows = [row("embedded/original", 0.0)]
    for place, size in (("8-2", 3072.0), ("8-1", 1536.0)):
        rows.append(row(f"embedded/{place}/refined", 0.08, cache_bytes_per_token=size, conversion=conversion()))
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return Store(path)


def test_cells_are_measured_on_what_shared_heads_were(grouped):
    found = command.cells(grouped, steps=150)
    assert [cell.name for cell in found[:2]] == ["embedded/8-2/refined", "embedded/8-1/refined"]
    assert found[0].spec["patch"] == {
        "patch": "latent", "cache_target": 0.25, "method": "refined", "refine_steps": 150
    }  # fmt: skip
    assert found[0].spec["calibration"] == {"source": "text"}
    assert found[-1].spec["calibration"] is None


def test_without_shared_heads_there_is_nothing_to_compare(tmp_path):
    with pytest.raises(SettingsError, match="run recipes/results_grouped_query.py first"):
        command.cells(Store(tmp_path / "none.jsonl"), steps=1)


def test_the_page_says_the_ratio_and_what_was_not_measured(grouped, tmp_path):
    path = tmp_path / "out/metrics.jsonl"
    path.parent.mkdir()
    latent = row("embedded/8-2/refined", 0.02, cache_bytes_per_token=3072.0, conversion=conversion())
    path.write_text(json.dumps(latent) + "\n")
    store = Store(path)
    assert command.of_shared(grouped, store, "embedded/8-2/refined").value == pytest.approx(0.25)
    command.write(grouped, store, command.cells(grouped, steps=150), path.parent)
    page = (path.parent / "README.md").read_text()
    assert "0.25 of what shared heads lose at the same bytes (as was aimed at)" in page
    assert "| 8-2 | latent, refined | 3072 |" in page
    assert "80 + 48" in page
    assert "Not measured yet: embedded/8-1/refined" in page
    assert (path.parent / "excess.png").stat().st_size > 1000
