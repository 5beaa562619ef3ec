"""Runs a model on a few tokens without side effects: random state, mode and gradients are restored."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configs import all_configs
from .edits import Edit, tried
from .errors import AttnPatchError, NoWeights, UnsupportedArchitecture
from .exclusive import alone, lock_of
from .functional.finite import all_finite
from .interruption import ensured, removing
from .upstream import words
from .upstream.roles import predicted, roles_of
from .weightless import is_weightless

# Largest difference of logits, relative to the largest logit, that rounding alone explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}

Inputs = Mapping[str, Tensor]
_ABSENT = object()


@dataclass(frozen=True)
class Trace:
    """One forward: the logits (or hidden states) at tokens that are no padding, and how often each module ran."""

    logits: Tensor
    calls: Mapping[str, int]


def default_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return two rows of ten tokens, the second left-padded by three if the model takes a mask.

    Raises:
        NoWeights: the weights are not in memory.
        UnsupportedArchitecture: it reads no tokens.
    """
    check_in_memory(model)
    if not reads_tokens(model):
        raise UnsupportedArchitecture(
            f"{type(model).__name__}: reads {model.main_input_name} and no tokens; this needs a model of text."
        )
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(20).view(2, 10) * 7 + 5) % vocab
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {words.TOKENS: ids.repeat_interleave(codebooks(model), dim=0), words.MASK: mask}
    if model.config.is_encoder_decoder:
        inputs[words.DECODER_TOKENS] = ids
    return {name: tensor.to(input_device(model)) for name, tensor in roles_of(model).call(**inputs).items()}


def brief_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return two rows of eight of the default tokens, the second left-padded by two: the probe of ``apply``.

    Raises:
        NoWeights: the weights are not in memory.
    """
    return {name: tensor[:, 1:9] for name, tensor in default_inputs(model).items()}


def reads_tokens(model: PreTrainedModel) -> bool:
    """Return whether a model's forward takes token ids, for one of its sequences."""
    roles = roles_of(model)
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return isinstance(vocabulary, int) and (roles.takes(words.TOKENS) or roles.takes(words.DECODER_TOKENS))


def tokens_of(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Return the token ids, (batch, length), among inputs of a model's forward."""
    return inputs[roles_of(model).name(words.TOKENS)]


def check_in_memory(model: PreTrainedModel) -> None:
    """Refuse weights that are not in memory.

    Raises:
        NoWeights: some are on the meta device, and not because Accelerate has offloaded them.
    """
    for path, module in [] if is_weightless() else model.named_modules():
        absent = next((name for name, p in module.named_parameters(recurse=False) if p.is_meta), None)
        if absent is not None and not has_offloaded_params(module):
            name = f"{path}.{absent}".lstrip(".")
            raise NoWeights(
                f"{name} has no data (on the meta device); load the weights: this runs the model, to patch it or to "
                "see whether it can be patched."
            )


def check_loaded(model: PreTrainedModel, path: str) -> None:
    """Refuse to add parameters to a module whose own are offloaded: nothing would load the new ones.

    Raises:
        UnsupportedArchitecture: Accelerate has offloaded them.
    """
    if has_offloaded_params(model.get_submodule(path)):
        raise UnsupportedArchitecture(
            f"{path}: its parameters are offloaded by Accelerate, and new ones beside them would be nowhere. Load the "
            "model without offloading, patch and save it; the result can be loaded offloaded."
        )


def codebooks(model: PreTrainedModel) -> int:
    """Return how many rows of ids make one sequence: audio decoders read one for each codebook."""
    with contextlib.suppress(NotImplementedError):  # of a model that has none
        tables = model.get_input_embeddings()
        return len(tables) if isinstance(tables, nn.ModuleList) else 1
    return 1


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the inputs; Accelerate's hooks move them on if all weights are offloaded."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def checked_inputs(name: str, inputs: object) -> Inputs:
    """Return inputs of a forward unchanged, if they are valid.

    Args:
        name: the argument's name, for the error.
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


def trace(
    model: PreTrainedModel, inputs: Inputs, watch: tuple[str, ...] = (), use_cache: bool = False, padded: bool = False
) -> Trace:
    """Run one forward in eval mode.

    Args:
        model: any transformers model.
        inputs: keyword arguments of its forward.
        watch: paths of modules whose calls are counted.
        use_cache: whether keys and values pass through a cache.
        padded: whether logits at padding are kept.

    Raises:
        AttnPatchError: the forward fails on these inputs.
    """
    with quiet(model), _counting(model, watch) as calls, torch.no_grad():
        try:
            logits = _forward(model, inputs, use_cache)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError) as error:
            names = ", ".join(inputs)
            if isinstance(error, UnsupportedArchitecture):
                raise
            raise AttnPatchError(
                f"{type(model).__name__} does not run on the probe ({names}): {type(error).__name__}: {error}. "
                "Pass probe={...} with inputs it takes."
            ) from error
    return Trace(logits if padded else valid(model, logits, inputs), dict(calls))


def trial(
    model: PreTrainedModel, edits: Sequence[Edit], inputs: Inputs, reference: Tensor, backward: bool
) -> str | None:
    """Try edits that must not change the logits, and take them back.

    Args:
        model: left unchanged.
        edits: what to try.
        inputs: keyword arguments of the forward.
        reference: logits without them.
        backward: also require a backward pass.

    Returns:
        None if the logits agree, otherwise why the edits are rejected.
    """
    try:
        with tried(model, edits):
            found = trace(model, inputs).logits
            problem = disagreement(reference, found)
            return problem or (_try_backward(model, inputs) if backward else None)
    except AttnPatchError as error:
        return _one_line(error.__cause__ or error)
    except (ImportError, ValueError, RuntimeError, OSError, TypeError) as error:
        return _one_line(error)


def logits_under(model: PreTrainedModel, edits: Sequence[Edit], inputs: Inputs, padded: bool = False) -> Tensor:
    """Return the logits of the edited model; the edits are undone.

    Args:
        model: any model.
        edits: what to try.
        inputs: keyword arguments of the forward.
        padded: whether logits at padding are returned, too.

    Raises:
        AttnPatchError: an edit is refused, or the edited model does not run on these inputs.
    """
    with tried(model, edits):
        return trace(model, inputs, padded=padded).logits


def disagreement(reference: Tensor, found: Tensor) -> str | None:
    """Return how far two sets of logits differ, or None if rounding explains it."""
    if reference.shape != found.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(reference.shape)}"
    if not all_finite(found):
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
    """Return the predictions at tokens that are no padding, (tokens, ...); all of them without a mask."""
    mask = inputs.get(roles_of(model).names.get(words.MASK, ""))
    return logits[mask.bool()] if mask is not None and logits.shape[:2] == mask.shape else logits


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode, and restore what a forward writes: modes, states and children of modules, configs, seeds.

    No other thread can patch or probe the model meanwhile. A thread that runs it sees eval mode, and what its forward
    stored in modules may be reset; that cannot be prevented.
    """
    with alone(lock_of(model)), unchanged(model), own_random_state(model):
        model.eval()
        yield


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore, at the end of a block, attributes of modules and configs (not tensor data) and torch's modes."""
    with ensured(way_back(model)):
        yield


def way_back(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the present attributes of modules and configs, and torch's modes."""
    stores = [vars(m) for m in model.modules()]
    stores += [vars(c) for c in all_configs(model)] if isinstance(model, PreTrainedModel) else []
    if isinstance(model, PreTrainedModel) and model.can_generate() and model.generation_config is not None:
        stores.append(vars(model.generation_config))
    ways = [remembered(store) for store in stores]
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()

    def put_back() -> None:
        for way in ways:
            way()
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)

    return put_back


def remembered(store: dict[str, Any]) -> Callable[[], None]:
    """Return a function that restores a namespace, and the plain containers directly in it.

    Missing entries are added before new ones are removed, so that another thread never finds fewer.
    """
    containers: list[Any] = [(v, dict(v)) for v in (store, *store.values()) if isinstance(v, dict)]
    containers += [(v, list(v)) for v in store.values() if isinstance(v, list)]

    def restore() -> None:
        for container, content in containers:
            if isinstance(container, dict):
                _make_equal(container, content)
            elif len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
                container[:] = content

    return restore


def _make_equal(found: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    for key, value in wanted.items():
        if found.get(key, _ABSENT) is not value:
            found[key] = value
    for key in [key for key in found if key not in wanted]:
        found.pop(key, None)
    if list(found) != list(wanted):
        for key in wanted:  # in this order behind one another
            found[key] = found.pop(key)


@contextlib.contextmanager
def own_random_state(model: nn.Module) -> Iterator[None]:
    """Restore torch's random state if this block drew from it.

    Generators belong to the whole process. If their state moved while other threads existed, most likely one of those
    drew, as models draw nothing in eval mode: the state is then kept, and no number comes twice.
    """
    put_back = random_states(model)
    with ensured(lambda: _other_threads() or put_back()):
        yield


def random_states(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the random state of the CPU and of the model's devices, where it moved."""
    devices = [d for d in dict.fromkeys(p.device for p in model.parameters()) if d.type not in ("cpu", "meta")]
    before, states = torch.get_rng_state(), [torch.get_device_module(d).get_rng_state(d) for d in devices]

    def put_back() -> None:
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
        for device, state in zip(devices, states, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    return put_back


def _other_threads() -> bool:
    """Return whether another thread may draw random numbers; those of progress bars do not."""
    others = (t for t in threading.enumerate() if t is not threading.current_thread())
    return any(type(thread).__name__ != "TMonitor" for thread in others)


@contextlib.contextmanager
def _counting(model: nn.Module, paths: tuple[str, ...]) -> Iterator[Counter[str]]:
    calls: Counter[str] = Counter()

    def counter(path: str) -> Callable[..., None]:
        def count(*_: object) -> None:
            calls[path] += 1

        return count

    with removing() as handles:
        for path in paths:
            handles.append(model.get_submodule(path).register_forward_hook(counter(path)))
        yield calls


def _one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())[:200]
    made_for_people = isinstance(error, (AttnPatchError, ValueError, ImportError, RuntimeError, OSError))
    return said if made_for_people else f"its forward does not take the masks or tensors of it ({said})"
