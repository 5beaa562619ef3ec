"""Local tasks through lm-eval: against a plain loop, whole examples or an error, no NaN."""

import json
import math
import random

import pytest
import torch
from measured_models import llama

from hf_attnpatch import EvaluationError, MissingExtra, embedded, evaluation
from hf_attnpatch.evaluation import harness

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 6, until: ["."]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROWS = [
    {"question": "The sky over the sea is", "choices": ["blue", "green", "red"], "answer": 0},
    {"question": "Grass that has had rain is", "choices": ["blue", "green", "red"], "answer": 1},
    {"question": "The blood of a deer is", "choices": ["blue", "green", "red"], "answer": 2},
    {"question": "A leaf of the willow is", "choices": ["blue", "green", "red"], "answer": 1},
]

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"lm_eval.*pip install 'hf_attnpatch\[eval\]'"):
        evaluation.task_scores(llama(), None, ["hellaswag"])


@pytest.fixture
def task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colours.yaml").write_text(TASK)
    (folder / "write.yaml").write_text(WRITE)
    (folder / "colours.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return folder / "colours.yaml"


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.load_tokenizer()


def model():
    return llama(vocab_size=4096)


def test_a_local_task_is_a_plain_loop(task, tokenizer):
    random.seed(3)
    torch.manual_seed(3)
    asked = model().train()
    states = random.getstate(), torch.get_rng_state()
    found = evaluation.task_scores(asked, tokenizer, [task], max_length=64)
    assert asked.training
    assert (random.getstate(), torch.equal(torch.get_rng_state(), states[1])) == (states[0], True)
    right = 0
    for row in ROWS:
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['question']} {choice}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(row["question"])["input_ids"])
            with torch.no_grad():
                losses = asked.eval()(ids).logits.log_softmax(-1)[0, start - 1 : -1]
            sums.append(float(losses.gather(1, ids[0, start:, None]).sum()))
        right += sums.index(max(sums)) == row["answer"]
    assert found.metrics[0].value == right / 4
    assert (found.metrics[0].task, found.metrics[0].metric, found.examples) == ("colours", "acc", {"colours": 4})
    assert found.max_length == 64
    assert "nothing truncated at 64 tokens" in str(found)
    assert evaluation.TaskScores.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_is_too_long_is_an_error_and_never_cut(task, tokenizer):
    sizes = [len(tokenizer(f"{row['question']} green")["input_ids"]) for row in ROWS]
    evaluation.task_scores(model(), tokenizer, [task], max_length=max(sizes) - 1)  # the last token is not read
    with pytest.raises(EvaluationError, match=rf"task colours, example {sizes.index(max(sizes))}: {max(sizes)} tokens"):
        evaluation.task_scores(model(), tokenizer, [task], max_length=max(sizes) - 2)
    write = task.with_name("write.yaml")
    sizes = [len(tokenizer(row["question"])["input_ids"]) + 6 for row in ROWS]
    found = evaluation.task_scores(model(), tokenizer, [write], max_length=max(sizes))
    assert found.metrics[0].metric == "exact_match"
    with pytest.raises(EvaluationError, match=f"task write, example .*: {max(sizes)} tokens with its answer"):
        evaluation.task_scores(model(), tokenizer, [write], max_length=max(sizes) - 1)


@pytest.mark.parametrize("name", ["colours.yaml", "write.yaml"])
def test_nan_is_an_error(task, tokenizer, name):
    broken = model()
    broken.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(EvaluationError, match="logits that are NaN"):
        evaluation.task_scores(broken, tokenizer, [task.with_name(name)], max_length=64)


def test_no_such_task(task, tokenizer):
    with pytest.raises(EvaluationError, match="task 'hellaswagg': lm-eval has no such task; did you mean .*hellaswag"):
        evaluation.task_scores(model(), tokenizer, ["hellaswagg"], max_length=64)
    with pytest.raises(EvaluationError, match="there is no such file"):
        evaluation.task_scores(model(), tokenizer, [task.with_name("none.yaml")], max_length=64)
    task.with_name("colours.jsonl").unlink()
    with pytest.raises(EvaluationError, match="look at the task's data"):
        evaluation.task_scores(model(), tokenizer, [task], max_length=64)
    with pytest.raises(EvaluationError, match=r"tasks=\[\]"):
        evaluation.task_scores(model(), tokenizer, [], max_length=64)


def test_a_nan_metric_is_an_error():
    found = {"results": {"colours": {"alias": "colours", "acc,none": math.nan}}}
    with pytest.raises(EvaluationError, match="task colours: its acc is NaN"):
        harness._scores(found, 64, "0")
