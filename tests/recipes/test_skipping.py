"""Positions with gaps: what they are, and that a block stays one text."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_attnpatch as ap
from recipes.data import DataConfig, load_blocks
from recipes.settings import SettingsError
from recipes.skipping import check_model, skipped_positions

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return {"source": str(tmp_path / "text.txt"), "block": 16, "cache": str(tmp_path / "cache")}


def test_positions_ascend_in_contiguous_chunks_below_the_target():
    seen = torch.zeros(64, dtype=torch.bool)
    for index in range(300):
        positions = skipped_positions(16, 64, 3, index)
        steps = positions.diff()
        assert positions[0] <= 64 - 16
        assert (steps >= 1).all()
        assert (steps > 1).sum() <= 2
        assert 0 <= positions.min() <= positions.max() < 64
        assert torch.equal(positions, skipped_positions(16, 64, 3, index))
        seen[positions] = True
    assert seen.all()  # every position of the long block is trained
    assert len({tuple(skipped_positions(16, 64, 2, index).tolist()) for index in range(50)}) > 40


def test_distances_up_to_the_target_occur():
    farthest = max(int(p[-1] - p[0]) for p in (skipped_positions(16, 64, 2, n) for n in range(300)))
    assert farthest == 63


def test_blocks_have_them_and_are_the_same_text(source, tokenizer):
    plain = load_blocks(DataConfig(**source), tokenizer)
    skipped = load_blocks(DataConfig(**source, skip_to=64), tokenizer)
    assert torch.equal(plain[3]["input_ids"], skipped[3]["input_ids"])
    assert "position_ids" not in plain[3]
    assert torch.equal(skipped[3]["position_ids"], skipped_positions(16, 64, 2, 3))
    assert plain.fingerprint != skipped.fingerprint  # a run is not resumed with other positions
    assert len(list(Path(source["cache"]).iterdir())) == 1  # the tokens are the same


def last(model, batch):
    return model(**batch, use_cache=False).logits[0, -1]  # as in training


def test_the_chunks_of_a_block_see_each_other(source, tokenizer):
    """transformers takes a gap in the positions for the beginning of another text unless there is a mask."""
    blocks = load_blocks(DataConfig(**source, skip_to=64), tokenizer)
    index = next(n for n in range(len(blocks)) if blocks[n]["position_ids"].diff().max() > 1)
    batch = {key: value[None] for key, value in blocks[index].items() if key != "labels"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **SIZES)).eval()
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 0] += 1
    with torch.no_grad():
        with_mask = last(model, batch) - last(model, other)
        del batch["attention_mask"], other["attention_mask"]
        without = last(model, batch) - last(model, other)
    assert with_mask.abs().max() > 1e-5
    assert without.abs().max() == 0  # the trap is there, or the mask could go


@pytest.mark.parametrize(
    ("changes", "message"), [({"skip_to": 16}, "skip_to: 16"), ({"skip_chunks": 17}, "chunks: 17")]
)
def test_what_cannot_be_skipped_is_refused(source, tokenizer, changes, message):
    with pytest.raises(SettingsError, match=message):
        load_blocks(DataConfig(**{**source, "skip_to": 64, **changes}), tokenizer)


def test_a_model_that_skipping_teaches_nothing_is_refused():
    made = {**SIZES, "vocab_size": 64, "max_position_embeddings": 32, "initializer_range": 0.2}
    with pytest.raises(SettingsError, match="skip_to: 128 positions, and LlamaForCausalLM is made for 32"):
        check_model(LlamaForCausalLM(LlamaConfig(**made)), 128)
    for patch in (ap.Alibi(), ap.NoPosition(), ap.RelativeXl()):
        model = LlamaForCausalLM(LlamaConfig(**made))
        ap.apply(model, patch)
        with pytest.raises(
            (SettingsError, ap.AttnPatchError), match="does not read position ids|position_ids have gaps"
        ):
            check_model(model, 128)
    model = LlamaForCausalLM(LlamaConfig(**made))
    ap.patch_rope_scaling(model, kind="yarn", factor=4)
    check_model(model, 128)
