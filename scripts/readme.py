"""The parts of the README that a command writes: between `<!-- NAME:start -->` and `<!-- NAME:end -->`."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def with_part(text: str, name: str, new: str) -> str:
    """The text with another part between the two markers."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    head, opening, rest = text.partition(start)
    _, closing, tail = rest.partition(end)
    if not opening or not closing:
        raise SystemExit(f"README.md: the markers {start} and {end} are missing.")
    return f"{head}{start}\n{new}\n{end}{tail}"


def write(name: str, new: str) -> None:
    """Writes the part into the README."""
    README.write_text(with_part(README.read_text("utf-8"), name, new), "utf-8")


def is_current(name: str, new: str) -> bool:
    """Whether the README has exactly this part."""
    text = README.read_text("utf-8")
    return text == with_part(text, name, new)
