"""What the recipes' tests share; `recipes` is no installed package, so the root goes on the path."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from accelerate.state import AcceleratorState  # noqa: E402  (after the path, like everything below it)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision in a singleton; every test starts without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    from recipes.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the quick brown fox jumps over the lazy dog\n"] * 20, folder, vocab_size=300, context=64)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A folder with a model of 4 key-value heads, a tokenizer and text."""
    from uptraining import material

    return material(tmp_path, tokenizer)


@pytest.fixture
def no_reload(monkeypatch):
    """Leaves out the new process that loads the result; other tests have it."""
    from recipes import uptrain

    found = {"max_difference": 0.0, "stock": True, "attention": "sdpa"}
    monkeypatch.setattr(uptrain.saving, "check_reload", lambda *_, **__: found)
