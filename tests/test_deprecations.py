"""Who is at fault for a deprecation of transformers, on made-up functions compiled as if transformers had them."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import deprecations
import pytest
import torch
from deprecations import WATCH
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.logging import get_logger

FAMILY = """
@deprecate_kwarg("old", "99.0.0", new_name="new")
def create(new=None):
    return new

class Attention(torch.nn.Module):
    @deprecate_kwarg("old", "99.0.0", new_name="new")
    def forward(self, new=None):
        return new

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
    def forward(self, ids=None, **kwargs):
        return self.attention(**kwargs)

class Careless(Model):
    def forward(self, **kwargs):
        return self.attention(old=1)

def calls_back(function):
    return function(old=1)

def enable():
    warnings.warn("`enable` is deprecated, use `switch_on`.", FutureWarning)

def advise():
    warnings.warn("`advise` is deprecated, but this is no such category.")
"""
OUTPUT = """
class Output:
    @property
    def old(self):
        logger.warning_once("`old` is deprecated. Use `new` instead.")
    def get(self, key):
        return self._key(key)
    def _key(self, key):
        if key == "old":
            logger.warning("`old` is deprecated. Use `new` instead.")
"""


def made_up(source, name):
    space = {
        "torch": torch,
        "warnings": warnings,
        "deprecate_kwarg": deprecate_kwarg,
        "logger": get_logger("transformers.made_up"),
    }
    exec(compile(source, deprecations.UPSTREAM + name, "exec"), space)
    return SimpleNamespace(**space)


family = made_up(FAMILY, "models/made_up/modeling_made_up.py")
output = made_up(OUTPUT, "utils/made_up.py")
third_party = made_up("def call(function, **kwargs):\n    return function(old=1)", "../peft/made_up.py")


def through_kwargs(**kwargs):
    return family.create(**kwargs)


OURS = {
    "a function": lambda: family.create(old=1),
    "both names": lambda: family.create(old=1, new=2),
    "a module, through torch": lambda: family.Attention()(old=1),
    "a name that transformers passes on": lambda: family.Model()(old=1),
    "a method": lambda: family.enable(),
    "a field, through the log": lambda: output.Output().old,
    "an item, through the log": lambda: output.Output().get("old"),
    "in a function of ours that transformers calls": lambda: family.calls_back(lambda old: family.create(old=old)),
    "through keywords of our own": lambda: through_kwargs(old=1),
}
THEIRS = {
    "transformers itself": lambda: family.Careless()(),
    "transformers through a wrapper of ours": lambda: family.calls_back(through_kwargs),
    "another library": lambda: third_party.call(family.create),
    "another library, which we pass something": lambda: third_party.call(family.create, new=1),
    "the new name": lambda: family.Model()(new=1),
    "another category": lambda: family.advise(),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", OURS)
def test_ours_is_found_each_time(name):
    for _ in range(2):  # the log would say it once in a process
        OURS[name]()
        (found,) = WATCH.take()
        assert found.startswith("tests/test_deprecations.py:")
        assert "deprecated" in found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", THEIRS)
def test_theirs_is_not_ours(name):
    THEIRS[name]()
    assert WATCH.take() == []


def test_it_is_found_where_warnings_are_silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        family.create(old=1)
    assert len(WATCH.take()) == 1


def test_a_warning_still_points_where_it_did():
    with pytest.warns(FutureWarning, match="`old` is deprecated") as caught:
        family.create(old=1)
    assert Path(caught[0].filename) == Path(__file__)
    WATCH.take()


def test_the_log_still_points_where_it_did(caplog):
    logging.getLogger("made_up").warning("something")
    assert [record.pathname for record in caplog.records] == [__file__]


def test_a_test_that_causes_one_fails(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "from test_deprecations import OURS, THEIRS\n"
        "def test_ours(): OURS['a function']()\n"
        "def test_theirs(): THEIRS['transformers itself']()\n"
        "@pytest.mark.deprecated('old')\n"
        "def test_meant(): OURS['a function']()\n"
    )
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q", str(tmp_path)]
    paths = {"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=paths)
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "our code uses what transformers deprecates" in done.stdout
