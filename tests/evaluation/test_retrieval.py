"""Prompts of exact lengths, the published scoring rules, and answers that a shared prefix does not change."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from measured_models import llama

import hf_attnpatch as ap
from hf_attnpatch import EvaluationError, embedded, evaluation
from hf_attnpatch.evaluation.retrieval import TASKS, answering, examples, first_number, string_match_all, words

LENGTHS = {
    "vt": (640, 701),
    "cwe": (900, 1013),
    "niah_multikey_3": (440, 512),
    "niah_multivalue": (512, 607),
    "niah_multiquery": (512, 607),
}


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.load_tokenizer()


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_their_length_and_their_needles(task, tokenizer):
    lengths = LENGTHS.get(task, (350, 413))
    found = examples(tokenizer, task=task, lengths=lengths, samples=2)
    depths = (0.0, 0.25, 0.5, 0.75, 1.0) if TASKS[task].by_depth else (None,)
    assert [(e.length, e.depth, e.sample) for e in found] == [
        (n, d, s) for n in lengths for d in depths for s in (0, 1)
    ]
    for example in found:
        assert 0 <= example.length - TASKS[task].new_tokens - len(example.ids) <= 1
        text = tokenizer.decode(example.ids)
        assert tokenizer(text)["input_ids"] == list(example.ids)
        assert all(piece in text for piece in example.hidden)
        asked = max(text.rfind(sign) for sign in ("?", "Key:", "Question: Find"))
        assert not any(answer in text[asked:] for answer in example.answers)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.by_depth])
def test_depth_is_where_the_needle_is(task, tokenizer):
    found = examples(tokenizer, task=task, lengths=(1024,), depths=(0.0, 0.5, 1.0), samples=1)
    places = []
    for example in found:
        text = tokenizer.decode(example.ids)
        places.append(text.index(example.hidden[0]) / len(text))
        assert example.answers == found[0].answers  # the same needle at every depth
    assert places[0] < 0.16
    assert 0.35 < places[1] < 0.65
    assert 0.6 < places[2]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_prompts(task, tokenizer):
    options = {"task": task, "lengths": LENGTHS.get(task, (350,))[:1], "samples": 1}
    once, again, other = (examples(tokenizer, **options, seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert all(a.ids != b.ids and a.answers != b.answers for a, b in zip(once, other, strict=True))


def test_prompts_are_the_same_on_every_machine(tokenizer):
    first = examples(tokenizer, task="niah_multikey_3", lengths=(512,), samples=1)[0]
    assert first.answers == ("7532cc98-340f-4df6-bd97-f3f42a3a0f3b",)


@pytest.mark.parametrize("task", TASKS)
def test_a_perfect_answer_scores_100_and_an_empty_one_0(task, tokenizer):
    for example in examples(tokenizer, task=task, lengths=LENGTHS.get(task, (350,))[:1], samples=2):
        assert TASKS[task].points(" " + ", ".join(example.answers).upper() + ".", example.answers) == 100
        assert TASKS[task].points("", example.answers) == 0


def test_the_published_rules():
    assert string_match_all("it is QUICK-LIZARD\x07and 12.", ["quick-lizard", "12", "13"]) == pytest.approx(2 / 3)
    assert first_number("is 12345. Not 99999", ["12345"]) == 1
    assert first_number("is 99999, not 12345", ["12345"]) == 0
    assert first_number("123456", ["12345"]) == 0


class Copy(torch.nn.Module):
    """Answers from a table of prompts; its cache is all that it has read."""

    def __init__(self, table, end):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.table, self.end, self.read = table, end, 0

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        past = past_key_values or Read()
        rows = input_ids if past.rows is None else torch.cat([past.rows, input_ids], dim=1)
        past.rows, self.read = rows, self.read + input_ids.numel()
        logits = torch.zeros(*input_ids.shape, 4096)
        for row, ids in enumerate(rows.tolist()):
            for prompt, answer in self.table.items():
                if tuple(ids[: len(prompt)]) == prompt:
                    said = len(ids) - len(prompt)
                    logits[row, -1, answer[said] if said < len(answer) else self.end] = 1
        return SimpleNamespace(logits=logits, past_key_values=past)


class Read:
    rows = None

    def batch_repeat_interleave(self, count):
        self.rows = self.rows.repeat_interleave(count, dim=0)


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_knows_scores_100_and_one_that_is_silent_0(task, tokenizer):
    options = {"task": task, "lengths": LENGTHS.get(task, (400, 470)), "samples": 3}
    drawn = examples(tokenizer, **options)
    table = {e.ids: tokenizer(" " + " ".join(e.answers))["input_ids"] for e in drawn}
    knowing = Copy(table, tokenizer.eos_token_id)
    found = evaluation.retrieval(knowing, tokenizer, **options, batch_tokens=2000)
    assert all(value == 100 for row in found.grid() for value in row)
    assert (found.score().value, found.score().low) == (100, 100)
    silent = Copy({e.ids: [] for e in drawn}, tokenizer.eos_token_id)
    found = evaluation.retrieval(silent, tokenizer, **options)
    assert all(value == 0 for row in found.grid() for value in row)
    assert all(answer.answer == "" for answer in found.answers)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "passkey"])
def test_a_shared_prefix_is_read_once_and_changes_nothing(task, tokenizer):
    options = {"task": task, "lengths": (500, 600), "samples": 4, "new_tokens": 12}
    model = llama(vocab_size=4096, max_position_embeddings=1024)
    shared = evaluation.retrieval(model, tokenizer, **options)
    alone = evaluation.retrieval(model, tokenizer, **options, batch_tokens=1)
    assert shared.answers == alone.answers
    assert shared.reused > 0.3 * shared.tokens
    drawn = examples(tokenizer, **options)
    counting = Copy({e.ids: [] for e in drawn}, tokenizer.eos_token_id)
    found = evaluation.retrieval(counting, tokenizer, **options)
    decoded = 8 * len(drawn)  # one step more than the prompt, until they are seen to have ended
    assert found.tokens - found.reused <= counting.read <= found.tokens - found.reused + decoded


def test_what_is_read_once_only_grows_with_the_depth(tokenizer):
    drawn = examples(tokenizer, task="passkey", lengths=(500,), samples=4)
    parts = answering.batches(drawn, 8192, 12)
    counts = [count for _, count in parts]
    assert counts == sorted(counts)
    assert sorted(e.ids for part, _ in parts for e in part) == sorted(e.ids for e in drawn)
    for (part, count), (after, _) in zip(parts[:-1], parts[1:], strict=True):
        assert len({e.ids[:count] for e in [*part, *after]}) == 1 or count == 0
    assert counts[-1] > 400


def test_frequencies_that_change_with_the_length_are_not_shared(tokenizer):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = llama(vocab_size=4096, max_position_embeddings=64, rope_parameters=rope)
    options = {"task": "passkey", "lengths": (500,), "samples": 4}
    shared = evaluation.retrieval(model, tokenizer, **options)
    assert shared.reused == 0
    fixed = evaluation.retrieval(llama(vocab_size=4096), tokenizer, **options)
    assert fixed.reused > 0


def test_what_is_there_may_be_asked_in_chat(tokenizer):
    class Chatty:
        chat_template = "turns"
        eos_token_id = 0

        def apply_chat_template(self, turns, tokenize, add_generation_prompt):
            return f"<user>{turns[0]['content']}<assistant>"

        def __call__(self, text, **options):
            return tokenizer(text)

    example = examples(Chatty(), task="passkey", lengths=(400,), samples=1, chat=True)[0]
    text = tokenizer.decode(example.ids)
    assert text.startswith("<user>There is")
    assert text.endswith("What is the pass key?<assistant>The pass key is")
    assert len(example.ids) in (387, 388)


def test_results_survive_json(tokenizer):
    found = evaluation.retrieval(llama(vocab_size=4096), tokenizer, task="vt", lengths=(640,), samples=2, new_tokens=4)
    assert evaluation.Retrieval.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.depths == (None,)
    assert "vt: score of 100" in str(found)
    assert len(found.grid()) == len(found.grid()[0]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "passkeys"}, "task 'passkeys': there is no such task; choose from passkey, needle"),
        ({"task": "passkey", "lengths": (64,)}, "task passkey, length 64, 12 for the answer: the shortest prompt has"),
        ({"task": "cwe", "depths": (0.5,)}, "task cwe: depths=.*leave them out"),
        ({"task": "passkey", "depths": (50,)}, "from 0 to 1"),
        ({"task": "needle", "text": "too short"}, "a text of 2 words"),
        ({"task": "passkey", "samples": 0}, "samples=0"),
        ({"task": "passkey", "chat": True}, "has no chat template"),
    ],
)
def test_bad_input_is_a_clear_error(options, message, tokenizer):
    with pytest.raises(EvaluationError, match=message):
        examples(tokenizer, **{"lengths": (400,), **options})


def test_models_that_cannot_be_asked(tokenizer):
    broken = llama(vocab_size=4096)
    broken.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(EvaluationError, match="logits that are not finite"):
        evaluation.retrieval(broken, tokenizer, lengths=(400,))

    class Bare(type(broken)):
        def forward(self, **inputs):
            return SimpleNamespace(logits=super().forward(**inputs).logits, past_key_values=None)

    with pytest.raises(EvaluationError, match="Bare returned no cache"):
        evaluation.retrieval(Bare(broken.config), tokenizer, lengths=(400,))


def test_words_are_distinct_and_plain():
    assert len(set(words.ADJECTIVES)) == len(words.ADJECTIVES)
    assert len(set(words.NOUNS)) == len(words.NOUNS)
    assert len(words.ADJECTIVES) * len(words.NOUNS) > 40_000
    assert all(word.isalpha() and word.islower() for word in [*words.ADJECTIVES, *words.NOUNS])


def test_a_tokenizer_that_drops_text_is_an_error():
    """More and more text would be tried for ever."""
    with pytest.raises(EvaluationError, match="the tokenizer drops text"):
        examples(lambda text, **_: {"input_ids": [1, 2, 3]}, task="passkey", lengths=(400,))


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_a_model_scaled_by_request_is_told_how_long_it_will_become(tokenizer, batch_tokens):
    model = embedded.load_model()
    ap.patch_rope_scaling(model, kind="dynamic_yarn", factor=4)
    options = {"task": "passkey", "lengths": (512, 600), "depths": (0.5, 1.0), "samples": 2, "new_tokens": 4}
    found = evaluation.retrieval(model, tokenizer, **options, batch_tokens=batch_tokens)
    assert found.reused == 0
    for example, answer in zip(examples(tokenizer, **options), found.answers, strict=True):
        ids = torch.tensor([example.ids])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert answer.answer == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
