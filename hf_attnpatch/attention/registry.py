"""Registers one name for each kernel in transformers' tables; under it, a module's wrappers run around the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..configs import config_at
from ..edits import AddPreHook, Edit, SetAttention
from ..errors import AttnPatchError
from ..upstream import words
from ..upstream.calls import attention_registered, mask_registered
from .call import AttentionCall, Output
from .kernels import attend
from .masks import mask_function
from .wrapper import wrappers_of

PREFIX = "attnpatch_"  # precedes the kernel's name, from which transformers infers what a family supports
FUSED = "fused_by_hf_attnpatch"  # masks only: families that get it call no attention function
TORCH = PREFIX + "torch"  # sdpa for families with sinks, which transformers lets ask for nothing with that in its name
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
KERNELS = ("eager", "sdpa", "flex_attention", *FLASH)


def register() -> None:
    """Register the kernels and their mask functions, and the masks for families that compute attention themselves.

    ``FUSED`` has no attention function on purpose: ``from_pretrained(attn_implementation=...)`` then refuses the name,
    so that no model gets these masks without the hooks that understand them.
    """
    AttentionMaskInterface.register(FUSED, mask_registered(mask_function("sdpa", True)))
    for kernel in KERNELS:  # masks first: if interrupted here, the name stays unknown
        AttentionMaskInterface.register(PREFIX + kernel, mask_registered(mask_function(kernel)))
        AttentionInterface.register(PREFIX + kernel, attention_registered(attention_function(kernel)))
    AttentionMaskInterface.register(TORCH, mask_registered(mask_function("sdpa")))
    AttentionInterface.register(TORCH, attention_registered(attention_function("sdpa")))


@functools.cache
def attention_function(kernel: str) -> Callable[..., Output]:
    """Return the attention function of a kernel; the same object each time."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Output:
        return attend(AttentionCall(kernel, module, query, key, value, mask, given))

    return attention


def kernel_of(implementation: str) -> str:
    """Return the kernel of an attention implementation: the name itself, unless this package registered it."""
    return "sdpa" if implementation == TORCH else implementation.removeprefix(PREFIX)


def dense(implementation: str) -> str:
    """Return the implementation that computes every score (eager), with the same wrappers around it."""
    return (PREFIX if implementation.startswith(PREFIX) else "") + "eager"


def set_kernel(kernel: str) -> SetAttention:
    """Return the edit by which a model attends through its modules' wrappers, and by this kernel beneath them."""
    return SetAttention("", PREFIX + kernel, register, otherwise=TORCH if kernel == "sdpa" else None)


def chosen(model: PreTrainedModel, kernel: str) -> SetAttention:
    """Return the edit by which a model attends by another kernel, beneath the wrappers of its modules if it has any."""
    undeclared = kernel == "sdpa" and not getattr(model, words.DECLARES_SDPA, False)
    if undeclared or (kernel in KERNELS and any(wrappers_of(module) for module in model.modules())):
        return set_kernel(kernel)
    return SetAttention("", kernel)


def keep_wrappers(config: Any) -> None:
    """Switch a config to the wrapped name of its kernel, if a user selected transformers' own name."""
    if config._attn_implementation in KERNELS:
        config._attn_implementation = PREFIX + config._attn_implementation


def guarded(model: PreTrainedModel, base: str | None, places: Iterable[tuple[str, str]]) -> Iterator[Edit]:
    """Yield hooks that prevent any kernel from running without the wrappers, where they are missing.

    Args:
        model: the patched model.
        base: path of the module that makes the masks; None for the model itself.
        places: paths of attention modules, each with the path of the config whose attention implementation it reads.
    """
    for path, config in places:
        if not _has(model.get_submodule(path), Guard):
            yield AddPreHook(path, Guard(config_at(model, config)), "refuses to run without its wrappers")
    held = model.get_submodule(base or "")
    if not _has(held, Keeper):
        configs = [config_at(model, config) for config in dict.fromkeys(config for _, config in places)]
        yield AddPreHook(base or "", Keeper(configs), "another kernel runs beneath the wrappers, too")


def _has(module: nn.Module, kind: type) -> bool:
    return any(isinstance(hook, kind) for hook in module._forward_pre_hooks.values())


class Keeper:
    """Forward pre-hook of the module that makes masks: keeps the wrappers when a user selects another kernel.

    Args:
        configs: the configs whose attention implementation the wrapped modules read.
    """

    def __init__(self, configs: list[Any]):
        self.configs = configs

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Replace the kernel's own name by the wrapped one."""
        for config in self.configs:
            keep_wrappers(config)


class Guard:
    """Forward pre-hook of an attention module: raises if its wrappers would be skipped.

    Args:
        config: the config whose attention implementation the module reads.
    """

    def __init__(self, config: Any):
        self.config = config

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Check, and change nothing."""
        found, held = self.config._attn_implementation, wrappers_of(module)
        if held and not found.startswith(PREFIX):
            raise AttnPatchError(
                f"{type(module).__name__}: attention implementation {found!r} knows nothing of this model's "
                f"{', '.join(each.name for each in held)}, and would drop it; call the model itself, or choose one of "
                f"{', '.join(KERNELS)}."
            )
