"""Texts to learn a retrieval task on: whole blocks, with their answers, none of them a prompt that is measured."""

import json
import sys

import pytest

from hf_attnpatch import embedded
from hf_attnpatch.evaluation.retrieval import examples
from recipes.data import DataConfig, load_blocks
from scripts import build_retrieval


@pytest.mark.parametrize("task", ["passkey", "niah_single_1"])
def test_blocks_begin_with_a_prompt_and_hold_its_answer(task, tmp_path, monkeypatch):
    tokenizer = embedded.load_tokenizer()
    arguments = ["--task", task, "--tokens", "256", "--count", "5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["build_retrieval.py", *arguments])
    build_retrieval.main()
    texts = [json.loads(line)["text"] for line in (tmp_path / "a_retrieval.jsonl").read_text().splitlines()]
    assert len(set(texts)) == 5
    blocks = load_blocks(DataConfig(source=str(tmp_path), block=256, cache=str(tmp_path / "cache")), tokenizer)
    drawn = build_retrieval.drawn(tokenizer, task, 256, 5)
    for number, (text, example) in enumerate(zip(texts, drawn, strict=True)):
        ids = blocks[number]["input_ids"].tolist()
        assert ids[:-1] == tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert ids[: len(example.ids)] == list(example.ids)
        assert tokenizer.decode(ids[len(example.ids) :]).startswith(f" {example.answers[0]}.\n")
    keys = {
        each.answers
        for each in examples(tokenizer, task=task, lengths=(512,), samples=10, depths=(0.5,), new_tokens=16)
    }
    assert keys.isdisjoint(each.answers for each in build_retrieval.drawn(tokenizer, task, 256, 5))
    assert len(blocks) > 5  # ordinary text follows
