"""What is read off a model, against what was built."""

import pytest
import transformers
from architectures import tiny_config, tiny_model
from packaging.version import Version
from snapshot import snapshot
from transformers import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention

import hf_attnpatch as ap
from hf_attnpatch import anatomy as anatomy_module
from hf_attnpatch.upstream import dispatching
from hf_attnpatch.upstream import words as roles
from hf_attnpatch.upstream.roles import Roles, roles_of

# model type, overrides, (heads, key-value heads, head size), layout, output projection of the first site
SITES = [
    ("llama", {}, (4, 4, 16), "q/k/v", "o_proj"),
    ("llama", {"num_key_value_heads": 1}, (4, 1, 16), "q/k/v", "o_proj"),
    ("llama", {"head_dim": 8}, (4, 4, 8), "q/k/v", "o_proj"),
    ("gemma2", {"num_key_value_heads": 2, "head_dim": 24}, (4, 2, 24), "q/k/v", "o_proj"),
    ("phi3", {"num_key_value_heads": 2}, (4, 2, 16), "qkv_proj blocks", "o_proj"),
    ("stablelm", {"num_key_value_heads": 2}, (4, 2, 16), "q/k/v", "o_proj"),
    ("gpt2", {}, (4, 4, 16), "c_attn blocks", "c_proj"),
    ("gpt_bigcode", {}, (4, 4, 16), "c_attn per group", "c_proj"),
    ("gpt_neox", {}, (4, 4, 16), "query_key_value per group", "dense"),
    ("bloom", {}, (4, 4, 16), "query_key_value per group", "dense"),
    ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, (4, 2, 16), "query_key_value per group", "dense"),
    ("falcon", {"multi_query": True}, (4, 1, 16), "query_key_value per group", "dense"),
    ("mpt", {}, (4, 4, 16), "Wqkv blocks", "out_proj"),
    ("codegen", {}, (4, 4, 16), "qkv_proj model-parallel", "out_proj"),
    ("gptj", {}, (4, 4, 16), "q/k/v", "out_proj"),
    ("opt", {}, (4, 4, 16), "q/k/v", "out_proj"),
    ("persimmon", {}, (4, 4, 16), "query_key_value per group", "dense"),
    ("qwen3_next", {"num_key_value_heads": 2}, (4, 2, 16), "q/k/v", "o_proj"),
]


@pytest.mark.parametrize(("model_type", "overrides", "shape", "layout", "output"), SITES)
def test_sites(model_type, overrides, shape, layout, output):
    model = tiny_model(model_type, **overrides)
    anatomy = ap.describe(model)
    site = anatomy.sites[0]
    assert {(s.num_heads, s.num_kv_heads, s.head_dim) for s in anatomy.sites} == {shape}
    assert {s.v_head_dim for s in anatomy.sites} == {shape[2]}
    assert site.layout.name == layout
    assert site.output.endswith(output)
    assert model.get_submodule(site.output) is not None
    assert anatomy.architecture == type(model).__name__
    assert anatomy.model_type == model_type


@pytest.mark.parametrize(("model_type", "n"), [("bert", 2), ("roberta", 2), ("distilbert", 2), ("modernbert", 2)])
def test_encoders(model_type, n):
    anatomy = ap.describe(tiny_model(model_type, encoder=True))
    assert len(anatomy.sites) == n
    assert not any(site.cross for site in anatomy.sites)


def test_reading_changes_nothing():
    for model_type in ("llama", "gpt2", "qwen3_next", "gemma3"):
        model = tiny_model(model_type)
        before = snapshot(model)
        str(ap.describe(model))
        assert snapshot(model) == before


@pytest.mark.parametrize(
    ("model_type", "encoder", "positions"),
    [
        ("llama", False, "rotary"),
        ("gpt2", False, "table"),
        ("opt", False, "table"),
        ("bert", True, "table"),
        ("roberta", True, "table"),
        ("bloom", False, "alibi"),
        ("mpt", False, "alibi"),
        ("gpt_neox", False, "rotary"),
        ("modernbert", True, "rotary"),
        ("mamba", False, "none or inside the attention module"),
    ],
)
def test_positions(model_type, encoder, positions):
    assert ap.describe(tiny_model(model_type, encoder=encoder)).positions == positions


@pytest.mark.parametrize(("model_type", "rows"), [("gpt2", 128), ("opt", 130), ("bert", 128)])
def test_tables_have_the_rows_they_have(model_type, rows):
    anatomy = ap.describe(tiny_model(model_type, encoder=model_type == "bert"))
    assert list(anatomy.tables.values()) == [rows]  # OPT's positions begin at 2
    assert anatomy.max_positions == 128


def test_rotary_modules_name_their_kind_and_their_config():
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    rotary = ap.describe(tiny_model("llama", rope_parameters=scaled)).rotary
    assert [(r.path, r.rope_type, r.config) for r in rotary] == [("model.rotary_emb", "linear", "")]
    nested = ap.describe(tiny_model("gemma3_text")).rotary[0].rope_type
    assert nested == {"full_attention": "default", "sliding_attention": "default"}
    assert ap.describe(tiny_model("gemma3")).rotary[0].config == "text_config"


def test_cross_attention_is_told_from_self_attention():
    sites = ap.describe(tiny_model("bart", encoder=True)).sites
    assert {s.cross for s in sites if "encoder_attn" in s.path} == {True}
    assert {s.cross for s in sites if "self_attn" in s.path} == {False}


def test_the_registry_is_known():
    assert all(site.dispatches for site in ap.describe(tiny_model("llama")).sites)
    for model_type in ("bloom", "mpt", "falcon"):  # GPT-J and CodeGen dispatch from 5.24 on
        assert not any(site.dispatches for site in ap.describe(tiny_model(model_type)).sites), model_type


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.2"),
    reason="its rotary modules ask for autocast of the device, which torch refuses for a device without data",
)
def test_a_registry_behind_something_else_is_found_by_running(monkeypatch):
    plain = LlamaAttention.forward

    def forward(*args, **kwargs):
        return plain(*args, **kwargs)

    model = tiny_model("llama")
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    monkeypatch.setattr(dispatching, "_RUN", set())
    assert all(site.dispatches for site in ap.describe(model).sites)
    attention = roles_of(model.model.layers[0].self_attn)
    assert attention.takes(roles.STATES, roles.CACHE, roles.MASK, roles.ANGLES)


def test_what_a_call_passes_by_position_to_a_forward_that_declares_nothing_is_handed_on():
    arguments = Roles("Attention", (), {}, {}, True).bind((1, 2), {"x": 3})
    assert arguments.back() == ((1, 2), {"x": 3})
    arguments = Roles("Attention", ("a",), {}, {}, True).bind((1, 2), {"x": 3})
    assert arguments.back() == ((1, 2), {"x": 3})


@pytest.mark.parametrize(("model_type", "encoder"), [("gpt2", False), ("opt", False), ("bert", True)])
def test_position_tables_are_found_whatever_they_are_called(model_type, encoder, monkeypatch):
    model = tiny_model(model_type, encoder=encoder)
    named = ap.describe(model).tables
    assert named
    monkeypatch.setattr(anatomy_module, "_TABLES", ())
    assert ap.describe(model).tables == named


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("deepseek_v3", "latent attention caches a compressed vector"),
        ("mamba2", "linear attention keeps a state"),
        ("xlnet", "matches no row of hf_attnpatch/layouts.py (its projections are none; queries were looked for in "),
    ],
)
def test_what_cannot_be_read_says_why(model_type, words):
    anatomy = ap.describe(tiny_model(model_type))
    assert not anatomy.sites
    why = {**anatomy.unread, **anatomy.other}
    assert all(words in reason for reason in why.values())
    assert next(iter(why)).split(".")[0] in str(anatomy)


def test_keys_that_pass_other_weights_after_their_projection_are_not_read():
    """Inkling-2 convolves each head's keys by weights of its own; 5.24 put these beside the projection."""
    if "inkling2_text" not in CONFIG_MAPPING:
        pytest.skip("this release has no Inkling-2")
    anatomy = ap.describe(tiny_model("inkling2_text"))
    assert not anatomy.sites
    assert sum("convolution of their own" in why for why in anatomy.other.values()) == 2


def test_heads_are_read_from_weights_not_from_the_config():
    model = tiny_model("llama", num_key_value_heads=2)
    model.config.num_key_value_heads = 4  # a lie
    assert {site.num_kv_heads for site in ap.describe(model).sites} == {2}


def test_a_patched_model_reads_as_what_it_is():
    model = tiny_model("llama")
    ap.patch_grouped_query(model, num_kv_heads=1)
    assert {site.num_kv_heads for site in ap.describe(model).sites} == {1}
    foreign = tiny_model("gpt2")
    ap.patch_grouped_query(foreign, num_kv_heads=2)
    assert {site.num_kv_heads for site in ap.describe(foreign).sites} == {2}


def test_a_site_gives_the_rows_of_any_number_of_heads():
    site = ap.describe(tiny_model("gpt_neox")).sites[0]
    assert site.rows().key.shape == (4, 16)
    assert site.rows(2).key.shape == (2, 16)
    assert site.rows(2).query.shape == (4, 16)
    assert tiny_config("gpt_neox").num_attention_heads == 4
