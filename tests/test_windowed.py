"""Windows: what a layer sees, which layers lose least, sinks for first tokens, caches that shrink, refusals."""

import copy

import pytest
import torch
import transformers
from architectures import tiny_model
from test_homes import made, reloaded, slow, state
from transformers import DynamicCache

import hf_attnpatch as ap
from hf_attnpatch.evaluation.memory import held_bytes
from hf_attnpatch.functional import sinking
from hf_attnpatch.homes.fitting import current
from hf_attnpatch.windows import choice, sinks

WINDOW = 8
TEXT = torch.randint(3, 97, (4, 40), generator=torch.Generator().manual_seed(1))


def logits(model, ids=TEXT, **more):
    with torch.no_grad():
        return model(ids, use_cache=False, **more).logits


@pytest.mark.parametrize("home", ["auto", "cwm", "smollm3", "ministral", "granite_swa"])
@pytest.mark.parametrize("layers", [None, [1, 2]], ids=str)
def test_layers_see_a_window_and_no_more(home, layers, tmp_path):
    model = made("llama")
    before, exact = state(model), copy.deepcopy(model)
    wanted = slow(exact, current(model).windowed(WINDOW, layers))
    report = ap.patch_windowed(model, window=WINDOW, layers=layers, home=home)
    assert report.stock
    assert (logits(model, ids_of(wanted)) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert torch.equal(logits(reloaded(model, tmp_path), ids_of(wanted)), logits(model, ids_of(wanted)))
    report.revert()
    assert state(model) == before


def ids_of(_):
    from test_homes import IDS

    return IDS


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gpt_oss"])
def test_a_type_that_has_windows_stays_what_it_is(model_type):
    model = tiny_model(model_type, layer_types=["full_attention"] * 2, num_hidden_layers=2)
    cls, full = type(model), logits(model)
    report = ap.patch_windowed(model, window=WINDOW, layers=[0])
    assert type(model) is cls
    assert report.stock
    assert not torch.allclose(logits(model), full, atol=1e-3)
    early = slice(0, WINDOW)
    assert torch.allclose(logits(model)[:, early], full[:, early], atol=1e-5)
    report.revert()
    assert torch.equal(logits(model), full)


def test_a_cache_keeps_the_window_and_no_more():
    """Bytes after 40 tokens and one more: full layers hold all, others their window."""
    model = made("llama")
    site = ap.describe(model).sites[0]
    token = 4 * site.num_kv_heads * (site.head_dim + site.v_head_dim) * len(TEXT)
    ap.patch_windowed(model, window=WINDOW, layers=[0, 2, 3])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(TEXT, cache=cache) if "cache" in _arguments(model) else model(TEXT, past_key_values=cache)
        out = model(TEXT[:, :1], **{name: cache for name in _arguments(model) & {"cache", "past_key_values"}})
    assert out.logits.isfinite().all()
    assert held_bytes(cache) <= token * (41 + 3 * WINDOW)
    assert held_bytes(cache) >= token * (41 + 3 * (WINDOW - 1))


def _arguments(model):
    import inspect

    return {*inspect.signature(type(model).forward).parameters} & {"cache"} or {"past_key_values"}


def test_the_cost_of_a_layer_is_the_divergence_with_a_window_there():
    """One forward for each layer, of the whole model, through a stock type with windows."""
    model = made("llama")
    paths = ap.describe(model).attending
    found = choice.costs(model, paths, WINDOW, list(TEXT))
    plain = logits(model).double().log_softmax(-1)[:, WINDOW:]
    for n, cost in enumerate(found):
        with ap.patched(model, ap.Windowed(window=WINDOW, layers=[n], home="cwm")):
            other = logits(model).double().log_softmax(-1)[:, WINDOW:]
        assert cost == pytest.approx(float((plain.exp() * (plain - other)).sum(-1).mean()), rel=1e-3)
    assert torch.equal(logits(model).double().log_softmax(-1)[:, WINDOW:], plain)


@pytest.mark.parametrize(("target", "count"), [(0.99, 1), (0.53125, 2), (0.5, 3), (0.07, 4)])
def test_as_few_layers_as_the_budget_takes_and_the_cheapest(target, count):
    costs = [0.3, 0.1, 0.4, 0.2]
    found = choice.chosen(costs, 8, 128, target)
    assert found == tuple(sorted(sorted(range(4), key=costs.__getitem__)[:count]))
    assert 1 - count / 4 * (1 - 8 / 128) <= target
    assert count == 1 or 1 - (count - 1) / 4 * (1 - 8 / 128) > target


def test_the_closed_form_takes_the_weight_of_the_first_tokens():
    window, first = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sinks.closed_form(window + 4, first + torch.tensor([[0.0], [5.0], [9.0]]))
    taken = torch.sigmoid(found.double()[:, None] - window - 4).mean(1)
    wanted = torch.sigmoid(first + torch.tensor([[0.0], [5.0], [9.0]]) - window - 4).mean(1)
    assert torch.allclose(taken, wanted, atol=1e-6)


def test_first_tokens_of_the_same_score_everywhere_are_stood_for_exactly():
    """Where a first token has no value and every query gives it one score, the sink is that score."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    query[..., 0], key[..., 0], key[:, :, 0] = 3.0, 0.0, 0.0
    key[:, :, 0, 0], value[:, :, 0] = 8.0, 0.0  # a score of 6 with a scale of 1 / 4
    log = sinking.logs(query, key, value, sinking.bands(40, WINDOW, query.device), 0.25)[..., WINDOW:]
    found = sinks.closed_form(log[0].double(), torch.full_like(log[0], 6.0).double())
    assert torch.allclose(found, torch.full((2,), 6.0), atol=1e-4)
    at = torch.arange(40)
    gap = at[:, None] - at
    seen = (gap >= 0) & ((gap < WINDOW) | (at < 1))
    kept = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.25)
    out = sinking.attend(query, key, value, found, sinking.bands(40, WINDOW, query.device), 0.25)
    assert torch.allclose(out[:, :, WINDOW:], kept[:, :, WINDOW:], atol=1e-4)


def test_text_gives_sinks_to_the_layers_with_a_window_and_shuts_the_others():
    model = made("llama")
    report = ap.patch_windowed(model, window=WINDOW, layers="auto", cache_target=0.55, calibration=TEXT, first_tokens=2)
    found = report.findings["windowed"]
    assert model.config.model_type == "granite_swa"
    assert len(found.costs) == 4
    assert list(found.layers) == sorted(sorted(range(4), key=found.costs.__getitem__)[:2])
    for n, layer in enumerate(model.model.layers):
        held = layer.self_attn.sinks
        assert bool((held == sinks.SHUT).all()) is (n not in found.layers)
    for gap in found.gaps.values():
        assert gap.refined <= gap.closed
    assert list(report.record["patches"][0]["layers"]) == list(found.layers)
    assert "KL of a window here" in str(found)


def test_the_closed_form_alone_without_steps():
    closed, refined = made("llama"), made("llama")
    text = torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(2))
    given = {"window": WINDOW, "layers": [2, 3], "calibration": text}
    ap.patch_windowed(closed, refine_steps=0, **given)
    report = ap.patch_windowed(refined, refine_steps=60, **given)
    one, other = (m.model.layers[3].self_attn.sinks.detach() for m in (closed, refined))
    model = made("llama")
    path = ap.describe(model).attending[3]
    assert torch.equal(one, sinks.find(model, [path], WINDOW, 4, list(text))[path])
    gap = report.findings["windowed"].gaps[3]
    assert gap.refined < gap.closed < gap.plain
    assert not torch.equal(one, other)


def test_no_text_or_no_home_with_sinks_gives_plain_windows():
    for given in ({}, {"calibration": TEXT, "home": "cwm"}, {"calibration": TEXT, "first_tokens": 0}):
        model = made("llama")
        ap.patch_windowed(model, window=WINDOW, layers=[1], **given)
        assert model.config.model_type != "granite_swa"


def test_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    model = made("llama")
    report = ap.patch_windowed(model, window=WINDOW, layers="auto", cache_target=0.55, calibration=TEXT, first_tokens=2)
    report.findings["windowed"].save_figure(tmp_path / "windows.png")
    assert (tmp_path / "windows.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"window": 0}, "window is 0; it must be a whole number, at least 1"),
        ({"window": 128}, "context 128 tokens; a window that is no shorter changes nothing"),
        ({"window": 8, "layers": [7]}, "layers: 7 is not there; this model has layers 0 to 3"),
        ({"window": 8, "layers": "some"}, "give layer numbers such as"),
        ({"window": 8, "layers": "auto"}, "belong together"),
        ({"window": 8, "cache_target": 0.5}, "belong together"),
        ({"window": 8, "layers": "auto", "cache_target": 0.5}, "needs text to choose by"),
        ({"window": 8, "layers": "auto", "cache_target": 2.0, "calibration": TEXT}, "a share between 0 and 1"),
        (
            {"window": 64, "layers": "auto", "cache_target": 0.3, "calibration": TEXT.repeat(1, 3)},
            "leave 0.5 of the cache",
        ),
        ({"window": 64, "layers": "auto", "cache_target": 0.9, "calibration": TEXT}, "rows of 128 tokens or more"),
        ({"window": 64, "calibration": TEXT}, "longest row has 40 tokens"),
        ({"window": 8, "home": "mistral", "layers": [1]}, "no stock type can say this"),
        ({"window": 8, "home": None}, "choose auto"),
        ({"window": 8, "home": "cow"}, "choose from"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_changed(given, said):
    model = made("llama")
    before = state(model)
    with pytest.raises(ap.AttnPatchError, match=said):
        ap.patch_windowed(model, **given)
    assert state(model) == before


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "gemma3_text", "cohere2", "olmo3"])
def test_families_without_a_home_are_refused(model_type):
    model = tiny_model(model_type)
    with pytest.raises(ap.UnsupportedArchitecture):
        ap.patch_windowed(model, window=4)


def test_it_is_saved_loaded_and_fused(tmp_path):
    """With sinks, as a stock checkpoint; a fused kernel computes the same."""
    model = made("llama")
    ap.patch_windowed(model, window=WINDOW, layers=[0, 2], calibration=TEXT, first_tokens=2)
    wanted = logits(model)
    other = reloaded(model, tmp_path)
    assert isinstance(other, transformers.GraniteSWAForCausalLM)
    assert torch.equal(logits(other), wanted)
    ap.patch_flash(model)
    assert (logits(model) - wanted).abs().max() < 1e-5 * wanted.abs().max()
