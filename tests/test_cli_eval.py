"""``attnpatch eval``: each suite on a checkpoint, its JSON, and errors in one line."""

import json

import pytest
from test_cli import fails, run

from hf_attnpatch import embedded, evaluation
from hf_attnpatch.commands import evaluate as cli_eval
from hf_attnpatch.evaluation.retrieval import TASKS


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(embedded.heldout("prose")[0][:9000])
    return file


def test_suites_are_printed_and_written(text, tmp_path):
    out = tmp_path / "new" / "figures.json"
    options = ["--text", text, "--documents", 3, "--lengths", "64,96", "--targets", 16, "--original", "embedded"]
    result = run("eval", "embedded", "--suite", "perplexity,positions,fidelity", *options, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["results"]
    assert list(found) == ["perplexity", "positions", "fidelity"]
    by_length = evaluation.LossByLength.from_dict(found["perplexity"])
    assert by_length.lengths == (64, 96)
    assert f"{by_length[96].nats:.4f}" in result.output
    assert evaluation.LossByPosition.from_dict(found["positions"]).edges[-1] == 96
    same = evaluation.Fidelity.from_dict(found["fidelity"])
    assert (same.kl.nats, same.top1.value, same.continuation.value) == (0, 1, 1)


def test_what_is_measured_is_the_text(text):
    ids = embedded.load_tokenizer()(text.read_text())["input_ids"]
    windows = {str(n + 1): ids[n * 64 : n * 64 + 64] for n in range(len(ids) // 64)}
    chosen = {name: windows[name] for name in ("1", str(len(windows) // 2 + 1))}
    wanted = evaluation.perplexity(embedded.load_model(), chosen, lengths=(32, 64), targets=16)
    options = ["--text", text, "--documents", 2, "--lengths", "64,32", "--targets", 16, "--dtype", "float32"]
    result = run("eval", "embedded", *options)
    assert str(wanted) in result.output


def test_retrieval_by_name(tmp_path):
    out = tmp_path / "figures.json"
    options = ["--lengths", "300", "--depths", "0.5", "--samples", 1, "--out", out]
    result = run("eval", "embedded", "--suite", "passkey,fwe", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["results"]
    assert evaluation.Retrieval.from_dict(found["passkey"]).depths == (0.5,)
    assert evaluation.Retrieval.from_dict(found["fwe"]).depths == (None,)
    assert set(cli_eval.RETRIEVAL) | set(cli_eval.RULER) == set(TASKS)


def test_a_later_failure_keeps_what_was_found(text, tmp_path):
    out = tmp_path / "figures.json"
    options = ["--text", text, "--documents", 2, "--lengths", "64", "--out", out]
    assert fails(run("eval", "embedded", "--suite", "positions,passkey", *options), "task passkey, length 64")
    assert list(json.loads(out.read_text())["results"]) == ["positions"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--suite", "perplexities"], ["--suite perplexities", "choose from retrieval, ruler, perplexity"]),
        (["--suite", "fidelity", "--lengths", "32"], ["add --original MODEL"]),
        (["--lengths", "many"], ["--lengths many", "numbers with commas"]),
        (["--suite", "passkey", "--depths", "2"], ["from 0 to 1"]),
        (["--lengths", "900000"], ["the embedded text, document 1", "wanted 900000"]),
        (["--text", "none.txt"], ["--text none.txt: no such file"]),
        (["--tasks", "none.yaml"], ["none.yaml"]),
    ],
)
def test_errors_are_one_line(options, words):
    if "--tasks" in options:
        pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    assert fails(run("eval", "embedded", *options), *words)


def test_a_text_that_is_too_short(text):
    options = ["--text", text, "--lengths", "512", "--documents", 400]
    assert fails(run("eval", "embedded", *options), "documents of 512 tokens, wanted 400")
