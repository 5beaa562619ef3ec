"""The survey: a crash is a cell, an invariant that only the patched model breaks is a failure, the table follows."""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import readme
import support_page
import survey_architectures as survey
import survey_cases
import survey_table

ASK = {"grouped_query down": ("llama", "native"), "flash": ("gpt2", "native"), "rope_scaling yarn": ("llama", "native")}


def asked(model_type, case, encoder=False, limit=survey.LIMIT):
    question = survey.Question(model_type, encoder, case)
    return dict(survey.ask_all([question], workers=1, limit=limit))[question]


@pytest.mark.parametrize("case", ASK)
def test_an_applicable_patch(case):
    model_type, status = ASK[case]
    found = asked(model_type, case)
    assert found["status"] == status
    assert found["broken"] == {}


def test_what_stock_cannot_express_is_said():
    assert asked("gpt2", "grouped_query down")["status"] == "own type"
    assert asked("bert", "grouped_query down", encoder=True)["status"] == "own type"


def test_a_refusal_gives_its_reason():
    found = asked("gpt2", "rope_scaling yarn")
    assert found["status"] == "not applicable"
    assert "rotary" in found["detail"]


def test_growing_starts_from_a_natively_grouped_model():
    assert asked("llama", "grouped_query up")["status"] == "native"
    assert "no grouped checkpoints" in asked("gpt2", "grouped_query up")["detail"]


def _crash(model):
    os._exit(7)


def _raise(model):
    raise RuntimeError("no such luck")


@pytest.mark.parametrize(("fault", "words"), [(_crash, "exit code 7"), (_raise, "RuntimeError: no such luck")])
def test_a_crash_is_one_cell(fault, words, monkeypatch):
    monkeypatch.setitem(survey.CASES, "flash", fault)
    questions = [survey.Question("llama", False, case) for case in ("flash", "unpatched")]
    found = dict(survey.ask_all(questions, workers=2))
    assert found[questions[0]]["status"] == "FAILED"
    assert words in found[questions[0]]["detail"]
    assert found[questions[1]]["status"] == "unpatched"


def test_a_hang_is_one_cell(monkeypatch):
    import time

    monkeypatch.setitem(survey.CASES, "flash", lambda model: time.sleep(60))
    found = asked("llama", "flash", limit=1)
    assert found == {"status": "FAILED", "detail": "killed after 1 s; more with --limit"}


def test_only_what_the_patch_breaks_is_its_failure():
    base = survey.Question("llama", False, "unpatched")
    patched = survey.Question("llama", False, "flash")
    own = {base: {"status": "unpatched", "broken": {"padding": "1"}}}
    both = {**own, patched: {"status": "native", "broken": {"padding": "1"}}}
    assert survey.judged(both)["llama"]["flash"]["status"] == "native"
    worse = {**own, patched: {"status": "native", "broken": {"padding": "1", "deepcopy": "2"}}}
    cell = survey.judged(worse)["llama"]["flash"]
    assert cell == {"status": "FAILED", "detail": "deepcopy: 2"}


def test_what_transformers_own_model_of_the_config_breaks_is_not_the_patchs():
    base, patched = survey.Question("llama", False, "unpatched"), survey.Question("llama", False, "grouped_query down")
    rounds = {"status": "native", "broken": {"padding": "1", "deepcopy": "2"}, "twin": {"padding": "1"}}
    answers = {base: {"status": "unpatched", "broken": {}}, patched: rounds}
    assert survey.judged(answers)["llama"]["grouped_query down"] == {"status": "FAILED", "detail": "deepcopy: 2"}
    rounds["twin"] = rounds["broken"]
    cell = survey.judged(answers)["llama"]["grouped_query down"]
    assert cell == {"status": "native", "broken": {"padding": "1", "deepcopy": "2"}}
    rows = {"llama": survey.judged(answers)["llama"]}
    assert ("llama", "grouped_query down: padding (1)") in survey_table.broken_by_transformers(rows)


def test_only_a_twin_with_the_same_logits_excuses(monkeypatch):
    model = survey.tiny_model("llama")
    survey.ap.patch_grouped_query(model, num_kv_heads=2)
    monkeypatch.setattr(survey_cases, "broken", lambda twin: {"padding": "1"})
    assert survey_cases.broken_by_its_twin(model) == {"padding": "1"}
    other = survey.tiny_model("llama", seed=1, num_key_value_heads=2)
    monkeypatch.setattr(survey_cases, "stock_twin", lambda model: other)
    assert survey_cases.broken_by_its_twin(model) == {}


def test_a_survey_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "ANSWERS", tmp_path / "answers.jsonl")
    monkeypatch.setattr(survey, "CASES", {case: survey.CASES[case] for case in ("unpatched", "flash")})
    survey.survey(["gpt2"], 2, {}, keep=False)
    assert not (tmp_path / "answers.jsonl").exists()
    first = survey.survey(["gpt2"], 2, {})
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    remembered = survey.remembered()
    monkeypatch.setattr(survey, "ask_all", lambda questions, *_: iter([(q, 1 / 0) for q in questions]))
    assert survey.survey(["gpt2"], 2, remembered) == first


def test_the_table_counts_and_names():
    kinds = {"native": "native", "not applicable": "not applicable", "failed": "FAILED"}
    rows = {name: {"unpatched": {"status": "unpatched"}, "flash": {"status": s}} for name, s in kinds.items()}
    rows["not applicable"]["flash"]["detail"] = "a | b_<c>"
    found = {"rows": rows, "invariants": ["x"], "types": {"causal": 7, "masked": 1}}
    found["versions"] = {"transformers": "5", "torch": "2"}
    text = survey_table.summary(found)
    assert "3 of 7 causal-LM and 0 of 1 masked-LM types" in text
    assert "| `flash` | 1 | 0 | 1 | 1 |" in text
    lines = list(csv.DictReader(io.StringIO(survey_table.as_csv(found))))
    assert [(line["type"], line["result"], line["reason"]) for line in lines] == [
        ("native", "stock", ""),
        ("not applicable", "no", "a | b_<c>"),
        ("failed", "fails", ""),
    ]
    page = support_page.html(found)
    assert '<tr><th scope="row">not applicable</th><td class="no" data-r="0">no</td></tr>' in page
    assert json.loads(re.search(r'id="reasons">(.*)</script>', page)[1]) == ["a | b_<c>"]


def test_a_part_of_the_readme_is_replaced_whole():
    text = "a\n<!-- x:start -->\nold\n<!-- x:end -->\nb"
    new = readme.with_part(text, "x", "new")
    assert new == "a\n<!-- x:start -->\nnew\n<!-- x:end -->\nb"
    assert readme.with_part(new, "x", "new") == new
    with pytest.raises(SystemExit, match="markers"):
        readme.with_part("nothing", "x", "new")


def test_a_figure_is_replaced_inside_a_sentence():
    text = "it loses <!--=a.b-->1<!--/-->\nnats, or <!--=c-->2\n<!--/-->."
    new = readme.with_figures(text, {"a.b": "0.07", "c": "3"})
    assert new == "it loses <!--=a.b-->0.07<!--/-->\nnats, or <!--=c-->3<!--/-->."
    with pytest.raises(SystemExit, match=r"no result has the figures c;"):
        readme.with_figures(text, {"a.b": "0.07"})


def test_a_part_stands_in_one_page():
    assert readme.holder("support-table").name == "architectures.md"
    with pytest.raises(SystemExit, match="stands in no page"):
        readme.holder("nowhere")
