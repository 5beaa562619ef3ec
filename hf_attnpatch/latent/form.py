"""Runs one attention module of a home with weights that are being worked out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..heads.refine import rows
from ..heads.replay import Call
from ..interruption import removing
from ..sites import Site
from ..upstream import words
from ..upstream.roles import frequencies, roles_of
from .shape import Shape
from .weights import LatentWeights


@dataclass(frozen=True)
class LatentForm:
    """The attention module of a home that has no numbers yet, called with given ones.

    Attributes:
        site: the module in the original model.
        home: a model of the home's type; only its rotary modules need numbers.
        shape: of the latent.
        output: path of the output projection below the module.
    """

    site: Site
    home: PreTrainedModel
    shape: Shape
    output: str = "o_proj"

    def attend(self, weights: LatentWeights, call: Call) -> tuple[Tensor, Tensor | None]:
        """Return what the heads give, (tokens, num_heads, v_head_dim), and the attention weights."""
        module = self.home.get_submodule(self.site.path)
        args, kwargs = self._inputs(module, call)
        device = next(v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        moved = _moved(weights, device)
        found: dict[str, Tensor] = {}
        with removing() as handles:
            taken = module.get_submodule(self.output)
            handles.append(taken.register_forward_pre_hook(lambda _, given: found.update(heads=given[0])))
            output = functional_call(module, self.shape.tensors(moved, torch.float32), args, kwargs)
        heads = found["heads"].view(*found["heads"].shape[:-1], self.site.num_heads, self.site.v_head_dim)
        heads = heads[call.tokens] if call.tokens is not None else heads.flatten(0, 1)
        return heads, rows(_probabilities(output), call)

    def hold(self, name: str, gradient: Tensor) -> None:
        """Keep biases of queries zero where the home has none."""
        if name == "query" and not self.shape.query_bias:
            gradient[..., -1] = 0

    def _inputs(self, module: nn.Module, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the recorded inputs in float32, with the home's angles in the place of the original's."""
        roles = roles_of(module)
        given = roles.bind(call.args, call.kwargs)
        states = given.get(words.STATES).float()
        positions = given.get(words.POSITIONS)
        if positions is None:
            positions = torch.arange(states.shape[1], device=states.device)[None]
        rotary = next(m for m in self.home.modules() if frequencies(m))
        given.put(words.STATES, states)
        given.put(words.ANGLES, rotary(states, positions))
        mask = given.get(words.MASK)
        if isinstance(mask, Tensor) and mask.is_floating_point():
            given.put(words.MASK, mask.float())
        return given.back()


def _moved(weights: LatentWeights, device: torch.device) -> LatentWeights:
    bias = weights.output_bias
    moved = {name: getattr(weights, name).to(device, torch.float32) for name in weights.trained}
    return LatentWeights(**moved, output_bias=None if bias is None else bias.to(device, torch.float32))


def _probabilities(output: object) -> Tensor | None:
    found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    return found if isinstance(found, Tensor) else None
