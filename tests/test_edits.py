"""Every edit and its inverse, alone."""

import contextlib

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from architectures import tiny_model
from snapshot import snapshot
from torch import nn
from transformers import SmolLM3ForCausalLM

import hf_attnpatch as ap
from hf_attnpatch import foreign
from hf_attnpatch.attention.wrapper import HELD, AddWrapper, Listener, RemoveWrapper
from hf_attnpatch.edit import short
from hf_attnpatch.edits import (
    AddHook,
    AddModule,
    AddPreHook,
    BecomeModel,
    Edit,
    FirstLayers,
    RemoveHook,
    ReplaceModule,
    SetAttention,
    SetAttribute,
    SetBuffer,
    SetConfig,
    SetConfigClass,
    whole_shapes,
)
from hf_attnpatch.homes.fitting import rebuilt
from hf_attnpatch.rope.request_angles import RequestAngles


class _Hook:
    def __call__(self, module, args, kwargs):
        return args, kwargs


class _Behind:
    def __call__(self, module, args, kwargs, output):
        return output


def _wider(old):
    return nn.Linear(old.in_features, 2 * old.out_features, bias=False)


THERE, AROUND = _Hook(), Listener()


def subject():
    """A model with a hook and a wrapper that may be taken off."""
    model = tiny_model("llama")
    model.model.layers[0].mlp.register_forward_pre_hook(THERE, with_kwargs=True)
    model.model.layers[0].mlp.register_forward_pre_hook(_Hook(), with_kwargs=True)
    setattr(model.model.layers[0].mlp, HELD, (AROUND,))
    return model


def _smollm3(model):
    fields = {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 2, "use_sliding_window": False}
    return rebuilt(model, SmolLM3ForCausalLM, fields, {})


EDITS = {
    "the class of the model": BecomeModel("", _smollm3, "smollm3", "another class"),
    "a field that is there": SetConfig("", "num_key_value_heads", 2),
    "a field that is not": SetConfig("", "attnpatch", {"version": 1}),
    "a field by its alias": SetConfig("", "n_ctx", 3),
    "an attribute that is there": SetAttribute("model.layers.0.self_attn", "num_key_value_groups", 2),
    "an attribute that is not": SetAttribute("model.layers.1.mlp", "note", "new"),
    "a module": ReplaceModule("model.layers.0.self_attn.k_proj", _wider, "a wider one"),
    "a child that was not there": AddModule("model", "added", lambda base: nn.Linear(2, 2), "a small one"),
    "a list of layers": FirstLayers("model.layers", 1),
    "a buffer": SetBuffer("model.rotary_emb", "inv_freq", lambda old: old + 1, "one more"),
    "a hook": AddPreHook("model.layers.0.self_attn", _Hook(), "does nothing"),
    "a hook behind it": AddHook("model.layers.1.self_attn", _Behind(), "does nothing"),
    "a hook that is there": RemoveHook("model.layers.0.mlp", THERE),
    "a wrapper": AddWrapper("model.layers.0.self_attn", Listener()),
    "a wrapper that is there": RemoveWrapper("model.layers.0.mlp", AROUND.name),
    "the attention function": SetAttention("", "eager"),
    "the class of the config": SetConfigClass("", foreign.config_class(type(tiny_model("llama").config))),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_stands_until_its_inverse_takes_it_back(edit):
    model = tiny_model("llama") if isinstance(edit, BecomeModel) else subject()  # which would lose hooks of others
    before = snapshot(model)
    assert all(isinstance(text, str) and len(text) <= 80 for text in edit.preview(model))
    assert snapshot(model) == before
    inverse = edit.run(model)
    assert inverse.claim == edit.claim
    assert inverse.stands()
    assert snapshot(model) != before
    inverse.undo()
    assert not inverse.stands()
    assert snapshot(model) == before
    inverse.undo()  # as where Ctrl-C comes while it is undone
    assert snapshot(model) == before


def test_layers_behind_the_first_do_not_run():
    model = tiny_model("llama", num_hidden_layers=3)
    layers = list(model.model.layers)
    inverse = FirstLayers("model.layers", 2).run(model)
    assert list(model.model.layers) == layers[:2]
    inverse.undo()
    assert list(model.model.layers) == layers


def test_a_model_that_becomes_another_has_its_class_its_modules_and_its_fields():
    model = tiny_model("llama")
    wanted, layer, config = _smollm3(model), model.model.layers[0], model.config
    config.of_this_one = 1
    write = BecomeModel("", _smollm3, "smollm3", "another class").prepare(model)
    assert model.model.layers[0] is layer
    write.do()
    assert type(model) is SmolLM3ForCausalLM
    assert type(model.model) is type(wanted.model)
    assert model.config is config
    assert vars(config).keys() == vars(wanted.config).keys()
    assert (config.no_rope_layers, config.model_type) == ([1, 0], "smollm3")
    assert [name for name, m in model.named_modules() if "config" in vars(m)] == [
        name for name, m in wanted.named_modules() if "config" in vars(m)
    ]
    assert all(vars(m).get("config", config) is config for m in model.modules())
    write.undo()
    assert model.model.layers[0] is layer
    assert config.of_this_one == 1


def test_a_model_that_is_spread_over_devices_does_not_become_another():
    model = tiny_model("llama")
    add_hook_to_module(model.model.layers[1], AlignDevicesHook(execution_device="cpu"))
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match="spread over devices or offloaded; load it without"):
        EDITS["the class of the model"].run(model)
    assert snapshot(model) == before


def test_parameters_that_are_partitioned_have_their_whole_shape_for_a_while():
    """DeepSpeed's marks alone; its own are tested on two ranks."""
    model = tiny_model("llama")
    here, there = model.lm_head.weight, model.model.norm.weight
    parted = nn.Parameter(torch.empty(0), requires_grad=False)
    learning = nn.Parameter(torch.empty(0))
    parted.ds_shape, learning.ds_shape = (7, 5), (3,)
    model.model.norm.weight, model.model.layers[0].input_layernorm.weight = parted, learning
    model.model.layers[1].input_layernorm.weight = learning  # shared
    with contextlib.suppress(RuntimeError), whole_shapes(model):
        whole, one = model.model.norm.weight, model.model.layers[0].input_layernorm.weight
        assert (tuple(whole.shape), whole.requires_grad) == ((7, 5), False)
        assert (tuple(one.shape), one.requires_grad) == ((3,), True)
        assert model.model.layers[1].input_layernorm.weight is one
        assert whole.untyped_storage().nbytes() == whole.element_size()  # one number
        assert model.lm_head.weight is here
        model.model.layers[1].input_layernorm.weight = there  # another in its place stays
        raise RuntimeError
    assert model.model.norm.weight is parted
    assert model.model.layers[0].input_layernorm.weight is learning
    assert model.model.layers[1].input_layernorm.weight is there


def test_a_hook_is_taken_off_once():
    """Without a second call for what is gone already, and with its place in the order on the way back."""
    model = subject()
    hooks = model.model.layers[0].mlp._forward_pre_hooks
    order = list(hooks.values())
    write = EDITS["a hook that is there"].prepare(model)
    write.do()
    write.do()
    assert list(hooks.values()) == order[1:]
    write.undo()
    assert list(hooks.values()) == order


def test_every_edit_is_tested_here():
    kinds = Edit.__subclasses__()
    kinds += [deeper for kind in kinds for deeper in kind.__subclasses__()]
    assert {type(edit) for edit in EDITS.values()} == {kind for kind in kinds if not kind.__name__.startswith("_")}
    assert all(f"{edit.rung}," in Edit.__doc__ or f"{edit.rung}." in Edit.__doc__ for edit in EDITS.values())


def test_what_was_not_there_is_shown_as_nothing():
    model = subject()
    new = ("a child that was not there", "a hook", "a hook behind it", "a wrapper")
    assert [name for name, edit in EDITS.items() if edit.preview(model)[0] == "-"] == [*new]
    assert [EDITS[name].preview(model)[1] for name in new[:3]] == ["a small one", "does nothing", "does nothing"]
    gone = ("a hook that is there", "a wrapper that is there")
    assert [name for name, edit in EDITS.items() if edit.preview(model)[1] == "-"] == [*gone]


@pytest.mark.parametrize("kind", [AddPreHook, AddHook])
@pytest.mark.parametrize("first", [None, True, False])
def test_hooks_stand_behind_those_there_unless_they_are_to_be_first(kind, first):
    model, order = tiny_model("llama"), []
    norm = model.model.norm

    class Noting:
        def __init__(self, name):
            self.name = name

        def __call__(self, module, args, kwargs, *output):
            assert kwargs == {}
            assert len(output) == (kind is AddHook)
            order.append(self.name)

    hang = norm.register_forward_pre_hook if kind is AddPreHook else norm.register_forward_hook
    hang(Noting("theirs"), with_kwargs=True)
    inverse = kind("model.norm", Noting("ours"), "", **({} if first is None else {"first": first})).run(model)
    norm(torch.ones(1, norm.weight.shape[0]))
    assert order == (["ours", "theirs"] if first else ["theirs", "ours"])
    inverse.undo()
    order.clear()
    norm(torch.ones(1, norm.weight.shape[0]))
    assert order == ["theirs"]


def test_a_config_that_names_no_attention_names_none_again():
    model = tiny_model("gemma3")
    del model.config.vision_config.__dict__["_attn_implementation_internal"]
    inverse = SetAttention("", "eager").run(model)
    assert model.config.vision_config._attn_implementation == "eager"
    for _ in range(2):
        inverse.undo()
        assert "_attn_implementation_internal" not in vars(model.config.vision_config)


def test_masks_alone_are_asked_for_where_it_is_said():
    """The image tower dispatches by itself: its function is not exchanged."""
    model = tiny_model("gemma3")
    configs = (model.config, model.config.text_config, model.config.vision_config)
    old = configs[2]._attn_implementation
    assert old != "eager"
    inverse = SetAttention("", "eager", only_masks=True, configs=("", "text_config")).run(model)
    assert [config._attn_implementation for config in configs] == ["eager", "eager", old]
    inverse.undo()
    assert {config._attn_implementation for config in configs} == {old}
    SetAttention("", "eager", only_masks=True).run(model)
    assert {config._attn_implementation for config in configs} == {"eager"}


def test_a_family_that_chooses_its_attention_when_built_is_left_as_it_was():
    """transformers only logs that it will not."""
    model = tiny_model("falcon", attn_implementation="eager")
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match="chooses its attention when it is built"):
        SetAttention("", "sdpa").run(model)
    assert snapshot(model) == before


def test_claims_tell_places_apart():
    claims = [edit.claim for edit in EDITS.values()]
    assert len(set(claims)) == len(claims)
    assert SetConfig("", "a", 1).claim == SetConfig("", "a", 2).claim
    assert SetConfig("text_config", "a", 1).claim != SetConfig("", "a", 1).claim


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SetConfig("", "num_key_value_heads", 2), SetConfig("", "num_key_value_heads", 1)),
        (SetAttribute("lm_head", "note", "a"), SetAttribute("lm_head", "note", "b")),
        (EDITS["a module"], ReplaceModule("model.layers.0.self_attn.k_proj", nn.Sequential, "another")),
    ],
)
def test_a_later_write_is_noticed(first, second):
    model = tiny_model("llama")
    inverse = first.run(model)
    later = second.run(model)
    assert not inverse.stands()
    later.undo()
    assert inverse.stands()


def test_a_removed_hook_is_noticed():
    model = tiny_model("llama")
    inverse = EDITS["a hook"].run(model)
    model.model.layers[0].self_attn._forward_pre_hooks.clear()
    assert not inverse.stands()


def test_an_alias_is_written_where_the_family_keeps_it():
    model = tiny_model("gpt2")
    before = snapshot(model)
    inverse = SetConfig("", "num_attention_heads", 2).run(model)
    assert model.config.n_head == 2
    assert "num_attention_heads" not in vars(model.config)
    inverse.undo()
    assert snapshot(model) == before


def test_a_sub_config_is_found():
    model = tiny_model("gemma3")
    before = snapshot(model)
    inverse = SetConfig("text_config", "num_key_value_heads", 2).run(model)
    assert model.config.text_config.num_key_value_heads == 2
    inverse.undo()
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "edit",
    [
        SetConfig("", "num_key_value_heads", "many"),
        SetConfig("", "rope_parameters", 7),
        SetConfig("nowhere", "num_key_value_heads", 2),
        SetAttribute("model.nowhere", "a", 1),
        ReplaceModule("model.layers.7", _wider, ""),
        ReplaceModule("model.norm", _wider, ""),
        SetAttention("", "no_such_attention"),
        SetAttention("", "flash_attention_2"),
    ],
    ids=lambda e: f"{type(e).__name__}-{e.claim}",
)
def test_an_edit_that_raises_has_written_nothing(edit):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever transformers raises; what counts is below
        edit.run(model)
    assert snapshot(model) == before


def test_attention_is_set_in_every_config_and_each_gets_its_own_back():
    model = tiny_model("gemma3")
    model.config.text_config._attn_implementation_internal = "eager"
    before = snapshot(model)
    inverse = SetAttention("", "eager").run(model)
    assert model.config._attn_implementation == "eager"
    inverse.undo()
    assert snapshot(model) == before
    assert model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("training", [True, False])
def test_a_new_module_keeps_mode_and_order(training):
    model = tiny_model("llama").train(training)
    attention = model.model.layers[0].self_attn
    attention.v_proj.train(not training)  # whatever stands beside it
    names = list(attention._modules)
    EDITS["a module"].run(model)
    EDITS["a child that was not there"].run(model)
    assert attention.k_proj.training is training
    assert model.model.added.training is training
    assert list(attention._modules) == names


def test_a_replaced_module_has_the_mode_of_the_one_it_replaces():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.k_proj.train()  # alone: what surrounds it is in eval mode
    EDITS["a module"].run(model)
    assert model.model.layers[0].self_attn.k_proj.training


def test_new_tensors_are_made_only_when_an_edit_runs():
    made = []

    def make(old):
        made.append(old)
        return nn.Identity()

    model = tiny_model("llama")
    edit = ReplaceModule("model.norm", make, "")
    edit.preview(model)
    assert not made
    edit.run(model)
    assert len(made) == 1


def test_planning_allocates_no_weights():
    model = tiny_model("llama")
    kinds = [edit for edit in ap.plan(model, ap.GroupedQuery(num_kv_heads=2)).edits if isinstance(edit, ReplaceModule)]
    kinds = [edit for edit in kinds if hasattr(edit.make, "twin")]  # the others keep the old module's shape
    assert len(kinds) == 4
    for edit in kinds:
        assert all(p.device == torch.device("meta") for p in edit.make.twin.parameters())


@pytest.mark.parametrize("hang", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_user_s_hook_is_not_lost_without_a_word(hang):
    model = tiny_model("gpt2")
    getattr(model.transformer.h[0].attn.c_attn, hang)(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match=r"h\.0\.attn\.c_attn: carries the hook <lambda>.*take it off"):
        ap.patch_grouped_query(model, num_kv_heads=1, method="mean")
    assert snapshot(model) == before


class _Named(_Hook):
    """A hook that is no function."""


def test_hooks_that_a_new_module_still_has_are_not_lost():
    model = tiny_model("llama")
    old = model.model.norm
    hook = _Named()
    old.register_forward_pre_hook(hook, with_kwargs=True)
    ReplaceModule("model.norm", nn.Sequential, "around it").run(model)
    assert model.model.norm[0] is old
    with pytest.raises(ap.AttnPatchError, match=r"^model\.norm\.0: carries the hook _Named, which"):
        ReplaceModule("model.norm.0", lambda _: nn.Identity(), "instead of it").run(model)


@pytest.mark.parametrize("hang", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_deep_inside_counts_and_one_of_this_package_does_not(hang):
    model = tiny_model("llama")
    own = RequestAngles(None, None, ())
    getattr(model.model.layers[1].mlp.up_proj, hang)(own)
    inverse = ReplaceModule("model.layers.1", lambda _: nn.Identity(), "").run(model)
    inverse.undo()
    getattr(model.model.layers[1].mlp.up_proj, hang)(_Named())
    with pytest.raises(ap.AttnPatchError, match=r"model\.layers\.1: carries the hook _Named"):
        ReplaceModule("model.layers.1", lambda _: nn.Identity(), "").run(model)


@pytest.mark.parametrize("nested", [False, True])
def test_accelerate_s_hook_goes_with_the_place_and_keeps_each_module_s_own_weights(nested):
    model = tiny_model("llama")
    old = model.model.layers[0].self_attn.k_proj
    kept = old.weight.detach().clone()
    hook = AlignDevicesHook(execution_device="cpu", offload=True)
    add_hook_to_module(old, SequentialHook(hook) if nested else hook)
    weights = dict(hook.weights_map)
    inverse = EDITS["a module"].run(model)
    new = model.model.layers[0].self_attn.k_proj
    own = new._hf_hook.hooks[0] if nested else new._hf_hook
    assert own is not hook
    assert own.offload
    assert own.weights_map["weight"].shape == (2 * old.out_features, old.in_features)
    assert all(hook.weights_map[name] is tensor for name, tensor in weights.items())  # the old one's are as they were
    assert new(torch.ones(1, old.in_features)).shape == (1, 2 * old.out_features)
    inverse.undo()
    assert model.model.layers[0].self_attn.k_proj is old
    torch.testing.assert_close(old(torch.eye(old.in_features)), kept.T)


@pytest.mark.parametrize("there", [True, False])
def test_none_is_a_value_and_not_an_absence(there):
    model = tiny_model("llama")
    if there:
        model.lm_head.note = "old"
    inverse = SetAttribute("lm_head", "note", None).run(model)
    assert inverse.stands()
    del model.lm_head.note
    assert not inverse.stands()


@pytest.mark.parametrize("length", [1, 59, 60, 61, 62, 200])
def test_a_value_is_shown_on_one_line_of_sixty_characters(length):
    value = "a b".ljust(length, "x")[:length]
    shown = short(value.replace(" ", "\n  \t"))
    assert len(shown) <= 60
    assert shown == value if length <= 60 else (shown == value[:57] + "...")


def test_nor_is_a_parametrization():
    model = tiny_model("gpt2")
    torch.nn.utils.parametrize.register_parametrization(model.transformer.h[1].attn.c_attn, "weight", nn.Identity())
    with pytest.raises(ap.AttnPatchError, match=r"h\.1\.attn\.c_attn: carries a parametrization"):
        ap.patch_grouped_query(model, num_kv_heads=1, method="mean")
