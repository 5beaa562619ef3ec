"""One name for each kernel in transformers' tables, under which the wrappers of a module run around it."""

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

PREFIX = "attnpatch_"  # before the kernel's own name: transformers reads from that what a family supports
FUSED = "fused_by_hf_attnpatch"  # no attention function of this name: the families that get it do not ask for one
TORCH = PREFIX + "torch"  # sdpa for families with sinks, which transformers lets ask for nothing with that in its name
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
KERNELS = ("eager", "sdpa", "flex_attention", *FLASH)


def register() -> None:
    """Make the kernels known, each with the masks that it takes; and masks for families that only ask for those.

    There is no attention function beside ``FUSED`` on purpose: ``from_pretrained(attn_implementation=...)`` then
    refuses the name, and nobody gets these masks without the hooks that understand them.
    """
    AttentionMaskInterface.register(FUSED, mask_registered(mask_function("sdpa", True)))
    for kernel in KERNELS:  # masks first: interrupted here, the name is not known
        AttentionMaskInterface.register(PREFIX + kernel, mask_registered(mask_function(kernel)))
        AttentionInterface.register(PREFIX + kernel, attention_registered(attention_function(kernel)))
    AttentionMaskInterface.register(TORCH, mask_registered(mask_function("sdpa")))
    AttentionInterface.register(TORCH, attention_registered(attention_function("sdpa")))


@functools.cache
def attention_function(kernel: str) -> Callable[..., Output]:
    """Return the attention function of a kernel: always the same."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Output:
        return attend(AttentionCall(kernel, module, query, key, value, mask, given))

    return attention


def kernel_of(implementation: str) -> str:
    """Return the kernel beneath an attention implementation: itself, where it is none of this package's."""
    return "sdpa" if implementation == TORCH else implementation.removeprefix(PREFIX)


def dense(implementation: str) -> str:
    """Return the implementation that computes every score, around which the same wrappers run."""
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
    """Choose the name of the same kernel that wrappers run around, where a user chose transformers' own."""
    if config._attn_implementation in KERNELS:
        config._attn_implementation = PREFIX + config._attn_implementation


def guarded(model: PreTrainedModel, base: str | None, places: Iterable[tuple[str, str]]) -> Iterator[Edit]:
    """Yield the hooks that let no kernel run without the wrappers, where they are not there yet.

    Args:
        model: that is patched.
        base: path of what makes the masks; None for the model itself.
        places: paths of attention modules, and of the configs whose attention implementation they ask for.
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
    """Forward pre-hook of what makes the masks: a kernel that a user chooses later runs beneath the wrappers.

    Args:
        configs: whose attention implementation modules with wrappers ask for.
    """

    def __init__(self, configs: list[Any]):
        self.configs = configs

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Look at the name, and choose ours for the same kernel."""
        for config in self.configs:
            keep_wrappers(config)


class Guard:
    """Forward pre-hook of an attention module: stops one whose wrappers would be passed over.

    Args:
        config: whose attention implementation the module asks for.
    """

    def __init__(self, config: Any):
        self.config = config

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Look, and change nothing."""
        found, held = self.config._attn_implementation, wrappers_of(module)
        if held and not found.startswith(PREFIX):
            raise AttnPatchError(
                f"{type(module).__name__}: attention implementation {found!r} knows nothing of this model's "
                f"{', '.join(each.name for each in held)}, and would drop it; call the model itself, or choose one of "
                f"{', '.join(KERNELS)}."
            )
