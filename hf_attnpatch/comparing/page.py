"""The report as one self-contained HTML file: inline figures, light and dark theme, no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import unescapeAll
from markdown_it.token import Token

from .figures import Figure

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
STYLE = """:root { --ground: #ffffff; --text: #1f2328; --faint: #59636e; --line: #d0d7de; --code: #f2f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --text: #e6edf3; --faint: #9198a1; --line: #3d444d; --code: #1a2029; }
}
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1, h2 { line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin-top: 2.2rem; padding-top: 1rem; border-top: 1px solid var(--line); }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
th { color: var(--faint); font-weight: 600; }
code { background: var(--code); border-radius: 4px; padding: .1em .3em; font-size: .88em; overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; }
pre code { background: none; padding: 0; overflow-wrap: normal; }"""


def render(markdown: str, figures: Sequence[Figure]) -> str:
    """Return report.html.

    Args:
        markdown: report.md; HTML in it is shown as text.
        figures: that its images are.
    """
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    drawn = {figure.file: figure for figure in figures}

    def image(renderer: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
        figure, alt = drawn.get(str(tokens[index].attrs["src"])), tokens[index].content
        return html.escape(alt) if figure is None else _picture(figure, alt)

    reader.add_render_rule("image", image)
    reader.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    heading = next((line[2:] for line in markdown.splitlines() if line.startswith("# ")), "Comparison")
    return framed(unescapeAll(heading), STYLE, reader.render(markdown))  # no markup in a title


def framed(title: str, style: str, body: str) -> str:
    """Return a page that loads nothing from anywhere.

    Args:
        title: as text.
        style: CSS.
        body: HTML, whose author has escaped what is not his own.
    """
    return _PAGE.format(title=html.escape(title), style=style, body=body)


def _picture(figure: Figure, alt: str) -> str:
    light, dark = (_data(figure.drawn[theme]) for theme in ("light", "dark"))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(alt, quote=True)}"></picture>'
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
