"""Task files of lm-eval, which may run code: read as data unless the caller trusts them.

A task file names Python functions (``!function``), other files (``include``), metrics that are scripts on the Hub, and
templates in Jinja, which lm-eval renders without a sandbox: any method of any object can be called in one. Without
trust a file holds what lm-eval reads as data, and its templates put fields of an example into text and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import EvaluationError
from ..schema import LARGEST_YAML, brief, from_yaml, text_of

_DEEPEST = 64  # lists in lists; PyYAML takes quadratic time over deeper ones
_DATA = {
    *("task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs", "training_split"),
    *("validation_split", "test_split", "fewshot_split", "output_type", "target_delimiter", "fewshot_delimiter"),
    *("num_fewshot", "generation_kwargs", "metric_list", "repeats", "should_decontaminate", "metadata"),
}
_TEMPLATES = {
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "doc_to_decontamination_query",
    "description",
    "gen_prefix",
}
# Formats that hold text and numbers; any other name without an owner may be a reader of pickles, or a folder.
_FORMATS = {"json", "csv", "parquet", "text", "arrow"}
_METRICS = {  # of lm-eval itself; another name would be looked up on the Hub and run
    *("acc", "acc_norm", "acc_mutual_info", "acc_bytes", "acc_all", "exact_match", "f1", "mcc", "brier_score"),
    *(
        "perplexity",
        "likelihood",
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
        "bypass",
        "bleu",
        "chrf",
        "ter",
    ),
}
_NODES = {
    *("Template", "Output", "TemplateData", "Name", "Const", "Getattr", "Getitem", "Filter", "If", "CondExpr"),
    *("Compare", "Operand", "Not", "And", "Or", "Concat"),
}
_FILTERS = {"trim", "lower", "upper", "capitalize", "title", "join", "length", "first", "last", "string", "int"}


def is_file(task: str | Path) -> bool:
    """Whether a task is given as a file."""
    return str(task).endswith((".yaml", ".yml"))


def specified(task: str | Path, known: Iterable[str], *, trusted: bool) -> str | dict[str, Any]:
    """Return lm-eval's form of a task: a known name, a file, or the content of a file with its data located.

    Args:
        task: name of lm-eval, or a YAML file.
        known: names of lm-eval.
        trusted: whether code in a file may run.

    Raises:
        EvaluationError: no such name or file, or a file would run code and is not trusted.
    """
    if not is_file(task):
        if str(task) not in known:
            near = difflib.get_close_matches(str(task), list(known), n=5)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise EvaluationError(f"task {task!r}: lm-eval has no such task; {hint} A local task ends in .yaml.")
        return str(task)
    path = Path(task)
    if not path.is_file():
        raise EvaluationError(f"task {task}: there is no such file; wanted a task of lm-eval in YAML.")
    content = _trusted(path) if trusted else _as_data(path)
    files = None if content is None else (content.get("dataset_kwargs") or {}).get("data_files")
    if content is None or (trusted and (files is None or "include" in content)):
        return str(path)
    if files is None:
        return content
    return {**content, "dataset_kwargs": {**content["dataset_kwargs"], "data_files": _beside(path.parent, files)}}


def _trusted(path: Path) -> dict[str, Any] | None:
    """Return the content of a file, or None if only lm-eval can read it because it contains functions."""
    try:
        content = yaml.safe_load(text_of(path, LARGEST_YAML))
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None


def _as_data(path: Path) -> dict[str, Any]:
    text = text_of(path, LARGEST_YAML)
    if any(tag.startswith("!function") for tag in _tags(text)):
        _refuse(path, "names a function (!function)")
    content = from_yaml(text, f"task {path}")
    if not isinstance(content, dict):
        raise EvaluationError(f"task {path}: is {brief(content)}; wanted a task of lm-eval in YAML.")
    for key, value in content.items():
        if key in _TEMPLATES:
            _check_templates(path, key, value)
        elif key not in _DATA:
            _refuse(path, f"has {brief(key)}, which may name code or other files")
    _check_data(path, content)
    _check_metrics(path, content.get("metric_list") or [])
    return content


def _tags(text: str) -> Iterator[str]:
    """Yield the tags of a YAML text, as far as it can be parsed; the loader reports errors."""
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                return
            yield getattr(event, "tag", None) or ""
    except (yaml.YAMLError, RecursionError):
        return


def _refuse(path: Path, why: str) -> None:
    raise EvaluationError(
        f"task {path}: {why}, so that code may run; pass trust_remote_code=True (--trust-remote-code) if you trust it."
    )


def _check_data(path: Path, content: Mapping[str, Any]) -> None:
    source, options = content.get("dataset_path"), content.get("dataset_kwargs") or {}
    if isinstance(source, str) and source not in _FORMATS and ("/" not in source or Path(source).exists()):
        _refuse(path, f"dataset_path is {brief(source)}, neither owner/name nor one of {', '.join(sorted(_FORMATS))}")
    if not isinstance(options, Mapping) or "trust_remote_code" in options:
        _refuse(path, "dataset_kwargs has trust_remote_code")


def _check_metrics(path: Path, metrics: Any) -> None:
    for entry in metrics if isinstance(metrics, list) else [metrics]:
        named = entry.get("metric") if isinstance(entry, Mapping) else None
        if not isinstance(named, str) or named not in _METRICS or "hf_evaluate" in entry:
            _refuse(path, f"metric_list names {brief(named)}, which is no metric of lm-eval itself")


def _check_templates(path: Path, key: str, value: Any) -> None:
    values = value if isinstance(value, list) else list(value.values()) if isinstance(value, Mapping) else [value]
    strange = next((text for text in values if isinstance(text, str) and not _only_fields(text)), None)
    if strange is not None:
        _refuse(path, f"{key} is a template that does more than name fields ({brief(strange, 60)})")


def _only_fields(template: str) -> bool:
    """Return whether a template only inserts fields of an example into text."""
    from jinja2 import Environment, TemplateError, nodes
    from jinja2.defaults import DEFAULT_NAMESPACE

    try:
        tree = Environment(autoescape=False).parse(template)  # noqa: S701 - nothing is rendered
    except (TemplateError, RecursionError):
        return False
    level: list[Any] = [tree]
    for node in level:  # grows while it is walked
        level.extend(node.iter_child_nodes())
        named = getattr(node, "attr", None) if isinstance(node, nodes.Getattr) else getattr(node, "name", "")
        hidden = str(named or "").startswith("_") or str(getattr(node, "value", "")).startswith("_")
        builtin = isinstance(node, nodes.Name) and node.name in DEFAULT_NAMESPACE
        odd = isinstance(node, nodes.Filter) and node.name not in _FILTERS
        computed = isinstance(node, nodes.Getitem) and not isinstance(node.arg, (nodes.Const, nodes.Name))
        if type(node).__name__ not in _NODES or hidden or builtin or odd or computed:
            return False
    return True


def _beside(folder: Path, files: Any) -> Any:
    """Return data files with those that lie in ``folder`` named in full."""
    if isinstance(files, dict):
        return {split: _beside(folder, names) for split, names in files.items()}
    if isinstance(files, list):
        return [_beside(folder, name) for name in files]
    if not isinstance(files, str):
        raise EvaluationError(f"data_files is {brief(files)}; wanted names of files.")
    return str((folder / files).resolve()) if (folder / files).is_file() else files
