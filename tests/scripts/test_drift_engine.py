"""The engine of `make drift`, on made-up sources: what changes, what stays, what is refused; how cells are judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import rehearse_drift
from drifting import cells, copies, mutations, rehearsal, report
from drifting.move import Move
from drifting.rename import Rename
from drifting.shape import AddArgument, PassByKeyword, WrapReturn
from drifting.source import InvalidMutation, Source
from drifting.written import Decorate, KeywordOnly, PassByPosition, Rewrite

CACHED = '''
"""The cache is kept."""
from functools import cache as remembered
import torch

from .utils import deprecate_kwarg


@deprecate_kwarg("past", "5.40", new_name="cache")
def forward(self, states, cache: "Cache | None" = None, use_cache=True):
    """Reads the cache.

    cache: of keys
    """
    cache = cache if cache is not None else make(cache=self.cache, plan={"layers.*.cache": 1})  # the cache
    kept = {"cache": cache, "use_cache": use_cache}
    torch.save(cache=cache)
    return f"cache {cache!r:>{self.cache}} {{cache}}", [cache for cache in kept["cache"]], lambda cache: cache
'''


def changed(change, text, name="models/made_up/modeling_made_up.py"):
    source = Source(name, text)
    change.edit(source)
    return source.result()


def test_a_name_changes_in_every_role_and_text_does_not():
    wanted = CACHED.replace('new_name="cache"', 'new_name="kept"').replace("cache: ", "kept: ", 1)
    wanted = wanted.replace(
        'cache = cache if cache is not None else make(cache=self.cache, plan={"layers.*.cache": 1})',
        'kept = kept if kept is not None else make(kept=self.kept, plan={"layers.*.kept": 1})',
    )
    wanted = wanted.replace('kept = {"cache": cache, "use', 'held = {"kept": kept, "use')
    wanted = wanted.replace("torch.save(cache=cache)", "torch.save(cache=kept)")
    wanted = wanted.replace("cache {cache!r:>{self.cache}} {{cache}}", "cache {kept!r:>{self.kept}} {{cache}}")
    wanted = wanted.replace('[cache for cache in kept["cache"]]', '[kept for kept in held["kept"]]')
    wanted = wanted.replace("lambda cache: cache", "lambda kept: kept")
    given = CACHED.replace('kept = {"', 'held = {"').replace("in kept[", "in held[")
    assert changed(Rename("cache", "kept"), given) == wanted


def test_what_is_imported_from_outside_keeps_its_name():
    text = (
        "from functools import cache\nimport torch.nn as nn\n\n@cache\ndef f():\n    return nn.cache(cache=f.cache)\n"
    )
    assert changed(Rename("cache", "kept"), text) == text.replace("f.cache", "f.kept")


def test_a_keyword_that_partial_passes_on_is_ours():
    text = "from functools import partial\n\ng = partial(f, mask=1)\n"
    assert changed(Rename("mask", "seen"), text) == text.replace("mask", "seen")


def test_imports_from_the_package_follow():
    text = "from ..masks import mask, other as mask_\nfrom outside import mask as m\n"
    assert changed(Rename("mask", "seen"), text) == text.replace("import mask,", "import seen,")


def test_bytes_are_not_letters():
    assert changed(Rename("mask", "seen"), 'f("é", mask="über", b=mask)\n') == 'f("é", seen="über", b=seen)\n'


@pytest.mark.parametrize(
    ("text", "role"),
    [
        ("def f(mask, seen):\n    return mask\n", "parameter"),
        ("f(mask=1, seen=2)\n", "keyword"),
        ("class A:\n    mask: int\n    seen: int\n", "field"),
        ("def f(self):\n    return self.mask + self.seen\n", "attribute"),
    ],
)
def test_two_names_do_not_become_one(text, role):
    with pytest.raises(InvalidMutation, match=f"modeling_made_up.py:.*another {role} there"):
        changed(Rename("mask", "seen"), text)
    assert changed(Rename("mask", "sight"), text) == text.replace("mask", "sight")


def test_the_same_name_elsewhere_is_no_collision():
    text = "def f(mask):\n    return g(seen=mask)\n\n\ndef g(seen):\n    return seen\n"
    assert changed(Rename("mask", "seen"), text) == text.replace("mask", "seen")


@pytest.mark.parametrize("text", ['f"{x}mask"', 'f"{x}_mask"', 'f"{x}.mask"', 'f"{x}.mask.{y}"', 'f"{x}" f"{y}_mask"'])
def test_a_name_made_of_parts_follows(text):
    assert changed(Rename("mask", "seen"), text) == text.replace("mask", "seen")


@pytest.mark.parametrize("text", ['f"{x} mask"', 'f"{x}mask is no name"', 'f"mask {x}"', 'f"{x}_masks"', 'f"{a_mask}"'])
def test_words_of_a_message_do_not(text):
    assert changed(Rename("mask", "seen"), text) == text


def test_roles_and_patterns_choose():
    text = 'class Cache:\n    def update(self, x):\n        return x.update(self.layers[0].update(x), "update")\n'
    method = Rename("update", "append", ("method",), inside="Cache")
    call = Rename("update", "append", ("attribute",), receiver=r"layers\[")
    assert changed(method, text) == text.replace("def update", "def append")
    assert changed(call, text) == text.replace("[0].update", "[0].append")
    keyword = Rename("scaling", "scale", ("keyword",), callee="^interface$")
    assert changed(keyword, "interface(scaling=1), other(scaling=1)\n") == "interface(scale=1), other(scaling=1)\n"
    inside = Rename("scaling", "scale", ("name", "parameter"), inside="^kernel$")
    text = "def kernel(scaling):\n    return scaling\n\n\ndef other(scaling):\n    return scaling\n"
    assert changed(inside, text) == text.replace("scaling", "scale", 2)
    field = Rename("cache", "kept", ("string",), receiver="^outputs$")
    assert changed(field, 'outputs["cache"], kwargs["cache"]\n') == 'outputs["kept"], kwargs["cache"]\n'


def test_unknown_roles_are_refused():
    with pytest.raises(InvalidMutation, match="roles"):
        Rename("a", "b", ("variable",))


def test_an_argument_goes_in_front():
    text = (
        "class MadeAttention:\n    @kept\n    def forward(self, states, mask=None):\n        return states\n\n\n"
        "class Layer:\n    def __init__(self):\n        self.attn = MadeAttention()\n        self.mlp = Mlp()\n\n"
        "    def forward(self, x):\n        return self.attn(states=x), self.mlp(x), self.attn(x), self.attn()\n"
    )
    wanted = text.replace("(self, states,", "(self, context, states,").replace(
        "self.attn(states", "self.attn(None, states"
    )
    wanted = wanted.replace("self.attn(x)", "self.attn(None, x)").replace("self.attn()", "self.attn(None)")
    assert changed(AddArgument(r"Attention[.]forward$", "context"), text) == wanted
    functions = AddArgument("^make_mask$", "purpose", calls="^make_mask$")
    text = "def make_mask(config, *, mask):\n    return mask\n\n\nmake_mask(**kwargs)\nother.make_mask(1)\n"
    wanted = text.replace("(config", "(purpose, config").replace("\nmake_mask(**", "\nmake_mask(None, **")
    assert changed(functions, text) == wanted


def test_a_function_from_outside_gets_no_argument():
    text = "from outside import make_mask\n\nmake_mask(1)\n"
    assert changed(AddArgument("^make_mask$", "purpose", calls="^make_mask$"), text) == text


@pytest.mark.parametrize(
    "choice", ["kind = MadeAttention if a else Other\n", "kind = {1: MadeAttention}\n", "kind = Other()\n"]
)
def test_a_class_may_be_chosen_from_several(choice):
    text = f"{choice}self.attn = kind[a](b)\nself.attn(x)\n"
    wanted = text.replace("self.attn(x)", "self.attn(None, x)") if "Made" in choice else text
    assert changed(AddArgument(r"Attention[.]forward$", "context"), text) == wanted


def test_a_position_becomes_a_keyword():
    change = PassByKeyword("^interface$", 2, ("mask", "bias"))
    assert changed(change, "interface(q, k, m, dropout=0)\n") == "interface(q, k, mask=m, dropout=0)\n"
    assert changed(change, "interface(q, k, m, b)\n") == "interface(q, k, mask=m, bias=b)\n"
    for same in ("interface(q, k)\n", "interface(q, *k, m)\n", "other(q, k, m)\n"):
        assert changed(change, same) == same


ROTARY = '''"""Angles."""
from __future__ import annotations

class MadeRotary:
    def forward(self, x):
        if x is None:
            return None
        return x + 1, x + 2

def use(position_embeddings):
    cos, sin = position_embeddings
    a, b = other
    return cos, sin
'''


def test_a_tuple_becomes_a_dataclass_that_is_taken_apart():
    change = WrapReturn(r"Rotary[.]forward$", "Angles", ("cosine", "sine"), unpack="^position_embeddings$")
    wanted = ROTARY.replace("return x + 1, x + 2", "return Angles(x + 1, x + 2)")
    wanted = wanted.replace("sin = position_embeddings", "sin = position_embeddings.parts()")
    wanted = wanted.replace("class MadeRotary", "from transformers.rehearsed_types import Angles\nclass MadeRotary")
    assert changed(change, ROTARY) == wanted
    made = {}
    exec(change.module, made)
    assert made["Angles"](1, 2).parts() == (1, 2)
    with pytest.raises(TypeError):
        tuple(made["Angles"](1, 2))


def test_a_tuple_becomes_a_named_tuple():
    change = WrapReturn(r"Rotary[.]forward$", "Angles", ("cosine", "sine"))
    assert "position_embeddings\n" in changed(change, ROTARY)
    made = {}
    exec(change.module, made)
    assert made["Angles"](1, 2) == (1, 2)


ATTENDING = """class MadeAttention:
    @kept
    def forward(self, states, mask=None, cache=None):
        return states


class Layer:
    def __init__(self):
        self.attn = MadeAttention()

    def forward(self, x, mask):
        return self.attn(x, mask, cache=None), self.attn(states=x, mask=mask), self.mlp(x, mask)
"""


def test_arguments_become_keywords_only():
    wanted = ATTENDING.replace("states, mask=None", "states, *, mask=None").replace(
        "attn(x, mask,", "attn(x, mask=mask,"
    )
    assert changed(KeywordOnly(r"Attention[.]forward$"), ATTENDING) == wanted


def test_a_keyword_becomes_a_position():
    wanted = ATTENDING.replace("attn(states=x", "attn(x")
    assert changed(PassByPosition(r"Attention[.]forward$", "states"), ATTENDING) == wanted


def test_a_forward_is_decorated_outside_of_what_decorates_it():
    wanted = ATTENDING.replace("    @kept\n", "    @traced\n    @kept\n")
    change = Decorate(r"Attention[.]forward$", "traced", "def traced(f): ...\n")
    assert changed(change, ATTENDING) == f"from transformers.rehearsed_types import traced\n{wanted}"


def test_text_is_rewritten_with_what_it_imports():
    change = Rewrite(r"self\.mlp\((\w+)", r"outer(\1", ("mlp",), "def outer(x, m): ...\n", "outer")
    wanted = ATTENDING.replace("self.mlp(x", "outer(x")
    assert changed(change, ATTENDING) == f"from transformers.rehearsed_types import outer\n{wanted}"


def test_projections_are_fused_and_split_in_the_installed_models():
    """The patterns of these two name places in files of the release: what they do is there."""
    for name, family, there in (("projections fused", "llama", "qkv_proj"), ("projections split", "phi3", "q_proj")):
        file = f"models/{family}/modeling_{family}.py"
        source = Source(file, (rehearsal.installed().package / file).read_text("utf-8"))
        for change in mutations.by_name(name).changes:
            assert change.concerns(file, source.text)
            change.edit(source)
        assert source.result().count(f"self.{there}") == 2


PACKAGE = {
    "__init__.py": '_import_structure = {"store": ["Store"], "users.one": []}\nfrom .store import Store as Store\n',
    "store.py": "from .users import names\nfrom .users.names import NAME\n\n\nclass Store:\n    name = NAME\n",
    "users/__init__.py": "",
    "users/names.py": 'NAME = "made up"\n',
    "users/one.py": "from .. import store\nfrom ..store import Store\n\nSAME = store.Store is Store\n",
    "users/two.py": "import transformers.store as kept\n\nNAME = kept.Store.name\n",
    "users/convert_two.py": "from ..store import nothing\n",
}


@pytest.fixture
def package(tmp_path):
    for name, text in PACKAGE.items():
        file = tmp_path / "installed/transformers" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "installed/transformers"


def ran(place, code):
    env = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_module_moves_with_all_its_imports(package, tmp_path):
    place = tmp_path / "copy"
    assert copies.make(package, place, [Move("store", "storing.shelf")]) == 6
    code = "import transformers; from transformers.users import one, two; print(one.SAME, two.NAME)"
    assert ran(place, code) == "True made up"
    code = "import transformers as t, transformers.storing.shelf as s; print(t._import_structure, s.Store.__module__)"
    assert ran(place, code) == "{'storing.shelf': ['Store'], 'users.one': []} transformers.storing.shelf"
    with pytest.raises(subprocess.CalledProcessError):
        ran(place, "import transformers.store")


def test_only_changed_files_are_written(package, tmp_path):
    before = {path: path.read_text() for path in package.rglob("*.py")}
    place = tmp_path / "copy"
    assert copies.make(package, place, [Rename("NAME", "TITLE"), Rename("TITLE", "HEADING")]) == 3
    assert "HEADING" in (place / "transformers/store.py").read_text()
    assert os.path.samefile(place / "transformers/users/one.py", package / "users/one.py")
    assert {path: path.read_text() for path in package.rglob("*.py")} == before


def test_a_copy_is_kept_until_something_changes(package, tmp_path):
    place, changes = tmp_path / "copy", [Rename("NAME", "TITLE")]
    copies.make(package, place, changes)
    mark = place / "transformers/mark"
    mark.touch()
    assert copies.make(package, place, changes) == 3
    assert mark.exists()
    copies.make(package, place, [Rename("NAME", "HEADING")])
    assert not mark.exists()


def test_a_family_that_is_not_changed_is_not_touched(package, tmp_path):
    for family in ("one", "two"):
        (package / f"models/{family}").mkdir(parents=True)
        (package / f"models/{family}/modeling.py").write_text(f"name_of_{family} = 1\n")
    copies.make(package, tmp_path / "copy", [Rename("name_of_one", "title")])
    assert copies.touches(tmp_path / "copy", "one")
    assert not copies.touches(tmp_path / "copy", "two")
    copies.make(package, tmp_path / "copy", [Rename("NAME", "TITLE")])
    assert copies.touches(tmp_path / "copy", "two")


def test_answers_of_earlier_states_count_but_for_those_that_are_asked_again(tmp_path):
    file, cells = tmp_path / "answers", {"alibi": "same", "rotary": "refused", "sinusoidal": "refused"}
    lines = [("old", case, status) for case, status in cells.items()] + [("new", "sinusoidal", "refused")]
    file.write_text(
        "\n".join(
            json.dumps({"code": c, "mutation": "m", "change": "d", "cell": ["gpt2", case], "found": {"status": s}})
            for c, case, s in lines
        )
    )

    def known(*again):
        found = rehearse_drift.remembered(file, "new", *again).get(("m", "d"), {})
        return {cell[1]: answer["code"] for cell, answer in found.items()}

    assert known() == {"sinusoidal": "new"}
    assert known([]) == {"alibi": "old", "rotary": "old", "sinusoidal": "new"}
    assert known(["refused"]) == {"alibi": "old", "sinusoidal": "new"}
    assert known(["gpt2"]) == {"sinusoidal": "new"}


@pytest.mark.parametrize("change", [Rename("nowhere", "there"), Move("nowhere", "there"), AddArgument("^no$", "x")])
def test_a_mutation_that_changes_nothing_is_none(package, tmp_path, change):
    with pytest.raises(InvalidMutation, match="nowhere|nothing"):
        copies.make(package, tmp_path / "copy", [change])


def test_the_table_of_mutations_is_large_and_distinct():
    assert len(mutations.MUTATIONS) >= 15
    assert len({m.name for m in mutations.MUTATIONS}) == len({m.changes for m in mutations.MUTATIONS})
    assert {type(c) for m in mutations.MUTATIONS for c in m.changes} == {
        *(Rename, Move, AddArgument, PassByKeyword, WrapReturn, Decorate, KeywordOnly, PassByPosition, Rewrite)
    }


def test_callers_follow_the_renames():
    words = mutations.renaming("cache=kept,logits=scores").vocabulary
    assert (words["cache"], words["output:cache"], words["output:logits"]) == ("kept", "kept", "scores")
    assert words["attention_mask"] == "attention_mask"
    assert mutations.renaming("cache=kept@attribute").vocabulary["cache"] == "cache"
    only_out = mutations.by_name("output cache").vocabulary
    assert (only_out["cache"], only_out["output:cache"]) == ("cache", "kv_store")
    assert mutations.by_name("interface scaling").vocabulary == mutations.by_name("mask by keyword").vocabulary


@pytest.mark.parametrize("text", ["cache", "a=b@variable", "a.b=c"])
def test_a_rename_that_is_none_is_refused(text):
    with pytest.raises(InvalidMutation):
        mutations.renaming(text)


def test_a_refusal_must_name_what_was_not_found():
    mutation = mutations.renaming("position_embeddings=rotary_pair")
    assert rehearsal.names(mutation, "no argument holds the angles that position_embeddings held")
    assert not rehearsal.names(mutation, "logits differ by 0.1")
    found = rehearsal._named(mutation, {"status": "refused", "detail": "it did not work"})
    assert found["status"] == "vague"


def test_numbers_are_the_same_or_it_is_said_how_they_differ():
    wanted = torch.tensor([1.0, 2.0])
    assert cells.unlike(wanted, wanted + 1e-6) is None
    assert cells.unlike(wanted, wanted + 1e-3) == "differ by 0.0005 of the largest"
    assert cells.unlike(wanted, wanted[:1]) == "shape (1,) instead of (2,)"
    assert cells.unlike(wanted, wanted * torch.nan) is not None
    assert cells.unlike(torch.tensor([1, 2]), torch.tensor([1, 3])) == "other tokens"


DYING = """
import json, os, sys, time
job = json.loads(sys.argv[1])
for family, case in job["cells"]:
    print("noise")
    print("@drift " + json.dumps({"start": [family, case]}), flush=True)
    if case == "dies":
        sys.stderr.write("no such luck")
        sys.stderr.flush()
        os._exit(7)
    if case == "hangs":
        time.sleep(60)
    print("@drift " + json.dumps({"cell": [family, case], "status": "same"}), flush=True)
"""


def test_a_process_that_dies_or_hangs_costs_one_cell(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setattr(rehearsal, "WORKER", (str(tmp_path / "dying.py"),))
    asked = [("llama", case) for case in ("a", "dies", "b", "hangs", "c")]
    found = dict(rehearsal.work(tmp_path, asked, {}, tmp_path, keep=False, limit=3))
    assert [found[cell]["status"] for cell in asked] == ["same", "crash", "same", "crash", "same"]
    assert found["llama", "dies"]["detail"] == "the process died with exit code 7: no such luck"
    assert found["llama", "hangs"]["detail"] == "killed after 3 s"


def answers(*statuses):
    detail = {"at": "masks.py:1 f", "detail": "why | how"}
    return {("cache", (f"family{i}", "alibi")): {"status": s, **detail} for i, s in enumerate(statuses)}


@pytest.mark.parametrize(
    ("statuses", "good"),
    [
        (["same"] * 4 + ["refused"], True),
        (["same"] * 3 + ["refused"], False),
        (["same"] * 9 + ["crash"], False),
        (["same"] * 9 + ["silent"], False),
        (["same"] * 9 + ["invalid"], False),
        ([], False),
    ],
)
def test_what_passes(statuses, good):
    assert report.passed(answers(*statuses)) is good


def test_a_proof_counts_only_where_it_failed():
    proofs = {
        ("cache", ("llama", "unpatched")): {"status": "same"},
        ("cache", ("gpt2", "unpatched")): {"status": "invalid"},
    }
    found = report.counts(proofs)
    assert (found["same"], found["invalid"]) == (0, 1)


def test_the_results_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    found = answers("same", "crash", "crash", "refused")
    report.write(tmp_path, found, {"alibi": "alibi"}, {"transformers": "5"})
    page = (tmp_path / "README.md").read_text()
    assert "| cache | 1 | 1 | 0 | 2 | 0 | 0 | 1/4 |" in page
    assert "crash: cache: masks.py:1 f: why | how [2: family1 alibi, family2 alibi]" in page
    assert len((tmp_path / "drift.csv").read_text().splitlines()) == 5
    assert "| all | 1 | 1 | 0 | 2 | 0 | 0 | 1/4 |" in page
    assert json.loads((tmp_path / "drift.json").read_text())["counts"]["crash"] == 2
    assert "</svg>" in (tmp_path / "drift.svg").read_text()
