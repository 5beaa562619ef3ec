"""The names in a configuration, and how held-out text is cut."""

import dataclasses

import pytest
import torch

from hf_attnpatch import embedded
from recipes import sources
from recipes.data import DataConfig, DataError, documents
from recipes.evaluate import heldout_windows
from recipes.job import HeldoutConfig

COUNTS = {"python": 7, "prose": 4, "docs": 5}
TEXTS = {domain: [f"{domain} {number}" for number in range(count)] for domain, count in COUNTS.items()}


@pytest.fixture
def shipped(monkeypatch):
    monkeypatch.setattr(embedded, "heldout", lambda domain=None: TEXTS[domain])


@pytest.mark.usefixtures("shipped")
def test_the_two_parts_are_disjoint_and_every_domain_is_in_both(tmp_path):
    parts = []
    for name in sources.PARTS:
        config = DataConfig(source=name, cache=str(tmp_path))
        parts.append(list(documents(sources.resolve(config))))
        assert {text.split()[0] for text in parts[-1]} == set(embedded.DOMAINS)
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(text for texts in TEXTS.values() for text in texts)
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.usefixtures("shipped")
def test_a_domain_of_a_part_is_that_part_of_it(tmp_path):
    for part in sources.PARTS:
        by_domain = []
        for domain in embedded.DOMAINS:
            config = DataConfig(source=f"{part}/{domain}", cache=str(tmp_path))
            by_domain += (found := list(documents(sources.resolve(config))))
            assert {text.split()[0] for text in found} == {domain}
        assert by_domain == sources.embedded_texts(part)


def test_what_ships_is_split_without_a_rest():
    if not (embedded.path() / "heldout.jsonl.xz").is_file():
        pytest.skip("the embedded text is absent")
    uptrain, evaluation = (sources.embedded_texts(part) for part in sources.PARTS)
    assert not set(uptrain) & set(evaluation)
    assert sorted(uptrain + evaluation) == sorted(embedded.heldout())
    assert len(evaluation) > 15


def test_other_names_are_left_alone_and_wrong_parts_are_named(tmp_path):
    config = DataConfig(source="some/dataset")
    assert sources.resolve(config) is config
    assert sources.locate("some/model") == "some/model"
    assert sources.locate("embedded") == str(embedded.path())
    with pytest.raises(DataError, match="embedded/uptrain/poetry: the package ships .*python, prose, docs"):
        sources.resolve(DataConfig(source="embedded/uptrain/poetry", cache=str(tmp_path)))
    with pytest.raises(DataError, match="embedded/test: the package ships embedded/uptrain and embedded/evaluation"):
        sources.resolve(DataConfig(source="embedded/test", cache=str(tmp_path)))


def test_windows_are_spread_over_documents_and_predict_no_token_twice(tmp_path, tokenizer):
    for name, words in (("a", 200), ("b", 30), ("c", 2)):
        (tmp_path / f"{name}.txt").write_text(" ".join(str(number) for number in range(words)))
    config = HeldoutConfig(source=str(tmp_path), block=16, windows=1000, cache=str(tmp_path / "cache"))
    windows = heldout_windows(config, tokenizer)
    for number, name in enumerate("abc"):
        ids = tokenizer((tmp_path / f"{name}.txt").read_text())["input_ids"]
        own = [window["input_ids"] for window in windows if window["document"] == number]
        predicted = torch.cat([window[1:] for window in own]).tolist()
        assert predicted == ids[: len(predicted)]
        assert len(predicted) > len(ids) - 15 or name == "c"
    assert len([w for w in windows if w["document"] == 2]) == 1  # shorter than a window, and still measured
    few = heldout_windows(dataclasses.replace(config, windows=3), tokenizer)
    chosen = [w["input_ids"].tolist() for w in few if w["document"] == 0]
    everything = [w["input_ids"].tolist() for w in windows if w["document"] == 0]
    assert [everything.index(window) for window in chosen] == [0, len(everything) // 3, 2 * len(everything) // 3]
    assert {w["document"] for w in heldout_windows(dataclasses.replace(config, documents=2), tokenizer)} == {0, 1}
