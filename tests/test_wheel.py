"""What a wheel carries, asked of the backend that builds it: the package, the recipes of the demo, nothing idle."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import hf_attnpatch as ap

ROOT = Path(__file__).parents[1]
CARRIED = {
    "hf_attnpatch": "hf_attnpatch",
    "recipes/configs": "hf_attnpatch/shipped/recipes/configs",
    "recipes/accelerate": "hf_attnpatch/shipped/recipes/accelerate",
}


@pytest.fixture(scope="module")
def wheel():
    """Path in the wheel -> path here."""
    return {f.distribution_path: Path(f.path) for f in WheelBuilder(str(ROOT)).recurse_included_files()}


@pytest.mark.parametrize("folder", CARRIED)
def test_it_carries_the_package_and_the_recipes(folder, wheel):
    here = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert here
    assert {f"{CARRIED[folder]}/{p.relative_to(ROOT / folder).as_posix()}" for p in here} <= set(wheel)


def test_it_carries_every_module_of_the_recipes(wheel):
    modules = {p.name for p in (ROOT / "recipes").glob("*.py")}
    assert "uptrain.py" in modules
    assert {f"hf_attnpatch/shipped/recipes/{name}" for name in modules} <= set(wheel)


def test_it_carries_nothing_idle(wheel):
    assert all(name.startswith("hf_attnpatch/") for name in wheel)
    assert not [name for name in wheel if "/results/" in name or name.endswith((".png", ".pyc"))]
    assert sum(path.stat().st_size for path in wheel.values()) < 16 * 2**20


def test_a_wheel_can_be_built_from_the_sdist(wheel):
    sdist = {Path(f.path) for f in SdistBuilder(str(ROOT)).recurse_included_files()}
    assert set(wheel.values()) <= sdist


def test_the_demo_starts_from_what_is_carried(wheel, tmp_path):
    for name, path in wheel.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / name)
    start = "from hf_attnpatch import demo; print(demo.recipes())"
    found = _python(tmp_path, "-c", start).stdout.strip()
    assert Path(found) == (tmp_path / "hf_attnpatch/shipped/recipes").resolve()
    assert "--config" in _python(tmp_path, f"{found}/uptrain.py", "--help").stdout  # every import is there


def _python(installed, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_it_carries_the_documentation(wheel):
    assert {f"hf_attnpatch/docs/{name}" for name in ("index.md", "support.html", "figures/front.svg")} <= set(wheel)


def test_the_citation_names_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["version"] == ap.__version__


def test_issues_ask_for_what_doctor_says():
    for name in ("bug", "architecture"):
        form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text("utf-8"))
        labels = [part["attributes"]["label"] for part in form["body"]]
        assert "attnpatch doctor --json" in labels


def test_workflows_call_what_make_has():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(file.read_text("utf-8"))["jobs"]
        lines = [
            step["run"] for job in jobs.values() for step in job["steps"] if step.get("run", "").startswith("make ")
        ]
        called = {word for line in lines for word in line.split()[1:] if re.fullmatch(r"[\w-]+", word)}
        assert called <= targets
    assert set(jobs_matrix()) == {"lint", "test", "test-lowest", "check-releases", "test-newest"}


def jobs_matrix():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    return jobs["tests"]["strategy"]["matrix"]["target"]


def test_a_release_says_everywhere_which_it_is():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == ap.__version__
    notes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"\n## [{ap.__version__}] - {citation['date-released']}\n" in notes


def test_workflows_run_only_what_a_hash_names():
    used = re.findall(r"uses: (\S+)", "".join(f.read_text("utf-8") for f in (ROOT / ".github/workflows").glob("*.yml")))
    assert len(used) >= 10
    assert [each for each in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", each)] == []
