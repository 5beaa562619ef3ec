"""Calibration text: what is measured on it, against plain loops; its forms, its masks, its errors."""

import dataclasses
import itertools
import json

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot
from tolerances import ROUNDING

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.errors import CalibrationError
from hf_attnpatch.heads import calibration, calibration_text, repair
from hf_attnpatch.heads.estimate import PROBE, estimate, find_frames
from hf_attnpatch.probe import default_inputs, largest_difference, quiet, trace


def tokens(rows=6, length=48, seed=0):
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def patch(text, method="calibrated", **more):
    return ap.GroupedQuery(num_kv_heads=2, method=method, calibration=text, **{"refine_steps": 4, **more})


def logits(model):
    return trace(model, default_inputs(model)).logits


def moments(model, text, tokenizer=None):
    """What a conversion would measure, module by module."""
    sites = [s for s in ap.describe(model).sites if not s.cross]
    with quiet(model):
        return list(
            estimate(model, sites, calibration_text.batches(text, tokenizer, model), find_frames(model, sites)).values()
        )


def assert_same_moments(found, wanted):
    for one, two in zip(found, wanted, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(two, field.name)
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.abs().max()), msg=field.name)
            else:
                assert a == b, field.name


# what is measured


@pytest.mark.parametrize("kv", [4, 2])
def test_moments_against_loops(kv):
    """Keys and queries from the weights, attended values from the eager attention weights, token by token."""
    model = tiny_model("llama", num_key_value_heads=kv, attn_implementation="eager")
    ids = tokens(3, 40)
    inputs = []
    layer = model.model.layers[1]
    handle = layer.input_layernorm.register_forward_hook(lambda _, args, output: inputs.append(output))
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions[1].double()
    handle.remove()
    hidden = inputs[0].detach().double()
    query, key, value = (
        (hidden @ getattr(layer.self_attn, name).weight.detach().double().t()).unflatten(-1, (-1, 16))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    found = moments(model, ids)[1]
    count = ids.numel()
    assert found.tokens == count
    torch.testing.assert_close(found.mean, key.mean((0, 1)), rtol=1e-4, atol=1e-6)
    for i, j in itertools.product(range(kv), repeat=2):
        wanted = sum(torch.outer(key[b, t, i], key[b, t, j]) for b in range(3) for t in range(40)) / count
        torch.testing.assert_close(found.key[i, :, j], wanted, rtol=1e-4, atol=1e-5)
    for h in range(4):
        wanted = query[:, :, h].flatten(0, 1)
        torch.testing.assert_close(found.query[h], wanted.t() @ wanted / count, rtol=1e-4, atol=1e-5)
    total = torch.zeros(kv * 16, kv * 16, dtype=torch.float64)
    for b, h, t in itertools.product(range(3), range(4), range(40)):
        y = torch.cat([attention[b, h, t] @ value[b, :, g] for g in range(kv)])
        total += torch.outer(y, y)
    torch.testing.assert_close(found.value, total / (4 * count), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side, kernel):
    """Three texts of different lengths in one batch, the padding full of a token that would be seen."""
    model = tiny_model("llama", attn_implementation=kernel)
    texts = [tokens(1, n, seed=n)[0] for n in (48, 31, 40)]
    assert_same_moments(moments(model, [padded(texts, side)]), moments(model, texts))


def padded(texts, side, positions=False):
    longest = max(map(len, texts))
    ids, mask = torch.full((len(texts), longest), 7), torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        part = slice(longest - len(text), longest) if side == "left" else slice(0, len(text))
        ids[row, part], mask[row, part] = text, 1
    more = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if positions else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_a_dictionary_are_used(side):
    """Learned positions: with left padding a text is the same only where its positions are said."""
    model = tiny_model("gpt2")
    texts = [tokens(1, n, seed=n)[0] for n in (48, 31, 40)]
    assert_same_moments(moments(model, [padded(texts, side, positions=True)]), moments(model, texts))


def test_padding_of_an_encoder_counts_for_nothing():
    model = tiny_model("bert", encoder=True)
    texts = [tokens(1, n, seed=n)[0] for n in (48, 31, 40)]
    assert_same_moments(moments(model, [padded(texts, "right")]), moments(model, texts))


def test_encoder_and_decoder_have_padding_of_their_own():
    model = tiny_model("bart", encoder=True)
    sources = [tokens(1, n, seed=n)[0] for n in (48, 31, 40)]
    targets = [tokens(1, n, seed=n)[0] for n in (20, 48, 33)]
    source, target = padded(sources, "right"), padded(targets, "right")
    together = {**source, **{f"decoder_{name}": tensor for name, tensor in target.items()}}
    alone = [{"input_ids": a[None], "decoder_input_ids": b[None]} for a, b in zip(sources, targets, strict=True)]
    assert_same_moments(moments(model, [together]), moments(model, alone))


@pytest.mark.parametrize("method", ["calibrated", "refined"])
def test_a_row_of_nothing_but_padding_is_harmless(method):
    batch = padded([tokens(1, n, seed=n)[0] for n in (48, 31, 40, 48)], "left")
    batch["attention_mask"][1] = 0
    model = tiny_model("llama")
    report = ap.apply(model, patch([batch, *tokens(3)], method))
    assert logits(model).isfinite().all()
    assert all(0 <= gap.output < 10 for layer in report.damage.layers for gap in layer.gaps.values())


# forms


@pytest.mark.parametrize(
    "text",
    [
        tokens(),
        list(tokens()),
        tuple(tokens()),
        [tokens()[:2], tokens()[2:]],
        [{"input_ids": tokens()}],
        [{"input_ids": row[None], "attention_mask": torch.ones(1, 48), "labels": row[None]} for row in tokens()],
        [{"input_ids": row[None], "attention_mask": torch.ones(1, 48, dtype=torch.bool)} for row in tokens()],
        [tokens()[0], {"input_ids": tokens()[1:]}],
        tokens().to(torch.int32),
    ],
    ids=["tensor", "rows", "tuple", "tensors", "dict", "dicts", "bool masks", "mixed", "int32"],
)
def test_forms_of_the_same_text(text):
    model = tiny_model("llama")
    assert_same_moments(moments(model, text), moments(model, tokens()))


def test_an_iterable_is_read_once():
    found = tiny_model("llama"), tiny_model("llama")
    ap.apply(found[0], patch(iter([{"input_ids": row[None]} for row in tokens()])))
    ap.apply(found[1], patch([{"input_ids": row[None]} for row in tokens()]))
    assert torch.equal(logits(found[0]), logits(found[1]))


def test_a_loader_of_torch_is_an_iterable_of_dictionaries():
    rows = [{"input_ids": row} for row in tokens()]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    assert_same_moments(moments(tiny_model("llama"), loader), moments(tiny_model("llama"), tokens()))


def test_strings_with_their_tokenizer_are_their_tokens():
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    texts = [text[:3000] for text in embedded.heldout("docs")[:2]]
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    windows = [row[start : start + 512] for row in ids for start in range(0, len(row), 512)]
    assert max(map(len, windows)) == 512
    assert len(windows) > 2
    assert_same_moments(moments(model, texts, tokenizer), moments(model, windows))


# errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "calibration is empty"),
        (torch.zeros(0, 8, dtype=torch.int64), "calibration is empty"),
        (["a text"], "holds strings; pass tokenizer="),
        ("a text", "calibration is a str; pass token ids"),
        (7, "calibration is a int; pass token ids"),
        ([7], "calibration holds a int; its items are strings, token tensors or dictionaries"),
        ([[5, 6, 7]], "calibration holds a list"),
        ([{"attention_mask": torch.ones(1, 4)}], "dictionaries with a tensor input_ids"),
        (torch.full((8, 48), 128), "token ids from 128 to 128, the vocabulary has 128"),
        (torch.full((8, 48), -1), "token ids from -1 to -1, the vocabulary has 128"),
        (torch.ones(8, 48), r"input_ids are torch.float32 \(8, 48\); wanted int64"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"\(2, 3, 4\); wanted"),
        (tokens(1, 127)[:, :127], "calibration has 127 tokens; output projections of 64 inputs .* takes 128"),
        ([padded([tokens(1, 60)[0], tokens(1, 60)[0][:50]], "left")], "calibration has 110 tokens"),
    ],
)
@pytest.mark.parametrize("method", ["calibrated", "refined", "mean"])
def test_text_that_is_none(text, message, method):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match=message):
        ap.apply(model, patch(text, method))
    assert snapshot(model) == before


def test_too_little_is_a_calibration_error():
    with pytest.raises(CalibrationError, match="pass more text, or fallback='principal'"):
        ap.apply(tiny_model("llama"), patch(tokens(1, 20)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "calibrated"}, "method 'calibrated' needs text; pass calibration="),
        ({"method": "refined"}, "method 'refined' needs text"),
    ],
)
def test_methods_that_need_text_say_so(settings, message):
    model = tiny_model("llama")
    with pytest.raises(ap.AttnPatchError, match=message):
        ap.patch_grouped_query(model, num_kv_heads=2, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grouping": "random"}, "grouping 'random' does not exist; choose from: adjacent, similar"),
        ({"grouping": 1}, "grouping 1 does not exist"),
        ({"fallback": "refined"}, "fallback 'refined' does not exist; choose from: first, mean"),
        ({"method": "svd"}, "method 'svd' does not exist; choose from: first, .*, refined"),
        ({"refine_steps": 0}, "refine_steps is 0; it must be a whole number, at least 1"),
        ({"refine_steps": 1.5}, "refine_steps is 1.5"),
        ({"refine_seconds": 0}, "refine_seconds is 0; it must be a positive number"),
        ({"refine_seconds": -1.0}, "refine_seconds is -1.0"),
        ({"refine_seconds": "1"}, "refine_seconds is '1'"),
        ({"refine_seconds": float("nan")}, "refine_seconds is nan"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(ap.AttnPatchError, match=message):
        ap.GroupedQuery(num_kv_heads=2, **settings)


def overflowing(length=PROBE[1]):
    """A model whose positions beyond the probe's are not finite, as fp16 gives where it overflows."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[length:] = float("inf")
    return model


@pytest.mark.parametrize("method", ["mean", "procrustes", "calibrated", "refined"])
def test_activations_that_are_not_finite_are_an_error(method):
    model = overflowing()
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"transformer\.h\.0\.attn: activations .* are not finite"):
        ap.apply(model, patch(tokens(4, 100), method))
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ["principal", "calibrated"])
def test_weights_that_are_not_finite_are_an_error_of_ours(method):
    """With and without a fallback, for a fallback cannot mend them."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 3] = float("nan")
    text = tokens() if method == "calibrated" else None
    for fallback in (None, "principal"):
        before = snapshot(model)
        with pytest.raises(ap.AttnPatchError, match="finite"):
            ap.apply(model, patch(text, method, fallback=fallback))
        after = snapshot(model)
        assert {k: after[k] for k in ("modules", "config", "attributes")} == {
            k: before[k] for k in ("modules", "config", "attributes")
        }


@pytest.mark.parametrize("fallback", ["first", "mean", "mean_rescaled", "procrustes", "principal"])
@pytest.mark.parametrize("reason", ["calibration has 20 tokens", "are not finite"])
def test_the_fallback_that_was_asked_for_is_taken_and_said(fallback, reason):
    few = "tokens" in reason
    model, plain = (tiny_model("gpt2") if few else overflowing() for _ in range(2))
    report = ap.apply(model, patch(tokens(1, 20) if few else tokens(4, 100), "refined", fallback=fallback))
    ap.apply(plain, patch(None, fallback))
    difference = largest_difference(logits(plain), logits(model))  # one path computes in fp32, the other in fp64
    assert difference <= ROUNDING[torch.float32]
    assert report.damage.method == fallback
    assert report.damage.stages == ()
    text = " ".join(str(report).split())
    assert f"fallback to {fallback}: " in text
    assert reason in text
    assert f"fallback to {fallback}" in json.dumps(report.damage.to_dict())
    assert report.record["patches"][0]["method"] == fallback, "the checkpoint says what was done"


def test_a_fallback_is_not_taken_without_need():
    report = ap.apply(tiny_model("llama"), patch(tokens(), fallback="mean"))
    assert report.damage.method == "calibrated"
    assert report.record["patches"][0]["method"] == "calibrated"


def test_wrong_arguments_are_no_reason_to_fall_back():
    for text in ([], ["a text"], torch.full((8, 48), 128)):
        with pytest.raises(ap.AttnPatchError) as caught:
            ap.apply(tiny_model("llama"), patch(text, fallback="mean"))
        assert not isinstance(caught.value, CalibrationError)


# passes


@pytest.mark.parametrize("method", ["calibrated", "refined", "procrustes"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_one_module_at_a_time_gives_the_same_bits(model_type, method, monkeypatch):
    def convert():
        model, forwards = tiny_model(model_type, num_hidden_layers=4), []
        base = model.base_model.register_forward_hook(lambda *_: forwards.append(1))
        ap.apply(model, patch(tokens(), method))
        base.remove()
        return model.state_dict(), len(forwards)

    together, few = convert()
    monkeypatch.setattr(calibration, "MEMORY", 1)
    alone, many = convert()
    assert many > few + 2
    assert all(torch.equal(alone[name], tensor) for name, tensor in together.items())


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_small_batches_measure_what_large_ones_do(model_type, monkeypatch):
    model = tiny_model(model_type, encoder=model_type == "bert")
    wanted = moments(model, tokens())
    monkeypatch.setattr(calibration_text, "ROOM", 1)
    assert_same_moments(moments(model, tokens()), wanted)


def test_damage_is_measured_on_text_that_no_step_sees(monkeypatch):
    """However little text there is, as long as there are two rows."""
    seen = {"steps": [], "held": []}
    refine, gap = repair.refine, repair.gap

    def rows(target):
        hidden = (target.call.args or tuple(target.call.kwargs.values()))[0]
        return {tuple(row.flatten().tolist()) for row in hidden}

    def watched_refine(socket, start, targets, **more):
        seen["steps"] += [rows(t) for t in targets]
        return refine(socket, start, targets, **more)

    def watched_gap(socket, weights, wanted):
        seen["held"].append(rows(wanted))
        return gap(socket, weights, wanted)

    monkeypatch.setattr(repair, "refine", watched_refine)
    monkeypatch.setattr(repair, "gap", watched_gap)
    for text in (tokens(6, 48), tokens(40, 64), [*tokens(3, 64), tokens(1, 20)[0]]):
        seen["steps"].clear()
        seen["held"].clear()
        ap.apply(tiny_model("llama"), patch(text, "refined"))
        assert seen["steps"]
        assert not set.union(*seen["held"]) & set.union(*seen["steps"])


def test_more_text_is_never_needed_than_is_there():
    """A conversion on exactly as many tokens as are asked for at least."""
    model = tiny_model("llama")
    ap.apply(model, patch(tokens(2, 64), "refined"))
    assert logits(model).isfinite().all()
    assert largest_difference(logits(tiny_model("llama")), logits(model)) > 0
