"""Which backends there are, what each needs, and what is registered for them."""

import importlib.machinery
import importlib.util
import types

import pytest
import torch
from architectures import tiny_model
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from hf_attnpatch import MissingExtra, backends
from hf_attnpatch.attention import registry
from hf_attnpatch.attention.masks import mask_of
from hf_attnpatch.attention.registry import dense, kernel_of
from hf_attnpatch.backends import Candidate, obstacle, ranked

HALF = (torch.float16, torch.bfloat16)
# (oldest compute capability, packages): FlashAttention's README: 2 for Ampere, Ada and Hopper; 3 for Hopper; 4 for
# Hopper and Blackwell; fp16 and bf16, heads up to 256, for all of them
LIMITS = {
    "flash_attention_2": ((8, 0), "flash_attn"),
    "flash_attention_3": ((9, 0), "flash_attn_interface"),
    "flash_attention_4": ((9, 0), "flash_attn"),
}


class _Model:
    """What a backend asks of a model, on a device that may not be here."""

    def __init__(self, device="cuda", softcap=None, **flags):
        self.device = torch.device(device)
        self._supports_flash_attn = self._supports_sdpa = self._supports_flex_attn = True
        vars(self).update(flags)
        text = types.SimpleNamespace(attn_logit_softcapping=softcap)
        self.config = types.SimpleNamespace(get_text_config=lambda decoder: text if decoder is True else None)


@pytest.fixture
def installed(monkeypatch):
    """Everything is installed, on a Hopper."""
    found = {"flash_attn", "flash_attn_interface", "kernels"}
    spec = importlib.machinery.ModuleSpec("there", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name in found else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return found


def _asked(model=None, dtype=torch.bfloat16, head_dim=64, training=False):
    return Candidate(model or _Model(), dtype, head_dim, training)


@pytest.mark.parametrize("name", LIMITS)
def test_flash_attention_runs_within_its_limits(name, installed, monkeypatch):
    oldest, package = LIMITS[name]
    for dtype in HALF:
        for head_dim in (64, 255, 256):
            assert obstacle(name, _asked(dtype=dtype, head_dim=head_dim, training=True)) is None
    for dtype in (torch.float32, torch.float64):
        assert "needs fp16 or bf16, the model is in float" in obstacle(name, _asked(dtype=dtype))
    for head_dim in (257, 512):
        assert obstacle(name, _asked(head_dim=head_dim)) == f"takes heads up to 256, the model has {head_dim}"
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        wanted = None if capability >= oldest else f"needs compute capability {oldest[0]}.{oldest[1]}"
        assert obstacle(name, _asked()) == wanted
    assert obstacle(name, _asked(_Model("cpu"))) == "needs a CUDA device, the model is on cpu"
    assert "does not dispatch to it" in obstacle(name, _asked(_Model(_supports_flash_attn=False)))
    installed.remove(package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "is not installed: pip install 'hf_attnpatch[flash]'" in obstacle(name, _asked())


def test_the_capability_asked_for_is_that_of_the_model_s_device(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {"cuda:1": (7, 0)}.get(str(device), (9, 0)))
    assert obstacle("flash_attention_2", _asked(_Model("cuda:0"))) is None
    assert obstacle("flash_attention_2", _asked(_Model("cuda:1"))) == "needs compute capability 8.0"


@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("training", [True, False])
def test_torch_s_own_kernels(name, device, training):
    flag = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}[name]
    backward = name == "flex_attention" and training and device == "cpu"  # torch has none there
    wanted = "flex_attention has no backward on CPU" if backward else None
    assert obstacle(name, _asked(_Model(device), torch.float32, 512, training)) == wanted
    assert "does not dispatch" in obstacle(name, _asked(_Model(device, **{flag: False})))
    capped = obstacle(name, _asked(_Model(device, softcap=30.0), training=False))
    assert (capped is not None and "soft-capping" in capped) == (name == "sdpa")
    assert obstacle(name, _asked(_Model(device, softcap=0.0), training=False)) is None


def test_a_model_that_says_nothing_dispatches_to_nothing():
    bare = types.SimpleNamespace(device=torch.device("cuda"))
    for name in (*backends.FLAG, "someone/kernel"):
        if "/" not in name:
            assert "does not dispatch to it" in obstacle(name, _asked(bare))


def test_a_kernel_of_the_hub_needs_its_package(installed):
    assert obstacle("someone/kernel", _asked()) is None
    for model in (_Model(_supports_flash_attn=False), types.SimpleNamespace(device=torch.device("cuda"))):
        assert "does not dispatch to it in this release of transformers (someone/kernel)" in obstacle(
            "someone/kernel", _asked(model)
        )
    installed.remove("kernels")
    with pytest.raises(MissingExtra, match=r"backend 'someone/kernel'.*hf_attnpatch\[kernels\]"):
        obstacle("someone/kernel", _asked())


def test_the_fastest_come_first():
    """Newer generations of FlashAttention are the faster ones; flex_attention computes blocks that sdpa skips."""
    flash = tuple(f"flash_attention_{n}" for n in (4, 3, 2))
    assert ranked(torch.device("cuda")) == (*flash, "sdpa", "flex_attention")
    assert ranked(torch.device("cpu")) == ranked(torch.device("mps")) == ("sdpa", "flex_attention")
    assert set(ranked(torch.device("cuda"))) == set(backends.FLAG)


@pytest.mark.parametrize("kernel", registry.KERNELS)
def test_a_kernel_has_one_name_here(kernel):
    assert kernel_of(registry.PREFIX + kernel) == kernel_of(kernel) == kernel
    assert dense(registry.PREFIX + kernel) == "attnpatch_eager"
    assert dense(kernel) == "eager"


def _forget(monkeypatch, prefix):
    for table in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        for key in [key for key in table if key.startswith(prefix)]:
            monkeypatch.delitem(table, key)


def test_each_kernel_gets_one_function_and_the_masks_it_understands(monkeypatch):
    _forget(monkeypatch, registry.PREFIX)
    registry.register()
    for table in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        assert {key for key in table if key.startswith(registry.PREFIX)} == {
            registry.PREFIX + name for name in (*backends.FLAG, "eager", "torch")
        }
    sizes = (2, 6, 6)
    padding = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    for name in (*backends.FLAG, "eager"):
        attention = AttentionInterface._global_mapping[registry.PREFIX + name]
        mask = AttentionMaskInterface._global_mapping[registry.PREFIX + name]
        assert attention.__wrapped__ is registry.attention_function(name)
        if name.startswith("flash"):
            assert torch.equal(mask(*sizes, attention_mask=padding).bool(), padding.bool())
            continue
        made = mask(*sizes, mask_function=causal_mask_function, attention_mask=padding.bool(), device="cpu")
        assert mask_of(made).kernel == name
        if name == "sdpa":  # padding alone, in linear memory
            assert mask_of(made).told.shape == (2, 1, 1, 6)
            assert made.shape == (2, 1, 6, 6)
        elif name == "eager":  # every score, to be added
            assert made.shape == (2, 1, 6, 6)
            assert made.is_floating_point()
        else:
            assert type(made).__name__ == "BlockMask" or hasattr(made, "mask_mod")


def test_masks_without_a_function_for_families_that_compute_attention_themselves(monkeypatch):
    _forget(monkeypatch, registry.FUSED)
    registry.register()
    assert registry.FUSED not in AttentionInterface._global_mapping
    mask = AttentionMaskInterface._global_mapping[registry.FUSED]
    assert mask(1, 4, 4, mask_function=causal_mask_function, device="cpu").shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="attn_implementation"):
        tiny_model("llama", attn_implementation=registry.FUSED)
