"""One cell: a patched model says its numbers, or why it does not. Runs in front of a copy, in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNPATCHED = "unpatched"
ENCODERS = ("bert",)  # of a type that has both classes, the masked one
SEQ2SEQ = ("t5",)
ROTARY = ("llama", "qwen3", "mistral", "granite")  # they turn all of a head, which has a size of 16
SCALED: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {"original_max_position_embeddings": 4},
    "longrope": {
        "original_max_position_embeddings": 4,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + 0.5 * i for i in range(8)],
    },
    "llama3": {"original_max_position_embeddings": 4, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# a keyword that is lost must cost something: scores not divided by the root of the head size, shared heads, dropout
NOT_THE_DEFAULT: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {"query_pre_attn_scalar": 7},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "granite": {"attention_multiplier": 0.4},
    "llama": {"attention_dropout": 0.3},
    "mistral": {"num_key_value_heads": 2},
}
TOLERANCE = 1e-5  # of the largest logit, fp32
LENGTH, PADDING, PREFILL, NEW = 20, 4, 15, 6  # tokens; longer than the window that the rotary cases cut to 16
STEPS = (1, 1, 1, 2)  # what follows the prefill


@dataclass(frozen=True)
class Speaker:
    """A model and what its arguments and results are called.

    Attributes:
        model: in eval mode.
        words: `mutations.Mutation.vocabulary`.
        announce: makes the context in which a text grows by one's own forwards.
    """

    model: Any
    words: Mapping[str, str]
    announce: Callable[[int], Any]

    def takes(self, word: str) -> bool:
        """Whether the forward has this argument."""
        return self.words[word] in inspect.signature(self.model.forward).parameters

    def inputs(self, start: int = 0, end: int = LENGTH) -> dict[str, Tensor]:
        """Two rows of tokens from `start` to `end`, the second left-padded, by the names they have today."""
        ids = (torch.arange(2 * LENGTH).view(2, LENGTH) * 7 + 5) % 90 + 5
        mask = torch.ones_like(ids)
        mask[1, :PADDING] = 0
        if self.model.config.is_encoder_decoder:
            return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)[:, start:end]}
        given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        if self.takes("position_ids") and self.model.can_generate():
            given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start:end]
        return given

    def run(self, given: Mapping[str, Any], use_cache: bool) -> Any:
        """A forward, with arguments under the names they have now."""
        if self.takes("use_cache"):
            given = {**given, "use_cache": use_cache}
        return self.model(**{self.words[word]: value for word, value in given.items()})

    def logits_of(self, output: Any) -> Tensor:
        """The logits in a result."""
        return getattr(output, self.words["output:logits"])


def forward(speaker: Speaker) -> Tensor:
    """Logits of a full forward, at tokens that are not padding."""
    found = speaker.logits_of(speaker.run(speaker.inputs(), use_cache=False))
    return torch.cat([found[0], found[1, PADDING:]])


def training(speaker: Speaker) -> Tensor:
    """The same in training mode, where probabilities are dropped; the seed says which."""
    speaker.model.train()
    try:
        return forward(speaker)
    finally:
        speaker.model.eval()


def decoding(speaker: Speaker) -> Tensor:
    """Logits of a prefill, of single steps and of a step of two tokens, at tokens that are not padding."""
    pieces, state, start = [], {}, 0
    with speaker.announce(LENGTH):
        for size in (PREFILL, *STEPS):
            output = speaker.run({**speaker.inputs(start, start + size), **state}, use_cache=True)
            state = {"cache": getattr(output, speaker.words["output:cache"])}
            pieces.append(speaker.logits_of(output))
            start += size
    found = torch.cat(pieces, 1)
    return torch.cat([found[0], found[1, PADDING:]])


def generation(speaker: Speaker) -> Tensor:
    """Tokens of greedy generation."""
    words = ("input_ids", "attention_mask")
    given = {speaker.words[word]: value for word, value in speaker.inputs().items() if word in words}
    return speaker.model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


def reloading(speaker: Speaker) -> Tensor:
    """Logits of the checkpoint, loaded again."""
    with tempfile.TemporaryDirectory() as folder:
        speaker.model.save_pretrained(folder)
        loaded = _loaded(speaker.model, folder)
    return forward(Speaker(loaded.eval(), speaker.words, speaker.announce))


def _loaded(model: Any, folder: str) -> Any:
    if "hf_attnpatch" in str(getattr(model.config, "model_type", "")) or hasattr(model.config, "attnpatch"):
        import hf_attnpatch

        return hf_attnpatch.load(folder, dtype=torch.float32)
    return type(model).from_pretrained(folder, dtype=torch.float32)


STAGES: Mapping[str, Callable[[Speaker], Tensor]] = {
    "forward": forward,
    "training": training,
    "decoding": decoding,
    "generation": generation,
    "save and load": reloading,
}


def stages_of(speaker: Speaker) -> list[str]:
    """The stages of a model: one that does not generate does not decode either."""
    without = ("decoding", "generation") if not speaker.model.can_generate() else ()
    return [stage for stage in STAGES if stage not in without]


def speakers(family: str, case: str, words: Mapping[str, str]) -> Iterator[tuple[str, Speaker]]:
    """Yield the models of a cell, under a name each: the patched one; unpatched, one for each kernel.

    Raises:
        AttnPatchError: the patch is refused.
    """
    if case == UNPATCHED:
        yield from _stock(family, words)
        return
    import patches

    import hf_attnpatch

    chosen = next(c for c in (*patches.CASES, *patches.IDENTITIES) if c.name == case)
    if family in SEQ2SEQ:
        model = _tiny(family, **{k: v for k, v in chosen.overrides.items() if k == "attn_implementation"})
    else:
        overrides = {**NOT_THE_DEFAULT.get(family, {}), **chosen.overrides}
        model = patches.build(family, family in ENCODERS, dataclasses.replace(chosen, overrides=overrides))
    hf_attnpatch.apply(model, chosen.patch)
    per_request = getattr(chosen.patch, "per_request", False)
    yield "", Speaker(model, words, (lambda n: hf_attnpatch.request(model, n)) if per_request else _nothing)


def _stock(family: str, words: Mapping[str, str]) -> Iterator[tuple[str, Speaker]]:
    """Yield unpatched models with each kernel and with each scaling of angles that patches may lead to."""
    for kernel in ("sdpa", "eager", "flex_attention"):
        try:
            model = _tiny(family, attn_implementation=kernel)
        except ValueError:  # the family has no such kernel
            continue
        yield kernel, Speaker(model, words, _nothing)
    for kind, rest in SCALED.items() if family in ROTARY else ():
        rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **rest}
        model = _tiny(family, rope_parameters=rope, max_position_embeddings=16)
        yield kind, Speaker(model, words, _nothing)


def _tiny(family: str, **overrides: Any) -> Any:
    from architectures import randomise, tiny_config, tiny_model
    from transformers import AutoModelForSeq2SeqLM

    if family not in SEQ2SEQ:
        return tiny_model(family, encoder=family in ENCODERS, **NOT_THE_DEFAULT.get(family, {}), **overrides)
    config = tiny_config(family, encoder=True, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config, **overrides)
    randomise(model)
    return model.eval()


def _nothing(length: int) -> Any:
    return contextlib.nullcontext()


def numbers(speaker: Speaker, stage: str) -> Tensor:
    """What a model says in a stage."""
    torch.manual_seed(0)
    with torch.no_grad():
        return STAGES[stage](speaker).detach().contiguous().clone()


def unlike(wanted: Tensor, found: Tensor) -> str | None:
    """Say how numbers differ from those of the release, or None."""
    if wanted.shape != found.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    if not wanted.is_floating_point():
        return None if torch.equal(wanted, found) else "other tokens"
    scale = wanted.double().abs().max().clamp_min(1e-30)
    difference = float((wanted.double() - found.double()).abs().max() / scale)
    return None if difference <= TOLERANCE else f"differ by {difference:.2g} of the largest"


def is_refusal(error: BaseException) -> bool:
    """Whether it is an `AttnPatchError`; by name, as the package may not have been imported."""
    return any(kind.__name__ == "AttnPatchError" for kind in type(error).__mro__)


def told(error: BaseException) -> dict[str, str]:
    """What an exception says, and the innermost place of the package that it came through."""
    chain, one = [], error
    while one is not None:
        chain.append(one)
        one = one.__cause__ or one.__context__
    frames = [f for e in chain[::-1] for f in traceback.extract_tb(e.__traceback__)]
    own = [f for f in frames if "hf_attnpatch" in Path(f.filename).parts]
    where = [f"{Path(f.filename).as_posix().split('hf_attnpatch/')[-1]}:{f.lineno} {f.name}" for f in own[-1:]]
    cause = "" if len(chain) == 1 else f" (from {type(chain[-1]).__name__}: {_line(chain[-1])[:200]})"
    return {"detail": f"{type(error).__name__}: {_line(error)[:600]}{cause}", "at": where[0] if where else ""}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
