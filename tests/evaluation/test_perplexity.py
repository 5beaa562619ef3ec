"""Loss by context length and by position, against a plain loop over whole logits in double precision."""

import json
import math

import pytest
import torch
from measured_models import MODELS, gpt2, llama
from transformers import LlamaForCausalLM

from hf_attnpatch import EvaluationError, evaluation
from hf_attnpatch.evaluation import logits, windows


def documents(sizes=(40, 33, 48, 40)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(40, (size,), generator=generator).tolist() for size in sizes]


def by_hand(model, ids, targets):
    """The losses of the last targets, one at a time."""
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].double()
    found = []
    for position in range(len(ids) - targets, len(ids)):
        before = rows[position - 1].tolist()
        top = max(before)
        found.append(top + math.log(sum(math.exp(x - top) for x in before)) - before[ids[position]])
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("elements", [2**25, 300])  # all logits at once, or a few positions at a time
def test_by_length_is_a_plain_loop(name, elements, monkeypatch):
    monkeypatch.setattr(logits, "_ELEMENTS", elements)
    model, texts = MODELS[name]().train(), documents()
    found = evaluation.perplexity(model, texts, lengths=(32, 16), targets=10, batch_tokens=70)
    assert model.training
    model.eval()
    assert found.lengths == (16, 32)
    for length in (16, 32):
        rows = [by_hand(model, ids[-length:], 10) for ids in texts]
        assert found[length].nats == pytest.approx(sum(map(sum, rows)) / 40, abs=1e-6)
        assert found[length].tokens == 40
        for number, row in enumerate(rows):
            assert found[length].losses[number] == (pytest.approx(sum(row), abs=1e-5), 10)
    assert found.truncated == found[16]
    assert found[16].nats != pytest.approx(found[32].nats, abs=1e-3)


def test_the_sliding_baseline_gives_each_target_its_own_window():
    model, texts = llama(), documents()
    found = evaluation.perplexity(model, texts, lengths=(32,), targets=10, window=12, stride=1)
    each = [by_hand(model, ids[: len(ids) - 9 + k][-12:], 1)[0] for ids in texts for k in range(10)]
    assert found.sliding.nats == pytest.approx(sum(each) / 40, abs=1e-6)
    coarse = evaluation.perplexity(model, texts, lengths=(32,), targets=10, window=12, stride=4)
    pieces = [
        by_hand(model, ids[: len(ids) - 10 + end][-12:], n) for ids in texts for end, n in [(4, 4), (8, 4), (10, 2)]
    ]
    assert coarse.sliding.nats == pytest.approx(sum(map(sum, pieces)) / 40, abs=1e-6)
    assert found.window == 12
    whole = evaluation.perplexity(model, texts, lengths=(32,), targets=10, window=12, stride=10)
    assert whole.sliding == whole.truncated


def test_a_first_token_counts_in_the_length():
    model, texts = llama(), documents((31, 31))
    found = evaluation.perplexity(model, texts, lengths=(32,), targets=10, bos_token_id=7)
    rows = [by_hand(model, [7, *ids], 10) for ids in texts]
    assert found[32].nats == pytest.approx(sum(map(sum, rows)) / 20, abs=1e-6)


def test_a_first_token_stands_before_a_window_that_is_shorter_by_it():
    """Documents longer than the windows, so that a window at the wrong place is another one."""
    model, texts = llama(), documents((40, 45))
    found = evaluation.perplexity(model, texts, lengths=(32,), targets=10, window=16, stride=5, bos_token_id=7)
    rows = [by_hand(model, [7, *ids[-31:]], 10) for ids in texts]
    assert found[32].nats == pytest.approx(sum(map(sum, rows)) / 20, abs=1e-6)
    rows = [by_hand(model, [7, *ids[-15:]], 10) for ids in texts]
    assert found.truncated.nats == pytest.approx(sum(map(sum, rows)) / 20, abs=1e-6)
    rows = [by_hand(model, [7, *ids[: len(ids) - back][-15:]], 5) for ids in texts for back in (5, 0)]
    assert found.sliding.nats == pytest.approx(sum(map(sum, rows)) / 20, abs=1e-6)


@pytest.mark.parametrize("elements", [2**25, 300])
def test_by_position_is_a_plain_loop(elements, monkeypatch):
    monkeypatch.setattr(logits, "_ELEMENTS", elements)
    model, texts = llama(), documents()
    found = evaluation.loss_by_position(model, texts, length=32, bins=4)
    rows = [by_hand(model, ids[:32], 31) for ids in texts]
    assert found.edges == (1, 8, 16, 24, 32)
    for (start, end), score in zip([(1, 8), (8, 16), (16, 24), (24, 32)], found.scores, strict=True):
        own = [x for row in rows for x in row[start - 1 : end - 1]]
        assert score.nats == pytest.approx(sum(own) / len(own), abs=1e-6)
    assert evaluation.loss_by_position(model, texts, bins=32).edges[-1] == 33  # the shortest document


def test_one_target_is_enough():
    model, texts = llama(), documents()
    found = evaluation.perplexity(model, texts, lengths=(2,), targets=1)
    assert found[2].nats == pytest.approx(sum(by_hand(model, ids[-2:], 1)[0] for ids in texts) / 4, abs=1e-6)


def test_a_stride_is_a_quarter_of_the_targets():
    for targets, stride in [(12, 3), (10, 2), (3, 1)]:
        found = evaluation.perplexity(llama(), documents(), lengths=(16,), targets=targets, resamples=10)
        assert found.stride == stride


def test_as_many_resamples_as_asked_for():
    few, more = (evaluation.perplexity(llama(), documents(), lengths=(16,), targets=4, resamples=n) for n in (3, 200))
    assert few[16].nats == more[16].nats
    assert few[16].high - few[16].low != more[16].high - more[16].low


def test_a_first_token_is_one():
    short, options = [[5] * 30], {"targets": 4, "bos_token_id": 7}
    assert evaluation.perplexity(llama(), short, lengths=(31,), **options)[31].tokens == 4
    with pytest.raises(EvaluationError, match="document 0: 30 tokens, wanted at least 31"):
        evaluation.perplexity(llama(), short, lengths=(32,), **options)


def test_the_table_has_a_line_for_each_length_and_both_baselines():
    found = evaluation.perplexity(llama(), documents(), lengths=(8, 16), targets=4, window=12, stride=2)
    head, *lines = str(found).split("\n")
    assert head == "last 4 tokens of 4 documents, nats per token (95 % over documents), perplexity"
    scores = (found[8], found[16], found.truncated, found.sliding)
    assert [line[:18].strip() for line in lines] == ["8", "16", "truncated 12", "sliding 12"]
    for line, score in zip(lines, scores, strict=True):
        shown = f"{score.nats:.4f} [{score.low:.4f}, {score.high:.4f}]  {math.exp(score.nats):.2f}"
        assert line[18:].strip() == shown


def test_a_mapping_names_the_documents():
    texts = dict(zip("abcd", documents(), strict=True))
    found = evaluation.perplexity(llama(), texts, lengths=(16,), targets=4)
    assert list(found[16].losses) == list("abcd")
    with pytest.raises(EvaluationError, match=r"document b: 33 tokens, wanted at least 40"):
        evaluation.perplexity(llama(), texts, lengths=(40,), targets=4)


class Widest(torch.nn.Linear):
    """An output head that remembers for how many positions it was asked at once."""

    widest = 0

    def forward(self, states):
        self.widest = max(self.widest, states.shape[0] * states.shape[1])
        return super().forward(states)


@pytest.mark.parametrize("elements", [2**25, 400])
def test_logits_are_made_for_the_targets_only(elements, monkeypatch):
    monkeypatch.setattr(logits, "_ELEMENTS", elements)
    model = llama()
    model.lm_head = Widest(32, 40, bias=False)
    evaluation.perplexity(model, documents(), lengths=(32,), targets=6, window=32, stride=6, batch_tokens=128)
    assert model.lm_head.widest == (4 * 6 if elements > 400 else 4 * (400 // 160))


def test_documents_longer_than_a_batch_go_one_by_one():
    model = llama()
    model.lm_head = Widest(32, 40, bias=False)
    found = evaluation.perplexity(model, documents(), lengths=(32,), targets=6, window=32, stride=6, batch_tokens=31)
    assert model.lm_head.widest == 6
    assert found[32].tokens == 24


def test_documents_may_be_tensors_of_any_integers():
    wanted = evaluation.perplexity(llama(), documents(), lengths=(16,), targets=4)
    for dtype in (torch.int32, torch.int64, torch.uint8):
        texts = [torch.tensor(ids, dtype=dtype) for ids in documents()]
        assert evaluation.perplexity(llama(), texts, lengths=(16,), targets=4) == wanted


def test_tokens_go_to_the_model_s_device(monkeypatch):
    seen = []

    def losses(model, ids, targets):
        seen.extend([ids.device, targets.device])
        return torch.zeros(targets.shape)

    monkeypatch.setattr(windows, "token_losses", losses)
    monkeypatch.setattr(windows, "device_of", lambda model: torch.device("meta"))
    evaluation.perplexity(llama(), documents(), lengths=(16,), targets=4)
    assert set(seen) == {torch.device("meta")}


def test_a_head_that_cannot_be_narrowed_is_left_alone():
    class Flattening(torch.nn.Linear):
        pass

    class Odd(LlamaForCausalLM):
        def forward(self, input_ids, use_cache=None):
            output = self.model(input_ids=input_ids, use_cache=use_cache)
            states = output.last_hidden_state
            output.logits = self.lm_head(states.flatten(0, 1)).unflatten(0, states.shape[:2])
            return output

    plain = llama()
    odd = Odd(plain.config).eval()
    odd.load_state_dict(plain.state_dict())
    found, wanted = (evaluation.perplexity(m, documents(), lengths=(32, 16), targets=10) for m in (odd, plain))
    assert found[32].nats == pytest.approx(wanted[32].nats, abs=1e-6)


def test_a_nan_names_its_document_and_never_averages_away():
    model = llama()
    model.model.embed_tokens.weight.data[39] = math.nan  # one word
    texts = [[token % 39 for token in ids] for ids in documents()]
    texts[2][-3] = texts[2][25] = 39
    wanted = r"document 2: the loss of token 1\d of 16 is nan"
    with pytest.raises(EvaluationError, match=wanted):
        evaluation.perplexity(model.train(), texts, lengths=(16,), targets=4)
    assert model.training
    with pytest.raises(EvaluationError, match="document c: the loss of token"):
        evaluation.loss_by_position(model, {"a": texts[3], "c": texts[2]}, length=40)
    blocks = [{"input_ids": torch.tensor(ids), "document": f"text {n}"} for n, ids in enumerate(texts)]
    with pytest.raises(EvaluationError, match="document text 2: the loss of token"):
        evaluation.mean_loss(model, blocks)
    with pytest.raises(EvaluationError, match="document b: its loss is nan"):
        evaluation.summarise({"a": (1.0, 2), "b": (math.nan, 2)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "at least one length"),
        ({"lengths": (16,), "targets": 0}, "at least one length, one target"),
        ({"lengths": (16,), "targets": 4, "stride": -1}, "a stride of 1 or more"),
        ({"lengths": (16,), "targets": 16}, "at most 15 targets"),
        ({"lengths": (16,), "targets": 8, "window": 8}, "at most 7 targets"),
        ({"lengths": (16, 400), "targets": 8}, "document 0: 40 tokens, wanted at least 400"),
    ],
)
def test_what_cannot_be_measured_is_an_error(options, message):
    with pytest.raises(EvaluationError, match=message):
        evaluation.perplexity(llama(), documents(), **options)


def test_other_bad_input():
    with pytest.raises(EvaluationError, match="there are no documents"):
        evaluation.perplexity(llama(), [])
    with pytest.raises(EvaluationError, match=r"document 0: token ids of shape \(1, 40\)"):
        evaluation.perplexity(llama(), torch.zeros(1, 1, 40, dtype=torch.int64), lengths=(8,), targets=2)
    with pytest.raises(EvaluationError, match="bins=40: 33 tokens have 32"):
        evaluation.loss_by_position(llama(), documents(), bins=40)
    with pytest.raises(EvaluationError, match="80 tokens were given, and its config says max_position_embeddings=64"):
        evaluation.perplexity(gpt2(), documents((90,)), lengths=(80,), targets=2)


def test_modes_of_modules_are_put_back_one_by_one():
    model = llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    evaluation.perplexity(model, documents(), lengths=(8,), targets=2)
    assert [module.training for module in model.modules()] == before
    assert True in before
    assert False in before


@pytest.mark.parametrize("measure", ["length", "position"])
def test_results_survive_json(measure):
    texts = dict(zip("abcd", documents(), strict=True))
    if measure == "length":
        found = evaluation.perplexity(llama(), texts, lengths=(8, 16), targets=4)
    else:
        found = evaluation.loss_by_position(llama(), documents(), bins=3)
    assert type(found).from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert f"{found.scores[0].nats:.4f}" in str(found)
    with pytest.raises(EvaluationError, match="(scores is missing|no field lengths); its fields are: .*measure again"):
        type(found).from_dict({"lengths": [1]})


@pytest.mark.parametrize("build", [llama, gpt2])
def test_tokens_that_the_model_does_not_know_are_named(build):
    """Not taken for too many positions, which is the other table that ends."""
    with pytest.raises(EvaluationError, match=r"token ids from 3 to 40, and it knows 40 tokens; tokenize with"):
        evaluation.perplexity(build(), [[3, 4, 40, 5]], lengths=(4,), targets=2)
