"""README and the pages that ship with the package, as tests read them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "hf_attnpatch/docs"
PAGES = sorted(DOCS.rglob("*.md"))
EVERY = [README, *PAGES]
_FENCE = re.compile(r"^(?:<!-- ([^>\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    """Code blocks of a language, each with what the comment right above it says."""
    return [(note or "", body) for note, name, body in _FENCE.findall(page.read_text("utf-8")) if name == language]


def commands(page, program):
    lines = [line.partition("#")[0].strip() for _, block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(program)]


def prose(text):
    """A page without code, figures that are rendered, generated parts, comments and the targets of links."""
    text = _FENCE.sub("", text)
    text = re.sub(r"<!-- ([\w-]+):start -->.*?<!-- \1:end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--=.*?<!--/-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.sub(r"\]\([^)]*\)", "]", text)
