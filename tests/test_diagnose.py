"""Diagnosis: what is lacking, what is prescribed, that it runs and does what was predicted; hardware from a file."""

import importlib
import json

import pytest
import torch
from caches import CACHE
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from typer.testing import CliRunner

import hf_attnpatch
import hf_attnpatch as ap
from hf_attnpatch.cli import app
from hf_attnpatch.commands import diagnose as cli_diagnose
from hf_attnpatch.commands import specs as cli_specs
from hf_attnpatch.diagnosing import diagnosis, prescribe
from hf_attnpatch.evaluation import hardware
from hf_attnpatch.evaluation.memory import held_bytes

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 100}
diagnosing = importlib.import_module("hf_attnpatch.diagnose")  # whose name the function has, too
RATES = {"matmul": 1e11, "attention": 5e10, "bandwidth": 2e10}


@pytest.fixture
def box(tmp_path):
    """A machine in a file; nothing is timed."""

    def write(**fields):
        file = tmp_path / "box.json"
        file.write_text(json.dumps({"name": "box", "rates": {"float32": RATES}, **fields}))
        return file

    return write


def llama(**fields):
    config = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **config, **fields})).eval()


def gpt2():
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=100, **special)).eval()


def of(found, kind):
    (each,) = [p for p in found.prescriptions if p.answers == kind]
    return each


def carried_out(model, prescription):
    """Run the prescribed line, as a user would."""
    exec(prescription.code, {"hf_attnpatch": hf_attnpatch, "model": model})
    return model


@torch.no_grad()
def real_cache_bytes(model, batch, context):
    ids = torch.zeros(batch, context + 1, dtype=torch.long)  # as after the first decoded token
    return held_bytes(model(input_ids=ids, use_cache=True)[CACHE])


# -- lacks and prescriptions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
def test_cache_traffic_is_answered_by_grouped_query(box, make):
    model = make()
    found = ap.diagnose(model, context=48, batch=64, hardware=box())
    assert "cache" in [lack.kind for lack in found.lacks]
    assert found.work.cache_bytes == real_cache_bytes(model, 64, 48)
    each = of(found, "cache")
    assert each.after.cache_bytes < found.work.cache_bytes
    assert each.gains["cache bytes"] == found.work.cache_bytes / each.after.cache_bytes
    assert each.stock is (make is llama)
    carried_out(model, each)
    assert each.after.cache_bytes == real_cache_bytes(model, 64, 48)
    assert any("merged heads lose quality" in line for line in each.untouched)
    again = ap.diagnose(model, context=48, batch=64, hardware=box())
    assert again.work == each.after  # what was predicted for the patched model is what the patched model is


def test_what_is_prescribed_reads_on_the_command_line(box):
    found = ap.diagnose(llama(), context=128, batch=64, hardware=box())
    assert {each.answers for each in found.prescriptions} == {"context", "cache"}
    for each in found.prescriptions:
        spec = each.command.partition("--patch ")[2]
        (patch,) = cli_specs.patches(None, [spec])
        ap.plan(llama(), patch)


def test_context_beyond_the_window_is_answered_by_rope_scaling(box):
    model = llama()
    found = ap.diagnose(model, context=200, batch=1, hardware=box(), training=False)
    assert found.lacks[0].what == "200 tokens are asked for, positions are trained up to 64 (rotary)"
    each = of(found, "context")
    assert each.gains == {}
    assert any("time and memory stay" in line for line in each.untouched)
    carried_out(model, each)
    assert model.config.max_position_embeddings >= 200 or model.config.rope_parameters["factor"] == 4
    assert not [
        lack for lack in ap.diagnose(llama(), context=64, batch=1, hardware=box()).lacks if lack.kind == "context"
    ]


def test_a_table_of_positions_has_no_patch(box):
    with pytest.raises(ap.AttnPatchError):
        ap.plan(gpt2(), ap.RopeScaling(kind="yarn", factor=2))
    found = ap.diagnose(gpt2(), context=128, batch=1, hardware=box())
    assert any(reason.startswith("context: GPT2LMHeadModel: rope scaling needs") for reason in found.declined)


def test_eager_attention_is_answered_by_flash(box):
    model = llama()
    model.set_attn_implementation("eager")
    found = ap.diagnose(model, context=512, batch=2, hardware=box())
    assert {"attention"} <= {lack.kind for lack in found.lacks}
    each = of(found, "attention")
    scores = 2 * 4 * 512 * 512 * 4  # batch, heads, queries, keys, bytes: one of them at least is held
    assert found.work.memory["prefill"].total - each.after.memory["prefill"].total >= scores
    assert each.gains["prefill seconds"] > 1
    carried_out(model, each)
    assert model.config._attn_implementation == "sdpa"
    fused = ap.diagnose(model, context=512, batch=2, hardware=box())
    assert fused.work == each.after
    assert any("sdpa is a fused kernel already" in reason for reason in fused.declined)


def test_one_key_value_head_cannot_become_fewer(box):
    found = ap.diagnose(llama(num_key_value_heads=1), context=64, batch=512, hardware=box(), training=False)
    assert found.declined == ("cache: every layer has one key-value head already, or none of its own",)


def test_memory_that_is_not_there_is_a_lack(box):
    found = ap.diagnose(llama(), context=64, batch=1, hardware=box(memory_bytes=1000))
    lacking = {lack.where for lack in found.lacks if lack.kind == "memory"}
    assert lacking == {"prefill", "decode", "train"}


def test_a_short_context_lacks_nothing(box):
    wide = llama(hidden_size=512, intermediate_size=2048)
    found = ap.diagnose(wide, context=16, batch=1, hardware=box())
    assert (found.lacks, found.prescriptions, found.declined) == ((), (), ())
    assert "lacks nothing that a patch here gives" in str(found)


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_training_holds_weights_gradients_and_states(box):
    model = llama()
    weights = sum(p.numel() * 4 for p in model.parameters())
    found = ap.diagnose(model, context=64, batch=2, hardware=box())
    memory = found.work.memory["train"]
    assert (memory.weights, memory.gradients_and_optimizer) == (weights, 3 * weights)
    assert memory.total == memory.weights + memory.gradients_and_optimizer + memory.activations
    assert set(found.work.phases) == {"prefill", "decode", "train"}
    for phase in found.work.phases.values():
        assert phase.seconds == pytest.approx(sum(phase.parts.values()))


def test_weights_need_not_be_there(box):
    with torch.device("meta"):
        empty = llama()
    found, full = (
        ap.diagnose(m, context=48, batch=8, hardware=box(), training=False, losses=False) for m in (empty, llama())
    )
    assert found == full


def test_the_model_is_left_alone(box):
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    ap.diagnose(model, context=256, batch=64, hardware=box())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not any(p.grad is not None for p in model.parameters())


def test_a_table_row(box):
    found = ap.diagnose(llama(), context=64, batch=1, hardware="h100", training=False)
    assert "H100" in found.hardware
    assert "data sheet" in found.source


def test_a_diagnosis_goes_through_json(box):
    found = ap.diagnose(llama(), context=128, batch=64, hardware=box())
    assert ap.Diagnosis.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    text = str(found)
    assert all(each.code in text for each in found.prescriptions)
    assert all(lack.what.split(",")[0] in text.replace("\n", " ") for lack in found.lacks)


# -- models of other kinds --------------------------------------------------------------------------------------------


def test_an_encoder_has_no_decoding(box):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    found = ap.diagnose(BertForMaskedLM(BertConfig(**shape, vocab_size=50)), context=64, batch=2, hardware=box())
    assert set(found.work.phases) == {"prefill", "train"}
    assert "no decoding: the model keeps no keys and values of earlier tokens" in found.notes


def test_a_state_is_no_cache(box):
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=20))
    found = ap.diagnose(model, context=16, batch=1, hardware=box(), training=False)
    assert not found.prescriptions
    assert sum("linear attention keeps a state" in note for note in found.notes) == 1


def test_what_cannot_be_diagnosed_is_an_error(box):
    with pytest.raises(ap.UnsupportedArchitecture, match="not a transformers model"):
        ap.diagnose(torch.nn.Linear(2, 2), hardware=box())
    with pytest.raises(ap.EvaluationError, match="context is 0; it must be a whole number above 0"):
        ap.diagnose(llama(), context=0, hardware=box())
    with pytest.raises(ap.EvaluationError, match="hardware box: no rate for .* in bfloat16"):
        ap.diagnose(llama().to(torch.bfloat16), context=16, batch=1, hardware=box())
    model = llama()
    model.hf_quantizer = object()
    with pytest.raises(ap.UnsupportedArchitecture, match="LlamaForCausalLM is quantized: .* diagnose the full"):
        ap.diagnose(model, hardware=box())


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_says(box, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    words = ["diagnose", tmp_path / "model", "--context", 128, "--batch", 64, "--hardware", box(), "--out"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    found = ap.Diagnosis.from_dict(json.loads((tmp_path / "found.json").read_text()))
    assert str(found) in done.stdout
    assert of(found, "cache").command in done.stdout
    machine = CliRunner().invoke(app, [*map(str, words[:-1]), "--json"])
    assert ap.Diagnosis.from_dict(json.loads(machine.stdout)) == found


def test_the_command_explains(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["diagnose", str(tmp_path / "model"), "--hardware", "h1000"])
    assert done.exit_code == 1
    assert "attnpatch: hardware 'h1000': neither a file nor in the table" in done.stderr


# -- how much of a patch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "first"), [(2048, 0), (900, 1), (500, 2), (48, None)])
def test_the_mildest_setting_that_lifts_the_bottleneck_comes_first(box, width, first):
    """It was 32 -> 1 heads, whatever the first steps gave. The wider the rest, the less has to be taken away."""
    model = llama(num_attention_heads=8, num_key_value_heads=8, head_dim=16, intermediate_size=width)
    each = of(ap.diagnose(model, context=64, batch=16, hardware=box()), "cache")
    assert [s.spec for s in each.settings] == [f"grouped_query:num_kv_heads={n}" for n in (4, 2, 1)]
    assert [s.gains["cache bytes"] for s in each.settings] == [2, 4, 8]
    lost = [s.lost for s in each.settings]
    assert lost == sorted(lost)
    assert all(0 < share < 1 for share in lost)
    lifts = [s.lifts for s in each.settings]
    assert lifts == sorted(lifts)
    assert (lifts.index(True) if any(lifts) else None) == first
    assert each.command.endswith(each.settings[first or 0].spec)
    assert each.gains == each.settings[first or 0].gains
    assert any("no setting lifts it" in line for line in each.untouched) == (first is None)


def test_what_does_not_fit_is_answered_by_the_mildest_that_fits(box):
    model = llama(num_attention_heads=8, num_key_value_heads=8, head_dim=16)
    now = ap.diagnose(model, context=64, batch=256, hardware=box(), training=False, losses=False).work

    def answer(limit):
        bench = prescribe.Bench(model, ap.describe(model), 256, 64, training=False, losses=False, memory_bytes=limit)
        machine = hardware.machine_for(str(box()), [], torch.device("cpu"))
        lack = diagnosis.Lack("memory", "decode", "")
        return prescribe._cache(bench, now, lambda passes, priced: diagnosing.work(passes, machine, priced), lack)

    largest = answer(1 << 40)
    assert largest.command.endswith("num_kv_heads=4")
    each = answer(largest.after.memory["decode"].total - 1)
    assert [s.lifts for s in each.settings] == [False, True, True]
    assert each.command.endswith("num_kv_heads=2")


def test_what_is_lost_is_predicted_from_weights_that_are_there(box):
    with torch.device("meta"):
        empty = llama()
    blank = of(ap.diagnose(empty, context=48, batch=64, hardware=box()), "cache")
    assert {s.lost for s in blank.settings} == {None}
    found = ap.diagnose(llama(), context=48, batch=64, hardware=box())
    assert "energy lost" in str(found)
    assert f"{of(found, 'cache').settings[0].lost:.1%}" in str(found)


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "l4", "rtx4090", "mi300x", "laptop"])
def test_every_machine_of_the_table_costs_every_dtype(name):
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = ap.diagnose(llama().to(dtype), context=64, batch=2, hardware=name, training=False, losses=False)
        assert "bounds from below" in found.source
        seconds[dtype] = found.work.phases["prefill"].seconds
    assert seconds[torch.float32] > seconds[torch.bfloat16] == seconds[torch.float16]
    assert name in cli_diagnose.NAMES
