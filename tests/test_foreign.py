"""Checkpoints that stock transformers cannot express: an error there, the same bits here."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from architectures import tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

import hf_attnpatch as ap
from hf_attnpatch import foreign
from hf_attnpatch.probe import default_inputs, trace
from hf_attnpatch.upstream import words

ROOT = Path(__file__).parents[1]
# model type -> whether its masked class is meant, Auto class
FAMILIES = {
    "gpt2": (False, "AutoModelForCausalLM"),
    "gpt_neox": (False, "AutoModelForCausalLM"),
    "opt": (False, "AutoModelForCausalLM"),
    "bert": (True, "AutoModelForMaskedLM"),
}
REFUSALS = (ValueError, StrictDataclassError)  # the second in releases whose configs check types before all else
FOREIGN = pytest.mark.parametrize("model_type", FAMILIES)


def _auto(model_type):
    return getattr(transformers, FAMILIES[model_type][1])


def _patched(model_type, dtype=torch.float32):
    model = tiny_model(model_type, dtype=dtype, encoder=FAMILIES[model_type][0])
    assert not ap.patch_grouped_query(model, num_kv_heads=2).stock
    return model


def _logits(model):
    return trace(model, default_inputs(model)).logits


def _heads(model):
    return {site.num_kv_heads for site in ap.describe(model).sites}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each family patched and saved: model type -> (folder, logits)."""
    folder = tmp_path_factory.mktemp("foreign")
    found = {}
    for model_type in FAMILIES:
        model = _patched(model_type)
        model.save_pretrained(folder / model_type)
        torch.save({"inputs": default_inputs(model), "logits": _logits(model)}, folder / model_type / "probe.pt")
        found[model_type] = (folder / model_type, _logits(model))
    return found


# -- another process --------------------------------------------------------------------------------------------------

_ATTEMPTS = """
import importlib.abc, json, sys
if sys.argv[2] == "absent":
    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "hf_attnpatch":
                raise ModuleNotFoundError("No module named 'hf_attnpatch'", name="hf_attnpatch")
    sys.meta_path.insert(0, Absent())
import torch, transformers
torch.set_num_threads(1)

def attempt(load, folder, cache):
    try:
        model = load().eval()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    probe = torch.load(folder + "/probe.pt")
    with torch.no_grad():
        output = model(**probe["inputs"], **cache)
    logits = output.get("logits", output[0])[probe["inputs"]["attention_mask"].bool()]
    return "equal" if torch.equal(logits, probe["logits"]) else "SILENTLY WRONG"

def attempts(folder, auto, own, trust):
    cache = {} if "Masked" in auto else {"use_cache": False}
    auto, own = getattr(transformers, auto), getattr(transformers, own)
    config, file = own.config_class, folder + "/config.json"
    ways = {
        "plain": lambda: auto.from_pretrained(folder),
        "base": lambda: transformers.AutoModel.from_pretrained(folder),
        "own class": lambda: own.from_pretrained(folder),
        "own class, sizes ignored": lambda: own.from_pretrained(folder, ignore_mismatched_sizes=True),
        "own class, some options": lambda: own.from_pretrained(folder, num_labels=3, dtype="float32"),
        "own config": lambda: own(config.from_pretrained(folder)),
        "own config, some options": lambda: own(config.from_pretrained(folder, num_labels=3, dtype="float32")),
        "own config, from the file": lambda: own(config.from_json_file(file)),
        "own config, from a dictionary": lambda: own(config.from_dict(json.load(open(file)))),
    } if not trust else {"trusted": lambda: auto.from_pretrained(folder, trust_remote_code=True)}
    return {way: attempt(load, folder, cache) for way, load in ways.items()}

jobs = json.loads(sys.argv[1])
found = {name: attempts(*job, False) for name, job in jobs.items()}
for name, job in jobs.items():  # these import the package, if it is there: so they come last
    found[name] |= attempts(*job, True)
json.dump(found, open("found.json", "w"))
"""


def _elsewhere(saved, package, tmp_path):
    jobs = {t: [str(folder), FAMILIES[t][1], type(_patched(t)).__name__] for t, (folder, _) in saved.items()}
    paths = {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ATTEMPTS, json.dumps(jobs), package],
        env={**os.environ, **paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "found.json").read_text())


def test_stock_transformers_without_the_package_fails_loudly(saved, tmp_path):
    for model_type, found in _elsewhere(saved, "absent", tmp_path).items():
        assert not {"equal", "SILENTLY WRONG"} & set(found.values()), (model_type, found)
        assert "trust_remote_code" in found["plain"], found["plain"]
        assert "trust_remote_code" in found["base"], found["base"]
        assert "pip install hf_attnpatch" in found["trusted"], found["trusted"]
        assert all("pip install hf_attnpatch" in found[way] for way in found if way.startswith("own")), found


def test_trust_remote_code_loads_it_where_the_package_is_installed(saved, tmp_path):
    for model_type, found in _elsewhere(saved, "there", tmp_path).items():
        assert found.pop("trusted") == "equal", model_type
        assert not {"equal", "SILENTLY WRONG"} & set(found.values())  # not imported, not trusted: still an error


# -- this process, where the package is imported -----------------------------------------------------------------------


@FOREIGN
def test_auto_classes_load_the_same_bits(model_type, saved):
    folder, logits = saved[model_type]
    for load in (_auto(model_type).from_pretrained, ap.load):
        model = load(folder).eval()
        assert torch.equal(_logits(model), logits)
        assert _heads(model) == {2}
        assert isinstance(model, type(_patched(model_type)))  # a GPT2LMHeadModel is a GPT2LMHeadModel


@FOREIGN
def test_a_concrete_class_of_transformers_refuses_the_files(model_type, saved):
    folder, cls = saved[model_type][0], type(_patched(model_type))
    with pytest.raises(REFUSALS, match="pip install hf_attnpatch"):
        cls.from_pretrained(folder)
    with pytest.raises(REFUSALS, match="pip install hf_attnpatch"):
        cls.from_pretrained(folder, ignore_mismatched_sizes=True)
    with pytest.raises(REFUSALS, match="pip install hf_attnpatch"):
        cls.from_pretrained(folder, attn_implementation="eager")
    with pytest.raises(REFUSALS, match="pip install hf_attnpatch"):
        cls(cls.config_class.from_pretrained(folder))


@FOREIGN
def test_a_concrete_class_of_transformers_refuses_the_config(model_type, saved):
    folder, patched = saved[model_type][0], _patched(model_type)
    cls, config = type(patched), AutoConfig.from_pretrained(folder)
    for build in (
        lambda: cls(config),
        lambda: cls._from_config(config),
        lambda: type(patched.base_model)(patched.config),
        lambda: type(patched)(patched.config),
        lambda: cls.from_pretrained(folder, config=config, ignore_mismatched_sizes=True),
    ):
        with pytest.raises(ap.AttnPatchError, match=r"would build an unpatched one; use from_config"):
            build()
    with pytest.raises(REFUSALS, match="pip install hf_attnpatch"):
        cls(cls.config_class(**config.to_dict()))


@FOREIGN
def test_a_subclass_of_the_users_refuses_the_config(model_type, saved):
    cls = type("Mine", (type(_patched(model_type)),), {})
    with pytest.raises(ap.AttnPatchError, match=r"Mine\(config\)"):
        cls(AutoConfig.from_pretrained(saved[model_type][0]))


@FOREIGN
def test_the_concrete_class_of_this_package_loads_and_builds(model_type, saved):
    folder, logits = saved[model_type]
    cls = getattr(foreign, type(_patched(model_type)).__name__)
    assert torch.equal(_logits(cls.from_pretrained(folder).eval()), logits)
    model = cls(AutoConfig.from_pretrained(folder))
    assert type(model) is cls
    assert _heads(model) == {2}


@FOREIGN
def test_configs_survive_their_own_dictionaries(model_type, saved):
    config = AutoConfig.from_pretrained(saved[model_type][0], num_labels=3)
    for again in (
        type(config)(**config.to_dict()),
        type(config).from_dict(config.to_dict()),
        AutoConfig.for_model(**config.to_dict()),  # what a config inside another one is read by
    ):
        assert type(again) is type(config)
        assert again.model_type == model_type
        assert again.to_dict() == config.to_dict()
        assert again.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_labels_survive_saving(saved, tmp_path):
    config = AutoConfig.from_pretrained(saved["bert"][0], id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.id2label, again.label2id) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})


def test_no_model_class_of_transformers_is_built_from_a_sealed_config():
    built, sealed = [], dict.fromkeys(words.SEALED, foreign.SEAL)
    for model_type, name in {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MASKED_LM_MAPPING_NAMES}.items():
        if getattr(CONFIG_MAPPING[model_type], "has_no_defaults_at_init", False):  # made of other configs only
            continue
        try:
            config = CONFIG_MAPPING[model_type].from_dict(dict(sealed))
        except StrictDataclassError:  # its own defaults do not fit
            continue
        cls = getattr(transformers, name if isinstance(name, str) else name[0])
        try:
            with torch.device("meta"):
                cls(config)
        except (ValueError, AttributeError) as error:
            if "pip install hf_attnpatch" not in str(error) and isinstance(error, ValueError):
                built.append(f"{name}: {error}")
        else:
            built.append(name)
    assert not built


@FOREIGN
def test_the_base_class_of_configs_reads_the_files(model_type, saved):
    file, config = saved[model_type][0] / "config.json", AutoConfig.from_pretrained(saved[model_type][0])
    for read in (PretrainedConfig.from_json_file(file), PretrainedConfig.from_pretrained(file.parent)):
        assert read.transformers_version == transformers.__version__
        assert read.vocab_size == config.vocab_size
        assert read.id2label == config.id2label


@FOREIGN
def test_transformers_knows_no_class_of_the_name_in_the_files(model_type, saved):
    found = json.loads((saved[model_type][0] / "config.json").read_text())["architectures"]
    assert found == [f"Patched{type(_patched(model_type)).__name__}"]
    assert not hasattr(transformers, found[0])


def test_a_seal_over_the_labels_is_still_read(saved, tmp_path):
    config = AutoConfig.from_pretrained(saved["gpt2"][0], num_labels=3).to_dict()
    config["id2label"] = {"the words of another release": config["id2label"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


@FOREIGN
def test_the_files_say_what_they_are(model_type, saved):
    folder = saved[model_type][0]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "hf_attnpatch"
    assert config["attnpatch"]["base_model_type"] == model_type
    assert config["attnpatch"]["patches"][0]["patch"] == "grouped_query"
    assert FAMILIES[model_type][1] in config["auto_map"]
    assert "AutoModel" in config["auto_map"]
    assert len((folder / "modeling_hf_attnpatch.py").read_text().splitlines()) < 30


@FOREIGN
def test_in_memory_the_config_stays_the_familys(model_type, saved):
    config = AutoConfig.from_pretrained(saved[model_type][0])
    assert config.model_type == model_type
    assert isinstance(config, type(tiny_model(model_type, encoder=FAMILIES[model_type][0]).config))


@FOREIGN
def test_trust_remote_code_is_harmless_here(model_type, saved):
    folder, logits = saved[model_type]
    assert torch.equal(_logits(_auto(model_type).from_pretrained(folder, trust_remote_code=True).eval()), logits)


@FOREIGN
def test_shards(model_type, tmp_path):
    model = _patched(model_type)
    model.save_pretrained(tmp_path, max_shard_size=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(_logits(_auto(model_type).from_pretrained(tmp_path).eval()), _logits(model))


@FOREIGN
def test_dtype_and_device_map(model_type, saved):
    folder = saved[model_type][0]
    model = _auto(model_type).from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu").eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    wanted = _patched(model_type, dtype=torch.bfloat16)
    wanted.load_state_dict({k: v.to(torch.bfloat16) for k, v in _patched(model_type).state_dict().items()})
    assert torch.equal(_logits(model), _logits(wanted))


@FOREIGN
def test_from_config_builds_the_structure(model_type, saved):
    folder, logits = saved[model_type]
    model = _auto(model_type).from_config(AutoConfig.from_pretrained(folder))
    assert _heads(model) == {2}
    assert not torch.equal(_logits(model.eval()), logits)  # its weights are its own
    loaded = _auto(model_type).from_pretrained(folder)
    model.load_state_dict(loaded.state_dict())
    assert torch.equal(_logits(model), logits)


@FOREIGN
def test_saving_again(model_type, saved, tmp_path):
    folder, logits = saved[model_type]
    _auto(model_type).from_pretrained(folder).save_pretrained(tmp_path)
    again = _auto(model_type).from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(again), logits)
    first, second = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert first == second


@FOREIGN
def test_pickles(model_type, saved):
    folder, logits = saved[model_type]
    loaded = _auto(model_type).from_pretrained(folder).eval()
    assert torch.equal(_logits(pickle.loads(pickle.dumps(loaded))), logits)
    assert type(pickle.loads(pickle.dumps(loaded.config))) is type(loaded.config)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt"])
def test_automodel_gives_the_headless_model(model_type, saved):
    folder, _ = saved[model_type]
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    base = AutoModel.from_pretrained(folder).eval()
    assert _heads(base) == {2}
    wanted = trace(whole.base_model, default_inputs(whole)).logits
    assert torch.equal(trace(base, default_inputs(whole)).logits, wanted)


def test_another_task_head_on_a_patched_body(saved):
    folder, _ = saved["gpt2"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    assert _heads(model) == {2}
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)


def test_a_loaded_model_can_be_patched_on(tmp_path, saved):
    model = AutoModelForCausalLM.from_pretrained(saved["gpt_neox"][0])
    report = ap.patch_rope_scaling(model, kind="yarn", factor=4.0)
    assert [p["patch"] for p in report.record["patches"]] == ["grouped_query", "rope_scaling"]
    assert not report.record["stock"]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(again), _logits(model))
    assert again.config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize("order", [1, -1])
def test_several_patches_in_one_call(order, tmp_path):
    patches = [ap.GroupedQuery(num_kv_heads=2), ap.RopeScaling(kind="linear", factor=2.0)][::order]
    model = tiny_model("gpt_neox")
    ap.apply(model, *patches)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), _logits(model))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c.pop("attnpatch"), "config.attnpatch is NoneType"),
        (lambda c: c["attnpatch"].update(version=99), "upgrade hf_attnpatch"),
        (lambda c: c["attnpatch"].pop("patches"), "config.attnpatch: patches is missing"),
        (lambda c: c["attnpatch"].update(base_model_type="klingon"), "does not know; upgrade transformers"),
        (lambda c: c["attnpatch"]["patches"][0].update(patch="gone"), "'gone' does not exist"),
        (lambda c: c["attnpatch"]["patches"][0].update(num_kv_heads=3), "choose num_kv_heads from 1, 2, 4"),
        (lambda c: c["attnpatch"]["patches"][0].update(colour="red"), "no field colour"),
    ],
)
def test_a_damaged_record_is_a_clear_error(damage, words, saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved["gpt2"][0])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    damage(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ap.AttnPatchError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_reverting_a_foreign_patch_saves_a_stock_checkpoint(tmp_path):
    model = tiny_model("gpt2")
    logits = _logits(model)
    ap.patch_grouped_query(model, num_kv_heads=2).revert()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert "attnpatch" not in config
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits)


@pytest.mark.parametrize("model_type", ["internlm3", "emu3"])  # Llama's class under another config; a decoder alone
def test_models_of_another_family_s_class_and_decoders_alone_come_back(model_type, tmp_path):
    if model_type not in CONFIG_MAPPING or "emu3_text_model" not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no such model type to load")
    model = tiny_model(model_type)
    ap.patch_alibi(model)
    model.save_pretrained(tmp_path)
    again = ap.load(tmp_path)
    assert torch.equal(_logits(again), _logits(model))
    assert type(again.config) is type(model.config)
    assert torch.equal(_logits(pickle.loads(pickle.dumps(again))), _logits(model))
    with pytest.raises(REFUSALS):
        type(model).from_pretrained(tmp_path)
