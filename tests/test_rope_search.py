"""The search for rotary divisors: what it tries, what it keeps, how it goes on, and what it writes."""

import json
import math
import random
import re

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.cli import app
from hf_attnpatch.commands.specs import parse
from hf_attnpatch.functional import rotary
from hf_attnpatch.patch import from_spec
from hf_attnpatch.rope_search import course as rope_search_course
from hf_attnpatch.rope_search import search as rope_search
from hf_attnpatch.rope_search.evolution import crossed, monotone, mutated, seeds

WINDOW, TARGET = 16, 48
TEXTS = list(torch.randint(5, 99, (3, TARGET + 5), generator=torch.Generator().manual_seed(2)))
QUICK = {"attention_factor": 1.1, "target": TARGET, "documents": TEXTS, "population": 8, "iterations": 2}


def _model():
    return tiny_model("llama", max_position_embeddings=WINDOW)


def _searched(**more):
    return ap.search_rope(_model(), **{**QUICK, **more})


def test_seeds_are_the_known_methods():
    frequencies = rotary.default(10_000.0, 64)
    found = seeds(frequencies, 4.0, 512)
    assert found["linear"] == (4.0,) * 32
    assert found["ntk"][0] == 1
    assert found["ntk"][-1] == pytest.approx(4)
    torch.testing.assert_close(
        frequencies / torch.tensor(found["yarn"]), rotary.by_parts(frequencies, 4.0, 512), rtol=1e-5, atol=0
    )
    assert all(monotone(each) for each in found.values())


def test_children_are_new_and_monotone_and_stay_on_the_grid():
    chance, parent = random.Random(0), tuple(1 + 4 * i / 31 for i in range(32))
    other, seen = tuple(each + 0.05 for each in parent), set()
    for _ in range(50):
        for child in (mutated(parent, seen, chance, 0.01, 5.1), crossed(parent, other, seen, chance)):
            assert child is not None
            assert monotone(child)
            assert child not in seen
            assert 1 <= child[0]
            assert child[-1] <= 5.1
            seen.add(child)
    assert mutated((5.0,), {(1.0,), (5.0,)}, chance, 10.0, 5.0) is None  # nothing else to draw
    assert crossed((1.0, 2.0), (1.0, 2.0), {(1.0, 2.0)}, chance) is None


def test_it_is_no_worse_than_its_seeds_and_what_it_says_is_what_the_patch_gives():
    model = _model()
    before = snapshot(model)
    found = ap.search_rope(model, **QUICK, targets=20)
    assert snapshot(model) == before
    assert found.loss <= min(found.seeds.values())
    assert set(found.seeds) == {"linear", "ntk", "yarn", "yarn of transformers"}
    assert monotone(found.patch.long_factor)
    ap.apply(model, found.patch)
    ids = torch.stack([text[:TARGET] for text in TEXTS])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids).logits[:, -21:-1].transpose(1, 2), ids[:, -20:])
    assert float(losses) == pytest.approx(found.loss, abs=1e-5)
    assert "found" in str(found)


def test_one_seed_is_one_search_and_another_is_another(tmp_path):
    files = [tmp_path / name for name in "abc"]
    first, again, _ = (_searched(seed=seed, state=file) for seed, file in zip((0, 0, 1), files, strict=True))
    assert first.patch == again.patch
    tried = [json.loads(file.read_text())["losses"] for file in files]
    assert tried[0] == tried[1]
    assert tried[0][:4] == tried[2][:4]  # the seeds
    assert tried[0][4] != tried[2][4]
    assert 8 < first.evaluations == again.evaluations <= 16  # a crossover may find nothing new


@pytest.mark.parametrize("after", [1, 9, 11])
def test_an_interrupted_search_goes_on_to_the_same_end(after, tmp_path, monkeypatch):
    wanted, file, real, calls = _searched(), tmp_path / "state.json", rope_search._loss, []

    def interrupted(*args):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    model = _model()
    before = snapshot(model)
    monkeypatch.setattr(rope_search, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ap.search_rope(model, **QUICK, state=file)
    assert snapshot(model) == before
    calls.clear()
    monkeypatch.setattr(rope_search, "_loss", lambda *args: calls.append(args) or real(*args))
    found = _searched(state=file)
    assert len(calls) == wanted.evaluations - after  # nothing is tried twice
    assert found.patch == wanted.patch
    assert found.loss == wanted.loss


def test_the_factor_on_the_angles_is_the_better_of_two_and_stays(tmp_path):
    file = tmp_path / "state.json"
    found = _searched(attention_factor=None, state=file)
    ways = {each: _searched(attention_factor=each) for each in (found.patch.attention_factor, 0.1 * math.log(3) + 1)}
    native = {each: way.seeds["yarn of transformers"] for each, way in ways.items()}
    assert native[found.patch.attention_factor] == min(native.values())
    assert found.patch == ways[found.patch.attention_factor].patch
    assert _searched(attention_factor=None, state=file).patch == found.patch


def test_a_time_budget_scales_both_numbers_down(monkeypatch):
    monkeypatch.setattr(rope_search, "_loss", lambda *args: 1.0)
    monkeypatch.setattr(rope_search_course.time, "monotonic", iter(float(n) for n in range(0, 1000)).__next__)
    timed = {"target": TARGET, "documents": TEXTS, "minutes": 0.25, "attention_factor": 1.1}
    found = ap.search_rope(_model(), **timed)  # a quarter of a second each
    assert 8 <= found.population < 64
    assert 1 <= found.iterations < 40
    assert found.population * (1 + found.iterations / 2) == pytest.approx(60, rel=0.2)
    assert found.population / found.iterations == pytest.approx(64 / 40, rel=0.15)


def test_the_file_of_another_search_is_refused(tmp_path):
    file = tmp_path / "state.json"
    _searched(state=file, iterations=1)
    with pytest.raises(ap.AttnPatchError, match="is of a search with seed 0, wanted 1"):
        _searched(state=file, iterations=1, seed=1)
    with pytest.raises(ap.AttnPatchError, match="is of a search with text"):
        _searched(state=file, iterations=1, documents=TEXTS[:2])
    file.write_text("{}")
    with pytest.raises(ap.AttnPatchError, match="settings is missing.*no state of a search.*delete it"):
        _searched(state=file)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"target": WINDOW}, "target is 16; the model reads 16 tokens already"),
        ({"target": 64}, "53 tokens, wanted at least 64"),
        ({"targets": TARGET}, "targets is 48; wanted 1 to 47"),
        ({"targets": 0}, "targets is 0"),
        ({"population": 4}, "population 4, iterations 2: wanted at least 8 and 1"),
        ({"iterations": 0}, "iterations 0"),
        ({"step": 0.0}, "step 0.0"),
        ({"minutes": -1}, "minutes -1"),
    ],
)
def test_numbers_that_will_not_do(more, words):
    with pytest.raises((ap.AttnPatchError, ap.EvaluationError), match=words):
        _searched(**more)


def test_a_model_without_rotary_positions_has_nothing_to_search():
    with pytest.raises(ap.AttnPatchError, match="nothing to search"):
        ap.search_rope(tiny_model("gpt2"), **{**QUICK, "target": 200})


def test_the_command_writes_a_stock_checkpoint_and_judges_it_on_other_text(tmp_path, monkeypatch):
    model, tokenizer = tiny_model("llama", max_position_embeddings=WINDOW, vocab_size=4096), embedded.load_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t[:3000]}) + "\n" for t in embedded.heldout()[:2]))
    words = ["search-rope", str(tmp_path / "model"), "--target", str(TARGET), "--data", str(text), "--windows", "2"]
    words += ["--held-out", "2", "--population", "8", "--iterations", "1", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--state", str(tmp_path / "state.json")])
    assert done.exit_code == 0, done.output
    assert "on 2 windows that were not searched on" in done.output
    assert len(re.findall(r"^ +found ", done.output, re.MULTILINE)) == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.rope_parameters["rope_type"] == "longrope"
    assert loaded.config.max_position_embeddings == TARGET
    assert loaded.config.attnpatch["commands"][0].startswith("attnpatch search-rope")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    spec = re.search(r"^as --patch: (.*)$", done.output, re.MULTILINE)[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ap.apply(model, from_spec(parse(spec)))
    ids = torch.arange(TARGET)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    monkeypatch.setattr(ap, "search_rope", lambda *_, **__: pytest.fail("searched, with nowhere to write to"))
    there = CliRunner().invoke(app, words)
    assert there.exit_code == 1
    assert "is not empty" in there.output
    few = CliRunner().invoke(app, [*words, "--windows", "999", "--overwrite"])
    assert few.exit_code == 1
    assert "wanted 1001" in few.output
