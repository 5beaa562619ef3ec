"""What is put in the place of positions, alone: tables, sinusoids, hooks, and buffers that grow with a table."""

import math
import types

import pytest
import torch
from pretended_gpu import CUDA, PretendedGpu
from torch import nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from hf_attnpatch import AttnPatchError
from hf_attnpatch.attention.alibi import AlibiBias, NoBias, alibi_of, bias_left_out
from hf_attnpatch.attention.registry import Guard, Keeper
from hf_attnpatch.attention.wrapper import HELD, without, wrapped, wrappers_of
from hf_attnpatch.functional import alibi
from hf_attnpatch.modules.added import LearnedPositions, SinusoidalPositions
from hf_attnpatch.modules.still import NoPositions, ZeroAngles, turns_nothing
from hf_attnpatch.positions import lengthening
from hf_attnpatch.upstream.roles import roles_of

EMBEDDINGS = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


# -- added to embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "factor"), [(None, math.sqrt(8)), (1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("amplitude", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sinusoid_is_added_to_scaled_embeddings(scale, factor, amplitude, dtype):
    """Attention Is All You Need, 3.4 and 3.5: embeddings times the root of their width, and the sinusoid."""
    places = torch.tensor([[0, 5, 9]])
    found = SinusoidalPositions(100.0, amplitude, scale)(EMBEDDINGS.to(dtype), places)
    assert found.dtype == dtype
    for n, place in enumerate((0, 5, 9)):
        for i in range(8):
            angle = place / 100 ** (2 * (i // 2) / 8)
            wanted = factor * EMBEDDINGS[:, n, i] + amplitude * (math.cos(angle) if i % 2 else math.sin(angle))
            assert (found[:, n, i].float() - wanted).abs().max() < (1e-6 if dtype == torch.float32 else 5e-2)


def test_a_table_gives_its_rows_and_says_where_it_ends():
    table = LearnedPositions(torch.randn(5, 8))
    found = table(EMBEDDINGS, torch.tensor([[0, 4, 2]]))
    assert torch.equal(found, EMBEDDINGS + table.weight[[0, 4, 2]])
    assert table.weight.requires_grad
    with pytest.raises(AttnPatchError, match="position 5 is beyond the position table, which has 5 rows"):
        table(EMBEDDINGS, torch.tensor([[0, 5, 2]]))
    assert "length=5, width=8" in repr(table)


def test_on_a_gpu_only_the_length_is_looked_at():
    """Asking for the largest position would wait for everything before it."""
    with PretendedGpu():
        table = LearnedPositions(torch.randn(5, 8).to(CUDA))
        places = torch.tensor([[0, 4, 2]]).to(CUDA)
        places.max = None
        assert table(EMBEDDINGS.to(CUDA), places).device == CUDA
        with pytest.raises(AttnPatchError, match="the position table, which has 5 rows"):
            table(EMBEDDINGS.to(CUDA), torch.arange(6).to(CUDA)[None])
        assert table(torch.zeros(1, 5, 8).to(CUDA), torch.arange(5).to(CUDA)[None]).shape == (1, 5, 8)


def test_a_table_that_is_gone_adds_a_zero_of_any_kind():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        states = EMBEDDINGS.to(dtype)
        found = states + NoPositions()(torch.arange(900), past_key_values_length=3)
        assert found.dtype == dtype
        assert torch.equal(found, states)


# -- hooks ------------------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """A rotary module, for what it calls its arguments."""

    def forward(self, x, position_ids, layer_type=None):
        return x, position_ids, layer_type


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("named", [True, False])
def test_zero_angles_puts_every_token_at_the_start(dtype, named):
    rotary, states, places = Rotary(), torch.ones(1, 3), torch.arange(3).to(dtype)[None]
    rotary.register_forward_pre_hook(ZeroAngles(roles_of(rotary)), with_kwargs=True)
    found = rotary(states, position_ids=places, layer_type="full") if named else rotary(states, places, "full")
    assert found[0] is states
    assert torch.equal(found[1], torch.zeros(1, 3, dtype=dtype))
    assert found[2] == "full"
    assert torch.equal(places, torch.arange(3).to(dtype)[None])  # what a caller holds is as it was


def test_marks_are_found_where_they_stand():
    module = nn.Linear(2, 2)
    assert not turns_nothing(module)
    module.register_forward_pre_hook(lambda *_: None)
    assert not turns_nothing(module)
    module.register_forward_pre_hook(ZeroAngles(roles_of(module)), with_kwargs=True)
    assert turns_nothing(module)
    assert alibi_of(module) is None
    assert not bias_left_out(module)
    bias = AlibiBias(None, None, True, 1.0)
    setattr(module, HELD, wrapped(module, bias))
    assert alibi_of(module) is bias
    assert not bias_left_out(module)
    setattr(module, HELD, wrapped(module, NoBias()))  # in the place of the one of its name
    assert alibi_of(module) is None
    assert bias_left_out(module)
    assert repr(wrappers_of(module)) == "(no bias,)"
    assert without(module, "alibi") == ()


@pytest.mark.parametrize(
    ("held", "name", "stopped"), [(1, "paged", True), (1, "attnpatch_sdpa", False), (None, "paged", False)]
)
def test_a_guard_stops_what_would_drop_positions(held, name, stopped):
    config = types.SimpleNamespace(_attn_implementation=name)
    guard, module = Guard(config), nn.Identity()
    if held:
        setattr(module, HELD, (AlibiBias(None, None, True, 1.0),))
    if not stopped:
        assert guard(module, (), {}) is None
        return
    with pytest.raises(AttnPatchError, match=r"Identity: .*'paged' knows nothing of this model's alibi"):
        guard(module, (), {})


def test_a_kernel_of_transformers_is_kept_under_our_name_for_it():
    config = types.SimpleNamespace(_attn_implementation="flex_attention")
    Keeper([config])(nn.Identity(), (), {})
    assert config._attn_implementation == "attnpatch_flex_attention"
    Keeper([config])(nn.Identity(), (), {})
    assert config._attn_implementation == "attnpatch_flex_attention"


def test_slopes_are_the_papers_or_those_that_are_given():
    paper = AlibiBias(None, 7, True, 0.5).distance(4, torch.bfloat16)
    assert torch.equal(paper.slope, alibi.slopes(4) * 0.5)
    assert (paper.clip, paper.rounded) == (7, None)
    given = AlibiBias((0.3, 0.1), None, False, 1.0)
    found = given.distance(2, torch.bfloat16)
    assert found.slope.dtype == torch.float64
    assert found.slope.tolist() == [0.3, 0.1]
    assert (found.clip, found.rounded) == (None, torch.bfloat16)
    assert (repr(given), repr(AlibiBias(None, None, True, 1.0))) == ("2 given slopes", "the paper's slopes")


# -- tables that become longer ----------------------------------------------------------------------------------------


def test_rows_that_stand_for_no_position():
    assert lengthening.reserved(nn.Embedding(9, 4)) == 0
    assert lengthening.reserved(nn.Embedding(9, 4, padding_idx=1)) == 2  # RoBERTa counts from behind its padding
    assert lengthening.reserved(nn.Embedding(9, 4, padding_idx=0)) == 1
    opt = OPTLearnedPositionalEmbedding(9, 4)
    assert lengthening.reserved(opt) == opt.weight.shape[0] - 9 == 2


@pytest.mark.parametrize("offset", [0, 2])
def test_a_longer_table_keeps_its_first_rows_its_dtype_and_whether_it_learns(offset):
    old = nn.Embedding(6 + offset, 4).to(torch.float64)
    old.offset = offset
    old.weight.requires_grad_(offset == 0)
    twin = nn.Embedding(11 + offset, 4, device="meta")
    new = lengthening._LongerTable(twin, "tile")(old)
    assert new.weight.shape == (11 + offset, 4)
    assert new.weight.dtype == torch.float64
    assert new.weight.requires_grad == (offset == 0)
    assert torch.equal(new.weight[:offset], old.weight[:offset])
    assert torch.equal(new.weight[offset:], old.weight[offset:][torch.arange(11) % 6])
    assert twin.weight.is_meta


def _grown(old, shape):
    make = lengthening._extension(old, torch.Size(shape))
    return None if make is None else make(old)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_buffers_that_count_or_are_the_same_everywhere(dtype):
    for lead in ((), (1,), (1, 1)):
        counted = _grown(torch.arange(4).to(dtype).expand(*lead, 4), (*lead, 9))
        assert torch.equal(counted, torch.arange(9).to(dtype).expand(*lead, 9))
        same = _grown(torch.full((*lead, 4), 3).to(dtype), (*lead, 9))
        assert torch.equal(same, torch.full((*lead, 9), 3).to(dtype))
        for made in (counted, same):
            made += 1  # of its own: no row is another's
    assert _grown(torch.arange(4)[None].expand(2, -1), (2, 9)) is None
    assert _grown(torch.tensor([0, 1, 2, 4]), (9,)) is None


def test_buffers_that_depend_on_the_distance():
    """What the old one does not have is as at its largest distance, ahead and back."""
    values = {d: 10 * d + d % 3 for d in range(-3, 4)}
    old = torch.tensor([[values[i - j] for j in range(4)] for i in range(4)])
    for lead in ((), (1, 1)):
        found = _grown(old.expand(*lead, 4, 4), (*lead, 7, 7))
        wanted = torch.tensor([[values[max(-3, min(3, i - j))] for j in range(7)] for i in range(7)])
        assert torch.equal(found, wanted.expand(*lead, 7, 7))
    spoiled = old.clone()
    spoiled[1, 2] += 1
    assert _grown(spoiled, (7, 7)) is None
    assert _grown(old[:3], (7, 7)) is None


@pytest.mark.parametrize("kind", ["global", "local"])
def test_the_masks_of_gpt_neo_are_those_of_a_longer_one(kind):
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_heads": 2, "num_layers": 1, "window_size": 4}
    config = {**sizes, "attention_types": [[[kind], 1]], "bos_token_id": 1, "eos_token_id": 1}
    models = (GPTNeoForCausalLM(GPTNeoConfig(**config, max_position_embeddings=n)) for n in (8, 15))
    old, wanted = (model.transformer.h[0].attn.attention.bias for model in models)
    found = _grown(old, wanted.shape)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
