"""Computes the angles of each row of a batch by the scaling factor of its own request."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..interruption import inside
from ..twin import Change
from ..upstream import words
from ..upstream.parts import made_like, parts_of
from ..upstream.roles import Roles
from .config import scaled_fields
from .request_length import Requests, chosen

_KEPT = 32  # number of cached rotary modules, one for each length; each is one vector


@dataclass(frozen=True)
class Growth:
    """A scaling whose factor depends on the length of the request.

    Attributes:
        want: a ``RopeScaling``; its own factor is used by ``dynamic``, and with given ``longrope`` divisors.
        trained: window in tokens within which nothing changes.
        compose: whether the kind must be written as ``longrope``.
    """

    want: Any
    trained: int
    compose: bool

    def at(self, length: int) -> Any:
        """Return the static scaling for a request of this many tokens."""
        want, ratio = self.want, length / self.trained
        fields: dict[str, Any] = {"factor": ratio}
        if want.kind == "dynamic":
            fields = {"kind": "ntk", "factor": want.factor * ratio - (want.factor - 1)}
        elif want.kind == "dynamic_yarn":
            fields = {"kind": "yarn", "factor": ratio}
        elif want.long_factor is not None:
            fields = {}
        return dataclasses.replace(want, per_request=False, trained_length=None, **fields)

    def config(self, config: PretrainedConfig, module: nn.Module, length: int) -> PretrainedConfig:
        """Return a copy of a config that scales all positions for requests of this many tokens."""
        fields, _ = inside(  # real numbers, even while a model is built on the meta device
            torch.device("cpu"), lambda: scaled_fields(self.at(length), config, module, self.trained, self.compose)
        )
        fields["rope_parameters"] = _unswitched(fields["rope_parameters"])
        copied = copy.copy(config)
        for name, value in fields.items():
            Change("", name, value).assign(copied)
        return copied


class RequestAngles:
    """Forward hook of a rotary module: rows of requests beyond the trained window get angles by their own factor.

    A stock rotary module, built for that factor, computes them, so that a row has the bits of a model scaled by it.
    Rows within the window keep the module's own angles.

    Args:
        requests: shared by the hooks of the model.
        growth: scaling factor by length.
        roles: argument roles of the module's forward; the first declared one is the hidden states.
    """

    def __init__(self, requests: Requests, growth: Growth, roles: Roles):
        self.requests, self.growth, self.roles = requests, growth, roles
        self.modules: OrderedDict[tuple[int, str], nn.Module] = OrderedDict()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # decides by numbers that are none of the graph's
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Return the angles of every row, or None to keep the module's."""
        given = self.roles.bind(args, kwargs)
        named, positions = given.named, given.get(words.POSITIONS)
        hidden = named[self.roles.parameters[0]]
        lengths = chosen(self.requests, hidden.shape[-3])  # Gemma-3n has several versions of each row
        if set(lengths) == {self.requests.trained}:
            return None
        if len(set(lengths)) == 1:
            return self._module(module, lengths[0], hidden.device)(**named)
        return self._mixed(module, named, positions.expand(*positions.shape[:-2], hidden.shape[-3], -1), lengths)

    def _mixed(self, module: nn.Module, named: dict[str, Any], positions: Tensor, lengths: tuple[int, ...]) -> Any:
        """Compute the rows of each length by its own module, and restore their order.

        Positions are (batch, n), or (axes, batch, n) for tokens in time and space.
        """
        parts, order, hidden = [], [], named[self.roles.parameters[0]]
        for length in dict.fromkeys(lengths):
            rows = [row for row, n in enumerate(lengths) if n == length]
            where = self.roles.name(words.POSITIONS)
            inputs = {**named, self.roles.parameters[0]: hidden[..., rows, :, :], where: positions[..., rows, :]}
            own = module.forward if length == self.requests.trained else self._module(module, length, hidden.device)
            parts.append(own(**inputs))
            order += rows
        back = torch.tensor(order, device=positions.device).argsort()
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, -3).index_select(-3, back)
        each = zip(*(parts_of(part) or () for part in parts), strict=True)
        rows_in_order = [torch.cat(tensors, -3).index_select(-3, back) for tensors in each]
        return made_like(parts[0], rows_in_order, "a factor for each request")

    def _module(self, module: nn.Module, length: int, device: torch.device) -> nn.Module:
        key = (length, str(device))
        if key not in self.modules:
            if len(self.modules) >= _KEPT:
                self.modules.popitem(last=False)
            kind: Any = type(module)
            config = self.growth.config(module.config, module, length)
            made: nn.Module = inside(torch.device("cpu"), lambda: kind(config))
            self.modules[key] = made.to(device)
        return self.modules[key]


def _unswitched(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope parameters that use the ``longrope`` divisors beyond the window at every position."""
    new = {key: _unswitched(value) if isinstance(value, Mapping) else value for key, value in parameters.items()}
    return {**new, "short_factor": list(new["long_factor"])} if new.get("rope_type") == "longrope" else new
