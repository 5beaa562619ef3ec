"""A few inputs for every parser: valid ones are read, broken ones end in a short error that is documented."""

import random
import time
import tracemalloc
from pathlib import Path

import pytest
import yaml
from fuzz_targets import TARGETS, mutated, outcome
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import hf_attnpatch as ap
from hf_attnpatch.patches.self_extend import _most, _reaching
from recipes import settings as recipe_settings

REFUSED = {"patched config": "its own model type, which would recurse"}


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_valid_is_read(name, tmp_path):
    wanted = "refused" if name in REFUSED else "read"
    assert [outcome(name, valid, tmp_path) for valid in TARGETS[name][1]] == [wanted] * len(TARGETS[name][1])


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
@example(seed=0)
def test_what_is_broken_ends_in_a_documented_error(name, tmp_path, seed):
    chance = random.Random(seed)
    assert outcome(name, mutated(chance.choice(TARGETS[name][1]), chance), tmp_path) in ("read", "refused")


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(max_size=60))
def test_text_of_any_kind_ends_in_a_documented_error(name, tmp_path, content):
    assert outcome(name, content, tmp_path) in ("read", "refused")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize("content", [BOMB, "[" * 100_000, "9" * 100_000, '{"a":' * 50_000, "- " * 50_000], ids=range(5))
@pytest.mark.parametrize("name", TARGETS)
def test_what_multiplies_or_nests_costs_little(name, content, tmp_path):
    tracemalloc.start()
    begin = time.monotonic()
    found = outcome(name, content, tmp_path)
    seconds, (_, peak) = time.monotonic() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found in ("read", "refused")
    assert seconds < 20
    assert peak < 200e6


def test_the_group_of_self_extend_is_the_smallest_that_reaches():
    for trained in range(2, 24):
        for window in range(1, trained + 1):
            for target in range(trained + 1, 90):
                tried = (g for g in range(2, target + 1) if _most(target, window, g) < trained)
                wanted = next(tried, None)
                if wanted is None:
                    with pytest.raises(ap.AttnPatchError, match="no group reaches"):
                        _reaching(target, window, trained)
                else:
                    assert _reaching(target, window, trained) == wanted
    assert _most(10**12, 1024, _reaching(10**12, 1024, 2048)) < 2048


def test_settings_may_name_what_stands_once_but_not_multiply_it(tmp_path):
    for file in Path(recipe_settings.__file__).with_name("configs").glob("*.yaml"):
        assert recipe_settings.read(file) == yaml.safe_load(file.read_text("utf-8"))
    (tmp_path / "bomb.yaml").write_text(BOMB)
    with pytest.raises(recipe_settings.SettingsError, match="more than 1,048,576 values"):
        recipe_settings.read(tmp_path / "bomb.yaml")
    (tmp_path / "loop.yaml").write_text("a: &a [*a]")
    with pytest.raises(recipe_settings.SettingsError, match="nested too deeply"):
        recipe_settings.read(tmp_path / "loop.yaml")
