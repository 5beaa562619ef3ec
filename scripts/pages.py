"""Renders what README and pages take from `recipes/results/`, or checks that they are current.

    python scripts/pages.py            # figures in sentences, support table (HTML and CSV), tables
    python scripts/pages.py --check    # exit 1 where a page says something else than the results
    python scripts/pages.py --draw     # also the drawings; needs matplotlib

It needs neither torch nor the package, so that it takes a second.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import page_tables
import readme
import support_page
import survey_table
from facts import RESULTS, facts

SURVEY = RESULTS / "survey/survey.json"


def rendered() -> Iterator[tuple[Path, str]]:
    """Each generated file with the text that it must have."""
    survey = json.loads(SURVEY.read_text("utf-8"))
    yield readme.DOCS / "support.html", support_page.html(survey)
    yield readme.DOCS / "support.csv", survey_table.as_csv(survey)
    known = facts()
    parts = {"support-table": survey_table.summary(survey), **page_tables.parts()}
    homes = {name: readme.holder(name) for name in parts}
    for page in readme.pages():
        text = readme.with_figures(page.read_text("utf-8"), known)
        for name in (name for name, home in homes.items() if home == page):
            text = readme.with_part(text, name, parts[name])
        yield page, text


def write() -> list[Path]:
    """Writes what is not current, and says which files."""
    stale = outdated()
    wanted = dict(rendered())
    for file in stale:
        file.write_text(wanted[file], "utf-8")
    return stale


def outdated() -> list[Path]:
    """The files that say something else than the results."""
    return [file for file, text in rendered() if not file.is_file() or file.read_text("utf-8") != text]


def main() -> None:
    """Render, check or draw, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a page is not current; write nothing")
    parser.add_argument("--draw", action="store_true", help="draw the figures, too")
    arguments = parser.parse_args()
    if arguments.check:
        names = ", ".join(file.relative_to(readme.ROOT).as_posix() for file in outdated())
        sys.exit(f"not what the results say: {names}; run `python scripts/pages.py`." if names else None)
    if arguments.draw:
        import page_figures

        page_figures.draw()
    for file in write():
        print(f"wrote {file.relative_to(readme.ROOT)}")


if __name__ == "__main__":
    main()
