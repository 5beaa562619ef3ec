"""``attnpatch doctor FOLDER``: who reads which field of a config, and the keys of version 4 beside those of 5."""

import json
import os

import pytest
import torch
from architectures import tiny_config, tiny_model
from safetensors.torch import save_file
from test_cli import fails, run
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

import hf_attnpatch as ap
from hf_attnpatch.doctoring.asking import ask, computed, fields, first_difference, without
from hf_attnpatch.doctoring.decoding import by_hand, texts
from hf_attnpatch.doctoring.facts import CONDITIONS, facts
from hf_attnpatch.doctoring.files import read
from hf_attnpatch.doctoring.quiet import quiet
from hf_attnpatch.doctoring.readers import READERS, VERDICTS, row_for, rows

YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}
NESTED = {
    "full_attention": {**YARN, "truncate": False},
    "sliding_attention": {"rope_type": "default", "rope_theta": 9e3},
}


def config(model_type, rope=None, **other):
    """The config of a tiny model, as version 5 writes it."""
    names = {**MODEL_FOR_MASKED_LM_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    raw = tiny_config(model_type).to_dict()
    raw |= {"model_type": model_type, "architectures": [names[model_type]], "dtype": "bfloat16"}
    raw |= {} if rope is None else {"rope_parameters": rope}
    return json.loads(json.dumps({k: v for k, v in raw.items() if k not in ("id2label", "label2id")} | other))


def folder(path, raw, **files):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def verdict(report, fact, reader):
    return next(r for r in report.readings if (r.fact, r.reader) == (fact, reader)).verdict


def verdicts(report, fact):
    return {r.reader: r.verdict for r in report.readings if r.fact == fact}


# transformers 5 is asked

CONFIGS = {
    "llama yarn": config(
        "llama", {**YARN, "original_max_position_embeddings": 4096, "truncate": True, "beta_fast": 30.0}, head_dim=128
    ),
    "llama old keys": {
        **without(config("llama"), "rope_parameters"),
        **{"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    },
    "gemma3 nested": config("gemma3_text", NESTED),
    "phi3 longrope": config("phi3", LONGROPE, original_max_position_embeddings=64),
    "gpt_neox": config("gpt_neox"),
    "gpt2": config("gpt2"),
}
OTHER = {float: lambda v: 1.25 * v, int: lambda v: 2 * v, bool: lambda v: not v, list: lambda v: [1.5 * x for x in v]}


def _angle_fields():
    for name, raw in CONFIGS.items():
        for field in fields(raw):
            value = raw
            for part in field.split("."):
                value = value[part]
            # used by texts beyond the original length alone; said twice, of which the other counts
            skipped = field.endswith("long_factor") or (name == "phi3 longrope" and field.endswith("embeddings"))
            if "rope_" in field and type(value) in OTHER and not skipped:
                yield pytest.param(raw, field, OTHER[type(value)](value), id=f"{name}: {field}")


def replaced(raw, field, value):
    name, _, rest = field.partition(".")
    return {**raw, name: replaced(raw[name], rest, value) if rest else value}


@pytest.mark.parametrize(("raw", "field", "other"), list(_angle_fields()))
def test_what_is_said_to_be_read_changes_the_model_and_what_is_not_does_not(raw, field, other):
    with quiet():
        before, after = computed(raw, "x"), computed(replaced(raw, field, other), "x")
        read_by = ask(raw, "x").reader_of(field)
    assert bool(read_by) == (first_difference(before, after) is not None)


def test_the_config_s_own_housekeeping_does_not_count_as_reading():
    answer = ask(config("llama", attn_logit_softcapping=30.0, made_up=7), "x")
    assert answer.ran
    for field in ("attn_logit_softcapping", "made_up", "transformers_version"):
        assert answer.reader_of(field) == ()
    for field in ("hidden_size", "num_key_value_heads", "rope_parameters", "rms_norm_eps"):
        assert answer.reader_of(field) == (field,)


def test_fields_of_a_config_inside_another_are_asked_for():
    raw = tiny_config("gemma3").to_dict() | {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
    }
    inner = ask(json.loads(json.dumps(raw)), "x")
    assert "text_config.rope_parameters.full_attention.rope_theta" in inner.reads
    assert inner.reader_of("text_config.sliding_window") == ("text_config.sliding_window",)


def test_a_window_that_only_the_cache_reads_is_a_loss_and_truly_one(tmp_path):
    report = ap.doctor_checkpoint(folder(tmp_path / "stray", config("llama", sliding_window=8)))
    assert verdict(report, "sliding_window", "transformers 5") == "differs"
    model = tiny_model("llama", sliding_window=8)
    assert by_hand(model, texts(model)[0]) > 1e-2
    whole = ap.doctor_checkpoint(folder(tmp_path / "mistral", config("mistral")))
    assert verdict(whole, "sliding_window", "transformers 5") == "reads"


# the rows about other readers


def test_every_row_is_well_formed():
    assert len({(r.fact, r.reader, r.types) for r in rows()}) == len(rows())
    for row in rows():
        assert row.reader in READERS
        assert row.verdict in VERDICTS
        assert row.says or row.verdict == "reads", row
        assert set(row.unless) <= set(CONDITIONS)
        repository, path = row.source.split(" ")[:2]
        assert repository.count("/") == 1
        assert path.startswith(("src/transformers/", "conversion/", "vllm/"))
        assert row.source.endswith(tuple(f"2026-{month:02}-{day:02}" for month in range(1, 13) for day in range(1, 32)))


def test_every_thing_that_a_checkpoint_may_say_has_a_row_for_every_other_reader(tmp_path):
    told = set()
    raws = [*CONFIGS.values(), config("llama", DYNAMIC), config("llama", LLAMA3)]
    raws += [config("llama", {**LONGROPE, "attention_factor": 1.0}), config("llama", {**YARN, "attention_factor": 1.0})]
    raws += [config("gemma2", torch_dtype="float32", temperature=0.5), config("stablelm", partial_rotary_factor=0.5)]
    raws += [config("gemma3_text", {**NESTED, "full_attention": {**YARN, "rope_type": "proportional"}})]
    raws += [config("llama", auto_map={"AutoConfig": "x.Y"}, attnpatch={"stock": True}), {"model_type": "hf_attnpatch"}]
    for i, raw in enumerate(raws):
        path = folder(tmp_path / str(i), raw, tokenizer_config={"model_max_length": 7})
        save_file({"x": torch.zeros(1, dtype=torch.float16)}, path / "model.safetensors")
        told |= {fact.name for fact in facts(read(path))}
    assert told == {row.fact for row in rows()}
    for fact in told:
        for reader in READERS[1:]:
            assert row_for(fact, reader, "llama") is not None, (fact, reader)


LOST = {  # config, thing -> verdicts of transformers 4, llama.cpp, vLLM
    "base": (
        config("llama", {"rope_type": "default", "rope_theta": 5e5}),
        "rope_parameters",
        ("ignores", "reads", "reads"),
    ),
    "base of version 4": (config("llama"), "rope_parameters", ("not needed", "reads", "reads")),
    "by layer type": (config("gemma3_text", NESTED), "rope_parameters by layer type", ("ignores", "reads", "reads")),
    "dynamic": (config("llama", DYNAMIC), "rope_type dynamic", ("ignores", "ignores", "differs")),
    "yarn": (config("llama", YARN), "rope_type yarn", ("ignores", "reads", "reads")),
    "llama3": (config("llama", LLAMA3), "rope_type llama3", ("ignores", "reads", "reads")),
    "llama3 on Qwen2": (config("qwen2", LLAMA3), "rope_type llama3", ("ignores", "ignores", "reads")),
    "longrope": (config("llama", LONGROPE), "rope_type longrope", ("ignores", "ignores", "differs")),
    "longrope on Phi-3": (config("phi3", LONGROPE), "rope_type longrope", ("ignores", "reads", "differs")),
    "windows of Mistral": (config("mistral"), "sliding_window", ("reads", "ignores", "reads")),
    "windows of Gemma 2": (config("gemma2"), "sliding_window", ("reads", "reads", "reads")),
    "layers of OLMo-3": (config("olmo3"), "layer_types", ("reads", "reads", "reads")),
    "soft-capping": (config("gemma2"), "attn_logit_softcapping", ("reads", "reads", "reads")),
    "GPT-NeoX": (config("gpt_neox"), "rope_parameters", ("ignores", "refuses", "reads")),
}


@pytest.mark.parametrize("name", LOST)
def test_what_other_readers_lose(tmp_path, name):
    raw, fact, wanted = LOST[name]
    found = verdicts(ap.doctor_checkpoint(folder(tmp_path / "x", raw)), fact)
    assert found == dict(zip(READERS, ("reads", *wanted), strict=True))


def test_what_transformers_5_ignores_is_no_loss_elsewhere_but_reading_it_is(tmp_path):
    report = ap.doctor_checkpoint(
        folder(tmp_path / "x", config("llama", attn_logit_softcapping=30.0, sliding_window=8))
    )
    softcap, window = verdicts(report, "attn_logit_softcapping"), verdicts(report, "sliding_window")
    assert softcap == {**dict.fromkeys(READERS, "not needed"), "transformers 5": "ignores"}
    assert (window["llama.cpp"], window["vLLM"]) == ("not needed", "differs")
    assert "attn_logit_softcapping" in report.unread


def test_the_tokenizer_s_length_and_the_weights_dtype_are_held_to_the_config(tmp_path):
    path = folder(tmp_path / "x", config("llama"), tokenizer_config={"model_max_length": 100})
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, path / "model.safetensors")
    report = ap.doctor_checkpoint(path)
    assert read(path).weights == {"F32": 10}
    assert verdict(report, "model_max_length of the tokenizer", "vLLM") == "differs"
    assert verdict(report, "dtype of the weights", "transformers 5") == "differs"
    path = folder(tmp_path / "x", config("llama", dtype="float32"), tokenizer_config={"model_max_length": 1000})
    report = ap.doctor_checkpoint(path)
    assert verdict(report, "model_max_length of the tokenizer", "vLLM") == "reads"
    assert "dtype of the weights" not in {r.fact for r in report.readings}


def test_patched_checkpoints(tmp_path):
    stock, own = tiny_model("llama"), tiny_model("llama")
    ap.patch_grouped_query(stock, num_kv_heads=2)
    ap.patch_alibi(own)
    stock.save_pretrained(tmp_path / "stock")
    own.save_pretrained(tmp_path / "own")
    found = ap.doctor_checkpoint(tmp_path / "stock")
    assert set(verdicts(found, "attnpatch").values()) == {"not needed"}
    found = ap.doctor_checkpoint(tmp_path / "own")
    wanted = {"transformers 5": "reads", "transformers 4": "refuses", "llama.cpp": "differs", "vLLM": "refuses"}
    assert verdicts(found, "model_type hf_attnpatch") == wanted
    with pytest.raises(ap.AttnPatchError, match="which needs transformers 5"):
        ap.write_legacy_keys(tmp_path / "own")


def test_the_report_says_what_to_do_and_nothing_of_this_machine(tmp_path):
    path = folder(tmp_path / "mine", config("llama", DYNAMIC))
    report = ap.doctor_checkpoint(path)
    text = json.dumps(report.to_dict())
    assert str(tmp_path) not in text
    assert "--write-legacy-keys" in text
    assert "scale by linear or yarn" in text
    assert "llama.cpp ignores rope_type dynamic" in str(report)
    shown, data = run("doctor", path), run("doctor", path, "--json")
    assert shown.exit_code == data.exit_code == 0
    assert json.loads(data.stdout) == report.to_dict()
    assert "rope_type dynamic" in shown.stdout


# what may be wrong with a folder


def broken(path, name, text):
    folder(path, config("llama"))
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert fails(run("doctor", tmp_path / "none"), "is not there", "wanted the folder of a checkpoint")
    assert fails(run("doctor", tmp_path / "file"), "is a file")
    assert fails(run("doctor", tmp_path / "empty"), "holds no config.json")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{"model_type": ', "not JSON"),
        ("config.json", b"\xff\xfe", "not UTF-8 text"),
        ("config.json", "[1]", "found a list"),
        ("config.json", '{"model_type": "llama", "model_type": "gpt2"}', "'model_type' stands there twice"),
        ("tokenizer_config.json", "nothing", "not JSON"),
        ("generation_config.json", "7", "found a int"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0nonsense", "header cannot be read"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, text, words):
    assert fails(run("doctor", broken(tmp_path / "x", name, text)), name, words)


def test_an_unknown_family_is_one_line_and_its_code_does_not_run(tmp_path):
    raw = {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    path = folder(tmp_path / "x", raw)
    (path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert fails(run("doctor", path), "'made_up'", "does not know", "is not run here")
    known = folder(tmp_path / "y", config("llama", auto_map=raw["auto_map"]))
    (known / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert run("doctor", known).exit_code == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "raw", [config("llama", num_attention_heads="four"), config("llama", {"rope_type": "yarn"}), {}]
)
def test_values_that_transformers_refuses_are_one_line(tmp_path, raw):
    assert fails(run("doctor", folder(tmp_path / "x", raw)), "x/config.json")


# the keys of version 4

WRITTEN = {
    "default": (config("llama"), {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "bfloat16"}),
    "yarn": (
        config("llama", YARN),
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_theta"}},
            "torch_dtype": "bfloat16",
        },
    ),
    "longrope": (
        config("phi3", LONGROPE, original_max_position_embeddings=64),
        {
            "rope_theta": 1e4,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "torch_dtype": "bfloat16",
        },
    ),
    "names of GPT-NeoX": (
        config("gpt_neox"),
        {"rotary_emb_base": 1e4, "rotary_pct": 0.25, "rope_scaling": None, "torch_dtype": "bfloat16"},
    ),
    "bases by layer": (
        config("modernbert"),
        {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "torch_dtype": "bfloat16"},
    ),
    "a share that is not read": (
        config("llama", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "bfloat16"},
    ),
    "no rope": (config("gpt2"), {"torch_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_keys_are_written_beside_what_is_there_and_once(tmp_path, name):
    raw, wanted = WRITTEN[name]
    path = folder(tmp_path / "x", raw)
    before = computed(raw, "x")
    found = ap.write_legacy_keys(path)
    after = json.loads((path / "config.json").read_text())
    assert {k: v for k, v in after.items() if k not in raw} == wanted
    assert {k: after[k] for k in raw} == raw
    assert list(after)[: len(raw)] == list(raw)
    assert dict(found.written) == wanted
    assert found.compared == len(before) > 0
    assert first_difference(before, computed(after, "x")) is None
    assert all(key in str(found) for key in wanted)
    stat = (path / "config.json").stat()
    again = ap.write_legacy_keys(path)
    assert not again.written
    assert set(again.present) >= set(wanted)
    assert (path / "config.json").stat().st_mtime_ns == stat.st_mtime_ns
    assert "nothing to write" in str(again)


def test_the_keys_of_a_config_inside_another(tmp_path):
    text = {**config("gemma3_text", {k: {**v, "truncate": True} if "factor" in v else v for k, v in NESTED.items()})}
    raw = tiny_config("gemma3").to_dict() | {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
    }
    raw = {**json.loads(json.dumps(raw)), "text_config": text}
    path = folder(tmp_path / "x", raw)
    ap.write_legacy_keys(path)
    inner = json.loads((path / "config.json").read_text())["text_config"]
    assert (inner["rope_theta"], inner["rope_local_base_freq"], inner["rope_scaling"]["factor"]) == (5e5, 9e3, 4.0)


def test_readers_of_version_4_lose_nothing_any_more(tmp_path):
    for i, raw in enumerate((config("llama", YARN), config("gemma3_text", NESTED), config("gpt_neox"))):
        path = folder(tmp_path / str(i), raw)
        assert any(r.reader == "transformers 4" and r.silent for r in ap.doctor_checkpoint(path).readings)
        result = run("doctor", path, "--write-legacy-keys", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["legacy_keys"]["written"]
        lost = [r for r in ap.doctor_checkpoint(path).readings if r.silent and r.reader == "transformers 4"]
        assert [r.fact for r in lost] == []


@pytest.mark.parametrize(
    "other", [{"rope_theta": 1e6}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"torch_dtype": "float16"}]
)
def test_keys_that_say_something_else_are_refused_and_nothing_is_written(tmp_path, other):
    path = folder(tmp_path / "x", {**config("llama", YARN), **other})
    before = (path / "config.json").read_bytes()
    (key,) = other
    assert fails(run("doctor", path, "--write-legacy-keys"), key, "one of the two is wrong", "Nothing was written")
    assert (path / "config.json").read_bytes() == before


def test_the_other_name_of_a_type_says_the_same(tmp_path):
    scaling = {k: v for k, v in YARN.items() if k not in ("rope_theta", "rope_type")}
    raw = {**config("llama", YARN), "rope_scaling": {"type": "yarn", **scaling}, "rope_theta": 5e5}
    found = ap.write_legacy_keys(folder(tmp_path / "x", raw))
    assert set(found.written) == {"torch_dtype"}


REFUSED = {
    "angles by layer": (config("olmo3", {k: v for k, v in NESTED.items()}), "differ by type of layer"),
    "a scaled window": (
        config("gemma3_text", {**NESTED, "sliding_attention": {**YARN}}),
        "no key for the scaling of sliding_attention",
    ),
    "more than a family takes": (config("olmo2", YARN), "take type and factor"),
    "no scaling in a family": (config("nemotron", {**YARN, "partial_rotary_factor": 0.5}), "take no scaling"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_angles_that_version_4_has_no_words_for_are_refused(tmp_path, name):
    raw, words = REFUSED[name]
    path = folder(tmp_path / "x", raw)
    before = (path / "config.json").read_bytes()
    assert fails(run("doctor", path, "--write-legacy-keys"), words, "nothing was written")
    assert (path / "config.json").read_bytes() == before


def test_a_write_that_breaks_off_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = folder(tmp_path / "x", config("llama", YARN))
    before = (path / "config.json").read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert fails(run("doctor", path, "--write-legacy-keys"), "no space left")
    assert (path / "config.json").read_bytes() == before
    assert [p.name for p in path.iterdir()] == ["config.json"]


def test_what_would_change_the_model_is_not_written(tmp_path, monkeypatch):
    from hf_attnpatch.doctoring import legacy

    monkeypatch.setattr(legacy, "legacy_keys", lambda *_: {"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    path = folder(tmp_path / "x", config("llama"))
    with pytest.raises(ap.AttnPatchError, match=r"would compute another .*; nothing was written"):
        ap.write_legacy_keys(path)
    assert "rope_scaling" not in (path / "config.json").read_text()
