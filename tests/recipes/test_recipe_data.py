"""Any text as data, and errors that say what to do."""

import json

import numpy as np
import pytest

from recipes import settings
from recipes.data import DataConfig, DataError, documents, load_blocks
from recipes.schedule import TrainConfig

TEXTS = ["the quick brown fox " * 10, "jumps over the lazy dog\n" * 8, "fox and dog " * 12]


def config(source, tmp_path, **changes):
    return DataConfig(source=str(source), block=16, cache=str(tmp_path / "cache"), **changes)


def jsonl(path, key="text"):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in TEXTS))
    return path


def packed(tokenizer):
    ids = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return np.array(ids[: len(ids) // 16 * 16]).reshape(-1, 16)


def test_file_folder_and_dataset_give_the_same_blocks(tmp_path, tokenizer):
    file = jsonl(tmp_path / "one/texts.jsonl")
    (tmp_path / "many").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / f"many/{number}.txt").write_text(text)
    expected = packed(tokenizer)
    named = {"data_files": str(file)}
    sources = [(file, {}), (file.parent, {}), (tmp_path / "many", {}), ("json", named)]
    sources.append(("json", named | {"streaming": True, "max_tokens": 10_000}))
    for source, changes in sources:
        blocks = load_blocks(config(source, tmp_path, **changes), tokenizer)
        assert np.array_equal(blocks.tokens, expected), source
    item = blocks[1]
    assert item["input_ids"].tolist() == item["labels"].tolist() == expected[1].tolist()


def test_a_stream_stops_at_max_tokens(tmp_path, tokenizer):
    file = jsonl(tmp_path / "one/texts.jsonl")
    stream = config("json", tmp_path, data_files=str(file), streaming=True, max_tokens=40)
    assert np.array_equal(load_blocks(stream, tokenizer).tokens, packed(tokenizer)[:2])
    with pytest.raises(DataError, match="set data.max_tokens"):
        load_blocks(config("json", tmp_path, data_files=str(file), streaming=True), tokenizer)


def test_the_cache_is_used_and_follows_the_content(tmp_path, tokenizer):
    file = jsonl(tmp_path / "one/texts.jsonl")
    first = load_blocks(config(file, tmp_path), tokenizer)
    cached = list((tmp_path / "cache").iterdir())
    stamp = cached[0].stat().st_mtime_ns
    assert load_blocks(config(file, tmp_path), tokenizer).fingerprint == first.fingerprint
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()] == [stamp]
    file.write_text(file.read_text().replace("fox", "cat"))
    assert load_blocks(config(file, tmp_path), tokenizer).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("not_a_dataset_of_ours", "neither a local file or folder .* nor a dataset"),
        ("{tmp}/pictures", r"found \.png, wanted files ending in \.txt"),
        ("{tmp}/blank.txt", "every document is blank"),
        ("{tmp}/short.txt", "wanted at least one block of 16"),
        ("{tmp}/broken.jsonl", "broken.jsonl:2: wanted a JSON object with the key 'text'"),
        ("{tmp}/other.jsonl", "other.jsonl:1: wanted a JSON object with the key 'text'"),
        ("{tmp}/null.jsonl", "null.jsonl:2: 'text' is None; wanted a text"),
        ("{tmp}/latin.txt", "latin.txt: not UTF-8 text"),
        ("{tmp}/latin.jsonl", "latin.jsonl: not UTF-8 text"),
    ],
)
def test_errors_say_what_was_found_and_wanted(tmp_path, tokenizer, source, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a network that is not there
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("fox")
    (tmp_path / "broken.jsonl").write_text('{"text": "fox"}\n{"text": \n')
    (tmp_path / "null.jsonl").write_text('{"text": "fox"}\n{"text": null}\n')
    for name in ("latin.txt", "latin.jsonl"):
        (tmp_path / name).write_bytes('{"text": "\xe9"}\n'.encode("latin-1"))
    jsonl(tmp_path / "other.jsonl", key="content")
    with pytest.raises(DataError, match=message):
        load_blocks(config(source.replace("{tmp}", str(tmp_path)), tmp_path), tokenizer)
    assert not list(tmp_path.glob("cache/.tmp-*"))


def test_documents_come_in_one_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert list(documents(config(tmp_path, tmp_path))) == ["a", "b", "c"]


def test_settings_are_checked_key_by_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {output: out, steps: 5, batch_size: 2, lr: 2e-3}\n")
    values = settings.read(path, ["train.steps=7"])
    assert settings.build(TrainConfig, values["train"], "train") == TrainConfig(
        output="out", steps=7, batch_size=2, lr=0.002
    )
    with pytest.raises(settings.SettingsError, match="train: unknown stepz; choose from accumulation"):
        settings.build(TrainConfig, values["train"] | {"stepz": 1}, "train")
    with pytest.raises(settings.SettingsError, match="train: output must be given"):
        settings.build(TrainConfig, {"steps": 1, "batch_size": 1}, "train")
    with pytest.raises(settings.SettingsError, match=r"expected section\.key=value"):
        settings.read(path, ["train.steps"])
    with pytest.raises(settings.SettingsError, match="steps is 5, no section"):
        settings.read(path, ["train.steps.more=1"])
    for section, message in [
        ({"schedule": "linear"}, "train.schedule: 'linear' does not exist; choose from 'cosine', 'constant'"),
        ({"steps": 1.5}, "train.steps: expected a whole number, found 1.5"),
        ({"lr": "high"}, "train.lr: expected a number, found 'high'"),
    ]:
        with pytest.raises(settings.SettingsError, match=message):
            settings.build(TrainConfig, values["train"] | section, "train")
    with pytest.raises(settings.SettingsError, match="train: expected a mapping, found 'fast'"):
        settings.build(TrainConfig, "fast", "train")
    with pytest.raises(settings.SettingsError, match="no such configuration"):
        settings.read(tmp_path / "none.yaml")
