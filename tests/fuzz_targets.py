"""Every parser of text that a stranger may have written, with a small valid input: what fuzzing starts from.

A target takes text. It may return, or raise one of the documented errors; anything else is a fault.
"""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path

import torch
from comparing.metrics import METRICS as MADE_UP
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of

import hf_attnpatch as ap
from hf_attnpatch import evaluation
from hf_attnpatch.commands import place, specs, text
from hf_attnpatch.comparing import store, tables
from hf_attnpatch.comparing import text as report
from hf_attnpatch.doctoring import files
from hf_attnpatch.evaluation import hardware, roofline, task_files
from hf_attnpatch.foreign import PatchedConfig
from hf_attnpatch.patch import from_spec
from hf_attnpatch.patches.self_extend import _reaching
from hf_attnpatch.publishing import origin
from hf_attnpatch.record import parse
from hf_attnpatch.recurrence.state import check_state
from hf_attnpatch.rope_search.state import opened
from hf_attnpatch.schema import from_json, from_yaml
from recipes import data, settings

DOCUMENTED = (ap.AttnPatchError, settings.SettingsError, data.DataError)
LONGEST_MESSAGE = 3_000

SCORE = {"nats": 2.5, "low": 2.0, "high": 3.0, "tokens": 64, "losses": [["a", [80.0, 32]], ["b", [80.0, 32]]]}
SHARE = {"value": 0.5, "low": 0.4, "high": 0.6}
AT = {"context": 64, "prefill_seconds": 0.1, "decode_seconds": 0.01, "prefill_tokens_per_second": 640.0}
AT |= {"decode_tokens_per_second": 100.0, "prefill_limit": None, "decode_limit": 4e3, "cache_bytes": 6400}
AT |= {"peak_bytes": None}
DECODING = {"model": "Llama", "dtype": "float32", "batch": 1, "device": "cpu", "threads": 1, "rows": [AT]}
DECODING |= {"limits": {"flops_per_second": 1e9, "bytes_per_second": 1e9}}
PHASE = {"seconds": 1.0, "parts": [["rest", 1.0]], "overhead_seconds": 0.0, "flops": 1, "traffic_bytes": 1}
PHASE |= {"operations": 1}
MEMORY = {"weights": 1, "cache": 1, "gradients_and_optimizer": 0, "activations": 1}
WORK = {"phases": [["decode", PHASE]], "memory": [["decode", MEMORY]], "cache_bytes": 1}
CURE = {"answers": "cache", "code": "x", "command": "y", "gains": [["decode seconds", 2.0]], "after": WORK}
CURE |= {"untouched": ["a"], "stock": True}
DIAGNOSIS = {"model": "Llama", "hardware": "h", "source": "s", "context": 8, "batch": 1, "dtype": "float32"}
DIAGNOSIS |= {"work": WORK, "lacks": [{"kind": "cache", "where": "decode", "what": "w"}], "prescriptions": [CURE]}
DIAGNOSIS |= {"declined": ["d"], "notes": []}
POINT = {"kind": "matmul", "dtype": "float32", "size": [["rows", 8]], "rate": 1e9}
MACHINE = {"name": "m", "source": "s", "threads": 1, "memory_bytes": 1, "call_seconds": 0.0, "operation_seconds": 0.0}
MACHINE |= {"fresh_bytes": 0, "fresh_seconds": 0.0, "points": [POINT]}
RECORD = {
    "version": 1,
    "patches": [{"patch": "grouped_query", "num_kv_heads": 2, "stock": True}, {"patch": "alibi"}],
    "base_model": "openai-community/gpt2",
    "base_model_type": "gpt2",
    "stock": False,
    "versions": {"hf_attnpatch": "0.1"},
    "commands": ["attnpatch apply A B"],
}
METRICS = json.loads(json.dumps({"version": 1, "settings": {"targets": 32}, **MADE_UP}))
METRICS["patched"]["record"] = RECORD
for _which in ("original", "patched"):
    METRICS["parts"]["decoding"][_which] = DECODING
SCORES = METRICS["parts"]["loss"]["original"]
STATE = {"settings": {"seed": 0, "population": 8, "iterations": 2}, "iteration": 1, "settled": 2}
STATE |= {"random": list(random.Random(0).getstate()), "population": [[1.0, 2.0], [1.0, 3.0]]}
STATE |= {"losses": [[[1.0, 2.0], 2.5], [[1.0, 3.0], 2.6]]}
YAML_MACHINE = """name: mine
memory_bytes: 8e9
rates:
  float32: {matmul: 1e12, attention: 1e12, bandwidth: 1e11}
"""
TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: a.jsonl}
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
SETTINGS = """data:
  source: corpus
  block: 512
  skip_to: null
train:
  lr: 2e-3
"""
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\npipeline_tag: text-generation\n---\n# A card\n"


def _file(folder: Path, content: str, name: str = "given.json") -> Path:
    file = folder / name
    file.write_text(content, "utf-8", errors="surrogatepass")
    return file


def _result(kind):
    return lambda content, folder: kind.from_dict(from_json(content, "result"))


def _metrics(content: str, folder: Path) -> None:
    found = ap.Comparison.load(_file(folder, content, "metrics.json").parent)
    report.render(found.metrics, [])
    [each(found.metrics) for each in (tables.loss_by_length, tables.fidelity, tables.retrieval, tables.decoding)]


def _config(content: str, folder: Path) -> None:
    found = from_json(content, "config.json")
    if isinstance(found, dict):
        parse(found.get("attnpatch"))


def _foreign(content: str, folder: Path) -> None:
    """The record alone is a stranger's: what else stands in a config is held to its types by transformers."""
    found = from_json(content, "record")
    if isinstance(found, dict) and found.get("base_model_type") != "gpt2":
        PatchedConfig.from_dict({"attnpatch": found})


def _extended(content: str, folder: Path) -> None:
    found = from_json(content, "lengths")
    if isinstance(found, list) and len(found) == 3 and all(type(n) is int and n > 1 for n in found):
        trained, window, target = found[0], min(found[1], found[0]), found[0] + found[2]
        group = _reaching(target, window, trained)
        assert (target - 1) // group + window - window // group < trained


def _stream(content: str, folder: Path) -> None:
    """Tensors as JSON: name -> [dtype, shape, a number]; the header is what a stranger writes."""
    found = from_json(content, "stream", finite=False)
    dtypes = {"int64": torch.int64, "float32": torch.float32, "bool": torch.bool, "bfloat16": torch.bfloat16}
    state = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        made = value
        if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) and value[0] in dtypes:
            whole = isinstance(value[1], list) and all(type(n) is int and 0 <= n < 9 for n in value[1][:5])
            number = value[2] if isinstance(value[2], (int, float)) else 0
            number = number if abs(number) < 2**62 and (value[0] != "int64" or number == number) else 0
            made = torch.full(value[1][:5] if whole else [1], number, dtype=dtypes[value[0]])
        state[name] = made
    check_state(state if isinstance(found, dict) else found)


def _tensors(content: str, folder: Path) -> None:
    check_state(tensors_of(bytes_of({"count": torch.zeros(len(content) % 7, dtype=torch.int64)})))


STREAM = {"segments": ["int64", [3], 1], "columns": ["int64", [], 4], "number": ["int64", [2, 3], 1]}
STREAM |= {"turned": ["int64", [2, 3], 1], "count": ["int64", [2], 3], "shift": ["int64", [2], 0]}
STREAM |= {"0.k": ["float32", [2, 2, 3, 4], 0.5], "0.v": ["float32", [2, 2, 3, 4], 0.5]}


def _made(content: str, folder: Path) -> None:
    given = settings.read(_file(folder, content, "c.yaml"), ["data.block=16"])
    settings.build(data.DataConfig, given.get("data"), "data")


def _task(content: str, folder: Path) -> None:
    task_files.specified(_file(folder, content, "t.yaml"), [], trusted=False)


def _checkpoint(content: str, folder: Path) -> None:
    found = files.read(_file(folder, content, "config.json").parent)
    _ = found.text, found.model_type


def _spec(content: str, folder: Path) -> None:
    from_spec(from_json(content, "spec"), recorded=False)


SPECS = [
    {"patch": "grouped_query", "num_kv_heads": 2, "method": "refined", "cache_target": None, "seed": 0},
    {"patch": "alibi", "slopes": [0.5, 0.25], "distance_clip": 4, "strength": 1.0},
    {"patch": "rope_scaling", "kind": "yarn", "factor": 4, "beta_fast": 32, "layer_types": ["full_attention"]},
    {"patch": "self_extend", "window": 8, "group": 2, "target": 64, "start": 0, "trained": 16, "backend": "sdpa"},
    {"patch": "rotary", "theta": 10000, "kind": "linear", "factor": 2, "partial": 0.5},
    {"patch": "segment_recurrence", "segment_length": 8, "memory_length": 8, "positions": "bounded"},
    {"patch": "re_rope", "leak": 0.1},
    {"patch": "score_temperature", "slope": 0.1, "step": 64},
    {"patch": "windowed", "window": 64, "layers": [0, 2], "first_tokens": 4, "home": "cwm"},
    {"patch": "latent", "rank": 20, "rope_dim": 16, "method": "principal", "home": "youtu"},
    {"patch": "no_position", "layers": [0, 2], "home": "smollm3"},
    {"patch": "position_table", "length": 64, "method": "tile"},
    {"patch": "sinusoidal", "embedding_scale": "paper"},
    {"patch": "relative_xl", "size": 4, "init": "recency"},
]

# name -> (what reads it, valid inputs)
TARGETS = {
    "record": (lambda c, f: parse(from_json(c, "record")), [json.dumps(RECORD)]),
    "config.json": (_config, [json.dumps({"model_type": "hf_attnpatch", "attnpatch": RECORD})]),
    "patched config": (_foreign, [json.dumps({**RECORD, "base_model_type": "hf_attnpatch"})]),
    "spec": (_spec, [json.dumps(spec) for spec in SPECS]),
    "plan": (
        lambda c, f: [from_spec(s) for s in specs.read_plan(_file(f, c, "plan.yaml"))],
        ["- patch: flash\n- patch: grouped_query\n  num_kv_heads: 2\n", json.dumps(SPECS)],
    ),
    "--patch": (lambda c, f: from_spec(specs.parse(c)), ["grouped_query:num_kv_heads=2,method=mean", "alibi"]),
    "metrics.json": (_metrics, [json.dumps(METRICS)]),
    "part": (
        lambda c, f: store.Store(_file(f, c, "loss.k.json").parent).get("loss", "k"),
        [json.dumps({"part": "loss", "key": "k", "result": SCORES})],
    ),
    "earlier result": (lambda c, f: store.is_result(_file(f, c), {"version"}), [json.dumps({"version": 1})]),
    "checkpoint at OUT": (lambda c, f: place._says_model(_file(f, c)), [json.dumps({"model_type": "gpt2"})]),
    "LossByLength": (_result(evaluation.LossByLength), [json.dumps(SCORES)]),
    "LossByPosition": (
        _result(evaluation.LossByPosition),
        [json.dumps({"edges": [1, 2, 4], "scores": [SCORE, SCORE]})],
    ),
    "Fidelity": (
        _result(evaluation.Fidelity),
        [json.dumps({"kl": SCORE, "top1": SHARE, "continuation": SHARE, "continued": 4})],
    ),
    "Retrieval": (_result(evaluation.Retrieval), [json.dumps(METRICS["parts"]["retrieval"]["original"])]),
    "Decoding": (_result(evaluation.Decoding), [json.dumps(DECODING)]),
    "LayerDifference": (_result(evaluation.LayerDifference), [json.dumps(METRICS["parts"]["layers"])]),
    "TaskScores": (
        _result(evaluation.TaskScores),
        [
            json.dumps(
                {
                    "metrics": [{"task": "a", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1}],
                    "examples": [["a", 4]],
                    "max_length": 64,
                    "version": "0.4",
                }
            )
        ],
    ),
    "Diagnosis": (_result(ap.Diagnosis), [json.dumps(DIAGNOSIS)]),
    "Phase": (_result(roofline.Phase), [json.dumps(PHASE)]),
    "machine, kept": (lambda c, f: hardware._kept(_file(f, c)), [json.dumps(MACHINE)]),
    "hardware file": (
        lambda c, f: hardware.machine_for(str(_file(f, c, "m.yaml")), [], torch.device("cpu")),
        [YAML_MACHINE, json.dumps(MACHINE), json.dumps(hardware.TABLE["h100"])],
    ),
    "search state": (lambda c, f: opened({"seed": None}, 0, _file(f, c)), [json.dumps(STATE)]),
    "stream state": (_stream, [json.dumps(STREAM)]),
    "calibration text": (
        lambda c, f: text.read(_file(f, c, "t.jsonl")),
        ['{"text": "one"}\n{"text": "two", "id": 1}\n'],
    ),
    "recipe settings": (_made, [SETTINGS]),
    "recipe rows": (lambda c, f: list(data.rows(_file(f, c, "r.jsonl"), "text")), ['{"text": "one"}\n']),
    "task file": (_task, [TASK]),
    "checkpoint's files": (_checkpoint, [json.dumps({"model_type": "gpt2", "text_config": {"a": 1}})]),
    "model card": (lambda c, f: origin._metadata(c, "README.md"), [CARD]),
    "Self-Extend's lengths": (_extended, ["[16, 8, 1000000000000]", "[2048, 1024, 100000]", "[4096, 4095, 999999]"]),
    "YAML": (lambda c, f: from_yaml(c, "y"), [SETTINGS, YAML_MACHINE]),
}

HARD = ["NaN", "Infinity", "-1", "1e400", "9" * 5_000, "10" + "0" * 400, "true", "null", "[]", "{}", '""', "2024-01-01"]
HARD += ["[" * 2_000, '{"a":' * 2_000, '"\\ud800"', '"\\u0000"', "0.5", "1e308", str(2**63), "- &a [*a]", "!!set {a}"]
HARD += [
    "&a [x, x]\nb: [*a, *a]",
    "<<: {a: 1}",
    "!!python/name:os.system",
    "\x1b[2J",
    "\ufeff",
    "[[]]",
    "12:30:00",
    "0x10",
]
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|true|false|null|[\w.]+|[\[\]{},:]')


ODD = [float("nan"), float("inf"), -1, 0, 10**400, 2**63, 1.5, True, None, [], {}, "", "x" * 2_000, [[]], {"a": [1]}]


def bent(valid: str, chance: random.Random) -> str:
    """Return JSON of which one to three values were replaced, moved, left out or added to."""
    tree = json.loads(valid)
    for _ in range(chance.randint(1, 3)):
        held = [tree]
        for each in held:  # grows while it is walked
            held.extend(
                v for v in (each.values() if isinstance(each, dict) else each) if isinstance(v, (dict, list)) and v
            )
        into = chance.choice(held)
        keys = list(into) if isinstance(into, dict) else list(range(len(into)))
        if not keys:
            continue
        key, kind = chance.choice(keys), chance.randrange(6)
        if kind < 3:
            into[key] = copy.deepcopy(chance.choice(ODD))
        elif kind == 3:
            into[key] = json.loads(json.dumps(into[chance.choice(keys)]))
        elif kind == 4:
            del into[key]
        elif isinstance(into, dict):
            name = chance.choice(("more", "found", "proved", "__class__", "a.b", "\x1b[2J"))
            into[name] = copy.deepcopy(chance.choice(ODD))
        else:
            into.append(json.loads(json.dumps(into[key])))
    return json.dumps(tree)


def mutated(valid: str, chance: random.Random) -> str:
    """Return an input with a few changes: of the values of JSON, or of its words and characters."""
    if valid.startswith(("{", "[")) and valid.count("\n") < 1 and chance.random() < 0.6:
        return bent(valid, chance)
    found = valid
    for _ in range(chance.randint(1, 4)):
        words = [match.span() for match in WORD.finditer(found)] or [(0, len(found))]
        (a, b), (c, d) = chance.choice(words), chance.choice(words)
        kind = chance.randrange(7)
        if kind < 3:
            found = found[:a] + chance.choice(HARD) + found[b:]
        elif kind == 3:
            found = found[:a] + found[c:d] + found[b:]
        elif kind == 4:
            found = found[:a] + found[min(a, c) : max(b, d)] + found[a:]
        elif kind == 5:
            found = found[: min(a, c)] + found[max(b, d) :]
        else:
            at = chance.randrange(len(found) + 1)
            found = (
                found[:at] + chr(chance.choice((0, 9, 10, 34, 58, 91, 123, 127, 0xD800, 0x202E, 0x1F600))) + found[at:]
            )
        found = found[:200_000]
    return found


def outcome(name: str, content: str, folder: Path) -> str:
    """Return what a target made of an input: ``read``, ``refused``, or the fault."""
    try:
        TARGETS[name][0](content, folder)
    except DOCUMENTED as error:
        said = str(error)
        return "refused" if len(said) < LONGEST_MESSAGE else f"a message of {len(said)} characters"
    except Exception as error:  # noqa: BLE001 - what a fuzzer is for
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "read"


__all__ = ["TARGETS", "mutated", "outcome"]
