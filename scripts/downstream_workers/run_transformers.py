"""Stock transformers: greedy continuation with its cache, or the choices of one forward without a cache.

The package `hf_attnpatch` is not imported here, which the worker holds at its end.
"""

from __future__ import annotations

import sys

import torch
from exchange import Json, serve, versions
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel


def top_logprobs(logits: torch.Tensor, top: int) -> list[dict[int, float]]:
    """The largest log-probabilities at each step; logits: float32 (steps, vocabulary)."""
    values, ids = logits.float().log_softmax(-1).topk(top)
    return [dict(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


def continuation(model: PreTrainedModel, prompt: list[int], top: int) -> tuple[list[int], list[dict[int, float]]]:
    """Greedy tokens and the log-probabilities that they were chosen by."""
    tokens = torch.tensor([prompt])
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens))
    return found.sequences[0, len(prompt) :].tolist(), top_logprobs(torch.cat(found.logits), top)


def scores(model: PreTrainedModel, prompt: list[int], given: list[int], top: int) -> list[dict[int, float]]:
    """The log-probabilities at each step of a given continuation, all from one forward."""
    logits = model(torch.tensor([prompt + given]), use_cache=False).logits[0]
    return top_logprobs(logits[len(prompt) - 1 : -1], top)


@torch.no_grad()
def answer(request: Json) -> Json:
    """Without `forced` the reference, by `generate`; with it the same tokens, chosen again by one forward over each."""
    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=torch.float32).eval()
    # nothing of the checkpoint's own: its penalties or its end of text would be taken for unset values
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=request["new_tokens"], return_dict_in_generate=True, output_logits=True
    )
    prompts, top = request["prompts"], request["top"]
    if request["forced"] is None:
        tokens, steps = zip(*(continuation(model, prompt, top) for prompt in prompts), strict=True)
    else:
        steps = [scores(model, *pair, top) for pair in zip(prompts, request["forced"], strict=True)]
        tokens = [[max(step, key=step.__getitem__) for step in one] for one in steps]
    assert "hf_attnpatch" not in sys.modules
    return {
        "continuations": tokens,
        "logprobs": steps,
        "kv_heads": model.config.get_text_config().num_key_value_heads,
        "versions": versions("transformers", "torch"),
        "settings": f"float32, {model.config._attn_implementation}; its row: one forward without cache",
    }


if __name__ == "__main__":
    serve(answer)
