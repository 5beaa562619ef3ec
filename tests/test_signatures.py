"""What a patch takes: seen by ``help``, completion and type checkers; one word for one idea; errors that help."""

import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from architectures import tiny_model

import hf_attnpatch as ap
from hf_attnpatch import patches
from hf_attnpatch.attention.rotation import KINDS as TURNING
from hf_attnpatch.functional.tables import METHODS as TABLES
from hf_attnpatch.patch import ALIASES, changed, fields_of, internal_fields
from hf_attnpatch.patches import grouped_query, position_table, relative_xl
from hf_attnpatch.positions.choice import BACKENDS
from hf_attnpatch.rope.fields import KINDS
from hf_attnpatch.spans.proposal import BACKENDS as MERGED

ROOT = Path(__file__).parents[1]
KINDS_OF_PATCH = [getattr(patches, name) for name in patches.__all__]
PUBLIC = [name for names in ap._DEFINES.values() for name in names]
SPANNING = (ap.SelfExtend, ap.DualChunk, ap.ReRope, ap.JetLong, ap.AttentionSinks)
each_patch = pytest.mark.parametrize("kind", KINDS_OF_PATCH, ids=lambda kind: kind.name)


def entries(documented):
    """The names under Args of a docstring."""
    section = inspect.cleandoc(documented).partition("\nArgs:\n")[2].partition("\n\n")[0]
    return re.findall(r"^    (\w+): ", section, re.MULTILINE)


# -- what is seen ------------------------------------------------------------------------------------------------------


@each_patch
def test_a_function_has_the_fields_of_its_patch(kind):
    function = getattr(ap, f"patch_{kind.name}")
    model, *rest = inspect.signature(function).parameters.values()
    assert (model.name, model.kind, model.default) == ("model", model.POSITIONAL_OR_KEYWORD, model.empty)
    assert {p.name: p.default for p in rest} == {
        name: inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        for name, field in fields_of(kind).items()
    }
    assert all(p.kind is p.KEYWORD_ONLY for p in rest)
    assert list(inspect.signature(kind).parameters) == [p.name for p in rest]
    assert not {p.name for p in rest} & set(internal_fields(kind)), "only a checkpoint needs those"


@each_patch
def test_every_field_is_documented_in_order_and_nothing_else(kind):
    documented = inspect.getdoc(kind)
    assert entries(documented) == list(fields_of(kind))
    assert entries(inspect.getdoc(getattr(ap, f"patch_{kind.name}"))) == ["model", *fields_of(kind)]
    assert documented.splitlines()[0].endswith("."), "the first line is a sentence"
    assert ("\nExperimental: " in documented) == kind.experimental


def test_the_functions_are_those_that_the_patches_give(monkeypatch):
    pytest.importorskip("ruff")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import write_signatures

    assert write_signatures.FILE.read_text("utf-8") == write_signatures.text(), "run scripts/write_signatures.py"


@pytest.mark.parametrize(
    ("kind", "field", "choices"),
    [
        (ap.GroupedQuery, "method", grouped_query.METHODS),
        (ap.GroupedQuery, "grouping", grouped_query.GROUPINGS),
        (ap.GroupedQuery, "fallback", (*grouped_query.PLAIN, *grouped_query.ALIGNED)),
        (ap.RopeScaling, "kind", KINDS),
        (ap.Rotary, "kind", TURNING),
        (ap.PositionTable, "method", TABLES),
        (ap.PositionTable, "init", position_table.INITS),
        (ap.RelativeXl, "init", relative_xl.INITS),
        (ap.RelativeXl, "backend", ("auto", *BACKENDS)),
        (ap.Alibi, "backend", ("auto", *BACKENDS)),
        *(
            (kind, "backend", MERGED)
            for kind in (ap.SelfExtend, ap.DualChunk, ap.ReRope, ap.JetLong, ap.AttentionSinks)
        ),
    ],
)
def test_types_name_the_choices_that_there_are(kind, field, choices):
    hint = get_type_hints(kind)[field]
    literal = hint if get_origin(hint) is Literal else next(h for h in get_args(hint) if get_origin(h) is Literal)
    assert set(get_args(literal)) == set(choices)


def test_a_star_import_teaches_thirty_names_and_the_rest_is_reachable():
    taught = {}
    exec("from hf_attnpatch import *", taught)
    assert set(ap.__all__) == set(taught) - {"__builtins__"}
    assert len(ap.__all__) <= 30
    assert set(ap.__all__) <= {*PUBLIC, "AttnPatchError"}
    for name in set(PUBLIC) - set(ap.__all__):
        value = getattr(ap, name)
        result = isinstance(value, type) and not issubclass(value, (ap.Patch, ap.OwnText))  # is returned, not called
        assert value is ap.Patch or result or "Experimental: " in value.__doc__, name


def test_completion_sees_fields_defaults_and_docstrings():
    jedi = pytest.importorskip("jedi", reason="completion is asked of jedi: pip install jedi")

    def asked(code):
        return jedi.Script(code, path=ROOT / "x.py", project=jedi.Project(ROOT))

    for kind in KINDS_OF_PATCH:
        function = f"import hf_attnpatch as ap\nap.patch_{kind.name}("
        (found,) = asked(function).get_signatures()
        assert [p.name for p in found.params] == ["model", *(["*"] if fields_of(kind) else []), *fields_of(kind)] or [
            p.name for p in found.params
        ] == ["model", *fields_of(kind)]
        assert inspect.getdoc(kind).splitlines()[0] in found.docstring()
    assert "target_length=" in [
        c.name for c in asked("import hf_attnpatch as ap\nap.patch_self_extend(m, ta").complete()
    ]
    assert "patch_re_rope" in [c.name for c in asked("import hf_attnpatch as ap\nap.patch_re").complete()]


USER = """
import hf_attnpatch as ap
from transformers import PreTrainedModel

def shorten(model: PreTrainedModel) -> ap.Report:
    ap.patch_self_extend(model, target_length=8192, backend="sdpa")
    ap.apply(model, ap.RopeScaling(kind="yarn", factor=4.0), ap.GroupedQuery(num_kv_heads=2))
    return ap.patch_alibi(model, slopes=[0.5, 0.25])
"""
WRONG = {
    "ap.patch_self_extend(model, targt_length=8192)": "targt_length",
    "ap.patch_rope_scaling(model, kind='yaarn', factor=4.0)": "yaarn",
    "ap.patch_flash(model, 'sdpa')": "positional|argument",
    "ap.Rotary(proved=True)": "proved",
    "ap.patch_grouped_query(model)": "num_kv_heads",
}


@pytest.mark.slow  # reads torch and transformers: a minute
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_see_them_in_a_users_code(checker, tmp_path):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed: pip install {checker}")
    lines = [USER, "def wrong(model: PreTrainedModel) -> None:", *(f"    {line}" for line in WRONG)]
    (tmp_path / "user.py").write_text("\n".join(lines))
    options = ["--strict", "--follow-imports=silent", "--ignore-missing-imports"] if checker == "mypy" else []
    command = [sys.executable, "-m", checker, *options, str(tmp_path / "user.py")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    errors = [line for line in said.splitlines() if re.search(r"user\.py:\d+.*error", line)]
    found = {int(number): line for line in errors for number in re.findall(r"user\.py:(\d+)", line)}
    first = USER.count("\n") + 3
    assert set(found) == {first + i for i in range(len(WRONG))}, said
    assert all(re.search(wanted, found[first + i]) for i, wanted in enumerate(WRONG.values())), said


# -- one word for one idea ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (lambda: ap.SelfExtend(target=900, trained=100), lambda: ap.SelfExtend(target_length=900, trained_length=100)),
        (lambda: ap.PositionTable(length=900), lambda: ap.PositionTable(target_length=900)),
        (lambda: ap.GroupedQuery(num_key_value_heads=2), lambda: ap.GroupedQuery(num_kv_heads=2)),
        (lambda: ap.Rotary(rope_theta=500.0), lambda: ap.Rotary(theta=500.0)),
        (
            lambda: ap.RopeScaling(rope_type="yarn", max_position_embeddings=9),
            lambda: ap.RopeScaling(kind="yarn", target_length=9),
        ),
        (lambda: ap.Flash(attn_implementation="sdpa"), lambda: ap.Flash(backend="sdpa")),
        (
            lambda: ap.from_spec({"patch": "re_rope", "target": 900, "window_size": 8}),
            lambda: ap.ReRope(target_length=900, window=8),
        ),
    ],
)
def test_old_names_and_those_of_transformers_are_understood(made, wanted):
    assert made() == wanted()


def test_no_alias_hides_a_field():
    fields = {name for kind in KINDS_OF_PATCH for name in fields_of(kind)}
    assert not set(ALIASES) & fields
    assert set(ALIASES.values()) <= fields


LENGTHS = [  # a factor, and the length that says the same on a model of 128 tokens
    (ap.SelfExtend(factor=4), ap.SelfExtend(target_length=512)),
    (ap.ReRope(factor=4), ap.ReRope(target_length=512)),
    (ap.RopeScaling(kind="linear", factor=4.0), ap.RopeScaling(kind="linear", target_length=512)),
    (ap.Rotary(kind="linear", factor=4.0), ap.Rotary(kind="linear", target_length=512)),
    (ap.PositionTable(factor=4), ap.PositionTable(target_length=512)),
]


@pytest.mark.parametrize(("by_factor", "by_length"), LENGTHS, ids=lambda patch: patch.name)
def test_a_factor_and_a_length_say_the_same(by_factor, by_length):
    model = tiny_model("llama", max_position_embeddings=128)
    one, other = (ap.apply(tiny_model("llama", max_position_embeddings=128), p) for p in (by_factor, by_length))
    assert one.record["patches"] == other.record["patches"]
    assert str(one.plan) == str(other.plan)
    assert one.context == (128, 512)
    assert ap.describe(model).max_positions == 128


@pytest.mark.parametrize("kind", [ap.SelfExtend, ap.ReRope, ap.RopeScaling, ap.Rotary, ap.PositionTable])
def test_a_factor_and_a_length_at_once_are_refused(kind):
    more = {"kind": "yarn"} if "kind" in fields_of(kind) else {}
    with pytest.raises(ap.AttnPatchError, match="target_length 512 and factor 4 both say how far to reach; give one"):
        kind(factor=4, target_length=512, **more)
    with pytest.raises(ap.AttnPatchError, match="target_length is 0.5; it must be a number of tokens"):
        kind(target_length=0.5, **more)


def test_a_length_below_the_models_own_is_refused():
    model = tiny_model("llama", max_position_embeddings=128)
    with pytest.raises(ap.AttnPatchError, match="target_length 64 is below the 128 tokens"):
        ap.plan(model, ap.RopeScaling(kind="linear", target_length=64))


# -- what is wrong -----------------------------------------------------------------------------------------------------

MISTAKES = {
    "misspelt": (lambda: ap.SelfExtend(targt_length=9), r"self_extend: no field targt_length \(did you mean target_l"),
    "near an alias": (lambda: ap.GroupedQuery(num_key_value_head=2), r"\(did you mean num_kv_heads\?\)"),
    "nothing near": (lambda: ap.Flash(xyz=1), "flash: no field xyz; its fields are: backend, training"),
    "of other patches": (lambda: ap.DualChunk(factor=4), r"no field factor \(it reaches any length; leave it out\)"),
    "no longer context": (lambda: ap.AttentionSinks(target=9), r"no field target \(it gives no longer context\)"),
    "heads by factor": (lambda: ap.GroupedQuery(factor=2), "num_kv_heads says how many heads are left"),
    "without a name": (lambda: ap.GroupedQuery(4), r"4 stands without a name; .* as in GroupedQuery\(num_kv_heads=4"),
    "no field at all": (lambda: ap.NoPosition(4), "4 stands without a name; give fields by name"),
    "twice": (lambda: ap.SelfExtend(target=9, target_length=9), "target_length is given twice"),
    "missing": (
        lambda: ap.SegmentRecurrence(),
        "segment_length is missing; .* at least 1; its fields",
    ),
    "no length": (lambda: ap.PositionTable(), "target_length is missing; give it, in tokens, or factor"),
    "a function": (lambda: ap.patch_self_extend(None, windw=4), r"no field windw \(did you mean window\?\)"),
    "a function, unnamed": (lambda: ap.patch_flash(None, "sdpa"), r"as in Flash\(backend=sdpa\)"),
    "a patch's name": (lambda: ap.from_spec({"patch": "self-extend"}), r"\(did you mean self_extend\?\); choose from"),
    "found out": (lambda: ap.Alibi(proved=True), "proved is found out by this package and never given"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_people_try_first_is_answered(mistake):
    do, said = MISTAKES[mistake]
    with pytest.raises(ap.AttnPatchError, match=said):
        do()


def test_the_model_is_asked_for_as_python_does():
    with pytest.raises(TypeError, match=r"patch_flash\(\) missing 1 required positional argument: 'model'"):
        ap.patch_flash()


def test_what_was_found_out_stays_with_a_changed_patch():
    patch = changed(ap.Rotary(theta=8.0), proved=True, theta=9.0)
    assert (patch.proved, patch.theta) == (True, 9.0)
    assert changed(patch, kind="yarn").proved
    with pytest.raises(ap.AttnPatchError, match="theta is 0"):
        changed(patch, theta=0)
