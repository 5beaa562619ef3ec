"""What the report on two releases says, on two made-up packages in which every change is known."""

import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import release_sources
import touched_names
import upstream_changes

ROOT = Path(__file__).resolve().parents[2]
OLD = {
    "__init__.py": '__version__ = "1.0"\n_import_structure = {"cache_utils": ["Cache"], "tools": ["helper"]}\n',
    "cache_utils.py": """
class Cache:
    def update(self, key, value, layer_idx): self.dtype = key.dtype
    def crop(self, length): ...
    def reorder(self, index): ...
""",
    "tools.py": "def helper(x, scale=1.0): ...\ndef dropped(): ...\n",
    "masking.py": """
def make(config):
    interface = ALL_MASK_ATTENTION_FUNCTIONS[config.kind]
    return interface(batch_size=1, cache_position=None)
""",
    "models/auto/modeling_auto.py": """
CONFIG_MAPPING_NAMES = OrderedDict([("one", "OneConfig"), ("old", "OldConfig")])
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict([("one", "OneForCausalLM")])
""",
    "models/one/modeling_one.py": """
class OneOutput(ModelOutput):
    logits: Tensor = None
    past: Cache | None = None

class OneAttention(Module):
    def __init__(self):
        self.q_proj = 1
        self._hidden_state = 2
    def forward(self, hidden_states, mask: Tensor = None, past: Cache | None = None, **kwargs):
        attention = ALL_ATTENTION_FUNCTIONS.get(self)
        return attention(self, 1, scaling=2, softcap=3)

class OneLayer(Module):
    def forward(self, hidden_states, past: Cache | None = None, flag=False, **kwargs): ...

class OneModel(OnePreTrainedModel):
    def forward(self, ids, past: Cache | None = None, extra_past: Cache | None = None): ...

class OneFlashAttention(Module):
    def forward(self, hidden_states): ...
""",
}
CHANGES = {
    "__init__.py": [('"1.0"', '"2.0"')],
    "cache_utils.py": [
        ("self.dtype = key.dtype", "..."),
        ("def crop(self, length)", "def crop(self, remove)"),
        ("def reorder(self, index): ...", "def peek(self): ..."),
    ],
    "tools.py": [("def dropped(): ...", ""), ("scale=1.0", "scale=2.0")],
    "masking.py": [("cache_position=None", "q_offset=0")],
    "models/auto/modeling_auto.py": [('("old", "OldConfig")', '("new", "NewConfig")'), ('"OneForCausalLM")', '"One")')],
    "models/one/modeling_one.py": [
        ("    past: Cache | None", "    cache: Cache | None"),
        ("extra_past: Cache | None = None): ...", "): ...\n"),
        ("past: Cache | None = None", "cache: Cache | None = None"),
        ("self.q_proj = 1", "self.query = 1"),
        ("self._hidden_state = 2", "..."),
        ("hidden_states, mask: Tensor", "hidden_states, positions, mask: Tensor"),
        ("None, flag=False", "None, *, flag=False"),
        (", softcap=3", ", sinks=3"),
        ("class OneFlashAttention(Module):\n    def forward(self, hidden_states): ...\n", ""),
        ("class OneLayer", '@deprecate_kwarg("past", "3.0", new_name="cache")\ndef old_way(): ...\n\nclass OneLayer'),
    ],
}
OURS = """
from transformers import Cache
from transformers.tools import dropped, helper
from transformers import tools

def use(cache, past, mask=None):
    cache.update(1, 2, 3)
    getattr(cache, "dtype", None)
    tools.helper(cache.q_proj, softcap=1)
"""


@pytest.fixture
def releases(tmp_path):
    for version, edits in ((1, {}), (2, CHANGES)):
        for name, text in OLD.items():
            for before, after in edits.get(name, ()):
                assert before in text, before
                text = text.replace(before, after)
            path = tmp_path / str(version) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path / "1", tmp_path / "2"


@pytest.fixture
def touched(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/use.py").write_text(OURS)
    (tmp_path / "test_upstream.py").write_text('PRIVATE = {"_hidden_state": 1, "_of_torch": 2}\n')
    return touched_names.read(tmp_path / "ours", tmp_path / "test_upstream.py")


@pytest.fixture
def sections(releases, touched):
    """Title -> rows of the report, blanks squeezed."""
    text = upstream_changes.report(*map(release_sources.read, releases), touched)
    found, rows = {}, []
    for line in text.splitlines():
        if line.startswith("  "):
            rows.append(" ".join(line.split()))
        else:
            rows = found[line.partition(":")[0].split(",")[0]] = []
    return found


def test_what_we_touch(touched):
    assert set(touched.imports) == {("", "Cache"), ("", "tools"), ("tools", "dropped"), ("tools", "helper")}
    assert {"update", "past", "mask", "dtype", "softcap", "q_proj"} <= set(touched.words)
    assert touched.private == ("_hidden_state", "_of_torch")


def test_one_rename_in_many_places_is_one_row(sections):
    assert sections["RENAMED"] == [
        "past -> cache in 1 of our files 3 forwards (attention 1, layers 1, models 1), 1 output classes",
        "length -> remove cache_utils.Cache.crop",
    ]


def test_arguments_that_are_gone_or_stand_in_the_way(sections):
    assert sections["GONE"] == ["and 1 rare ones that we do not name"]
    assert sections["NEW"] == ["positions modeling_one.OneAttention.forward"]


def test_imports_private_names_and_caches(sections):
    assert sections["IMPORTS"] == ["Cache.dtype GONE", "tools.dropped GONE", "tools.helper() scale=1.0 -> scale=2.0"]
    assert [row.split(";")[0] for row in sections["PRIVATE NAMES of tests/test_upstream.py"]] == ["_hidden_state GONE"]
    assert sections["CACHES"] == ["Cache.crop length -> remove", "Cache.reorder GONE", "Cache.peek new"]


def test_attention_modules(sections):
    assert sections["ATTENTION MODULES no longer set"][0] == "q_proj in 1 of our files modeling_one.OneAttention"
    assert sections["PASSED to attention and mask functions no longer"] == [
        "softcap in 1 of our files modeling_one.OneAttention",
        "cache_position masking",
    ]
    assert sections["PASSED to attention and mask functions newly"] == [
        "sinks modeling_one.OneAttention",
        "q_offset masking",
    ]


def test_model_types_lost_classes_and_deprecations(sections):
    assert sections["MODEL TYPES"] == ["configs lost: old", "configs new: new"]
    assert sections["CLASSES of families that are gone"] == ["one OneFlashAttention"]
    assert sections["DEPRECATED"] == ["past 1 places: 3.0, use 'cache'"]


def test_an_argument_that_changes_places_is_told(releases, touched):
    path = releases[1] / "models/one/modeling_one.py"
    path.write_text(path.read_text().replace("hidden_states, positions, mask: Tensor = None", "mask, hidden_states"))
    text = upstream_changes.report(*map(release_sources.read, releases), touched)
    assert "MOVED" in text.partition("NOTHING in")[0]


def test_the_same_release_twice_has_nothing_to_tell(releases, touched):
    old = release_sources.read(releases[0])
    lines = upstream_changes.report(old, old, touched).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("NOTHING in: RENAMED")


def test_a_wheel_reads_as_its_folder(releases, tmp_path):
    wheel = tmp_path / "transformers-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in OLD.items():
            file.writestr(f"transformers/{name}", text)
    assert release_sources.read(wheel) == release_sources.read(releases[0])


def test_what_is_no_release_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no package"):
        release_sources.read(tmp_path)
    with pytest.raises(SystemExit, match="is no version"):
        upstream_changes.found("nowhere", tmp_path)


def test_our_own_package_touches_what_it_imports():
    ours = touched_names.read(ROOT / "hf_attnpatch", ROOT / "tests/test_upstream.py")
    assert ("", "DynamicCache") in ours.imports
    assert "_attn_implementation" in ours.private
