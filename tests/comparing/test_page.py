"""The report in a browser: it renders, light and dark, and asks nothing of anybody."""

import base64
import copy
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparing import chromium
from comparing.metrics import METRICS, SCORES, WORSE, answers, loss

from hf_attnpatch.comparing import figures, page, style, text
from hf_attnpatch.comparing.result import Comparison
from hf_attnpatch.comparing.verdict import verdict


@pytest.fixture(scope="module")
def drawn():
    return figures.draw(METRICS)


@pytest.fixture(scope="module")
def html(drawn):
    return page.render(text.render(METRICS, drawn), drawn)


@pytest.fixture(scope="module")
def browser():
    found = chromium.find()
    if found is None:
        pytest.skip("no Chromium on this machine (CHROMIUM=PATH names one; Debian's package is `chromium`)")
    return found


class References(HTMLParser):
    """Collects tags and every attribute that makes a browser fetch something."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [
            value for key, value in attrs if key in ("src", "srcset", "href", "data", "poster", "action")
        ]


def test_nothing_is_fetched_and_nothing_runs(html):
    found = References()
    found.feed(html)
    assert "script" not in found.tags
    assert found.addresses
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_every_part_is_there_as_figure_and_table(html, drawn):
    assert {figure.title for figure in drawn} == {part[2] for part in figures.FIGURES}
    for title in ("In short", "Loss by context length", "Fidelity", "Damage by layer", "Retrieval", "Speed and cache"):
        assert f"<h2>{title}" in html
    assert html.count("<picture>") == len(drawn) == 4
    assert html.count("<table>") == 5


def test_it_begins_with_a_verdict_in_words(html):
    told = re.search(r"<h1>.*?</h1>\s*<p>(.*?)</p>", html, re.DOTALL)[1]
    assert told.startswith("At 256 tokens the patched model loses 0.100 nats per token more (+0.094 to +0.106).")
    assert "Its cache is as large. It decodes 2.00 times as fast at 128 tokens, on this machine." in told
    assert told.endswith("It finds 20 of 100 where the original finds 100.")


def test_what_the_original_cannot_do_says_nothing_of_the_patch():
    parts = {**METRICS["parts"], "retrieval": {"original": answers(0.0), "patched": answers(0.0)}}
    assert verdict({**METRICS, "parts": parts}).endswith("so that it says nothing of the patch.")
    same = {**METRICS, "parts": {"loss": {"original": loss(SCORES), "patched": loss(SCORES)}}}
    assert verdict(same).startswith("At 256 tokens no difference of the loss is shown: +0.000")
    assert verdict({**METRICS, "parts": {}}) == "Its cache is as large."


def test_figures_differ_by_marker_and_line_and_are_drawn_for_both_grounds(drawn):
    from PIL import Image

    for colours in (style.MODELS, style.ON_DARK):
        assert len({c for c, _, _ in colours.values()}) == len({m for _, m, _ in colours.values()}) == 2
        assert len({line for _, _, line in colours.values()}) == 2
    for figure in drawn:
        for theme, ground in (("light", (255, 255, 255)), ("dark", (13, 17, 23))):
            image = Image.open(io.BytesIO(figure.drawn[theme])).convert("RGB")
            assert image.getpixel((0, 0)) == ground
            assert len(image.getcolors(1 << 24)) > 50, "an empty figure"


def test_the_report_of_the_same_metrics_is_the_same(html):
    again = figures.draw(METRICS)
    assert page.render(text.render(METRICS, again), again) == html


def _screenshot(browser, html, folder, dark):
    from PIL import Image

    (folder / "report.html").write_text(html, "utf-8")
    shot = folder / f"{dark}.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    target = (folder / "report.html").as_uri()
    chromium.run(browser, folder / "profile", *scheme, "--window-size=1000,4200", f"--screenshot={shot}", target)
    return Image.open(shot).convert("RGB")


@pytest.mark.parametrize(("dark", "ground"), [(False, (255, 255, 255)), (True, (13, 17, 23))])
def test_a_browser_shows_it_light_and_dark(browser, html, tmp_path, dark, ground):
    image = _screenshot(browser, html, tmp_path, dark)
    pixels = image.tobytes()
    colours = [tuple(pixels[i : i + 3]) for i in range(0, len(pixels), 3)]
    count = {c: 0 for c in ((255, 255, 255), (13, 17, 23))}
    for colour in colours:
        if colour in count:
            count[colour] += 1
    other = next(c for c in count if c != ground)
    assert image.getpixel((2, 2)) == ground
    assert count[ground] > 0.5 * len(colours)
    assert count[other] < 0.02 * len(colours), "a figure or a table on the other ground"
    wanted = (style.ON_DARK if dark else style.MODELS)["original"][0]
    assert tuple(bytes.fromhex(wanted[1:])) in set(colours), "no figure of this scheme is shown"


def test_a_browser_finds_every_figure_whole_and_no_script(browser, html, tmp_path):
    (tmp_path / "report.html").write_text(html, "utf-8")
    done = chromium.run(browser, tmp_path / "profile", "--dump-dom", (tmp_path / "report.html").as_uri())
    body = done.stdout.split("<body>")[1]
    assert body.count("<img") == 4
    assert "<script" not in body
    assert "&lt;script&gt;alert(1)" in body
    assert "example.com" not in "".join(re.findall(r"<img[^>]*>", body))
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', body):
        assert base64.b64decode(data).startswith(b"\x89PNG")


def test_extreme_figures_are_shown():
    """Losses beyond what an exponential holds, nothing lost at all, nothing found."""
    metrics = copy.deepcopy(METRICS)
    lost = {**WORSE, "nats": 1e4, "low": 1e-9, "high": 1e30, "losses": [["a", [3.2e5, 32]], ["b", [3.2e5, 32]]]}
    metrics["parts"]["loss"]["patched"] = loss(lost)
    metrics["parts"]["layers"] |= {"alone": [0.0, 1e30], "in_place": [1e-30, 5.0]}
    metrics["parts"]["retrieval"]["patched"] = answers(0.0)
    drawn = figures.draw(metrics)
    assert len(drawn) == 4
    assert "| inf | +inf |" in text.render(metrics, drawn)
    results = Comparison(Path("unused"), metrics)._results()
    assert results == []  # the Hub reads numbers only
