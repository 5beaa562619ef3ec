"""The architecture of the package, held by walking its own syntax trees."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_attnpatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import room  # noqa: E402

PACKAGE = Path(hf_attnpatch.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

_CORE = {
    "anatomy",
    "configs",
    "edits",
    "errors",
    "few",
    "functional",
    "interruption",
    "layouts",
    "probe",
    "schema",
    "sites",
    "upstream",
    "writing",
}

# rooms and what they may import of the project; a room that is not named may import anything
MAY_IMPORT = {
    "functional/": set(),
    "errors.py": set(),
    "interruption.py": set(),
    "exclusive.py": {"interruption"},
    "upstream/": {
        "configs",
        "errors",
        "interruption",
    },  # the vocabulary of transformers: below everything but mathematics
    "stepwise.py": {"errors", "upstream"},
    "tested.py": set(),
    "configs.py": {"errors", "interruption"},
    "layouts.py": {"errors", "modules"},
    "layers.py": {"configs", "errors"},
    "sites.py": {"configs", "errors", "layouts", "upstream"},
    "anatomy.py": {
        *("attention", "configs", "errors", "layers", "layouts", "modules", "showing", "sites", "tables", "upstream"),
    },
    "edit.py": {"errors", "interruption"},
    "edits.py": {"configs", "edit", "errors", "interruption", "upstream"},
    "few.py": {"configs", "edits", "errors", "upstream"},
    "modules/": {"attention", "errors", "functional", "upstream"},
    "tables.py": {
        "anatomy",
        "patch",
        "plan",
        "showing",
    },  # types of the first and the third, which print themselves by it
    "restoring.py": {"anatomy", "edits", "record", "stacking", "tested", "weightless"},
    "stacking.py": {"attention", "edits", "errors", "patch", "record", "recurrence"},
    "schema.py": {"errors"},
    "showing.py": set(),
    "writing.py": set(),
    "patch.py": {"errors", "anatomy", "edits", "schema"},
    "probe.py": {"configs", "errors", "edits", "exclusive", "functional", "interruption", "upstream", "weightless"},
    "twin.py": {"configs", "errors", "edits"},
    "weightless.py": {"configs", "interruption", "upstream"},
    "rewriting/": {"errors", "progress", "record", "schema"},
    "heads/projections.py": {"layouts", "sites"},
    "aside.py": {"errors"},
    "heads/": {
        *_CORE,
        "aside",
        "attention",
        "backends",
        "evaluation",
        "modules",
        "plotting",
        "progress",
        "showing",
        "twin",
    },
    "homes/rows.py": {"layers"},
    "homes/checks.py": {"anatomy", "errors"},
    "homes/": {"layers", "configs", "edits", "errors", "foreign", "interruption", "probe", "record", "upstream"},
    "rope/fields.py": {"errors"},
    "rope/parameters.py": {"errors", "functional"},
    "rope_search/": {*_CORE, "api", "evaluation", "patch", "patches", "progress", "showing"},
    "rope/": {*_CORE, "patch", "twin"},
    "attention/": {"configs", "edit", "edits", "errors", "functional", "upstream"},
    "positions/": {*_CORE, "attention", "backends", "modules", "record", "twin"},
    "spans/": {*_CORE, "attention", "backends", "patch", "positions", "record", "weightless"},
    "recurrence/": {*_CORE, "attention", "positions"},
    "windows/": {*_CORE, "attention", "evaluation", "heads", "plotting", "progress", "showing"},
    "backends.py": {"errors", "upstream"},
    "media.py": {"errors", "probe", "upstream"},
    "patches/": {
        *_CORE,
        "attention",
        "backends",
        "heads",
        "homes",
        "latent",
        "layers",
        "media",
        "modules",
        "patch",
        "positions",
        "recurrence",
        "rope",
        "spans",
        "twin",
        "weightless",
        "windows",
    },
    "charts.py": set(),
    "evaluation/": {
        "charts",
        "embedded",
        "errors",
        "evaluation",
        "interruption",
        "progress",
        "schema",
        "showing",
        "upstream",
        "writing",
    },  # measures a model; knows nothing of patches
}

# who else may write to a module, a config or a process-wide table, what, and why
MAY_WRITE = {
    "edits.py": ("*", "the only room whose trade it is"),
    "upstream/dispatching.py": ("register eval", "its own listening names; a copy without data"),
    "upstream/calls.py": (
        "register setattr train attention mask sentinel first",
        "its own listening names; a module that it made to try attributes on; what a tiny model was heard to pass",
    ),
    "upstream/caches.py": ("setattr", "another name for a method, while a class of this package is made"),
    "upstream/roles.py": (
        "register_forward_hook register_forward_pre_hook eval",
        "on a copy without data; removed in any case",
    ),
    "stepwise.py": ("register_forward_pre_hook", "for the length of a generation; removed in any case"),
    "configs.py": ("_attn_implementation", "of a copy of the config"),
    "attention/registry.py": (
        "register _attn_implementation",
        "the only writer of transformers' attention tables; a kernel that a user chose, under our name for it",
    ),
    "attention/masks.py": ("setattr query_offset made attnpatch_mask", "of the masks that it has just made"),
    "spans/opaque.py": ("settings requires_grad_", "of autograd's context; of copies of states, for their gradients"),
    "stacking.py": ("vars", "the name of a patch on the hooks and wrappers of its own edits"),
    "recurrence/streams.py": ("load_state_dict", "of its own memory"),
    "recurrence/memory.py": (
        "keys values __class__",
        "of a layer that it has just made; of an empty cache that a caller holds, which becomes its own",
    ),
    "__init__.py": ("__class__ __setattr__", "the class of its own module"),
    "arrival.py": ("register loader __loader__", "calls foreign.register; the loader of one module's spec, put back"),
    "foreign.py": ("register", "teaches the Auto classes our own model type"),
    "probe.py": ("eval register_forward_hook", "counting hooks; puts back what a forward leaves behind"),
    "invariants/noise.py": ("register_forward_hook", "for the length of a forward; removed in any case"),
    "verify.py": ("grad copy_ eval", "puts back what probing leaves behind"),
    "invariants/training.py": ("train", "inside verify, which restores the mode"),
    "invariants/copies.py": ("eval neg_ data", "of the copy and of what was just loaded"),
    "modules/heads.py": ("register_parameter", "a module's own parameters, in its constructor"),
    "homes/fitting.py": (
        "_modules dtype train architectures _attn_implementation _name_or_path",
        "of the model and the config that it has just made",
    ),
    "twin.py": ("setattr", "on a copy of the config"),
    "checkpoint.py": ("setattr", "a mark of its own on the model that it has just loaded"),
    "weightless.py": (
        "register_forward_pre_hook",
        "for the length of a block; removed in any case, as what it exchanges",
    ),
    "patch.py": ("__setattr__", "a patch normalises its own fields while it is made"),
    "heads/regroup.py": ("_parameters vars", "of the new module, before it is put in place"),
    "heads/replay.py": (
        "register_forward_hook register_forward_pre_hook",
        "for the length of a call; removed in any case",
    ),
    "heads/layerwise.py": ("register_forward_hook", "for the length of a pass; removed in any case"),
    "heads/frames.py": ("register_forward_hook", "for the length of a trial; removed in any case"),
    "latent/conversion.py": ("shape weights eval", "of its own result; of a model that it has just built"),
    "latent/form.py": ("register_forward_pre_hook", "for the length of a call; removed in any case"),
    "patches/latent.py": ("conversion", "what its own preparation found, for its own edit"),
    "heads/refine.py": ("requires_grad_ grad", "of its own copies of weights"),
    "functional/pieces.py": ("step scale gap count", "of autograd's context"),
    "functional/two_way.py": ("scale", "of autograd's context"),
    "functional/sinking.py": ("tiles scale", "of autograd's context"),
    "positions/counting.py": ("attnpatch_counting", "a mark of its own on the cache of a text"),
    "windows/choice.py": ("register_forward_hook", "for the length of a measurement; removed in any case"),
    "windows/sinks.py": ("active sinks requires_grad_", "of its own wrappers and of its own copies of sinks"),
    "rope_search/course.py": ("settings", "of its own search"),
    "rope_search/state.py": ("losses population iteration settled settings began", "of a state just made"),
    "rope/request_length.py": (
        "attnpatch_lengths setattr",
        "a mark of its own on the cache of a request, and what moves it with the rows",
    ),
    "positions/lengthening.py": ("requires_grad_", "of the table that it has just made"),
    "positions/strength.py": ("strength", "of its own bias; a recipe drives it"),
    "patches/grouped_query.py": ("conversion", "what its own preparation found, for its own edits"),
    "evaluation/mode.py": ("eval training", "for the length of a measurement; restores the mode of every module"),
    "evaluation/logits.py": ("register_forward_pre_hook", "for the length of a call; removed in any case"),
    "evaluation/operations.py": ("eval train", "of its own copy, which has no data"),
    "evaluation/memory.py": ("bytes before", "of the object that it gives to its caller"),
    "evaluation/benchmarks.py": ("eval requires_grad_", "of what it has just built"),
    "evaluation/layers.py": ("register_forward_hook register_forward_pre_hook", "for the length of a forward"),
    "doctoring/models.py": ("eval", "of a model that it has just built"),
    "doctoring/decoding.py": ("register_forward_hook", "for the length of a call; removed in any case"),
    "doctoring/asking.py": ("eval __class__ vars", "of models and configs that it has just built"),
    "comparing/models.py": ("eval", "of a model that it has just loaded"),
    "rewriting/tokenizer.py": ("model_max_length", "of a tokenizer that it is handed to be lengthened"),
    "commands/command.py": (
        "__signature__ __annotations__ default_map",
        "of the function that it has just made; of the context of the command line's own process",
    ),
    "commands/models.py": ("eval", "of a model that it has just built"),
    "cli.py": ("excepthook", "of the command line's own process, when a bug has ended it"),
    "publishing/hub.py": ("timeout", "of the Hub's client, for the length of a request; put back in any case"),
    "embedded/__init__.py": ("eval", "of a model that it has just loaded"),
}
_WRITING_CALLS = {
    *("setattr", "delattr", "__setattr__", "register", "register_buffer", "register_parameter", "set_submodule"),
    *("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "add_module"),
    *("requires_grad_", "load_state_dict", "resize_token_embeddings", "train", "eval", "neg_"),
}
_STORES = {"_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_global_mapping"}


def _room(name, table):
    return next((value for room, value in table.items() if name == room or name.startswith(room)), None)


def _imports(tree, name):
    """First names, relative to the package, of all that a file imports from it."""
    depth = name.count("/")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level <= depth:  # inside its own room
                yield name.split("/")[0]
                continue
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (found.split(".")[0] for found in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_attnpatch":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def _outside(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", [name for name in FILES if _room(name, MAY_IMPORT) is not None])
def test_rooms_import_in_one_direction(name):
    allowed = _room(name, MAY_IMPORT) | {name.split("/")[0]} if "/" in name else _room(name, MAY_IMPORT)
    assert set(_imports(TREES[name], name)) <= allowed


def test_no_two_rooms_import_each_other():
    """Rooms are folders and files of the package; what a type checker alone reads is not counted."""
    assert len({path.relative_to(PACKAGE).parts[0] for path in room.files()}) > 60
    assert room.circles() == []


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("functional/")])
def test_mathematics_knows_torch_and_nothing_else(name):
    assert set(_imports(TREES[name], name)) <= {"functional"}
    own = {"torch", "math", "itertools", "functools", "collections", "typing", "dataclasses", "__future__"}
    assert set(_outside(TREES[name])) <= own | {"networkx"}  # matching; torch itself depends on it


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("patches/") and not n.endswith("__init__.py")])
def test_patches_never_import_each_other(name):
    siblings = {Path(n).stem for n in FILES if n.startswith("patches/")}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level != 1, "from a sibling"
            assert not (node.level == 2 and (node.module or "").split(".")[0] == "patches")
            assert not (node.level == 2 and not node.module and siblings & {a.name for a in node.names})


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("patches/")])
def test_patches_know_no_family_by_name(name):
    compared = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.Compare)]
    assert not any("model_type" in ast.unparse(node) for node in compared), "the anatomy lacks a field"


def _writes(tree):
    """What a file writes to objects that are not its own: attribute names, stores, calls that write."""
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in _WRITING_CALLS:
                yield called
        for target in targets:
            for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                yield from _written(part)


def _written(target):
    if isinstance(target, ast.Attribute):
        if not (isinstance(target.value, ast.Name) and target.value.id in ("self", "cls")):
            yield target.attr
    elif isinstance(target, ast.Subscript):
        inside = target.value
        if isinstance(inside, ast.Attribute) and inside.attr in _STORES:
            yield inside.attr
        if isinstance(inside, ast.Call) and getattr(inside.func, "id", "") == "vars":
            yield "vars"


@pytest.mark.parametrize("name", FILES)
def test_only_edits_write_to_a_model(name):
    allowed = MAY_WRITE.get(name, ("", ""))[0].split()
    found = set(_writes(TREES[name]))
    assert allowed == ["*"] or found <= set(allowed), f"{name} writes {found - set(allowed)}"


@pytest.mark.parametrize("name", [name for name, (what, _) in MAY_WRITE.items() if name in FILES and what != "*"])
def test_no_permission_to_write_is_out_of_use(name):
    in_use = set(_writes(TREES[name])) | {"clear", "update", "grad", "copy_"}
    assert set(MAY_WRITE[name][0].split()) <= in_use


def test_the_detector_of_writes_detects():
    source = """
setattr(model, "a", 1)
model.config.x = 2
module._modules["k_proj"] = new
vars(module)["y"] = 3
del module.z
a, model.b = 1, 2
model.c += 1
module.register_forward_pre_hook(f)
self.fine = 1
"""
    found = list(_writes(ast.parse(source)))
    wanted = ["setattr", "x", "_modules", "vars", "z", "b", "c", "register_forward_pre_hook"]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_swallowed(name):
    """No bare or broad ``except``; what catches everything raises it again."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            kinds = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
            if kinds & {"everything", "Exception", "BaseException"}:
                assert isinstance(node.body[-1], ast.Raise), f"{name}:{node.lineno} swallows {kinds}"
                assert node.body[-1].exc is None


_IMPORT = """
import json, sys
import torch, transformers
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import modeling_llama
from transformers import cache_utils, modeling_utils, generation

def picture():
    owners = [torch.nn.Module, torch.Tensor, torch.nn.functional, PreTrainedModel, cache_utils, modeling_utils,
              modeling_llama, modeling_llama.LlamaAttention, generation.GenerationMixin, ROPE_INIT_FUNCTIONS]
    tables = {
        "attention": AttentionInterface._global_mapping,
        "mask": AttentionMaskInterface._global_mapping,
        **{repr(owner)[:60]: owner if isinstance(owner, dict) else vars(owner) for owner in owners},
    }
    return {name: {k: id(v) for k, v in dict(table).items()} for name, table in tables.items()}

before, types = picture(), set(CONFIG_MAPPING.keys())
import hf_attnpatch
after = picture()
changed = [(name, key) for name in before for key in {*before[name], *after[name]}
           if before[name].get(key) != after[name].get(key)]
print(json.dumps({"changed": changed, "types": sorted(set(CONFIG_MAPPING.keys()) - types)}))
"""


def test_importing_patches_nothing():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _IMPORT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {"changed": [], "types": ["hf_attnpatch"]}


def test_the_public_names_are_there():
    for name in hf_attnpatch.__all__:
        assert getattr(hf_attnpatch, name).__doc__, name
    for name in ("describe", "plan", "apply", "patched", "verify", "load"):
        assert callable(getattr(hf_attnpatch, name))


@pytest.mark.parametrize("name", ["AttnPatchError", "UnsupportedArchitecture", "PatchConflict", "SelfCheckFailed"])
def test_errors_are_value_errors(name):
    assert issubclass(getattr(hf_attnpatch, name), ValueError)
    assert issubclass(getattr(hf_attnpatch, name), hf_attnpatch.AttnPatchError)
