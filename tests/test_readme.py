"""What README and pages show works: Python runs, commands parse, links lead somewhere, figures are the results'."""

import functools
import json
import os
import re
import subprocess
import sys
import types

import page_texts as pages
import pytest
import torch
import typer
import yaml
from architectures import tiny_model

from hf_attnpatch import embedded, patches
from hf_attnpatch.cli import app
from hf_attnpatch.commands import docs as docs_command
from hf_attnpatch.commands import specs as cli_specs
from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.functional import spans
from hf_attnpatch.patch import REGISTRY

PATCHES = {name: cls for name, cls in REGISTRY.items() if cls.__module__.startswith(patches.__name__)}
BENCH = pages.ROOT / "recipes/results/apply/bench_apply.json"
PYTHON = [(page, number) for page in pages.EVERY for number in range(len(pages.blocks(page, "python")))]
RUN = [page for page in pages.PAGES if pages.blocks(page, "python")]
# numbers in sentences that no result has: sizes of the example, versions, lengths that models were trained at
README_NUMBERS = {"7", "16", "4,096", "5", "3.10", "5.0", "3.11", "3.12", "3.13", "3", "1", "2", "135", "8"}
NUMBERS = {
    *("1.0", "3.10", "3.11", "3.12", "3.13", "5.0", "2.7", "2.0"),  # versions
    *("0.42", "1.01"),  # scripts/bench_perplexity.py prints them
    *("0.2", "3.2", "3.3", "2.1", "3.5"),  # million tokens of training; sections of papers
    *("25 %", "5 %"),  # what counts as near; the share of pretraining that uptraining took
}


@pytest.fixture
def in_scripts(monkeypatch):
    """The modules of scripts/ can be imported."""
    monkeypatch.syspath_prepend(str(pages.ROOT / "scripts"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The embedded model is a tiny one, and what is written goes elsewhere."""
    size = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "vocab_size": 4096}
    monkeypatch.setattr(embedded, "load_model", lambda: tiny_model("llama", **size))
    whole = embedded.heldout
    monkeypatch.setattr(embedded, "heldout", lambda domain=None: [text[:5000] for text in whole(domain)])
    monkeypatch.chdir(tmp_path)


# -- the README convinces on one screen -------------------------------------------------------------------------------


def test_the_readme_is_short():
    text = pages.README.read_text("utf-8")
    assert len(text.splitlines()) <= 250
    assert len(text.split()) <= 1800


@pytest.mark.parametrize("number", range(len(pages.blocks(pages.README, "python"))))
def test_python_of_the_readme_runs(number, small):
    _, code = pages.blocks(pages.README, "python")[number]
    names = {}
    if number == 0:
        exec(compile(code, "README.md, block 0", "exec"), names)
        assert names["ap"].describe(names["model"]).sites[0].num_kv_heads == 2
    else:
        exec(compile(code, f"README.md, block {number}", "exec"), names)


def test_python_blocks_are_there():
    assert len(pages.blocks(pages.README, "python")) >= 4


def test_every_number_of_the_readme_is_rendered_or_known():
    found = set(re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?", pages.prose(pages.README.read_text("utf-8"))))
    assert {number.rstrip(",") for number in found} <= README_NUMBERS


# -- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", RUN, ids=pages.name_of)
def test_python_of_a_page_runs(page, small, monkeypatch):
    """Blocks of one page run in order, as a reader runs them."""
    monkeypatch.setattr("hf_attnpatch.patch.REGISTRY", dict(REGISTRY))
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))  # where a dataclass of the page looks itself up
    names = {"__name__": "page"}
    for number, (note, code) in enumerate(pages.blocks(page, "python")):
        compiled = compile(code, f"{pages.name_of(page)}, block {number}", "exec")
        if not note.startswith("not run: "):
            exec(compiled, names)


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name_of)
def test_every_measured_number_of_a_page_is_rendered_or_known(page):
    text = pages.prose(page.read_text("utf-8"))
    text = re.sub(r"\b\d{4}\.\d{4,5}\b", "", text)  # identifiers of papers
    found = set(re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.]*\d)|\d+ %", text))
    assert found <= NUMBERS


@pytest.mark.parametrize("page", pages.EVERY, ids=pages.name_of)
def test_no_line_begins_with_a_figure(page):
    """It would end the paragraph: to Markdown, a line that begins with a comment is a block of HTML."""
    assert not re.findall(r"^ *<!--=", page.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", sorted(PATCHES))
def test_each_patch_has_a_page(name):
    text = (pages.DOCS / f"patches/{name}.md").read_text("utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["When to use it", "When not to", "What it costs", "Checkpoints", "Example"]
    assert f"# {PATCHES[name].__name__}\n" in text
    assert f"]({name}.md)" in (pages.DOCS / "patches/index.md").read_text("utf-8")
    reference = (pages.DOCS / "reference/patches.md").read_text("utf-8")
    assert f"## {PATCHES[name].__name__}\n" in reference


def test_the_navigation_names_every_page():
    site = yaml.safe_load((pages.ROOT / "mkdocs.yml").read_text("utf-8"))
    named = re.findall(r"[\w/-]+\.md", json.dumps(site["nav"]))
    assert sorted(named) == sorted(page.relative_to(pages.DOCS).as_posix() for page in pages.PAGES)


def test_troubleshooting_quotes_errors_that_there_are():
    text = (pages.DOCS / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(quoted) >= 20
    sources = [path.read_text("utf-8") for path in (pages.ROOT / "hf_attnpatch").rglob("*.py")]
    joined = " ".join(re.sub(r'"\s*\n\s*f?"', "", source) for source in sources)
    missing = [part for title in quoted for part in title.split("...") if part.strip() not in joined]
    assert missing == []


# -- what can be followed leads somewhere -----------------------------------------------------------------------------


@functools.cache
def anchors(page):
    """Anchors of a page, as MkDocs and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {docs_command.slug(re.sub(r"[`*]", "", title)) for title in titles}


@pytest.mark.parametrize("page", pages.EVERY, ids=pages.name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            assert re.match(r"https://(arxiv\.org/abs/\d{4}\.\d{5}$|github\.com/|kexue\.fm/)", target), target
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.is_file(), target
        assert not anchor or anchor in anchors(there), target
        if page != pages.README:
            assert pages.DOCS in there.resolve().parents, f"{target}: the wheel does not hold it"


@pytest.mark.parametrize("page", pages.EVERY, ids=pages.name_of)
def test_paths_of_the_repository_exist(page):
    text = page.read_text("utf-8")
    named = re.findall(r"(?<![\w/])((?:recipes|scripts|tests|hf_attnpatch)/[\w./-]+\w/?)", text)
    absent = [path for path in named if not (pages.ROOT / path).exists()]
    assert absent == []


@pytest.mark.parametrize(
    "words", [w for page in pages.EVERY for w in pages.commands(page, "attnpatch")], ids=lambda words: " ".join(words)
)
def test_command_lines_parse(words):
    group = typer.main.get_command(app)
    with group.make_context("attnpatch", words[1:2], resilient_parsing=True) as context:
        command = group.get_command(context, words[1])
        assert command is not None, words
        values = command.make_context(words[1], words[2:], parent=context).params
    assert all(cli_specs.parse(text) for text in values.get("patch", ()))
    assert cli_specs.patches(None, values.get("patch", ())) if values.get("patch") else True


def test_the_plan_is_one_that_can_be_used(tmp_path):
    ((_, plan),) = pages.blocks(pages.DOCS / "guides/command-line.md", "yaml")
    (tmp_path / "plan.yaml").write_text(plan)
    found = cli_specs.patches(tmp_path / "plan.yaml", [])
    assert [patch.name for patch in found] == [spec["patch"] for spec in yaml.safe_load(plan)]


def made(page):
    """Targets of make that a page mentions."""
    spoken = re.findall(r"`make (?:\w+=\S* )?([\w-]+)", page.read_text("utf-8"))
    return {words[1] for words in pages.commands(page, "make")} | set(spoken)


def test_make_targets_exist():
    assert {"demo", "test", "survey", "bench"} <= made(pages.README)
    defined = set(re.findall(r"^([\w-]+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set().union(*map(made, pages.EVERY)) <= defined


def test_ci_runs_the_test_command_of_the_readme():
    ci = (pages.ROOT / ".ci/run").read_text()
    assert ["make", "test"] in pages.commands(pages.README, "make")
    assert re.search(r"^counted make test$", ci, re.MULTILINE)
    assert re.search(r"^make lint$", ci, re.MULTILINE)


@pytest.mark.parametrize("page", [pages.README, pages.DOCS / "guides/training.md"], ids=pages.name_of)
def test_the_recipe_command_names_files_that_exist(page):
    (words,) = pages.commands(page, "accelerate")
    files = [word for word in words if "/" in word]
    assert len(files) == 2
    assert all((pages.ROOT / file).is_file() for file in files)


def the_map():
    shown = [body for _, body in pages.blocks(pages.DOCS / "write-a-patch.md", "")]
    (tree,) = [block for block in shown if block.startswith("hf_attnpatch/\n")]
    return tree


def test_the_map_names_what_is_there():
    for line in the_map().splitlines():
        names = re.findall(r"[\w/]+(?:\.py|/)", re.split(r"\s{3,}", line.strip())[0])
        folder = pages.ROOT / "hf_attnpatch" if line.startswith("  ") else pages.ROOT
        assert names, line
        assert all((folder / name).exists() for name in names), line


def test_the_map_names_every_module():
    modules = {path.name for path in (pages.ROOT / "hf_attnpatch").glob("*.py")}
    hidden = {"__init__.py", "errors.py", "checkpoint.py"}
    rooms = {f"{path.parent.name}/" for path in (pages.ROOT / "hf_attnpatch").glob("*/__init__.py")}
    assert {name for name in (modules - hidden) | rooms if name not in the_map()} == set()


# -- figures ----------------------------------------------------------------------------------------------------------


def test_pages_say_what_the_results_say():
    command = [sys.executable, str(pages.ROOT / "scripts/pages.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not BENCH.is_file(), reason="no bench has been run: make bench")
def test_the_measured_costs_are_those_of_the_json(in_scripts):
    import bench_report
    import readme

    assert readme.is_current("bench", bench_report.markdown(json.loads(BENCH.read_text("utf-8"))))


def words_of(folder):
    """What stands in each drawing."""
    return {file.name: re.findall(r"<text [^>]*>([^<]*)</text>", file.read_text()) for file in folder.iterdir()}


def test_drawings_say_what_the_results_say(in_scripts, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the drawings are made with matplotlib")
    import page_figures

    monkeypatch.setattr(page_figures, "OUT", tmp_path)
    page_figures.draw()
    assert words_of(tmp_path) == words_of(pages.DOCS / "figures")


def test_the_picture_of_distances_is_that_of_the_code(in_scripts):
    pytest.importorskip("matplotlib", reason="the drawings are made with matplotlib")
    import page_figures

    query, key = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    drawn = page_figures.distances(query.numpy(), key.numpy())
    kinds = {
        "SelfExtend": spans.Grouped(8, 5, 16),
        "ReRope": spans.Clipped(8, 0.0, 16),
        "DualChunk": spans.Chunked(12, 4, 16),
        "JetLong": spans.Bifocal(4, 16),
        "AttentionSinks": spans.Sinks(2, 14),
    }
    for name, kind in kinds.items():
        looked = (key <= query) & (kind.sees(query, key) if name == "AttentionSinks" else True)
        shown = torch.tensor(drawn[name], dtype=torch.float64)[looked]
        assert torch.equal(shown, kind.distance(query, key)[looked]), name


def test_the_support_table_is_searched_in_a_browser(tmp_path, monkeypatch):
    """A word of a type, and words of a reason; nothing is asked of a network."""
    monkeypatch.syspath_prepend(str(pages.ROOT / "tests/comparing"))
    import chromium

    browser = chromium.find()
    if browser is None:
        pytest.skip("no Chromium here")
    shown = {}
    for words in ("llama4_text", "no%20attention%20module", "nothing-has-this"):
        address = f"{(pages.DOCS / 'support.html').as_uri()}#{words}"
        page = chromium.run(browser, tmp_path / "profile", "--virtual-time-budget=2000", "--dump-dom", address).stdout
        shown[words] = int(re.search(r'<output id="count">(\d+) of \d+ types</output>', page)[1])
    assert shown["llama4_text"] == 2, "the type itself, and llama4, whose reason names it"
    assert 0 < shown["no%20attention%20module"] < 50
    assert shown["nothing-has-this"] == 0


# -- the pages can be read without a network --------------------------------------------------------------------------


def test_pages_are_written_as_html(tmp_path):
    folder = docs_command.write(tmp_path / "pages")
    for page in pages.PAGES:
        text = (folder / page.relative_to(pages.DOCS)).with_suffix(".html").read_text("utf-8")
        assert ".md" not in "".join(re.findall(r'href="([^"]*)"', text))
        assert "\n::: " not in text
        for target in re.findall(r'(?:href|src)="([^":]*)"', text):
            file = (folder / page.relative_to(pages.DOCS)).parent / target.partition("#")[0]
            assert file.exists(), (page, target)
    assert "def" not in (folder / "reference/functions.html").read_text("utf-8").split("<code")[0]


def test_the_command_opens_a_page(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(docs_command.webbrowser, "open", lambda address: opened.append(address) or True)
    docs_command.docs("guides/longer-context", tmp_path / "pages")
    assert opened == [(tmp_path / "pages/guides/longer-context.html").as_uri()]
    with pytest.raises(AttnPatchError, match="there is no page"):
        docs_command.docs("../../etc/passwd", tmp_path / "pages")
    assert os.listdir(tmp_path) == ["pages"]
