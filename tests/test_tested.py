"""Which releases of transformers are tested: one place, and a word where the installed one is newer."""

import re
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hf_attnpatch import tested

ROOT = Path(__file__).resolve().parents[1]
RANGE = Requirement(re.findall(r'"(transformers[<>=].*?)"', (ROOT / "pyproject.toml").read_text("utf-8"))[0])


@pytest.fixture
def say(monkeypatch):
    """Returns a function that says what is said where a version is installed."""

    def words(version, times=1):
        monkeypatch.setattr("transformers.__version__", version)
        tested.warn_if_newer.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                tested.warn_if_newer()
        return [str(each.message) for each in caught]

    yield words
    tested.warn_if_newer.cache_clear()


def test_the_declared_range_begins_with_the_lowest_and_has_the_newest():
    assert f">={tested.LOWEST}" in str(RANGE.specifier).split(",")
    assert RANGE.specifier.contains(tested.NEWEST)
    assert Version(tested.LOWEST) < Version(tested.NEWEST)


def test_the_newest_is_the_locked_one():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert f"transformers=={tested.NEWEST}" in lines


@pytest.mark.parametrize("version", [tested.LOWEST, tested.NEWEST])
def test_what_was_tested_needs_no_word(say, version):
    assert say(version) == []


@pytest.mark.parametrize("version", ["5.999.0", "5.999.0.dev0", "6.0.0"])
def test_a_newer_one_is_told_once_and_where_to_look(say, version):
    (words,) = say(version, times=3)
    assert version in words
    assert tested.NEWEST in words
    assert "attnpatch doctor" in words
