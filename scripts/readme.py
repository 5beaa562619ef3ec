"""What of README and pages a command writes: parts between two markers, and measured figures inside sentences.

A part stands between `<!-- NAME:start -->` and `<!-- NAME:end -->`, a figure between `<!--=NAME-->` and `<!--/-->`,
where NAME is one of `facts.py`. No line begins with a figure: to Markdown, that would be a block of HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "hf_attnpatch/docs"
FIGURE = re.compile(r"<!--=([^ ]+?)-->(.*?)<!--/-->", re.DOTALL)


def pages() -> list[Path]:
    """README and the pages that ship with the package."""
    return [README, *sorted(DOCS.rglob("*.md"))]


def with_part(text: str, name: str, new: str) -> str:
    """The text with another part between the two markers."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    head, opening, rest = text.partition(start)
    _, closing, tail = rest.partition(end)
    if not opening or not closing:
        raise SystemExit(f"the markers {start} and {end} are missing.")
    return f"{head}{start}\n{new}\n{end}{tail}"


def with_figures(text: str, facts: Mapping[str, str]) -> str:
    """The text with the figures that the results have today."""
    unknown = sorted({name for name, _ in FIGURE.findall(text)} - set(facts))
    if unknown:
        raise SystemExit(
            f"no result has the figures {', '.join(unknown)}; scripts/facts.py names those that there are."
        )
    return FIGURE.sub(lambda found: f"<!--={found[1]}-->{facts[found[1]]}<!--/-->", text)


def holder(name: str) -> Path:
    """The one page that has the markers of a part."""
    found = [page for page in pages() if f"<!-- {name}:start -->" in page.read_text("utf-8")]
    if len(found) != 1:
        where = ", ".join(page.relative_to(ROOT).as_posix() for page in found) or "no page"
        raise SystemExit(f"the part {name!r} must stand in exactly one page, and stands in {where}.")
    return found[0]


def write(name: str, new: str) -> None:
    """Writes a part into the page that has its markers."""
    page = holder(name)
    page.write_text(with_part(page.read_text("utf-8"), name, new), "utf-8")


def is_current(name: str, new: str) -> bool:
    """Whether its page has exactly this part."""
    text = holder(name).read_text("utf-8")
    return text == with_part(text, name, new)
