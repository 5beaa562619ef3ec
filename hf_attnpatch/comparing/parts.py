"""The parts of a comparison: what each depends on, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import describe
from ..errors import UnsupportedArchitecture
from ..evaluation import decoding, fidelity, layer_difference, perplexity, retrieval
from ..evaluation.hardware import processor
from .digest import digest_of, tokens_digest
from .settings import Settings
from .texts import Text

SEQUENCE = 512  # tokens of a row for fidelity and layers: attention outputs of all layers are kept for one row


@dataclass(frozen=True)
class Pair:
    """The inputs of a comparison.

    Attributes:
        models: ``original`` and ``patched``.
        digests: of each.
        tokenizer: of both.
        text: windows of token ids.
        settings: how much of it.
    """

    models: dict[str, PreTrainedModel]
    digests: dict[str, str]
    tokenizer: Any
    text: Text
    settings: Settings


@dataclass(frozen=True)
class Part:
    """One measurement, which is kept once it is finished.

    Attributes:
        name: such as ``loss``.
        which: ``original``, ``patched``, or None for both together.
        depends: settings that it depends on, with the digests of its models.
        measure: does it.
    """

    name: str
    which: str | None
    depends: dict[str, Any]
    measure: Callable[[], Any]

    @property
    def title(self) -> str:
        """Its name on the progress line and on disk."""
        return f"{self.name}, {self.which}" if self.which else self.name


def all_parts(pair: Pair) -> Iterator[Part]:
    """Yield the parts that the settings select, in order."""
    text = tokens_digest(pair.text.documents)
    for name in pair.settings.parts:
        settings, run, both = MEASURES[name]
        depends = {"settings": settings(pair), "text": text}
        for which in (None,) if both else ("original", "patched"):
            models = [_held(pair, w) for w in (("original", "patched") if which is None else (which,))]
            yield Part(name, which, {**depends, "models": models}, _bound(run, pair, which))


def why_not(pair: Pair) -> dict[str, str]:
    """Return the selected parts that do not apply to these two models, with the reason."""
    if "layers" not in pair.settings.parts:
        return {}
    try:
        one, other = (_sites(pair.models[which]) for which in ("original", "patched"))
    except UnsupportedArchitecture as error:
        return {"layers": f"the attention modules cannot be read: {error}"}
    if one != other:
        return {"layers": f"the attention modules differ: {len(one)} and {len(other)}, under other names"}
    return {}


def machine() -> dict[str, Any]:
    """Return the machine and the versions of the measurement."""
    from .. import __version__

    return {
        "processor": processor(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_attnpatch": __version__,
    }


def _held(pair: Pair, which: str) -> list[str]:
    """Return a model's digest with its dtype and kernel, on which the results depend, too."""
    model = pair.models[which]
    versions = [torch.__version__, transformers.__version__]
    return [
        pair.digests[which],
        str(model.dtype),
        str(model.device.type),
        str(model.config._attn_implementation),
        *versions,
    ]


def _words(pair: Pair) -> str:
    return digest_of(pair.tokenizer.get_vocab())


def _bound(run: Callable[[Pair, Any], Any], pair: Pair, which: str | None) -> Callable[[], Any]:
    return lambda: run(pair, which)


def _sites(model: PreTrainedModel) -> list[str]:
    return [site.path for site in describe(model).sites if not site.cross]


def _loss(pair: Pair, which: str) -> Any:
    chosen, documents = pair.settings, {f"window {n}": ids for n, ids in enumerate(pair.text.documents)}
    bos = getattr(pair.tokenizer, "bos_token_id", None) if _adds_bos(pair.tokenizer) else None
    found = perplexity(pair.models[which], documents, lengths=chosen.lengths, targets=chosen.targets, bos_token_id=bos)
    return found.to_dict()


def _fidelity(pair: Pair, _: None) -> Any:
    rows = _rows(pair, pair.settings.fidelity_tokens)
    batch = {"input_ids": torch.stack(rows)}
    found = fidelity(pair.models["original"], pair.models["patched"], [batch], continuation=pair.settings.continuation)
    return found.to_dict()


def _layers(pair: Pair, _: None) -> Any:
    sequences = _rows(pair, pair.settings.layer_tokens)
    original, patched = pair.models["original"], pair.models["patched"]
    found = layer_difference(original, patched, sequences, paths=_sites(original))
    return found.to_dict()


def _retrieval(pair: Pair, which: str) -> Any:
    chosen = pair.settings
    found = retrieval(
        pair.models[which],
        pair.tokenizer,
        task=chosen.retrieval_task,
        lengths=chosen.retrieval_lengths,
        samples=chosen.retrieval_samples,
    )
    return found.to_dict()


def _decoding(pair: Pair, which: str) -> Any:
    return decoding(pair.models[which], pair.settings.contexts).to_dict()


def _rows(pair: Pair, tokens: int) -> list[Tensor]:
    """Return the beginnings of windows, with about this many tokens in all."""
    length = min(SEQUENCE, pair.settings.lengths[-1], tokens)
    return pair.text.first(max(1, tokens // length), length)


def _adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer starts every text with a token that the models were trained with."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]


# name -> the settings that it depends on, how it is measured, whether it takes both models together
MEASURES: dict[str, tuple[Callable[[Pair], Any], Callable[[Pair, Any], Any], bool]] = {
    "loss": (lambda p: [p.settings.lengths, p.settings.targets, _adds_bos(p.tokenizer)], _loss, False),
    "fidelity": (lambda p: [p.settings.fidelity_tokens, p.settings.continuation, SEQUENCE], _fidelity, True),
    "layers": (lambda p: [p.settings.layer_tokens, SEQUENCE], _layers, True),
    "retrieval": (
        lambda p: [p.settings.retrieval_task, p.settings.retrieval_lengths, p.settings.retrieval_samples, _words(p)],
        _retrieval,
        False,
    ),
    "decoding": (lambda p: [p.settings.contexts, machine()], _decoding, False),
}
