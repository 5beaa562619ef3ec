"""Task files of lm-eval that would run code: each way there is, refused unless trusted; plain tasks need no trust."""

import pytest

from hf_attnpatch import AttnPatchError, EvaluationError
from hf_attnpatch.evaluation import task_files

PLAIN = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question|trim}} {% if hint %}({{ hint.words[0] }}){% endif %}{{ 'yes' if answer == 0 else '' }}"
doc_to_choice: ["{{a}}", "{{choices[answer]}}"]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].popen('touch mark').read() }}",
    "{{ cycler['__init__']['__globals__'] }}",
    "{{ question['__cla' ~ 'ss__'] }}",
    "{{ question|attr('__class__') }}",
    "{{ [question]|map(attribute='__class__')|list }}",
    "{{ question.format(question) }}",
    "{{ self._TemplateReference__context }}",
    "{{ namespace }}",
    "{% set x = question.upper() %}{{ x }}",
    "{% for a in range(10**9) %}x{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{% include '/etc/passwd' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{{ unclosed",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
]
LINES = {
    "function": "process_docs: !function utils.run",
    "function, deep": "metadata: {a: [!function utils.run]}",
    "function in a template": "doc_to_text: !function utils.run",
    "include": "include: ../../elsewhere.yaml",
    "group": "group: many",
    "class": "class: utils.Task",
    "prompts of another package": "use_prompt: 'promptsource:*'",
    "unsafe_code": "unsafe_code: true",
    "results": "process_results: run",
    "a metric of the Hub": "metric_list: [{metric: mallory/metric}]",
    "a metric with evaluate": "metric_list: [{metric: exact_match, hf_evaluate: true}]",
    "a metric by no name": "metric_list: [{metric: [acc]}]",
    "a reader of pickles": "dataset_path: pandas",
    "a folder": "dataset_path: .",
    "a folder elsewhere": "dataset_path: /etc",
    "trust in it": "dataset_kwargs: {trust_remote_code: true}",
    **{f"template {number}": f"doc_to_text: {text!r}" for number, text in enumerate(ESCAPES)},
    "template in a list": "doc_to_choice: ['a', \"{{ lipsum.__globals__ }}\"]",
    "template in a mapping": 'doc_to_choice: {a: "{{ lipsum.__globals__ }}"}',
    "description": 'description: "{{ lipsum.__globals__ }}"',
}


def task(folder, line=""):
    key = line.partition(":")[0]
    kept = PLAIN
    if key and f"\n{key}:" in PLAIN:  # replaced, with what is indented below it
        lines, kept = PLAIN.splitlines(), ""
        skipping = False
        for each in lines:
            skipping = each.startswith(f"{key}:") or (skipping and each.startswith(" "))
            kept += "" if skipping else each + "\n"
    file = folder / "task.yaml"
    file.write_text(kept + line + "\n")
    (folder / "colours.jsonl").write_text("")
    return file


def test_a_plain_task_is_data_and_its_files_are_found(tmp_path):
    found = task_files.specified(task(tmp_path), (), trusted=False)
    assert found["task"] == "colours"
    assert found["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "colours.jsonl")}
    assert found == task_files.specified(task(tmp_path), (), trusted=True)


@pytest.mark.parametrize("case", LINES)
def test_what_would_run_code_asks_for_trust(tmp_path, case):
    file = task(tmp_path, LINES[case])
    with pytest.raises(EvaluationError, match=r"trust_remote_code=True \(--trust-remote-code\)") as error:
        task_files.specified(file, (), trusted=False)
    assert len(str(error.value)) < 600
    assert task_files.specified(file, (), trusted=True)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system [touch mark]", "- a", "a: &x [1]\nb: *x", "[" * 5000]
)
def test_what_is_no_task_is_a_clear_error(tmp_path, text):
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(AttnPatchError):
        task_files.specified(tmp_path / "task.yaml", (), trusted=False)


def test_a_template_runs_no_code_through_lm_eval(tmp_path):
    """The whole way: the same file marks the disk when it is trusted, and only then."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from measured_models import llama

    from hf_attnpatch import embedded, evaluation

    mark = tmp_path / "mark"
    attack = "{{ lipsum.__globals__['os'].system('touch " + str(mark) + "') }}"
    file = task(tmp_path, f'doc_to_text: "{attack}"')
    (tmp_path / "colours.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 0, "a": "b"}\n')
    ask = (llama(vocab_size=4096), embedded.load_tokenizer(), [file])
    with pytest.raises(EvaluationError, match="more than name fields"):
        evaluation.task_scores(*ask, max_length=64)
    assert not mark.exists()
    evaluation.task_scores(*ask, max_length=64, trust_remote_code=True)
    assert mark.exists()
