"""What the package relies on in transformers and torch beyond their documented interfaces: listed here, checked here.

A release that moves one of these fails this file first, and says which.
"""

import ast
import inspect
import re
import sys

import pytest
import torch
from architectures import tiny_model
from test_house import TREES
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto import modeling_auto
from transformers.utils import hub

from hf_attnpatch.attention import registry
from hf_attnpatch.probe import default_inputs, trace
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.roles import roles_of

# private name -> whether it is there
PRIVATE = {
    "_keys_to_ignore_on_load_unexpected": lambda: hasattr(PreTrainedModel, "_keys_to_ignore_on_load_unexpected"),
    "_keys_to_ignore_on_save": lambda: hasattr(PreTrainedModel, "_keys_to_ignore_on_save"),
    "_raise_exceptions_for_missing_entries": lambda: (
        "_raise_exceptions_for_missing_entries" in inspect.signature(hub.cached_files).parameters
    ),
    "_attn_implementation": lambda: isinstance(PretrainedConfig._attn_implementation, property),
    "_experts_implementation": lambda: isinstance(PretrainedConfig._experts_implementation, property),
    "_attn_implementation_internal": lambda: "_attn_implementation_internal" in vars(LlamaConfig()),
    "_name_or_path": lambda: hasattr(LlamaConfig(), "_name_or_path"),
    "_non_persistent_buffers_set": lambda: isinstance(nn.Linear(1, 1)._non_persistent_buffers_set, set),
    "_gradient_checkpointing_func": lambda: _checkpointing_is_set_so(),
    "_supports_sdpa": lambda: isinstance(PreTrainedModel._supports_sdpa, bool),
    "_supports_flex_attn": lambda: isinstance(PreTrainedModel._supports_flex_attn, bool),
    "_supports_flash_attn": lambda: isinstance(PreTrainedModel._supports_flash_attn, bool),
    "_model_mapping": lambda: LlamaConfig in AutoModelForCausalLM._model_mapping,
    "_schema": lambda: (
        torch.ops.aten.copy_.default._schema.is_mutable and not torch.ops.aten.add.Tensor._schema.is_mutable
    ),
    "_modules": lambda: isinstance(nn.Linear(1, 1)._modules, dict),
    "_buffers": lambda: isinstance(nn.Linear(1, 1)._buffers, dict),
    "_forward_hooks": lambda: isinstance(nn.Linear(1, 1)._forward_hooks, dict),
    "_prepare_cache_for_generation": lambda: _cache_is_prepared_with_a_length(),
    "_backward_hooks": lambda: isinstance(nn.Linear(1, 1)._backward_hooks, dict),
    "_forward_pre_hooks": lambda: isinstance(nn.Linear(1, 1)._forward_pre_hooks, dict),
    "_forward_pre_hooks_with_kwargs": lambda: isinstance(nn.Linear(1, 1)._forward_pre_hooks_with_kwargs, dict),
    "_forward_hooks_with_kwargs": lambda: isinstance(nn.Linear(1, 1)._forward_hooks_with_kwargs, dict),
    "_forward_hooks_always_called": lambda: isinstance(nn.Linear(1, 1)._forward_hooks_always_called, dict),
    "_orig_mod": lambda: hasattr(torch.compile(nn.Linear(1, 1)), "_orig_mod"),
    "_hf_hook": lambda: _accelerate_keeps("_hf_hook"),
    "_scaled_dot_product_flash_attention_for_cpu": lambda: _schema("", "attn_mask", "is_causal"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda: _schema("_backward", "logsumexp", "out"),
    "_scaled_dot_product_flash_attention": lambda: _op("_flash_attention", "is_causal", "scale"),
    "_scaled_dot_product_flash_attention_backward": lambda: _op(
        "_flash_attention_backward", "logsumexp", "philox_seed"
    ),
    "_scaled_dot_product_efficient_attention": lambda: _op("_efficient_attention", "compute_log_sumexp", "scale"),
    "_scaled_dot_product_efficient_attention_backward": lambda: _op("_efficient_attention_backward", "logsumexp"),
    "_grouped_mm": lambda: callable(torch.ops.aten._grouped_mm),
    "_unsafe_view": lambda: callable(torch.ops.aten._unsafe_view),
    "_local_scalar_dense": lambda: callable(torch.ops.aten._local_scalar_dense),
    "_getframe": lambda: sys._getframe(0) is not None,
    "_old_forward": lambda: _accelerate_keeps("_old_forward"),
}


def _cache_is_prepared_with_a_length():
    names = list(inspect.signature(LlamaForCausalLM._prepare_cache_for_generation).parameters)
    return names[1:3] == ["generation_config", "model_kwargs"] and names[-1] == "max_cache_length"


def _schema(suffix, *names):
    return _op("_flash_attention_for_cpu" + suffix, *names)


def _op(suffix, *names):
    op = getattr(torch.ops.aten, "_scaled_dot_product" + suffix)
    return set(names) <= {argument.name for argument in op.default._schema.arguments}


def _accelerate_keeps(name):
    from accelerate.hooks import ModelHook, add_hook_to_module

    return hasattr(add_hook_to_module(nn.Linear(1, 1), ModelHook()), name)


@pytest.mark.parametrize("name", PRIVATE)
def test_it_is_there(name):
    assert PRIVATE[name]()


def _own_names():
    """Private names that the package itself defines: functions, classes, constants, attributes of self, parameters."""
    own = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, (ast.Name, ast.arg)):
                own.add(getattr(node, "id", None) or getattr(node, "arg", None))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    return own


def _checkpointing_is_set_so():
    model = tiny_model("llama")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # named so from 5.24 on
    return any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules())


def _used():
    for name, tree in TREES.items():
        pieces = {id(p) for f in ast.walk(tree) if isinstance(f, ast.JoinedStr) for p in f.values}  # of f-strings
        for node in ast.walk(tree):
            if id(node) in pieces:
                continue
            if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr):
                yield node.attr, f"{name}:{node.lineno}"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"_[a-z]+(_[a-z]+)+", node.value) and not name.startswith("cli"):
                    yield node.value, f"{name}:{node.lineno}"


def test_every_private_name_is_listed_above():
    own = _own_names()
    used = {name: where for name, where in _used() if name not in own}
    assert set(used) == set(PRIVATE), {name: where for name, where in used.items() if name not in PRIVATE}


# -- behaviours -------------------------------------------------------------------------------------------------------


def test_the_tables_of_attention_take_a_pair():
    assert {"eager", "sdpa"} <= {"eager", *AttentionInterface().valid_keys()}
    assert "sdpa" in AttentionMaskInterface().valid_keys()


def test_every_auto_class_that_is_looked_through_is_exported():
    autos = [name for name in modeling_auto.__all__ if name.startswith("AutoModel")]
    assert len(autos) > 20
    assert {"AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"} <= set(autos)


def test_caches_are_updated_by_this_method_and_hold_these_tensors():
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 3, 4)
    assert cache.update(keys, keys, 0)[0].shape == keys.shape
    assert cache.layers[0].keys.shape == keys.shape
    assert isinstance(EncoderDecoderCache(cache, DynamicCache()).self_attention_cache, Cache)


def test_gradient_checkpointing_has_one_of_two_names():
    assert any(hasattr(PreTrainedModel, f"{kind}_checkpointing_enable") for kind in ("activation", "gradient"))
    assert isinstance(PreTrainedModel.supports_gradient_checkpointing, bool)


def test_a_checkpoint_forgets_the_attention_function(tmp_path):
    """So the choice of a kernel has no business in the record."""
    tiny_model("llama", attn_implementation="eager").save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_checkpoint_keeps_a_field_that_the_config_class_does_not_know(tmp_path):
    model = tiny_model("llama")
    model.config.attnpatch = {"version": 1}
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attnpatch == {"version": 1}


def test_editing_rope_parameters_alone_changes_nothing_in_memory():
    """So config and rotary module are edited as one step."""
    model = tiny_model("llama")
    before = trace(model, default_inputs(model)).logits
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "linear", "factor": 8.0}
    assert torch.equal(trace(model, default_inputs(model)).logits, before)


def test_a_family_that_chooses_when_built_only_logs_that_it_will_not_switch():
    model = tiny_model("falcon", attn_implementation="eager")
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "eager"


@pytest.fixture
def key():
    name = "sdpa_hf_attnpatch_test"
    yield name
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def _padding_error(key):
    model = tiny_model("llama", attn_implementation="sdpa")
    inputs = default_inputs(model)
    wanted = trace(model, inputs).logits
    model.set_attn_implementation(key)
    return (trace(model, inputs).logits - wanted).abs().max().item()


def test_an_attention_function_without_its_mask_is_silently_wrong(key):
    """The trap that ``registry.register`` closes: each kernel has a name in both tables."""
    AttentionInterface.register(key, AttentionInterface._global_mapping["sdpa"])
    assert _padding_error(key) > 1e-2
    registry.register()
    for kernel in registry.KERNELS:
        assert registry.PREFIX + kernel in AttentionMaskInterface._global_mapping
        assert registry.PREFIX + kernel in AttentionInterface._global_mapping
    assert _padding_error(registry.PREFIX + "sdpa") == 0


# -- vocabulary -------------------------------------------------------------------------------------------------------

# What a tokenizer or a data set calls its columns is no forward's argument: batches of calibration and evaluation text.
COLUMNS = {words.INPUT_IDS, words.ATTENTION_MASK, words.DECODER_MASK}
BATCHES = (
    "heads/calibration_text.py",
    "heads/repair.py",
    "heads/estimate.py",
    "latent/statistics.py",
    "windows/choice.py",
    "comparing/",
    "commands/",
    "evaluation/",
)
SPELLINGS = {name for spellings in words.ARGUMENTS.values() for name in spellings} - {"cache"} | {*words.PREDICTIONS}


def _spelled(tree):
    """Names of forwards' arguments and outputs in a file: as strings, as keywords of calls, as attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg, node.value.lineno
        elif isinstance(node, ast.Attribute) and node.attr in words.ARGUMENTS[words.CACHE]:
            yield node.attr, node.lineno


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("upstream/")])
def test_no_other_room_spells_what_transformers_calls_an_argument(name):
    allowed = COLUMNS if name.startswith(BATCHES) else set()
    found = {(word, line) for word, line in _spelled(TREES[name]) if word in SPELLINGS - allowed}
    found -= {(word, line) for word, line in found if (name, word) in OWN_WORDS}
    assert not found, f"{name}: use hf_attnpatch.upstream.words and roles"


# this package's own uses of a word that transformers has, too
OWN_WORDS = {
    ("doctoring/expected.py", "alibi"): "the patch of that name",
    ("api.py", "logits"): "a line of the report",
    ("anatomy.py", "alibi"): "the position scheme of that name",
    ("anatomy.py", "position_embeddings"): "what some families call their table, a module",
    ("patches/rotary.py", "alibi"): "a field of the anatomy",
    ("patches/alibi.py", "alibi"): "the patch of that name",
    ("attention/alibi.py", "alibi"): "the wrapper of that name",
    ("positions/rotating.py", "alibi"): "a field of Falcon's config",
    ("positions/strength.py", "alibi"): "the patch of that name",
}


def test_every_word_of_our_own_is_in_use():
    assert all(word in {each for each, _ in _spelled(TREES[name])} for name, word in OWN_WORDS)


def test_the_vocabulary_is_what_the_installed_release_speaks():
    """The newest spelling comes first: what a Llama, a GPT-2 and a BERT declare is found without running them."""
    for kind, encoder in (("llama", None), ("gpt2", None), ("bert", True)):
        roles = roles_of(tiny_model(kind, encoder=encoder))
        assert roles.takes(words.TOKENS, words.MASK, words.POSITIONS, words.EMBEDDINGS)
        assert encoder or roles.takes(words.CACHE, words.USE_CACHE)
