"""Run a model on a few tokens without leaving a trace: random state, mode and gradients stay as they were."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configs import all_configs
from .edits import Edit, Inverse
from .errors import AttnPatchError, NoWeights
from .upstream import words
from .upstream.roles import predicted, roles_of

# Largest difference of logits, relative to their largest magnitude, that rounding alone explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trace:
    """One forward: the logits (or hidden states) at tokens that are not padding, and how often each module ran."""

    logits: Tensor
    calls: Mapping[str, int]


def default_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return two rows of ten tokens, the second left-padded by three where the model takes a mask.

    Raises:
        NoWeights: there is nothing to be run.
    """
    check_in_memory(model)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(20).view(2, 10) * 7 + 5) % vocab
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {words.TOKENS: ids.repeat_interleave(codebooks(model), dim=0), words.MASK: mask}
    if model.config.is_encoder_decoder:
        inputs[words.DECODER_TOKENS] = ids
    return {name: tensor.to(input_device(model)) for name, tensor in roles_of(model).call(**inputs).items()}


def brief_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return two rows of eight of the default tokens, the second left-padded by two: what ``apply`` runs by itself.

    Raises:
        NoWeights: there is nothing to be run.
    """
    return {name: tensor[:, 1:9] for name, tensor in default_inputs(model).items()}


def tokens_of(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Return the token ids, (batch, length), among inputs of a model's forward."""
    return inputs[roles_of(model).name(words.TOKENS)]


def check_in_memory(model: PreTrainedModel) -> None:
    """Refuse weights that are not there.

    Raises:
        NoWeights: some are on the meta device, and not because Accelerate has offloaded them.
    """
    for path, module in model.named_modules():
        absent = next((name for name, p in module.named_parameters(recurse=False) if p.is_meta), None)
        if absent is not None and not has_offloaded_params(module):
            name = f"{path}.{absent}".lstrip(".")
            raise NoWeights(
                f"{name} has no data (on the meta device); load the weights: this runs the model, to patch it or to "
                "see whether it can be patched."
            )


def codebooks(model: PreTrainedModel) -> int:
    """Return how many rows of ids make one sequence: audio decoders read one for each codebook."""
    tables = model.get_input_embeddings()
    return len(tables) if isinstance(tables, nn.ModuleList) else 1


def input_device(model: nn.Module) -> torch.device:
    """Return where inputs belong; Accelerate's hooks move them on where all weights are offloaded."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def checked_inputs(name: str, inputs: object) -> Inputs:
    """Return inputs of a forward as they are.

    Args:
        name: the argument they were passed as, for the error.
        inputs: what the user gave.

    Raises:
        AttnPatchError: not a mapping from names to tensors, or empty.
    """
    example = "{'input_ids': tensor of token ids, shape (batch, length)}"
    if not isinstance(inputs, Mapping) or not inputs:
        found = "empty" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise AttnPatchError(f"{name} is {found}; it must be a mapping of the forward's inputs, such as {example}.")
    for key, value in inputs.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            found = f"a {type(value).__name__}" if isinstance(key, str) else f"under a {type(key).__name__}"
            raise AttnPatchError(f"{name}[{key!r}] is {found}; it must be a tensor under its name, such as {example}.")
    return inputs


def trace(model: PreTrainedModel, inputs: Inputs, watch: tuple[str, ...] = (), use_cache: bool = False) -> Trace:
    """Run one forward in eval mode.

    Args:
        model: any transformers model.
        inputs: keyword arguments of its forward.
        watch: paths of modules whose calls are counted.
        use_cache: whether keys and values pass through a cache on the way.

    Raises:
        AttnPatchError: the forward fails on these inputs.
    """
    with quiet(model), _counting(model, watch) as calls, torch.no_grad():
        try:
            logits = _forward(model, inputs, use_cache)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError) as error:
            names = ", ".join(inputs)
            raise AttnPatchError(
                f"{type(model).__name__} does not run on the probe ({names}): {type(error).__name__}: {error}. "
                "Pass probe={...} with inputs it takes."
            ) from error
    return Trace(valid(model, logits, inputs), dict(calls))


def trial(
    model: PreTrainedModel, edits: Sequence[Edit], inputs: Inputs, reference: Tensor, backward: bool
) -> str | None:
    """Try edits that must not change the logits, and take them back.

    Args:
        model: as it should be left.
        edits: what to try.
        inputs: keyword arguments of the forward.
        reference: logits without them.
        backward: also require a backward pass.

    Returns:
        None if the logits agree, otherwise why the edits will not do.
    """
    inverses: list[Inverse] = []
    try:
        for edit in edits:
            inverses.append(edit.run(model))
        found = trace(model, inputs).logits
        problem = disagreement(reference, found)
        return problem or (_try_backward(model, inputs) if backward else None)
    except AttnPatchError as error:
        return _one_line(error.__cause__ or error)
    except (ImportError, ValueError, RuntimeError, OSError, TypeError) as error:
        return _one_line(error)
    finally:
        while inverses:
            inverses.pop().undo()


def logits_under(model: PreTrainedModel, edits: Sequence[Edit], inputs: Inputs) -> Tensor:
    """Return the logits that the model would have, and leave it as it was.

    Raises:
        AttnPatchError: an edit is refused, or the edited model does not run on these inputs.
    """
    inverses: list[Inverse] = []
    try:
        for edit in edits:
            inverses.append(edit.run(model))
        return trace(model, inputs).logits
    finally:
        while inverses:
            inverses.pop().undo()


def disagreement(reference: Tensor, found: Tensor) -> str | None:
    """Say how far two sets of logits are apart, or None if rounding explains it."""
    if reference.shape != found.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(reference.shape)}"
    if not found.isfinite().all():
        return "not finite"
    difference, allowed = largest_difference(reference, found), TOLERANCE.get(found.dtype, 1e-2)
    return None if difference <= allowed else f"logits differ by {difference:.2g} of their size, {allowed:.0e} allowed"


def largest_difference(reference: Tensor, found: Tensor) -> float:
    """Return the largest difference relative to the largest magnitude of the reference."""
    scale = reference.double().abs().max().clamp_min(1e-30)
    return float((reference.double() - found.double()).abs().max() / scale)


def _try_backward(model: PreTrainedModel, inputs: Inputs) -> str | None:
    wanted = [p for p in model.parameters() if p.requires_grad][:1]
    if not wanted:
        return None
    with quiet(model), torch.enable_grad():
        try:
            torch.autograd.grad(_forward(model, inputs).float().square().sum(), wanted, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            return f"no backward here: {_one_line(error)}"
    return None


def _forward(model: PreTrainedModel, inputs: Inputs, use_cache: bool = False) -> Tensor:
    roles = roles_of(model)
    extra = roles.call(**{words.USE_CACHE: use_cache}) if roles.takes(words.USE_CACHE) else {}
    return predicted(model(**inputs, **extra))


def valid(model: PreTrainedModel, logits: Tensor, inputs: Inputs) -> Tensor:
    """Return the predictions at tokens that are no padding, (tokens, ...); all of them where there is no mask."""
    mask = inputs.get(roles_of(model).names.get(words.MASK, ""))
    return logits[mask.bool()] if mask is not None and logits.shape[:2] == mask.shape else logits


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluate, and put back what a forward writes: modes, states and children of modules, configs, random state."""
    stores = [vars(m) for m in model.modules()]
    stores += [vars(c) for c in all_configs(model)] if isinstance(model, PreTrainedModel) else []
    ways_back = [remembered(store) for store in stores]
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        for way_back in ways_back:
            way_back()


def remembered(store: dict[str, Any]) -> Callable[[], None]:
    """Return a function that makes a namespace, and the plain containers directly in it, what they are now."""
    containers = [(v, copy.copy(v)) for v in (store, *store.values()) if isinstance(v, (dict, list))]

    def restore() -> None:
        for container, content in containers:
            if isinstance(container, dict):
                container.clear()
                container.update(content)
            else:
                container[:] = content

    return restore


@contextlib.contextmanager
def _counting(model: nn.Module, paths: tuple[str, ...]) -> Iterator[Counter[str]]:
    calls: Counter[str] = Counter()

    def counter(path: str) -> object:
        def count(*_: object) -> None:
            calls[path] += 1

        return model.get_submodule(path).register_forward_hook(count)

    handles = [counter(path) for path in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]  # RemovableHandle


def _one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())[:200]
    made_for_people = isinstance(error, (AttnPatchError, ValueError, ImportError, RuntimeError, OSError))
    return said if made_for_people else f"its forward does not take the masks or tensors of it ({said})"
