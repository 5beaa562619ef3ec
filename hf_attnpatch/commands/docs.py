"""``attnpatch docs``: the pages that ship with the package, as HTML files on this machine."""

from __future__ import annotations

import ast
import html
import re
import shutil
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import voice
from .command import command

PAGES = Path(__file__).resolve().parents[1] / "docs"
_NAVIGATION = (
    ("Start", "index.md"),
    ("Concepts", "concepts.md"),
    ("Patches", "patches/index.md"),
    ("Architectures", "architectures.md"),
    ("Troubleshooting", "troubleshooting.md"),
    ("API", "reference/index.md"),
    ("Limits", "limits.md"),
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
nav {{ padding: .8rem 0; border-bottom: 1px solid var(--line); }} nav a {{ margin-right: 1rem; }}
a {{ color: #0969da; }} img {{ background: white; border-radius: 6px; }}
@media (prefers-color-scheme: dark) {{ a {{ color: #7db8ff; }} }}
</style>
</head>
<body>
<main>
<nav>{navigation}</nav>
{body}
</main>
</body>
</html>
"""


def docs(
    page: Annotated[str, typer.Argument(help="A page to open, such as guides/longer-context.")] = "index",
    out: Annotated[Path | None, typer.Option(help="Folder for the HTML files.", show_default="in the cache")] = None,
    open_it: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Open the documentation that ships with the package; it needs no network."""
    from ..errors import AttnPatchError

    source = PAGES / f"{page.removesuffix('.html').removesuffix('.md')}.md"
    if not source.is_file() or PAGES not in source.resolve().parents:
        known = ", ".join(sorted(path.relative_to(PAGES).with_suffix("").as_posix() for path in _sources()))
        raise AttnPatchError(f"docs: there is no page {page!r}; choose from: {known}.")
    folder = write(out or _cache())
    target = (folder / source.relative_to(PAGES)).with_suffix(".html")
    opened = open_it and webbrowser.open(target.as_uri())
    voice.answer(f"{'opened' if opened else 'written'} {target}", {"page": target, "opened": bool(opened)})


def add(app: typer.Typer) -> None:
    """Add the command to an app."""
    command(app, "docs", "attnpatch docs", "attnpatch docs guides/longer-context --no-open --out site")(docs)


def _cache() -> Path:
    from .. import __version__

    return Path.home() / ".cache/hf_attnpatch/docs" / __version__


def _sources() -> Iterator[Path]:
    yield from PAGES.rglob("*.md")


def write(folder: Path) -> Path:
    """Write every page as HTML, and what the pages show, into a folder; files of the same names are replaced.

    Args:
        folder: made where it is not there.
    """
    for path in sorted(PAGES.rglob("*")):
        target = folder / path.relative_to(PAGES)
        if path.is_dir() or path.suffix == ".py":
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            target.with_suffix(".html").write_text(rendered(path), "utf-8")
        else:
            shutil.copyfile(path, target)
    return folder.absolute()


def rendered(source: Path) -> str:
    """Return a page as HTML; links to other pages lead to their HTML, API entries are read from the sources."""
    from markdown_it import MarkdownIt

    from ..comparing.page import STYLE

    text = re.sub(r"^::: ([\w.]+)$", lambda found: entry(found[1]), source.read_text("utf-8"), flags=re.MULTILINE)
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")  # our own files, not a stranger's
    reader.add_render_rule("link_open", _link)
    reader.add_render_rule("heading_open", _heading)
    reader.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    up = "../" * (len(source.relative_to(PAGES).parts) - 1)
    navigation = "".join(f'<a href="{up}{page[:-3]}.html">{title}</a>' for title, page in _NAVIGATION)
    title = html.escape(re.sub("[`#]", "", text.lstrip().splitlines()[0]).strip())
    return _PAGE.format(title=title, style=STYLE, navigation=navigation, body=reader.render(text))


def _link(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    target = str(tokens[index].attrs["href"])
    if "://" not in target:
        tokens[index].attrs["href"] = re.sub(r"\.md(?=#|$)", ".html", target)
    return str(renderer.renderToken(tokens, index, options, env))


def _heading(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    tokens[index].attrs["id"] = slug(tokens[index + 1].content)
    return str(renderer.renderToken(tokens, index, options, env))


def slug(title: str) -> str:
    """Return the anchor of a heading, as MkDocs makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def entry(name: str) -> str:
    """Return signature and docstring of a public name, read from the sources: nothing is imported for a page.

    Args:
        name: dotted, such as ``hf_attnpatch.api.apply``.
    """
    module, _, last = name.partition(".")[2].rpartition(".")
    base = PAGES.parent / module.replace(".", "/")
    file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    tree = ast.parse(file.read_text("utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == last)
    said = ast.get_docstring(node) or ""
    return f"```python\n{_signature(node)}\n```\n\n```text\n{said}\n```"


def _signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{node.name}({ast.unparse(node.args)}){returns}"
    fields = [ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign)]
    shown = [field for field in fields if "ClassVar" not in field and "init=False" not in field]
    return "\n".join([f"class {node.name}", *(f"    {field}" for field in shown)])
