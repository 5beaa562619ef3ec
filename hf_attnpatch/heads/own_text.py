"""Calibration text that the model generates itself, which covers what it was trained on, without a file.

It is sampled from the model's own distribution (temperature 1, no truncation), as in data-free quantization (LLM-QAT,
2305.17888, section 3.1), while a user's text covers one domain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import AttnPatchError
from ..evaluation.announcing import announced
from ..evaluation.generation import prefill
from ..probe import input_device, quiet
from ..progress import track

ROWS = 32  # sequences generated at once


@dataclass(frozen=True, kw_only=True)
class OwnText:
    """A text for ``calibration`` that the model generates before it is patched; takes time, but no file.

    Experimental: its arguments may get other names or defaults between minor versions.

    Args:
        sequences: their number.
        length: tokens of each, including the start token; cut to the trained window.
        seed: of the sampling; a seed gives the same text on the same machine.
        start: id of the start token; None takes the config's beginning-of-text token, else its end-of-text token.
    """

    sequences: int = 64
    length: int = 512
    seed: int = 0
    start: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AttnPatchError(f"OwnText: {name} is {value!r}; it must be a whole number, at least {least}.")

    def write(self, model: PreTrainedModel) -> Tensor:
        """Return token ids, (sequences, length), int64, on the CPU; the model is left unchanged.

        Raises:
            AttnPatchError: the model does not generate text from left to right, or has no token to begin with.
        """
        first = self._first(model)
        window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        length = min(self.length, window) if isinstance(window, int) else self.length
        parts = [min(ROWS, self.sequences - at) for at in range(0, self.sequences, ROWS)]
        with quiet(model), torch.no_grad():
            draws = torch.Generator(input_device(model)).manual_seed(self.seed)  # leaves the global generators alone
            found = [_sampled(model, first, rows, length, draws) for rows in track(parts, "writing own text")]
        return torch.cat(found)

    def _first(self, model: PreTrainedModel) -> int:
        if model.config.is_encoder_decoder or not model.can_generate():
            raise AttnPatchError(
                f"{type(model).__name__} does not write text from left to right, so that it cannot be calibrated on "
                "its own; pass text."
            )
        config = model.config.get_text_config(decoder=True)
        named = (self.start, *(getattr(config, f"{name}_token_id", None) for name in ("bos", "eos")))
        found = next((each for each in named if each is not None), None)
        found = found[0] if isinstance(found, list) and found else found
        if not isinstance(found, int) or not 0 <= found < config.vocab_size:
            raise AttnPatchError(
                f"{type(model).__name__}: its config names {found!r} as the token that begins a text; wanted an id "
                f"below {config.vocab_size}: pass OwnText(start=...)."
            )
        return found


def _sampled(model: PreTrainedModel, first: int, rows: int, length: int, draws: torch.Generator) -> Tensor:
    """Return (rows, length) tokens, without the checkpoint's generation settings and without stopping."""
    ids = [torch.full((rows, 1), first, device=input_device(model))]
    past = None
    with announced(model, length):
        while len(ids) < length:
            logits, past = prefill(model, ids[-1], past)
            probabilities = logits.float().softmax(-1).to(draws.device)
            ids.append(probabilities.multinomial(1, generator=draws).to(ids[0].device))
    return torch.cat(ids, 1).cpu()
