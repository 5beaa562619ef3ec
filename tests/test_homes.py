"""Homes: the model is the same one bit for bit, what a home says is what it does, and stock transformers loads it."""

import copy

import pytest
import torch
import transformers
from standing import Standing
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_attnpatch as ap
from hf_attnpatch import few
from hf_attnpatch.homes.fitting import current, find
from hf_attnpatch.homes.rows import HOMES
from hf_attnpatch.layers import Layers, Temperature

SIZE = {
    **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, tied, wide heads": ("LlamaForCausalLM", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama, yarn": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral, windows": ("MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "trunk": ("LlamaModel", {}),
    "classifier": ("LlamaForSequenceClassification", {"num_labels": 3}),
}
KNOWN = [
    row.model_type for row in HOMES if row.model_type in transformers.models.auto.configuration_auto.CONFIG_MAPPING
]


def made(name, **more):
    cls = getattr(transformers, MODELS[name][0])
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SIZE, **MODELS[name][1], **more})).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    return model


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(ids, **more)[0]


def state(model):
    written = ("architectures", "dtype")  # by save_pretrained, on any model
    config = sorted((k, repr(v)) for k, v in model.config.to_dict().items() if k not in written)
    return (
        type(model),
        type(model.config),
        config,
        {id(m) for m in model.modules()},
        {id(p) for p in model.parameters()},
    )


def reloaded(model, folder):
    model.save_pretrained(folder)
    name = type(model).__name__
    auto = (
        AutoModelForCausalLM if "Causal" in name else AutoModelForSequenceClassification if "Seq" in name else AutoModel
    )
    found = auto.from_pretrained(folder, attn_implementation=model.config._attn_implementation).eval()
    assert type(found) is type(model)
    assert type(found).__module__.startswith("transformers.models.")
    return found


def slow(model, layers):
    """The logits of a Llama in float64, one layer after the other, of which each has its own base and window."""
    m = copy.deepcopy(model).double()
    config, width = m.config, m.model.layers[0].self_attn.head_dim
    hidden, places = m.model.embed_tokens(IDS), torch.arange(IDS.shape[1])
    for layer, base, window in zip(m.model.layers, layers.bases, layers.windows, strict=True):
        x, at = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (p(x).unflatten(-1, (-1, width)).transpose(1, 2) for p in (at.q_proj, at.k_proj, at.v_proj))
        if base is not None:
            angles = places[:, None].double() * base ** -(torch.arange(0, width, 2).double() / width)
            angles = torch.cat([angles, angles], -1)
            half = lambda t: torch.cat([-t[..., width // 2 :], t[..., : width // 2]], -1)  # noqa: E731
            q, k = (t * angles.cos() + half(t) * angles.sin() for t in (q, k))
        if layers.temperature is not None:
            scale = 1 + layers.temperature.slope * (1 + places // layers.temperature.step).double().log()
            q = q * scale[:, None]
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        back = places[:, None] - places
        unseen = (back < 0) | (back >= (window or len(places)))
        weights = (q @ k.transpose(-1, -2) * width**-0.5).masked_fill(unseen, -torch.inf).softmax(-1)
        hidden = hidden + at.o_proj((weights @ v).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return m.lm_head(m.model.norm(hidden))


@pytest.mark.parametrize("home", KNOWN)
def test_what_a_home_says_is_what_it_does(home, tmp_path):
    model, row = made("llama"), next(row for row in HOMES if row.model_type == home)
    if home in ("qwen2", "qwen3"):
        pytest.skip("these hold models of their own type only, see below")
    plain = current(model)
    wanted = [plain]
    variants = (
        plain.rotated(None, [0, 2]),
        plain.rotated(None),
        plain.rotated(300.0, [1, 3]),
        Layers(plain.bases, (8,) * 4),
        Layers(plain.bases, (None, 8, 8, None)),
        Layers(plain.bases, plain.windows, Temperature(0.3, 8)),
    )
    wanted += [layers for layers in variants if not isinstance(row.fields(model.config, layers), str)]
    assert len(wanted) > 1
    for layers in wanted:
        moved = copy.deepcopy(model)
        before, as_it_was = logits(moved), state(moved)
        write = find(moved, layers, home).edit.run(moved)
        assert moved.config.model_type == home
        assert current(moved) == layers
        found, right = logits(moved), slow(model, layers)
        assert (found - right).abs().max() < 2e-5 * right.abs().max()
        assert torch.equal(logits(reloaded(moved, tmp_path / str(len(list(tmp_path.iterdir()))))), found)
        write.undo()
        assert state(moved) == as_it_was
        assert torch.equal(logits(moved), before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_no_position_leaves_as_a_stock_checkpoint(name, layers, tmp_path):
    model = made(name)
    before, as_it_was = logits(model), state(model)
    report = ap.apply(model, ap.NoPosition(layers=layers))
    assert report.stock
    assert model.config.model_type == "smollm3"
    after = logits(model)
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again), after)
    assert current(again).bases.count(None) == (4 if layers is None else 2)
    if layers is None and name != "llama, yarn":  # whose factor on cos and sin goes with the rotation
        other = made(name)
        ap.apply(other, ap.NoPosition(home=None))
        assert (logits(other) - after).abs().max() < 1e-5 * after.abs().max()
    report.revert()
    assert state(model) == as_it_was
    assert torch.equal(logits(model), before)


def test_generation_with_a_cache_and_training_go_on(tmp_path):
    model = made("llama")
    ap.apply(model, ap.NoPosition(layers=[0, 3]))
    tokens = model.generate(IDS[:, :9], max_new_tokens=8, do_sample=False, pad_token_id=0)
    again = reloaded(model, tmp_path).generate(IDS[:, :9], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, again)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = model.train()(IDS, labels=IDS).loss
    first.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert model(IDS, labels=IDS).loss < first


def test_other_patches_build_on_a_home(tmp_path):
    model = made("llama")
    ap.apply(model, ap.NoPosition(), ap.GroupedQuery(num_kv_heads=1, method="mean"))
    assert torch.equal(logits(reloaded(model, tmp_path / "stock")), logits(model))
    with pytest.raises(ap.UnsupportedArchitecture, match="rope scaling needs a rotary module"):
        ap.apply(model, ap.RopeScaling(kind="yarn", factor=2.0))
    report = ap.apply(model, ap.Rotary(theta=500.0))
    assert set(current(model).bases) == {500.0}
    assert report.stock
    model = made("llama")
    ap.apply(model, ap.NoPosition())
    ap.apply(model, ap.Alibi())  # a type of this package, of the home's family
    model.save_pretrained(tmp_path / "alibi")
    assert torch.equal(logits(ap.load(tmp_path / "alibi")), logits(model))


def test_heads_that_share_a_name_are_one_parameter_still():
    model = made("llama, tied, wide heads")
    ap.apply(model, ap.NoPosition())
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (lambda: ap.NoPosition(layers=[4]), "4 is not there; this model has layers 0 to 3"),
        (lambda: ap.NoPosition(layers=[]), "give a list of layer numbers"),
        (lambda: ap.NoPosition(layers=[1, 1]), "names one twice"),
        (lambda: ap.NoPosition(layers=[True]), "give a list of layer numbers"),
        (lambda: ap.NoPosition(home="gpt5"), "choose from: auto, "),
        (lambda: ap.NoPosition(home="cwm"), "cwm rotates in every layer"),
        (lambda: ap.NoPosition(layers=[0], home=None), "home='auto'"),
        (lambda: ap.Rotary(theta=500.0, layers=[0], home="smollm3"), "smollm3 has one rotary base for all layers"),
        (lambda: ap.Rotary(theta=500.0, layers=[0], kind="yarn", factor=2.0), "leave kind and layer_types out"),
        (lambda: ap.Rotary(theta=500.0, layers=[9]), "9 is not there"),
    ],
)
def test_what_cannot_be_said_is_refused(patch, said):
    model = made("llama")
    as_it_was = state(model)
    with pytest.raises(ap.AttnPatchError, match=said):
        ap.apply(model, patch())
    assert state(model) == as_it_was


def test_a_family_without_a_home_says_what_each_home_lacks():
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZE, head_dim=16)).eval()
    with pytest.raises(ap.UnsupportedArchitecture, match="smollm3 has no place for .*k_norm.weight"):
        ap.apply(model, ap.NoPosition(layers=[0]))
    report = ap.apply(model, ap.NoPosition())
    assert not report.stock
    assert "no stock type holds the result" in str(report)


@pytest.mark.parametrize("patch", [ap.NoPosition(), ap.ScoreTemperature(slope=0.1, step=32)], ids=lambda p: p.name)
def test_revert_puts_back_every_object_in_its_place(patch):
    """The class, every container with its order, every byte; what the user has set meanwhile stays."""
    model = made("llama")
    ap.apply(copy.deepcopy(model), patch)  # the first time learns what later ones know
    before = Standing(model)
    report = ap.apply(model, patch)
    assert type(model) is not before.classes[0][2], "the model has moved to a home"
    report.revert()
    assert before.difference() is None
    report = ap.apply(model, patch)
    model.config.of_the_user = 3
    report.revert()
    assert list(vars(model.config))[-1] == "of_the_user"
    assert model.config.of_the_user == 3
    del model.config.of_the_user
    assert before.difference() is None


def test_a_hook_of_the_users_is_not_lost():
    model = made("llama")
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ap.AttnPatchError, match="carries the hook"):
        ap.apply(model, ap.NoPosition())


def test_the_oracle_rotates_as_the_model_does():
    model = made("llama")
    assert (slow(model, current(model)) - logits(model)).abs().max() < 1e-5 * logits(model).abs().max()


UNREAD = {
    "sliding_window": 16,
    "no_rope_layers": [1, 0, 1, 0],
    "layer_types": ["sliding_attention"] * 4,
    "layer_rope_theta": [1.0, 2.0, 3.0, 4.0],
}


@pytest.mark.parametrize(
    "patch",
    [ap.NoPosition(layers=[1]), ap.Rotary(theta=300.0, layers=[1]), ap.ScoreTemperature(slope=0.3, step=8)],
    ids=lambda patch: patch.name,
)
def test_fields_that_a_family_does_not_read_say_nothing(patch):
    """As in checkpoints that were converted from another type; a window shows on long texts alone."""
    plain, model = made("llama"), made("llama", **UNREAD)
    assert torch.equal(logits(model), logits(plain))
    for each in (plain, model):
        ap.apply(each, patch)
    assert type(model) is type(plain)
    assert torch.equal(logits(model), logits(plain))


def test_a_memory_is_not_cut_by_a_window_that_the_family_does_not_read():
    """Oracle: with a memory of all that went before, the model is what it was."""
    model = made("llama", sliding_window=16, alibi=True)
    before = logits(model)
    ap.apply(model, ap.SegmentRecurrence(segment_length=8, memory_length=64, num_sinks=0))
    assert (logits(model) - before).abs().max() < 2e-5 * before.abs().max()
    assert not ap.describe(model).alibi


def test_what_shows_on_long_texts_only_is_proved(monkeypatch):
    """A family that declares a window and does not look at it; the probe has ten tokens, the window sixteen."""
    monkeypatch.setattr(transformers.models.mistral.modeling_mistral, "create_sliding_window_causal_mask",
                        transformers.models.mistral.modeling_mistral.create_causal_mask)  # fmt: skip
    model = made("mistral, windows", sliding_window=16)
    with pytest.raises(
        ap.UnsupportedArchitecture, match="smollm3 computes other logits .*where sliding_window would be"
    ):
        ap.apply(model, ap.NoPosition(layers=[1]))


def test_a_temperature_that_is_written_and_not_read_is_not_there_already():
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = made("llama", rope_parameters={**rope, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 64})
    with pytest.raises(ap.UnsupportedArchitecture, match="ministral3 computes other logits"):
        ap.apply(model, ap.ScoreTemperature(slope=0.5, step=64))
    report = ap.apply(made("llama"), ap.ScoreTemperature(slope=0.5, step=64))
    assert report.changed


class Faked(torch.nn.Linear):
    """As torchao's QAT makes them."""


def as_in_qat(model):
    model.model.layers[0].mlp.up_proj.__class__ = Faked


def with_a_forward(model):
    layer = model.model.layers[1].mlp
    layer.forward = type(layer).forward.__get__(layer)


def with_other_frequencies(model):
    model.model.rotary_emb.inv_freq /= 4


@pytest.mark.parametrize("change", [as_in_qat, with_a_forward, with_other_frequencies])
@pytest.mark.parametrize("patch", [ap.NoPosition(layers=[1]), ap.Rotary(theta=300.0, layers=[1])], ids=lambda p: p.name)
def test_what_the_config_does_not_make_is_not_lost(change, patch):
    """Also where the home runs eagerly and its logits are not the model's own bit for bit."""
    model = made("llama")
    change(model)
    before, as_it_was = logits(model), state(model)
    with pytest.raises(ap.UnsupportedArchitecture, match="patch the model as it was loaded"):
        ap.apply(model, patch)
    assert state(model) == as_it_was
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("dropped", "stock"), [(0.0, True), (0.5, False)])
def test_what_is_dropped_in_training_is_kept(dropped, stock):
    torch.manual_seed(0)
    config = transformers.SeedOssConfig(
        **{**SIZE, "head_dim": 16}, attention_bias=False, attention_dropout=0.0, residual_dropout=dropped
    )
    report = ap.apply(transformers.SeedOssForCausalLM(config).eval(), ap.NoPosition())
    assert report.stock is stock
    assert stock or "in training" in str(report)


def test_patches_of_one_call_and_of_two_come_off_again():
    model = made("llama")
    before, as_it_was = logits(model), state(model)
    shared = ap.GroupedQuery(num_kv_heads=1, method="mean")
    ap.apply(model, ap.NoPosition(layers=[1]), shared).revert()
    assert state(model) == as_it_was
    first, second = ap.apply(model, ap.NoPosition(layers=[1])), ap.apply(model, shared)
    with pytest.raises(ap.PatchConflict, match="revert the later patch"):
        first.revert()
    second.revert()
    first.revert()
    assert state(model) == as_it_was
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("value", ["x", [1], float("inf"), 10**400])
def test_what_a_stranger_wrote_for_a_temperature_is_no_traceback(value):
    model = made("llama")
    model.config.rope_parameters |= {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": value}
    assert ap.describe(model).positions == "rotary"
    with pytest.raises(ap.UnsupportedArchitecture, match="is no number"):
        ap.apply(model, ap.ScoreTemperature(slope=0.5, step=64))


def test_revert_does_not_throw_away_what_was_put_on_since():
    peft = pytest.importorskip("peft")
    model = made("llama")
    before = logits(model)
    report = ap.apply(model, ap.NoPosition(layers=[1]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ap.PatchConflict, match="take off what was put on since"):
        report.revert()
    assert sum("lora" in name for name, _ in adapted.named_parameters()) == 8
    adapted.unload()
    report.revert()
    assert torch.equal(logits(model), before)
    report = ap.apply(model, ap.NoPosition(layers=[1]))
    model.resize_token_embeddings(101, mean_resizing=False)
    with pytest.raises(ap.PatchConflict, match="take off what was put on since"):
        report.revert()
    assert logits(model).shape[-1] == 101


def test_layers_that_a_list_of_the_config_tells_apart_are_of_several_kinds():
    """Their modules are alike: the model turns by ``layer_rope_theta``, so that the first layer stands for no other."""
    model = made("llama")
    sites = [f"model.layers.{n}.self_attn" for n in range(4)]
    assert few.one_of_each(model, sites).count == 1
    report = ap.apply(model, ap.Rotary(theta=300.0, layers=[1]))
    assert few.one_of_each(model, sites).count == 2
    assert "in the first 2 of its layers" in report.checks["cached decoding"]
