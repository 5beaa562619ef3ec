"""The decoding bench: its steps are real ones, its bytes are right, a run writes what it says and can be continued."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_attnpatch as ap
from hf_attnpatch.evaluation.memory import held_bytes, weight_bytes
from hf_attnpatch.evaluation.timing import Work

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import decode_paths
import decode_report
import decode_rows
import readme
from caches import CACHE

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RESULT = SCRIPTS.parent / "recipes/results/decode/bench_decode.json"
COUNTS = [8, 2, 1]
PATHS = [f"{cache}+{attention}" for cache in decode_paths.CACHES for attention in decode_paths.ATTENTIONS]


def bench(out, *more):
    words = ["--quick", "--kv", "8,2,1", "--contexts", "32,64", "--batch", "2", "--out", str(out), *more]
    return subprocess.run([sys.executable, str(SCRIPTS / "bench_decode.py"), *words], capture_output=True, text=True)


def tiny():
    return decode_paths.llama(64, 8, 2, torch.float32)


@pytest.fixture(scope="module")
def models():
    return decode_paths.variants(COUNTS, tiny, torch.float32)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A quick run, whole; then what it said."""
    out = tmp_path_factory.mktemp("bench")
    page = readme.holder("decode")
    before = page.read_text("utf-8")
    done = bench(out)
    assert done.returncode == 0, done.stderr
    assert page.read_text("utf-8") == before  # only a run into the default folder writes there
    return out, json.loads((out / "bench_decode.json").read_text("utf-8"))


# -- what is timed is decoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", COUNTS)
@pytest.mark.parametrize("text", PATHS)
@torch.no_grad()
def test_a_step_is_the_next_token_of_the_model(models, text, kv):
    model, path = models[kv], decode_paths.DecodePath.parse(text)
    decode_paths.choose_attention(model, "sdpa")
    tokens = torch.cat([torch.arange(16), torch.tensor([7])]).expand(2, -1)
    wanted = model(tokens, use_cache=False).logits[:, -1]
    cache = decode_paths.prefilled(model, path, 16, 2)
    decode_paths.choose_attention(model, path.attention)
    for _ in range(2):  # the second one sees that the first was taken back
        found = model(tokens[:, -1:], **{CACHE: cache}, use_cache=True).logits[:, -1]
        decode_paths.take_back(cache)
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)
    assert int(cache.get_seq_length()) == 16


@pytest.mark.parametrize("cache", decode_paths.CACHES)
@torch.no_grad()
def test_folded_attention_sees_padding(models, cache):
    model, path = models[2], decode_paths.DecodePath(cache, "folded")
    keep = torch.ones(2, 17, dtype=torch.long)
    keep[0, :5] = 0
    logits = []
    for attention in ("sdpa", "folded"):
        filled = decode_paths.prefilled(model, path, 16, 2)
        decode_paths.choose_attention(model, attention)
        token = torch.tensor([[3], [3]])
        logits.append(model(token, **{CACHE: filled}, attention_mask=keep, use_cache=True).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=2e-6, rtol=0)
    assert not torch.allclose(logits[0][0], logits[0][1], atol=1e-4)  # the padded row was padded


@pytest.mark.parametrize("kv", COUNTS)
def test_folded_attention_takes_a_bias_of_each_head(kv):
    query, key, value = torch.randn(2, 8, 1, 16), torch.randn(2, kv, 40, 16), torch.randn(2, kv, 40, 16)
    bias = torch.randn(2, 8, 1, 40)
    keys, values = (x.repeat_interleave(8 // kv, 1) for x in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias).transpose(1, 2)
    found, _ = decode_paths.folded_attention(torch.nn.Identity(), query, key, value, bias)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kv", COUNTS)
def test_filled_caches_are_like_prefilled_ones(models, kv):
    for path in map(decode_paths.DecodePath.parse, ("dynamic+sdpa", "static+sdpa")):
        caches = [make(models[kv], path, 16, 3) for make in (decode_paths.filled, decode_paths.prefilled)]
        shapes = [[(layer.keys.shape, layer.values.dtype) for layer in cache.layers] for cache in caches]
        assert shapes[0] == shapes[1]
        assert [int(cache.get_seq_length()) for cache in caches] == [16, 16]


def test_sdpa_calls_are_seen(models):
    seen = {}
    for text in ("dynamic+folded", "static+folded", "dynamic+eager"):
        path = decode_paths.DecodePath.parse(text)
        cache = decode_paths.filled(models[2], path, 16, 1)
        decode_paths.choose_attention(models[2], path.attention)
        step = Work(
            lambda cache=cache: models[2](torch.zeros(1, 1, dtype=torch.long), **{CACHE: cache}),
            after=lambda cache=cache: decode_paths.take_back(cache),
        )
        seen[text] = decode_paths.sdpa_call(step)
    folded = "2 x 4 queries on 2 heads"
    assert seen == {"dynamic+folded": folded, "static+folded": f"{folded}, mask", "dynamic+eager": "not called"}


@pytest.mark.parametrize("kv", COUNTS)
def test_the_formulations_of_attention_agree(kv):
    query, key, value = torch.randn(2, 8, 1, 16), torch.randn(2, kv, 40, 16), torch.randn(2, kv, 40, 16)
    groups = 8 // kv
    scores = torch.stack([key[:, h // groups] @ query[:, h, 0, :, None] for h in range(8)], 1)[..., 0] / 4
    wanted = torch.stack([scores.softmax(-1)[:, h, None] @ value[:, h // groups] for h in range(8)], 1)
    for attend in decode_paths.FORMULATIONS.values():
        torch.testing.assert_close(attend(query, key, value), wanted, atol=1e-6, rtol=0)


# -- bytes ------------------------------------------------------------------------------------------------------------


def test_cache_bytes_fall_by_exactly_the_group_factor(models):
    table = {row["kv"]: row for row in decode_paths.byte_table(models, batch=1)}
    for kv, model in models.items():
        assert table[kv]["bytes a token"] == 2 * 2 * kv * 8 * 4  # keys and values, layers, heads of 8, fp32
        assert table[kv]["group factor"] == 8 / kv
        cache = decode_paths.filled(model, decode_paths.DecodePath("dynamic", "sdpa"), 16, 3)
        assert held_bytes(cache) == 16 * 3 * table[kv]["bytes a token"]


def test_a_cache_that_does_not_fall_so_is_an_error(models):
    deeper = decode_paths.llama(64, 8, 3, torch.float32)
    ap.apply(deeper, ap.GroupedQuery(num_kv_heads=2))
    with pytest.raises(SystemExit, match=r"2 of 8 heads, but 384.0 of 1024.0 bytes a token"):
        decode_paths.byte_table({8: models[8], 2: deeper}, batch=1)


@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes(tied):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    layer = 32 * 32 * 2 + 2 * 32 * 8 + 3 * 32 * 48 + 2 * 32
    wanted = 2 * layer + 32 + 100 * 32  # the last norm, the head
    rows = 3 * 32  # of the embedding, for three sequences
    assert weight_bytes(model, batch=3) == 4 * (wanted + rows)


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_says_everything(result):
    out, found = result
    assert (out / "bench_decode.png").stat().st_size > 30_000
    assert {row["kv"]: row["group factor"] for row in found["variants"]} == {8: 1, 2: 4, 1: 8}
    assert [row["kv"] for row in found["prefilled"]] == [8, 1]
    rows = decode_report.steps(found)
    assert len(rows) == 4 * 2 * 3  # paths, contexts, variants
    assert len(decode_report.alone(found)) == 2 * 3 * len(decode_paths.FORMULATIONS)
    for row in decode_report.alone(found):
        done = row["ms"] / 1e3 * row["of the arithmetic"] * decode_rows.arithmetic(found, row["context"])
        assert done == pytest.approx(2 * 2 * 2 * 2 * 64 * row["context"])  # operations, k and v, layers, batch, hidden
        low, high = row["interval"]
        assert 0 < low <= row["speed-up"] <= high
    for row in rows:
        assert row["cache bytes"] == 2 * 128 * row["kv"] * row["context"]
        assert row["of the limit"] == pytest.approx(row["tokens/s"] / row["limit tokens/s"])
        low, high = row["interval"]
        assert 0 < low <= row["speed-up"] <= high
    most = next(row for row in rows if row["kv"] == 8)
    fewest = next(row for row in rows if row["kv"] == 1)
    total = [row["weight bytes"] + row["cache bytes"] for row in (most, fewest)]
    assert fewest["speed-up by bytes"] == pytest.approx(total[0] / total[1])
    assert most["weight bytes"] - fewest["weight bytes"] == 2 * 2 * 7 * 8 * 64 * 4  # k, v, layers, heads of 8, hidden
    text = decode_report.markdown(found)
    assert all(row["path"] in text for row in rows)


def test_a_run_is_continued(result, tmp_path):
    _, found = result
    part = {**copy.deepcopy(found), "done": found["done"][:1]}
    (tmp_path / "bench_decode.json").write_text(json.dumps(part))
    done = bench(tmp_path, "--resume", "--paths", "dynamic+sdpa+glibc,static+sdpa")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("pass")]
    turns = [(0, 32), (0, 64), (1, 32), (1, 64)]
    assert lines == [
        *[f"pass {turn}, context {context}: dynamic+sdpa+glibc" for turn, context in turns[1:]],
        *[f"pass {turn}, context {context}: static+sdpa" for turn, context in turns],
    ]
    again = json.loads((tmp_path / "bench_decode.json").read_text("utf-8"))
    assert again["done"][0] == found["done"][0]
    other = bench(tmp_path, "--resume", "--batch", "3")
    assert other.returncode == 1
    assert "was made with {'batch': 2}" in other.stderr


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(SystemExit, match=r"path 'dynamic\+flash' is not known"):
        decode_paths.DecodePath.parse("dynamic+flash")
    with pytest.raises(SystemExit, match="has 8 query and 8 key-value heads, --kv begins with 4"):
        decode_paths.variants([4, 1], tiny, torch.float32)


@pytest.mark.skipif(not RESULT.is_file(), reason="no bench has been run: make bench-decode")
def test_the_readme_has_the_measured_figures():
    assert readme.is_current("decode", decode_report.markdown(json.loads(RESULT.read_text("utf-8"))))
