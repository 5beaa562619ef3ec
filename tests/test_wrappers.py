"""Wrappers that hold a model's parameters, and names by which others load it: right, or refused."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from architectures import tiny_model
from patches import CASES
from snapshot import snapshot
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

import hf_attnpatch as ap
from hf_attnpatch import record
from hf_attnpatch.attention.alibi import AlibiBias
from hf_attnpatch.attention.registry import attention_function
from hf_attnpatch.attention.relative import CHILD, Relative, RelativeTerms
from hf_attnpatch.attention.wrapper import HELD

IDS = torch.arange(5, 53).view(2, 24)
PATCHES = list({case.kind: case.patch for case in reversed(CASES)}.values())  # the first of each kind
NEED_ROTATION = (
    ap.RopeScaling,
    ap.ScoreTemperature,
    ap.Windowed,
    ap.Latent,
    ap.SelfExtend,
    ap.DualChunk,
    ap.ReRope,
    ap.JetLong,
    ap.AttentionSinks,
)
NEW_TENSORS = [ap.GroupedQuery(num_kv_heads=2), ap.RelativeXl(), ap.PositionTable(length=64), ap.Alibi()]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# -- who holds the parameters ------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("patch", NEW_TENSORS, ids=lambda p: p.name)
def test_a_model_inside_ddp_is_refused_and_one_beside_it_is_not(patch, alone):
    wrapped, beside = DistributedDataParallel(tiny_model("llama")), tiny_model("llama")
    before = snapshot(wrapped.module)
    for refuse in (ap.apply, ap.plan):
        with pytest.raises(
            ap.UnsupportedArchitecture, match="is inside a DistributedDataParallel.*Patch the model first"
        ):
            refuse(wrapped.module, patch)
    assert snapshot(wrapped.module) == before
    ap.apply(beside, patch)


def test_a_model_inside_a_module_inside_ddp_is_refused(alone):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model("llama")

    wrapped = DistributedDataParallel(Own())
    with pytest.raises(ap.UnsupportedArchitecture, match="is inside a DistributedDataParallel"):
        ap.patch_alibi(wrapped.module.model)


def test_a_model_inside_a_module_of_the_users_own_is_patched():
    own = nn.ModuleList([tiny_model("llama")])
    ap.patch_relative_xl(own[0])
    assert any(CHILD in name for name, _ in own.named_parameters())


@pytest.mark.parametrize("compiled", [torch.compile, lambda model, backend: model.compile(backend=backend) or model])
@pytest.mark.parametrize("patch", NEW_TENSORS, ids=lambda p: p.name)
def test_what_was_compiled_before_the_patch_computes_the_patched_model(patch, compiled):
    torch._dynamo.reset()
    model = tiny_model("llama").eval()
    fast = compiled(model, backend="eager")
    before = logits(fast)
    ap.apply(model, patch, self_check=False)  # which would run, and compile, the model again and again
    with torch.no_grad():
        wanted = model.forward(input_ids=IDS, use_cache=False).logits
    assert not torch.equal(before, wanted)
    torch.testing.assert_close(logits(fast), wanted, rtol=0, atol=1e-5)


# -- other classes than the family's own -------------------------------------------------------------------------------


class FakesQuantization(nn.Linear):
    """What quantization-aware training puts in the place of a linear layer."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 8).round() / 8, self.bias)


def faking(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                fake = FakesQuantization(child.in_features, child.out_features, bias=child.bias is not None)
                fake.load_state_dict(child.state_dict())
                setattr(module, name, fake)
    return model


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("method", ["mean", "principal"])
def test_a_subclass_of_linear_is_not_replaced_by_a_plain_one(model_type, method):
    model = faking(tiny_model(model_type).eval())
    before = snapshot(model)
    for refuse in (ap.apply, ap.plan):
        with pytest.raises(ap.UnsupportedArchitecture, match="FakesQuantization.*patch the model first"):
            refuse(model, ap.GroupedQuery(num_kv_heads=2, method=method))
    assert snapshot(model) == before


def test_a_subclass_of_linear_stays_where_nothing_is_replaced():
    model = faking(tiny_model("llama").eval())
    ap.patch_alibi(model)
    assert type(model.model.layers[0].self_attn.k_proj) is FakesQuantization


def test_the_familys_own_subclass_of_linear_is_replaced():
    model = tiny_model("falcon").eval()
    assert type(model.transformer.h[0].self_attention.query_key_value) is not nn.Linear
    assert ap.patch_grouped_query(model, num_kv_heads=1).changed


def test_weights_of_a_tensor_class_of_their_own_are_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    model = tiny_model("llama").eval()
    projection = model.model.layers[0].self_attn.k_proj
    projection.weight = nn.Parameter(TwoTensor(projection.weight.detach(), projection.weight.detach()))
    for patch in NEW_TENSORS:
        with pytest.raises(ap.UnsupportedArchitecture, match="is a TwoTensor: quantized, or otherwise no plain"):
            ap.apply(model, patch)


# -- heads shared among ranks ------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1])
def rank(request):
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    dist.destroy_process_group()


def attention_module(rank, whole):
    """A module whose query rows are sharded over two ranks, or one whose rows are all here."""
    module = nn.Module()
    module.q_proj = nn.Linear(8, 8, bias=False)
    if not whole:
        mesh = init_device_mesh("cpu", (2,))
        local = module.q_proj.weight.detach()[4 * rank : 4 * rank + 4].clone()
        module.q_proj.weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
    module.is_causal = True
    return module


@pytest.mark.parametrize("given", [None, (0.5, 0.3, 0.2, 0.05)])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_rank_biases_its_heads_by_their_own_slopes(kernel, given, rank):
    query, key, value = torch.randn(3, 1, 4, 12, 8).unbind(0)
    attend, mine = attention_function(kernel), slice(2 * rank, 2 * rank + 2)
    module, shard = attention_module(rank, True), attention_module(rank, False)
    for each in (module, shard):
        setattr(each, HELD, (AlibiBias(given, None, True, 1.0, 4),))
    wanted, _ = attend(module, query, key, value, None)
    found, _ = attend(shard, query[:, mine], key[:, mine], value[:, mine], None)
    torch.testing.assert_close(found, wanted[:, :, mine], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_rank_takes_its_heads_terms_and_does_not_train_them(kernel, rank):
    query, key, value = torch.randn(3, 1, 4, 12, 8).unbind(0)
    attend, mine = attention_function(kernel), slice(2 * rank, 2 * rank + 2)
    module, shard = attention_module(rank, True), attention_module(rank, False)
    terms = RelativeTerms(4, 8, 8, 10000.0, query)
    for parameter in terms.parameters():
        nn.init.normal_(parameter)
    for each in (module, shard):
        each.add_module(CHILD, terms)
        setattr(each, HELD, (Relative(),))
    with torch.no_grad():
        wanted, _ = attend(module, query, key, value, None)
        found, _ = attend(shard, query[:, mine], key[:, mine], value[:, mine], None)
    torch.testing.assert_close(found, wanted[:, :, mine], rtol=0, atol=1e-5)
    with pytest.raises(ap.AttnPatchError, match="each rank would train the terms of its own heads only"):
        attend(shard, query[:, mine], key[:, mine], value[:, mine], None)


def test_missing_heads_that_nothing_explains_are_an_error(rank):
    module = attention_module(rank, True)
    with pytest.raises(ap.AttnPatchError, match="queries of 2 heads on rank 0 of 1, but the module has 4"):
        AlibiBias(None, None, True, 1.0, 4).distance(2, torch.float32, module)
    with pytest.raises(ap.AttnPatchError, match="its total number of heads is unknown"):
        AlibiBias(None, None, True, 1.0).distance(2, torch.float32, attention_module(rank, False))


def test_two_real_ranks(tmp_path):
    """About twelve seconds: two processes import torch; nothing smaller shows transformers' own sharding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).parent
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [
        *launcher,
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
        str(here / "two_ranks.py"),
        str(tmp_path),
    ]
    paths = os.pathsep.join(map(str, (here.parent, here)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert "each rank would train the terms of its own heads only" in found.pop("trained")
    assert "is inside a DistributedDataParallel" in found.pop("inside")
    assert max(found.values()) < 1e-5, found


# -- names by which others load it -------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("patch", [p for p in PATCHES if p.recorded], ids=lambda p: p.name)
def test_a_model_patched_in_memory_is_not_called_by_the_name_it_was_loaded_by(patch, source):
    model = AutoModelForCausalLM.from_pretrained(source)
    before = snapshot(model)
    report = ap.apply(model, patch)
    for name in (model.name_or_path, model.config._name_or_path, copy.deepcopy(model).config._name_or_path):
        assert "patched in memory by hf_attnpatch" in name
        with pytest.raises(OSError, match="patched in memory by hf_attnpatch"):
            AutoModelForCausalLM.from_pretrained(name)
    assert record.loaded_from(model) == str(source)
    assert record.loaded_from(copy.deepcopy(model)) == str(source)
    assert model.config.attnpatch["base_model"] == "./source"
    report.revert()
    assert model.config._name_or_path == model.name_or_path == str(source)
    assert snapshot(model) == before


def test_the_choice_of_a_kernel_leaves_the_name(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    ap.patch_flash(model, backend="sdpa")
    assert model.config._name_or_path == str(source)


@pytest.mark.parametrize(
    "patch", [ap.GroupedQuery(num_kv_heads=2), ap.RopeScaling(kind="yarn", factor=4.0), ap.Alibi()]
)
def test_an_adapter_does_not_name_the_unpatched_model_as_its_base(patch, source, tmp_path):
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(source)
    ap.apply(model, patch)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "in memory")
    with pytest.raises(OSError, match="patched in memory by hf_attnpatch"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "in memory")

    model = AutoModelForCausalLM.from_pretrained(source)
    ap.apply(model, patch)
    model.save_pretrained(tmp_path / "patched")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "patched"), lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(adapted))


# -- offloaded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_an_offloaded_checkpoint_computes_what_it_computes_in_memory(patch, tmp_path):
    model = tiny_model("llama").eval()
    ap.apply(model, patch)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    wanted = logits(again)
    cpu_offload(again, execution_device=torch.device("cpu"))
    assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_patching_an_offloaded_model_gives_the_same_or_says_that_it_is_offloaded(patch, model_type):
    if model_type == "gpt2" and isinstance(patch, NEED_ROTATION):
        pytest.skip("gpt2 does not rotate")
    model, plain = tiny_model(model_type).eval(), tiny_model(model_type).eval()
    cpu_offload(model, execution_device=torch.device("cpu"))
    ap.apply(plain, patch)
    kept_whole = (ap.RelativeXl, ap.PositionTable, ap.ScoreTemperature, ap.Windowed, ap.Latent)
    if isinstance(patch, kept_whole):
        with pytest.raises(ap.UnsupportedArchitecture, match="are offloaded by Accelerate"):
            ap.apply(model, patch)
        return
    ap.apply(model, patch)
    assert torch.equal(logits(model), logits(plain))
