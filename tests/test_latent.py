"""Latent attention: nothing is lost where everything fits, stock transformers loads it, a budget is met exactly."""

import cmath

import pytest
import torch
import transformers
from test_homes import IDS, MODELS, logits, made, reloaded, state

import hf_attnpatch as ap
from hf_attnpatch.functional.gauge import rotary
from hf_attnpatch.functional.latent import (
    Seen,
    by_distance,
    choose_planes,
    components,
    mean_rotation,
    split,
    stock_factors,
)

TEXT = torch.randint(3, 97, (24, 48), generator=torch.Generator().manual_seed(0))
HELD = ("llama", "llama, tied, wide heads", "llama, yarn", "qwen2", "trunk", "classifier")
MULTI = {"num_key_value_heads": 4}


def ends(model, start=8, new=12):
    return model.generate(IDS[:1, :start], max_new_tokens=new, do_sample=False)


def largest(before, after):
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", HELD)
def test_nothing_is_lost_where_everything_fits(name, tmp_path):
    model = made(name)
    before, kept = logits(model), state(model)
    tokens = ends(model) if "Causal" in type(model).__name__ else None
    report = ap.patch_latent(model)
    assert report.stock
    assert model.config.model_type in ("youtu", "deepseek_v3")
    after = logits(model)
    assert largest(before, after) <= 1e-5
    if tokens is not None:
        assert torch.equal(ends(model), tokens)
    assert torch.equal(logits(reloaded(model, tmp_path / "out")), after)
    report.revert()
    assert torch.equal(logits(model), before)
    assert state(model) == kept


@pytest.mark.parametrize("home", ["youtu", "deepseek_v3"])
def test_multi_head_attention_in_either_home(home, tmp_path):
    model = made("llama", **MULTI, pad_token_id=None)
    before = logits(model)
    ap.patch_latent(model, home=home)
    assert model.config.model_type == home
    assert largest(before, logits(model)) <= 1e-5
    assert largest(before, logits(reloaded(model, tmp_path / "out"))) <= 1e-5


def test_positions_far_away_rotate_as_before():
    model = made("llama", max_position_embeddings=4096)
    far = torch.arange(4000, 4040)[None].expand(2, -1)
    before = logits(model, position_ids=far)
    ap.patch_latent(model)
    assert largest(before, logits(model, position_ids=far)) <= 1e-5


def test_bf16_loses_no_more_than_its_own_rounding():
    model = made("llama")
    exact = logits(model)
    model.to(torch.bfloat16)
    rounded = largest(exact, logits(model).float())
    report = ap.patch_latent(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "rounded once more" in str(report)
    assert largest(exact, logits(model).float()) <= 2 * rounded


def test_a_home_that_empties_the_padding_row_holds_no_model_that_uses_it():
    model = made("llama, tied, wide heads")  # youtu would load a zero in the place of row 0, and give logit 0 for it
    with pytest.raises(ap.UnsupportedArchitecture, match=r"embedding of the padding token \(0\) to zero"):
        ap.patch_latent(model, home="youtu")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    ap.patch_latent(model, home="youtu")


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("llama, biases", {}, "deepseek_v3 has no place for model.layers.0.mlp"),
        ("mistral, windows", {}, "no stock latent type has windows; load the model with sliding_window=None"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}},
            "a rope_type of default, linear, llama3 or yarn",
        ),
    ],
)
def test_what_no_latent_can_say_is_refused_with_what_works(name, more, words):
    model = made(name, **more)
    kept = state(model)
    with pytest.raises(ap.UnsupportedArchitecture, match=words):
        ap.patch_latent(model)
    assert state(model) == kept


def test_norms_of_keys_are_refused_with_the_reason():
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    with pytest.raises(ap.UnsupportedArchitecture, match=r"q/k norms.*no latent holds such keys.*patch_grouped_query"):
        ap.patch_latent(model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 8}, "rank and rope_dim belong together"),
        ({"rope_dim": 8}, "rope_dim needs rank, or a cache_target"),
        ({"rank": 8, "rope_dim": 7}, "choose 6 or 8"),
        ({"rank": 1, "rope_dim": 8}, "rank is 1; it must be a whole number, at least 2"),
        ({"cache_target": -1}, "must be a share of the present cache"),
        ({"cache_target": 0.5, "method": "mean"}, "choose from: principal, calibrated, refined"),
        ({"grade": "portable"}, "grade 'portable' does not exist; choose from: exact"),
        ({"home": "llama"}, "choose from: auto, youtu, deepseek_v3"),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.Latent(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cache_target": 0.01}, r"the smallest cache_target that is possible with rope_dim 2 is 0.0625\."),
        ({"cache_target": 0.25, "rope_dim": 16}, "possible with rope_dim 16 is 0.2812"),
        ({"rank": 90, "rope_dim": 16}, "more than there is: rank 33 and rope_dim 32 lose nothing"),
        ({"cache_target": 0.5, "method": "refined"}, "needs text; pass calibration="),
    ],
)
def test_a_budget_that_cannot_be_is_answered_by_the_nearest_that_can(fields, words):
    model = made("llama")
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.patch_latent(model, **fields)
    assert model.config.model_type == "llama"


def test_the_smallest_budget_works():
    model = made("llama")
    ap.patch_latent(model, cache_target=0.0625)
    assert (model.config.kv_lora_rank, model.config.qk_rope_head_dim) == (2, 2)


def test_a_budget_is_met_and_remembered(tmp_path):
    model = made("llama")
    report = ap.patch_latent(model, cache_target=0.5, calibration=TEXT, method="calibrated")
    config = model.config
    assert config.kv_lora_rank + config.qk_rope_head_dim == 32  # of 2 heads, 16 + 16 each
    kept = report.record["patches"][0]
    assert (kept["rank"], kept["rope_dim"]) == (config.kv_lora_rank, config.qk_rope_head_dim)
    assert kept["method"] == "calibrated"
    assert report.damage.stages == ("compressed", "refitted")
    assert f"rank {config.kv_lora_rank}, rotary {config.qk_rope_head_dim}" in str(report.damage)
    after = logits(model)
    assert torch.equal(logits(reloaded(model, tmp_path / "out")), after)
    report.revert()
    assert type(model) is transformers.LlamaForCausalLM


def test_the_more_room_the_less_damage_and_text_helps():
    model = made("llama")
    before = logits(model)

    def error(**fields):
        report = ap.patch_latent(model, **fields)
        found = float((logits(model) - before).square().mean())
        report.revert()
        return found, report.damage

    text = {"calibration": TEXT, "method": "calibrated"}
    (small, _), (large, damage), (free, _) = (
        error(rank=20, rope_dim=16, **text),
        error(rank=33, rope_dim=30, **text),
        error(rank=33, rope_dim=30),
    )
    assert large < small / 10
    assert large < free
    assert all(layer.gaps["refitted"].output < 0.01 for layer in damage.layers)
    assert torch.equal(logits(model), before)


def test_grouped_heads_become_a_latent_in_a_call_of_its_own():
    model = made("llama", **MULTI)
    with pytest.raises(ap.PatchConflict, match="apply them in separate calls"):
        ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method="mean"), ap.Latent())
    ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    ap.patch_latent(model)
    assert (model.config.kv_lora_rank, model.config.qk_rope_head_dim) == (33, 32)


def test_the_constant_that_serves_an_unrotated_key_best():
    mass = by_distance(torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]]).double())
    assert torch.allclose(mass, torch.tensor([[2.0, 0.8, 0.2]]).double())
    w = torch.tensor([0.0, 0.7]).double()
    rho = mean_rotation(mass, w)
    wanted = (2 + 0.8 * cmath.exp(-0.7j) + 0.2 * cmath.exp(-1.4j)) / 3
    assert abs(rho[0, 0] - 1) < 1e-12
    assert abs(rho[0, 1] - wanted) < 1e-6


def test_planes_are_chosen_by_what_all_layers_lose_together():
    first, second = torch.tensor([[5.0, 1.0], [0.5, 0.1]]), torch.tensor([[1.0, 0.0], [4.0, 0.2]])
    assert choose_planes([first, second], 2) == (1, 1)
    assert choose_planes([first, second], 3) == (2, 1)


def test_a_split_that_keeps_everything_gives_the_scores_and_values_back():
    torch.manual_seed(0)
    heads, queries, half, size = 2, 4, 3, 5
    dim, wide = 2 * half, 2 * heads * half + heads * size
    planes = rotary(dim, dim, interleaved=False).planes
    states = torch.randn(400, wide, dtype=torch.float64) @ torch.randn(wide, wide, dtype=torch.float64)
    cov, mean = torch.cov(states.t(), correction=0), states.mean(0)
    root = torch.randn(heads, size, size, dtype=torch.float64)
    rho = torch.rand(queries, half, dtype=torch.float64).to(torch.complex128)
    seen = Seen(cov, mean, torch.rand(queries, half).double() + 0.1, rho, root @ root.mT)
    found = components(seen, planes, heads)
    maps = split(seen, found, planes, (heads,) * half, heads * size, 0.2)
    q = torch.randn(queries, dim, dtype=torch.float64)
    key, value = states[:, : heads * dim].view(-1, heads, dim), states[:, heads * dim :].view(-1, heads, size)
    latent = (states - mean) @ maps.latent.t()
    owner = torch.arange(heads).repeat_interleave(queries // heads)
    score = torch.einsum("hra,ha,tr->th", maps.key_reader, q, states[:, : heads * dim] @ maps.key.t())
    assert torch.allclose(score, torch.einsum("ha,tha->th", q, key[:, owner]))
    again = torch.einsum("hvr,tr->thv", maps.up_value, latent) + maps.value
    assert torch.allclose(again, value[:, owner], atol=1e-6)
    assert maps.energy == pytest.approx((1, 1), abs=1e-6)


def test_the_table_of_frequencies_is_written_to_the_last_place():
    wanted = (10000.0 ** -(torch.arange(16).float() / 16)).repeat_interleave(8)
    factors = torch.tensor(stock_factors(wanted, 10000.0))
    made_ = 1.0 / (factors * 10000.0 ** (torch.arange(0, 256, 2).float() / 256))
    assert float(((made_ - wanted) / wanted).abs().max()) < 1.2e-7


def test_models_are_those_that_other_homes_are_tried_on():
    assert set(HELD) <= set(MODELS)
