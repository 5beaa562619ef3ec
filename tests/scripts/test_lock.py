"""The lock: what is in it, and that it fits pyproject.toml and the Makefile."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import lock

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it, from which on there is a lock")
PROJECT = tomllib.loads((lock.ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
WANTED = [
    *lock.BUILDING.split(),
    *PROJECT["build-system"]["requires"],
    *PROJECT["project"]["dependencies"],
    *(line for extra in ("dev", "recipes", "smollm2", "eval") for line in EXTRAS[extra]),
]
LINES = [line for line in lock.LOCK.read_text("utf-8").splitlines() if not line.startswith("#")]
RESOLVED = """\
# made by uv
numpy==2.4.6 ; python_full_version < '3.12'
numpy==2.5.5 ; python_full_version >= '3.12'
nvidia-cublas==13.1 ; sys_platform == 'linux'
cuda-bindings==13.4
torch==2.13.0
triton==3.8.0
"""


def test_a_lock_is_pins_under_a_header_without_what_only_cuda_needs():
    found = lock.as_lock(RESOLVED)
    assert [line for line in found.splitlines() if line.startswith("# for Python")] == ["# for Python 3.11 3.12 3.13"]
    assert lock.pins(found) == {
        "numpy": "2.4.6 ; python_full_version < '3.12', 2.5.5 ; python_full_version >= '3.12'",
        "torch": "2.13.0",
    }


def test_what_changed_is_said_by_package():
    assert lock.changes({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}) == [
        "  b: 1 -> 2",
        "  c: 1 -> -",
        "  d: - -> 1",
    ]


def test_the_tested_release_is_written_into_its_file():
    text = lock.TESTED.read_text("utf-8")
    found = lock.with_newest(text, "5.99.1")
    (before,) = set(text.splitlines()) - set(found.splitlines())
    (after,) = set(found.splitlines()) - set(text.splitlines())
    assert before.startswith("NEWEST = ")
    assert after.startswith('NEWEST = "5.99.1"  # ')


def test_every_line_is_a_pin_and_names_no_index():
    assert len(LINES) > 100
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[^ ;/@]+( ; [\w .'<>=!()*]+)?", line), line
        assert not lock.CUDA.match(line)


@pytest.mark.parametrize("text", WANTED)
def test_every_requirement_has_a_pin_that_satisfies_it(text):
    """Where this fails, pyproject.toml was changed without `make lock`."""
    wanted = Requirement(text)
    if wanted.name == "hf_attnpatch":
        return
    pinned = [found for found in map(Requirement, LINES) if found.name == canonicalize_name(wanted.name)]
    assert pinned
    for found in pinned:
        (pin,) = found.specifier
        assert wanted.specifier.contains(pin.version)


def test_torch_is_the_makefiles():
    makefile = (lock.ROOT / "Makefile").read_text("utf-8")
    (torch,) = re.findall(r"^TORCH \?= (.*)$", makefile, re.MULTILINE)
    assert torch in LINES
