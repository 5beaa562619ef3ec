"""Measuring a real model: what its tokenizer does to prompts, memory, time, and what it finds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnpatch import evaluation
from hf_attnpatch.evaluation.retrieval import TASKS, examples

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data" / "smollm2"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not (FOLDER / "config.json").exists(), reason="python scripts/fetch_smollm2.py --out data/smollm2"
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_their_length_and_their_needles(task, chat, tokenizer):
    for example in examples(tokenizer, task=task, lengths=(1024, 2011), samples=2, chat=chat):
        assert 0 <= example.length - TASKS[task].new_tokens - len(example.ids) <= 1
        text = tokenizer.decode(example.ids)
        assert all(piece in text for piece in example.hidden)
        assert text.startswith("<|im_start|>") == chat


def test_it_finds_a_passkey_near_the_end(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    options = {"task": "passkey", "lengths": (512,), "depths": (0.9, 1.0), "samples": 2}
    shared = evaluation.retrieval(model, tokenizer, **options)
    assert shared.score().value >= 50
    alone = evaluation.retrieval(model, tokenizer, **options, batch_tokens=1)
    assert [answer.score for answer in shared.answers] == [answer.score for answer in alone.answers]


def test_8192_tokens_fit_and_cost_no_more_than_a_forward():
    command = [sys.executable, str(ROOT / "scripts" / "bench_perplexity.py"), str(FOLDER), "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    extra = next(float(line.split()[1]) for line in lines if line.endswith("more at its peak"))
    share = next(float(line.split()[-1]) for line in lines if line.startswith("perplexity  "))
    assert extra < 1.5, done.stdout
    assert share < 1.05, done.stdout
