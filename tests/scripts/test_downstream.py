"""Comparing, the table, refusals, and the transformers worker for real; the other runtimes are `slow`."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import hf_attnpatch as ap
from hf_attnpatch import embedded

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_downstream
import downstream_checkpoints
import downstream_compare
import downstream_runtimes
import downstream_table
import environments

ROOT = check_downstream.ROOT


def step(**logprobs):
    """A step as a worker's JSON has it: `step(t5=0.5)` for probability 0.5 of token 5."""
    return {name[1:]: math.log(value) for name, value in logprobs.items()}


def answer(*continuations, steps):
    return {"continuations": [list(tokens) for tokens in continuations], "logprobs": [steps] * len(continuations)}


SURE = step(t1=0.9, t2=0.06, t3=0.03)
TIE = step(t4=0.4501, t5=0.45, t6=0.05)
REFERENCE = answer([1, 4, 1], [1, 4, 1], steps=[SURE, TIE, SURE])


def test_equal_answers_are_the_same():
    found = downstream_compare.compare(REFERENCE, REFERENCE)
    assert found.verdict == "same"
    assert (found.equal_prompts, found.prompts, found.equal_tokens, found.tokens) == (2, 2, 6, 6)
    assert found.departures == ()
    assert found.largest_difference == found.kl == 0.0


def test_a_near_tie_is_explained():
    other = answer([1, 4, 1], [1, 5, 3], steps=[SURE, TIE, SURE])
    found = downstream_compare.compare(REFERENCE, other)
    assert found.verdict == "same up to near ties"
    assert (found.equal_prompts, found.equal_tokens) == (1, 4)  # the token after a departure is not compared
    (departure,) = found.departures
    assert (departure.prompt, departure.step, departure.wanted, departure.found) == (1, 1, 4, 5)
    assert departure.gap == pytest.approx(math.log(0.4501 / 0.45))
    assert not departure.at_least


@pytest.mark.parametrize(("token", "gap", "at_least"), [(2, math.log(0.9 / 0.06), False), (7, math.log(30), True)])
def test_another_token_than_a_clear_first_is_a_departure(token, gap, at_least):
    other = answer([1, 4, 1], [token, 4, 1], steps=[SURE, TIE, SURE])
    found = downstream_compare.compare(REFERENCE, other)
    assert found.verdict == "DEPARTS"
    assert found.departures[0].gap == pytest.approx(gap)
    assert found.departures[0].at_least == at_least


def test_a_token_that_the_reference_does_not_list_is_no_near_tie():
    flat = step(t4=0.251, t5=0.25, t6=0.25)
    reference, other = answer([4], steps=[flat]), answer([9], steps=[flat])
    assert downstream_compare.compare(reference, other).verdict == "DEPARTS"


def test_the_same_tokens_by_other_numbers_fail():
    other = answer([1, 4, 1], [1, 4, 1], steps=[step(t1=0.85, t2=0.1, t3=0.04), TIE, SURE])
    found = downstream_compare.compare(REFERENCE, other)
    assert found.verdict == "OTHER LOGITS"
    assert found.largest_difference == pytest.approx(math.log(0.1 / 0.06))
    p, q = (0.9, 0.06, 0.03, 0.01), (0.85, 0.1, 0.04, 0.01)
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert found.kl == pytest.approx(kl / 3)  # one of three steps


def test_a_token_missing_from_the_other_list_bounds_the_difference():
    wanted, found = ({int(k): v for k, v in s.items()} for s in (SURE, step(t1=0.9, t2=0.06, t9=0.001)))
    assert downstream_compare.largest_difference(wanted, found) == pytest.approx(math.log(0.03 / 0.001))


def test_what_is_not_a_number_fails():
    bad = {**SURE, "3": math.nan}
    assert downstream_compare.compare(REFERENCE, {**REFERENCE, "logprobs": [[SURE, TIE, bad]] * 2}).verdict != "same"


def test_answers_of_another_length_are_refused():
    with pytest.raises(ValueError, match="wanted 3"):
        downstream_compare.compare(REFERENCE, answer([1, 4], [1, 4, 1], steps=[SURE, TIE, SURE]))
    with pytest.raises(ValueError, match="prompts"):
        downstream_compare.compare(REFERENCE, answer([1, 4, 1], steps=[SURE, TIE, SURE]))


def rows(other, control):
    """Rows of a converted checkpoint and its control on one runtime, from two answers."""
    for name, found in (("converted", other), ("original", control)):
        finding = downstream_compare.compare(REFERENCE, found)
        row = {"checkpoint": name, "control": name == "original", "runtime": "llama.cpp", "kv_heads": 1, "seconds": 3.2}
        yield {**row, "warnings": ["odd"], "verdict": finding.verdict, "finding": finding.record()}


DEPARTING = answer([1, 4, 1], [2, 4, 1], steps=[SURE, TIE, SURE])
FAILED = {"checkpoint": "a", "control": False, "runtime": "vllm", "verdict": "DOES NOT RUN", "failure": "no memory"}


@pytest.mark.parametrize(
    ("other", "control", "told"),
    [(DEPARTING, REFERENCE, "the control passes"), (DEPARTING, DEPARTING, "the control fails too")],
)
def test_a_control_tells_whose_a_difference_is(other, control, told):
    lines = downstream_table.conclusions(list(rows(other, control)))
    assert told in lines[0]
    assert ("llama.cpp's own" in lines[-1]) == (control is DEPARTING)


def test_no_control_is_said():
    assert "no control was given" in downstream_table.conclusions([FAILED])[0]
    assert downstream_table.conclusions(list(rows(REFERENCE, REFERENCE))) == []


def test_the_table_shows_every_row():
    record = {
        **{"rows": [*rows(DEPARTING, REFERENCE), FAILED], "command": "python x", "machine": "m"},
        "settings": {"prompts": 2, "shortest": 1, "longest": 9, "new_tokens": 3, "top": 3, "near_tie": 1, "at_most": 2},
        "texts": {"converted": {"1": " a|b", "2": " two"}, "original": {}},
        "checkpoints": [["converted", "grouped_query(num_kv_heads=1)", "'x'"], ["original", "none", "'y|z'"]],
        "runtimes": [["llama.cpp", "xllamacpp 1", "f32"]],
    }
    text = downstream_table.markdown(record)
    assert "| converted | 1 | llama.cpp | 1 of 2 | 3 of 6 | 0.0e+00 | 0.0e+00 | 3 | **DEPARTS** |" in text
    assert "| original (control) | 1 | llama.cpp | 2 of 2 | 6 of 6 | 0.0e+00 | 0.0e+00 | 3 | same |" in text
    assert "| a | - | vllm | - | - | - | - | - | **DOES NOT RUN** |" in text
    assert "prompt 1, token 0: `' two'` (2), transformers `' a\\|b'` (1), which it prefers by 2.7 nats." in text
    assert "The GGUF converter warned of `odd`: converted, original." in text
    columns = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(columns) == {10, 4}  # tables of nine columns and of three


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"),
    [("transformers,onnx", "'onnx'; wanted some of transformers,llama.cpp,vllm"), ("vllm", "wanted it among them")],
)
def test_runtimes_are_named_or_refused(names, said):
    with pytest.raises(SystemExit, match=said):
        check_downstream.main([str(embedded.path()), "--runtimes", names])


def test_a_runtime_is_left_out_on_purpose():
    found = downstream_runtimes.chosen("llama.cpp,transformers")
    assert [runtime.name for runtime in found] == ["transformers", "llama.cpp"]


def saved(folder, config, tokenizer=True):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


def test_checkpoints_that_cannot_be_taken_are_refused(tmp_path):
    foreign = saved(tmp_path / "foreign", {"model_type": "hf_attnpatch", "auto_map": {}})
    bare = saved(tmp_path / "bare", {"model_type": "llama"}, tokenizer=False)
    dynamic = saved(tmp_path / "dynamic", {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}})
    refused = [(tmp_path / "none", "no config.json"), (foreign, "needs code"), (bare, "save_pretrained")]
    for folder, said in [*refused, (dynamic, "acts beyond its window alone")]:
        with pytest.raises(SystemExit, match=said):
            downstream_checkpoints.checkpoint(folder)


def test_two_checkpoints_of_one_name_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="different names"):
        downstream_checkpoints.checkpoints([embedded.path()], [embedded.path()])


def test_a_window_too_short_is_refused(tmp_path):
    one = downstream_checkpoints.checkpoint(saved(tmp_path / "short", {"max_position_embeddings": 64}))
    with pytest.raises(SystemExit, match="max_position_embeddings is 64; wanted"):
        downstream_checkpoints.encoded(one, embedded.load_tokenizer(), 48)


def test_the_patches_of_a_checkpoint_are_those_it_records(tmp_path):
    spec = {"patch": "grouped_query", "num_kv_heads": 1, "method": "mean", "stock": True}
    one = downstream_checkpoints.checkpoint(saved(tmp_path / "a", {"attnpatch": {"patches": [spec]}}))
    assert one.patches == "grouped_query(num_kv_heads=1, method=mean)"
    assert downstream_checkpoints.checkpoint(embedded.path()).patches == "none"


# -- environments ---------------------------------------------------------------------------------------------------

# a step that fails without a package index
BROKEN = environments.Runtime("broken", "run_vllm.py", (("install", "--no-index", "no-such-package"),))
# one that needs none
EASY = environments.Runtime("easy", "run_transformers.py", (("list",),))


def test_a_runtime_that_cannot_be_installed_is_an_error_that_says_how(tmp_path):
    with pytest.raises(SystemExit) as refused:
        check_downstream.provide(BROKEN, tmp_path)
    said = str(refused.value)
    assert "broken could not be installed" in said
    assert "no-such-package` exited with 1" in said
    assert "No matching distribution" in said  # pip's own words
    assert "--runtimes transformers" in said
    assert not environments.is_installed(BROKEN, tmp_path)


def test_an_environment_is_made_once_and_again_for_other_steps(tmp_path):
    assert not environments.is_installed(EASY, tmp_path)
    environments.install(EASY, tmp_path)
    assert environments.is_installed(EASY, tmp_path)
    assert environments.python_of(EASY, tmp_path).is_file()
    other = environments.Runtime("easy", "run_transformers.py", (("check",),))
    assert not environments.is_installed(other, tmp_path)


def test_a_worker_that_fails_shows_its_last_words(tmp_path):
    request = {"scratch": str(tmp_path), "threads": 1, "checkpoint": str(tmp_path / "none")}
    with pytest.raises(environments.RuntimeFailed, match="exit status 1(.|\n)*none"):
        environments.run(downstream_runtimes.RUNTIMES["transformers"], tmp_path, request, tmp_path / "log")


def test_the_converter_s_warnings_are_kept(tmp_path):
    (tmp_path / "log").write_text("INFO:x\nWARNING:hf-to-gguf:Unknown RoPE type: odd\n" * 2 + "12 WARNING other\n")
    assert downstream_runtimes.warnings(tmp_path / "log") == ["hf-to-gguf:Unknown RoPE type: odd"]


# -- for real -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The embedded model with two key-value heads of eight, and its tokenizer."""
    folder = tmp_path_factory.mktemp("downstream") / "converted"
    model = embedded.load_model()
    ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    model.save_pretrained(folder)
    embedded.load_tokenizer().save_pretrained(folder)
    return folder


def test_transformers_for_real(converted, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--logs", str(tmp_path / "logs"), "--new-tokens", "12"]
    with pytest.raises(SystemExit) as done:
        check_downstream.main([str(converted), "--control", str(embedded.path()), "--runtimes", "transformers", *out])
    assert not done.value.code
    found = json.loads((tmp_path / "out/downstream.json").read_text())
    assert [(row["checkpoint"], row["kv_heads"], row["verdict"]) for row in found["rows"]] == [
        ("converted", 2, "same"),
        ("embedded", 8, "same"),
    ]
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    prompt = tokenizer(downstream_checkpoints.PROMPTS[0], return_tensors="pt")
    wanted = model.generate(**prompt, do_sample=False, max_new_tokens=12, eos_token_id=None)[
        0, prompt.input_ids.shape[1] :
    ]
    assert found["rows"][1]["continuations"][0] == wanted.tolist()
    assert "grouped_query(" in (tmp_path / "out/README.md").read_text()
    assert "8 of 8" in capsys.readouterr().out


def test_a_checkpoint_with_other_weights_departs(converted, tmp_path):
    """The comparison itself, on two checkpoints that truly differ: it must see it."""
    tokenizer, runtime = embedded.load_tokenizer(), downstream_runtimes.RUNTIMES["transformers"]
    prompts = [tokenizer(text).input_ids for text in downstream_checkpoints.PROMPTS[:3]]
    request = {"prompts": prompts, "new_tokens": 8, "top": 20, "threads": 1, "scratch": str(tmp_path)}

    def asked(folder, forced):
        told = {**request, "checkpoint": str(folder), "forced": forced}
        return environments.run(runtime, tmp_path, told, tmp_path / "log")

    reference = asked(embedded.path(), None)
    found = downstream_compare.compare(reference, asked(converted, reference["continuations"]))
    assert found.verdict == "DEPARTS"
    assert found.kl > 0.1


def test_the_worker_does_not_see_this_package(tmp_path):
    """The assertion in the worker can fail: with the package in the process it does."""
    worker = environments.WORKERS / "run_transformers.py"
    start = f"import sys, runpy, hf_attnpatch; sys.path.insert(0, {str(worker.parent)!r})"
    code = f"{start}; runpy.run_path({str(worker)!r}, run_name='__main__')"
    request = {"checkpoint": str(embedded.path()), "prompts": [[5, 6, 7]], "new_tokens": 2, "top": 5, "threads": 1}
    (tmp_path / "request.json").write_text(json.dumps({**request, "forced": None}))
    command = [sys.executable, "-c", code, str(tmp_path / "request.json"), str(tmp_path / "answer.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert 'assert "hf_attnpatch" not in sys.modules' in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_runtime_for_real(tmp_path):
    """Slow: fetches SmolLM2 (the embedded tokenizer is none that llama.cpp knows), installs 5 GB, runs ten minutes."""
    smollm2, converted = tmp_path / "smollm2", tmp_path / "converted"
    subprocess.run([sys.executable, str(ROOT / "scripts/fetch_smollm2.py"), "--out", str(smollm2)], check=True)
    apply = ["apply", str(smollm2), str(converted), "--patch", "grouped_query:num_kv_heads=1"]
    subprocess.run([sys.executable, "-m", "hf_attnpatch.cli", *apply], check=True)
    out = ["--out", str(tmp_path / "out"), "--logs", str(tmp_path / "logs")]
    with pytest.raises(SystemExit) as done:
        check_downstream.main([str(converted), "--control", str(smollm2), *out])
    assert not done.value.code, done.value.code  # 1 with the table above, or why it went no further
    rows = json.loads((tmp_path / "out/downstream.json").read_text())["rows"]
    assert [(row["runtime"], row["kv_heads"]) for row in rows] == [
        (runtime, heads) for heads in (1, 3) for runtime in ("transformers", "llama.cpp", "vllm")
    ]
