"""The committed table of pairs is what its command writes, and no number in it is more than rounding."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import pairs  # noqa: E402

PAGE = (ROOT / "recipes/results/pairs/README.md").read_text()
FP32 = 1e-6


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line and "\\" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def kinds(text):
    """Each cell, a number being as good as another."""
    return [[cell if cell.startswith("(") else "works" for cell in row[1:]] for row in rows(text)]


def test_no_pair_computes_something_else_than_its_oracle():
    cells = [cell for row in rows(PAGE) for cell in row[1:]]
    assert len(cells) == 3 * len(pairs.PATCHES) ** 2
    assert all(re.fullmatch(r"\(\d+\)|ok|[\d.e-]+", cell) for cell in cells)
    assert max(float(cell) for cell in cells if cell[0].isdigit()) < FP32
    assert sum(cell[0].isdigit() for cell in cells) > 150


def test_no_pair_is_refused_for_bookkeeping():
    reasons = re.findall(r"^\d+\. (.*)$", PAGE, re.MULTILINE)
    assert reasons
    assert not any("_attn_implementation" in reason or "on top again" in reason for reason in reasons)


@pytest.mark.parametrize("kind", ["llama"])
def test_the_page_is_what_the_command_writes(kind):
    committed = PAGE.split(f"## {kind}\n")[1].split("\n## ")[0]
    made = "\n".join(pairs.table(kind))
    assert kinds(made) == kinds(committed)
    assert max(float(cell) for row in rows(made) for cell in row[1:] if cell[0].isdigit()) < FP32
    assert re.findall(r"^\d+\..*$", made, re.MULTILINE) == re.findall(r"^\d+\..*$", committed, re.MULTILINE)
