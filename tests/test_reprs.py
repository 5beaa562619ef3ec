"""What a notebook or a prompt shows of a result: one short line, or a page in which nothing of a stranger's acts."""

import base64
import dataclasses
import re
from xml.etree import ElementTree

import pytest
from architectures import tiny_model
from rich.table import Table

import hf_attnpatch as ap
from hf_attnpatch.comparing.result import Comparison
from hf_attnpatch.evaluation import summarise
from hf_attnpatch.evaluation.positions import LossByPosition
from hf_attnpatch.evaluation.result import Result
from hf_attnpatch.heads.damage import DamageReport, LayerDamage
from hf_attnpatch.heads.refine import Gap
from hf_attnpatch.report import Report
from hf_attnpatch.showing import Shown, columns, rendered
from hf_attnpatch.verify import Finding, Verification

NASTY = "<script>alert(1)</script>\x1b[2J\u202e&"


@pytest.fixture(scope="module")
def found():
    """One of each, by name."""
    model = tiny_model("llama", num_hidden_layers=8)
    report = ap.apply(model, ap.GroupedQuery(num_kv_heads=2), ap.RopeScaling(kind="yarn", factor=4))
    return {
        "Report": report,
        "Plan": report.plan,
        "Anatomy": report.plan.anatomy,
        "Diagnosis": ap.diagnose(model, context=512, batch=1, hardware="h100", training=False, losses=False),
        "Verification": Verification("LlamaForCausalLM", (Finding("finite", "pass", 0.0, 1.0, "logits"),)),
    }


@pytest.mark.parametrize("name", ["Report", "Plan", "Anatomy", "Diagnosis", "Verification"])
def test_a_result_is_one_short_line_and_a_page(found, name):
    one = found[name]
    assert re.fullmatch(rf"<{name}: .*LlamaForCausalLM.*>", repr(one))
    assert len(repr(one)) <= 200
    assert len(str(one).splitlines()) > 3, "str stays what people read"
    page = one._repr_html_()
    assert page.startswith("<pre")
    assert "LlamaForCausalLM" in page or name in ("Report", "Plan")


def test_the_line_says_what_happened(found):
    said = repr(found["Report"])
    assert "grouped_query(num_kv_heads=2" in said
    assert "edits, checkpoint for stock" in said
    model = tiny_model("llama")
    report = ap.patch_alibi(model)
    assert "checkpoint for hf_attnpatch: alibi()" in repr(report)
    report.revert()
    assert repr(report).endswith("reverted>")
    assert repr(found["Anatomy"]) == "<Anatomy: LlamaForCausalLM (llama), 8 attention modules, rotary, context 128>"


def test_patches_are_written_as_python_without_their_defaults():
    assert repr(ap.GroupedQuery(num_kv_heads=2)) == "GroupedQuery(num_kv_heads=2)"
    assert repr(ap.NoPosition()) == "NoPosition()"
    patch = ap.RopeScaling(kind="longrope", factor=2.0, long_factor=[1.0, 2.0])
    assert eval(repr(patch), vars(ap) | {"RopeScaling": ap.RopeScaling}) == patch


@dataclasses.dataclass(frozen=True)
class Measured(Result):
    name: str
    losses: tuple[float, ...]
    more: dict[str, float]
    exact: float


def test_long_fields_are_told_by_their_size():
    assert repr(Measured("a" * 99, (1.0,) * 5000, {"b": 1.0}, 1 / 3)) == (
        f"<Measured: name='{'a' * 36} ...', losses=tuple of 5000, more=dict of 1, exact=0.333333>"
    )


def test_nothing_in_a_page_or_a_line_acts(found):
    anatomy = dataclasses.replace(found["Anatomy"], architecture=NASTY, model_type=NASTY)
    plan = dataclasses.replace(found["Plan"], anatomy=anatomy)
    for shown in (
        anatomy,
        plan,
        dataclasses.replace(found["Verification"], architecture=NASTY),
        Measured(NASTY, (), {}, 0),
    ):
        assert "\x1b" not in repr(shown)
        assert "\u202e" not in repr(shown)
        page = shown._repr_html_()
        assert not {"\x1b", "\u202e"} & set(page)
        assert "<script>" not in page
    assert "&lt;script&gt;" in anatomy._repr_html_()


def test_a_figure_stands_in_the_page_where_there_is_one(found, tmp_path):
    pytest.importorskip("matplotlib")
    layer = LayerDamage("model.layers.0.self_attn", ((0, 1), (2, 3)), 0.9, 0.8, {"merged": Gap(0.1, 0.2)}, "rotary")
    damage = DamageReport([layer], "calibrated")
    assert repr(damage) == "<DamageReport: calibrated, 1 layers, stages: merged>"
    report = Report(found["Plan"], {}, None, {"grouped_query": damage})
    for shown in (damage, report):
        assert '<img alt="" style="max-width:100%" src="data:image/png;base64,iVBOR' in shown._repr_html_()
    damage.save_figure(tmp_path / "d.svg")
    assert (tmp_path / "d.svg").stat().st_size > 1000
    (tmp_path / "loss_by_length.png").write_bytes(b"\x89PNG")
    scores = tuple(summarise({"a": (nats * 10, 10)}, resamples=1) for nats in (3.5, 2.5))
    assert "data:image/svg+xml" in found["Diagnosis"]._repr_html_()
    drawn = LossByPosition((1, 256, 512), scores)._repr_html_()
    svg = base64.b64decode(re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', drawn)[1]).decode()
    assert "Loss by position" in svg
    assert ElementTree.fromstring(svg).get("viewBox")  # it is well-formed, and scales
    names = {"original": {"name": "a"}, "patched": {"name": "b"}}
    comparison = Comparison(tmp_path, names)
    assert repr(comparison).startswith("<Comparison: a and b, in ")
    assert list(comparison._figures()) == [b"\x89PNG"]


def test_every_result_is_shown_so():
    public = [getattr(ap, name) for names in ap._DEFINES.values() for name in names]
    kinds = [
        v for v in public if isinstance(v, type) and dataclasses.is_dataclass(v) and v.__str__ is not object.__str__
    ]
    assert ap.Report in kinds
    assert [kind for kind in kinds if not issubclass(kind, Shown)] == []


def test_tables_take_the_columns_that_there_are():
    table = Table("where", "what")
    table.add_row("word " * 30, "word " * 30)
    assert max(map(len, rendered(table).splitlines())) <= 140
    with columns(60):
        assert max(map(len, rendered(table).splitlines())) <= 60
