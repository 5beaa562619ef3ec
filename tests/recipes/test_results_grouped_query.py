"""The comparison's command: cells, resuming, figures that are right, and what is missing is said."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from hf_attnpatch.evaluation import difference, summarise
from hf_attnpatch.evaluation.memory import peak_memory
from recipes import results_grouped_query as command
from recipes.comparison import running
from recipes.comparison.cells import Cell, choose
from recipes.comparison.running import CellFailed
from recipes.grouped_query import cells, render, runner, targets
from recipes.grouped_query.cells import FULL, QUICK
from recipes.grouped_query.ratios import damage_ratio
from recipes.grouped_query.runner import Runner
from recipes.grouped_query.store import Store
from recipes.settings import SettingsError

ROOT = Path(__file__).resolve().parents[2]
ORIGINAL = {"python/0": [20.0, 10], "python/1": [45.0, 15], "docs/0": [30.0, 10], "prose/0": [70.0, 20]}


def losses(per_token):
    return {name: [total + count * per_token[name.split("/")[0]], count] for name, (total, count) in ORIGINAL.items()}


def flat(excess):
    return losses(dict.fromkeys(("python", "docs", "prose"), excess))


def row(store, name, found, **conversion):
    conversion = {"seconds": 1.0, "cpu_seconds": 2.0, "peak_mb": 3.0, **conversion}
    place = {"date": "-", "cpu": "-", "cores": 2, "threads": 2, "load": 1.0, "python": "-", "code": "-"}
    place |= {"torch": "-", "transformers": "-", "hf_attnpatch": "-"}
    store.add(Cell(name, "convert", {}), {"losses": found, "conversion": conversion, "total_seconds": 1.0}, place)


@pytest.fixture
def store(tmp_path):
    """Made-up damages: first 1.0, mean 1.0, procrustes 0.5, calibrated 0.1, refined 0.05 nats a token."""
    made = Store(tmp_path / "results/metrics.jsonl")
    for model, places in (("embedded", ("8-4", "8-2", "8-1")), ("smollm2", ("3-1",))):
        row(made, f"{model}/original", ORIGINAL)
        for place in places:
            for method, excess in (("mean", 1.0), ("procrustes", 0.5), ("calibrated", 0.1), ("refined", 0.05)):
                damage = {"seconds": {"refinement": 160.0}}
                row(made, f"{model}/{place}/{method}", flat(excess), seconds=170.0, damage=damage)
    row(made, "embedded/8-2/refined/on-python", losses({"python": 0.05, "docs": 0.2, "prose": 0.2}))
    return made


def test_names_are_unique_and_every_figure_of_the_issue_has_a_cell():
    every = cells.all_cells(("embedded", "smollm2"), FULL, cells.CORPUS)
    names = [cell.name for cell in every]
    assert len(set(names)) == len(names)
    assert len({cell.digest for cell in every}) == len(every)
    for kv in (4, 2, 1):
        for method in ("first", "mean", "mean_rescaled", "procrustes", "principal", "calibrated", "refined"):
            assert f"embedded/8-{kv}/{method}" in names
        starts = ("first", "mean", "procrustes", "calibrated", "refined")
        assert {f"uptraining/8-{kv}/{start}" for start in starts} <= set(names)
        assert {f"embedded/8-{kv}/refined/on-python", f"embedded/8-{kv}/refined/seed-2"} <= set(names)
    assert {"embedded/8-4/refined-adjacent", "smollm2/3-1/refined", "smollm2/original"} <= set(names)
    assert not any("smollm2" in c.name for c in cells.all_cells(("embedded",), FULL, cells.CORPUS))


def test_nothing_is_fitted_tried_or_trained_on_what_is_reported():
    for cell in cells.all_cells(("embedded", "smollm2"), FULL, cells.CORPUS):
        spec = cell.spec
        assert "evaluation" not in str(spec["calibration"])
        if cell.kind == "convert":
            assert all(source.startswith("embedded/evaluation/") for source in spec["evaluation"])
        else:
            assert spec["data"]["source"] == "data/corpus/train"
            assert (spec["heldout"] == "embedded/uptrain") == ("/rates/" in cell.name)


def test_five_percent_of_pretraining():
    pretrained = 2600 * 8 * 512  # recipes/configs/pretrain_embedded.yaml
    assert FULL.steps * FULL.batch * FULL.block == 0.05 * pretrained


def test_ratios_are_of_sums_over_documents():
    original, half, whole = (
        summarise({k: tuple(v) for k, v in found.items()})
        for found in (ORIGINAL, losses({"python": 0.1, "docs": 0.3, "prose": 0.2}), flat(0.4))
    )
    found = damage_ratio(original, half, whole)
    assert found.value == pytest.approx((25 * 0.1 + 10 * 0.3 + 20 * 0.2) / (55 * 0.4))
    assert 0.1 / 0.4 <= found.low < found.value < found.high <= 0.3 / 0.4
    assert found.value == pytest.approx(difference(original, half).value / difference(original, whole).value)
    with pytest.raises(ValueError, match="different documents"):
        damage_ratio(original, half, summarise({"other": (1.0, 1)}))


def test_targets_say_what_was_measured_and_whether_it_is_met(store):
    found = {target.claim: target for target in targets.every(store)}
    assert len(found) == len(list(targets.every(store)))
    good = found["embedded 8 to 2: `refined` / `mean`"]
    assert good.value.value == pytest.approx(0.05)
    assert good.row()[1:] == ["0.050 (0.050 to 0.050)", "at most 0.100", "yes"]
    elsewhere = found["embedded 8 to 2, calibrated on python, measured elsewhere: `refined` / `mean`"]
    assert elsewhere.value.value == pytest.approx(0.2)
    assert elsewhere.row()[3] == "**no**"
    slow = found["SmolLM2 3 to 1: `calibrated`, all of it, seconds"]
    assert slow.row()[1:] == ["170", "at most 180", "yes"]
    assert found["SmolLM2 3 to 1: `refined`, refinement alone, seconds"].row()[1] == "160"
    assert found["embedded 8 to 1, `refined`, uptrained on 5 %: nats above the original"].row()[3] == "not measured"


def test_the_table_has_the_figures_and_says_what_is_missing(store, tmp_path):
    every = cells.all_cells(("embedded", "smollm2"), FULL, cells.CORPUS)
    render.write(store, every, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert "| `refined` | 3.0500 | +0.0500 (+0.0500 to +0.0500) | 21.12 | 0.050 (0.050 to 0.050)" in text
    assert "| 8 to 2, `refined` on python | 0.050 (0.050 to 0.050) | 0.200 (0.200 to 0.200) |" in text
    missing = next(line for line in text.splitlines() if "not measured yet" in line)
    assert "uptraining/8-1/refined" in missing
    assert "embedded/8-2/refined," not in missing


def test_figures_are_drawn_of_what_is_there(store, tmp_path):
    command.draw.everything(store, tmp_path)
    for name in ("zero_shot.png", "domains.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "uptraining.png").exists()


def test_no_point_is_outside_its_panel(store):
    """The panels share an axis; the worst ratio is in the last one."""
    row(store, "embedded/8-1/refined/on-prose", losses({"python": 0.9, "docs": 0.9, "prose": 0.05}))
    figure = command.draw.domains(store)
    drawn = [(y, axis.get_ylim()) for axis in figure.axes for line in axis.lines for y in line.get_ydata()]
    assert max(y for y, _ in drawn) > 0.85
    assert all(low <= y <= high for y, (low, high) in drawn)


def test_a_store_survives_half_a_line_and_knows_other_settings(tmp_path):
    path, (cell, other) = tmp_path / "metrics.jsonl", (Cell("a", "convert", {"x": 1}), Cell("a", "convert", {"x": 2}))
    Store(path).add(cell, {"losses": {}}, {})
    path.write_text(path.read_text() + '{"cell": "b", "dig')
    again = Store(path)
    assert again.has(cell)
    assert not again.has(other)
    assert again.get("b") is None
    again.add(other, {"losses": {}}, {})
    assert len(path.read_text().splitlines()) == 1


def test_two_runs_into_one_file_lose_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    one, two = Store(path), Store(path)
    one.add(Cell("a", "convert", {}), {"by": 1}, {})
    two.add(Cell("b", "convert", {}), {"by": 2}, {})
    with path.open("a") as file:
        file.write(json.dumps({"cell": "c", "digest": "", "by": 3}) + "\n")  # from another machine
    one.add(Cell("a", "convert", {}), {"by": 4}, {})
    assert {name: row["by"] for name, row in Store(path).rows.items()} == {"a": 4, "b": 2, "c": 3}


def test_the_rate_of_an_uptraining_is_the_best_of_its_trials(tmp_path):
    made = Store(tmp_path / "metrics.jsonl")
    run = Runner(made, tmp_path, 1)
    cell = next(c for c in cells.all_cells(("embedded",), FULL, "text") if c.name == "uptraining/8-1/refined")
    assert run.ready(cell).spec["lr"] is None
    with pytest.raises(CellFailed, match="run --cells 'uptraining/rates"):
        run.run(cell)
    for rate, nats in ((5e-4, 3.0), (1.5e-3, 3.1)):
        made.add(
            Cell(f"uptraining/rates/8-2/refined/{rate:g}", "uptrain", {}), {"scores": {"uptrained": {"nats": nats}}}, {}
        )
    assert run.ready(cell).spec["lr"] == 5e-4


def test_the_command_measures_goes_on_and_renders(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--quick",
        "--out",
        "out",
        "--scratch",
        "scratch",
        "--threads",
        "1",
        "--text",
        "embedded/uptrain",
        "--cells",
    ]
    for patterns in (
        ["embedded/original"],
        ["embedded/original", "embedded/8-2/refined", "uptraining/rates/8-2/mean/*"],
    ):
        monkeypatch.setattr("sys.argv", ["results_grouped_query.py", *flags, *patterns])
        command.main()
    assert capfd.readouterr().out.count("embedded/original") == 1  # the second run found it
    found = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [each["cell"] for each in found] == [
        "embedded/original",
        "embedded/8-2/refined",
        "uptraining/rates/8-2/mean/0.0015",
    ]
    original, refined, trial = found
    assert refined["cache_bytes_per_token"] == original["cache_bytes_per_token"] / 4
    totals = [sum(loss for loss, _ in each["losses"].values()) for each in (original, refined)]
    assert totals[0] < totals[1]
    assert refined["conversion"]["peak_mb"] > 0
    assert len(refined["conversion"]["damage"]["layers"]) == 6
    assert trial["trained_tokens"] == 2 * 127
    assert trial["curve"][-1]["heldout_loss"] == pytest.approx(trial["scores"]["uptrained"]["nats"], abs=0.02)
    assert Path("out/damage_embedded.png").is_file()
    assert "| `refined` |" in Path("out/README.md").read_text()


def test_a_failed_cell_is_said_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    run = Runner(Store(tmp_path / "metrics.jsonl"), tmp_path, 1)
    wanted = choose(cells.all_cells(("embedded",), QUICK, "embedded/uptrain"), ["embedded/8-2/*"])
    assert running.run(run, wanted, again=False, said=str) == [cell.name for cell in wanted]
    assert capsys.readouterr().out.count("FAILED") == len(wanted)


def test_what_is_missing_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    every = cells.all_cells(("embedded", "smollm2"), FULL, cells.CORPUS)
    with pytest.raises(SettingsError, match="data/smollm2: not there; .*fetch_smollm2.* --models embedded"):
        command.check(every, cells.CORPUS)
    embedded = cells.all_cells(("embedded",), FULL, cells.CORPUS)
    with pytest.raises(SettingsError, match="data/corpus/train: not there; .*build_corpus"):
        command.check(embedded, cells.CORPUS)
    (tmp_path / "data/corpus").mkdir(parents=True)
    manifest = json.loads((ROOT / "hf_attnpatch/embedded/corpus_manifest.json").read_text())
    manifest["train"][0]["sha256"], manifest["python"] = "0", "3.13.0"
    (tmp_path / "data/corpus/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SettingsError, match="not the corpus of the embedded model .made with Python 3.13.0"):
        command.check(embedded, cells.CORPUS)
    command.check(embedded, "embedded/uptrain")
    with pytest.raises(SettingsError, match="nothing/\\*: no such cell"):
        choose(every, ["nothing/*"])
    for flags, message in ((["--quick"], "--out"), (["--models", "gpt9"], "no gpt9; choose from embedded, smollm2")):
        with pytest.raises(SettingsError, match=message):
            command.parse(flags)


def test_the_peak_is_of_what_was_needed_meanwhile():
    from recipes.grouped_query import worker

    with peak_memory(torch.device("cpu")) as peak:
        big = torch.ones(50_000_000)
        del big
    if peak.more is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 180 < peak.more / worker.MB < 260
