"""Everything about a model that a refusal, a failure or a revert must leave bitwise as it was."""

import hashlib
import json

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_attnpatch.attention import registry
from hf_attnpatch.upstream import dispatching

_CONTAINERS = ("_parameters", "_buffers", "_modules")


def bits(tensor):
    """A digest of shape, dtype, strides and content."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (tuple(tensor.shape), str(tensor.dtype), tensor.stride(), hashlib.sha1(raw).hexdigest())


def snapshot(model):
    """Identities and contents, comparable with ``==``; holds the objects, so no identity is used twice."""
    held = [*model.modules(), *model.parameters(), *model.buffers()]
    return {
        "held": _Held(held),
        "modules": [(path, id(m), type(m).__qualname__, m.training) for path, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, _grad(p), bits(p)) for n, p in model.named_parameters()],
        "buffers": [(n, id(b), bits(b)) for n, b in model.named_buffers()],
        "state_dict": list(model.state_dict()),
        "attributes": {path: _attributes(m) for path, m in model.named_modules()},
        "config": _config(model.config),
        "generation": _generation(model),
        "registries": registries(),
    }


def registries():
    """Keys and functions of transformers' process-wide tables.

    Names of our own are added by the first patch that needs them and stay, since other models may use them; what was
    registered once must not be registered anew.
    """
    registry.register()
    dispatching.register_listening()
    return {
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "configs": sorted(CONFIG_MAPPING.keys()),
    }


class _Held(list):
    """Keeps objects alive and takes no part in comparisons."""

    def __eq__(self, other):
        return True

    __hash__ = None


def _grad(parameter):
    return None if parameter.grad is None else (id(parameter.grad), bits(parameter.grad))


def _attributes(module):
    return {name: _value(value) for name, value in vars(module).items() if name not in _CONTAINERS}


def _value(value):
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, torch.Tensor):
        return (id(value), bits(value))
    if isinstance(value, dict):
        return (id(value), [(str(k), id(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)) and not any(isinstance(v, nn.Module) for v in value):
        return repr(value)
    return id(value)


def _config(config):
    if not isinstance(config, PretrainedConfig):
        return repr(config)
    inside = {k: v for k, v in vars(config).items()}
    return {
        "id": id(config),
        "class": type(config),
        "fields": {k: _config(v) if isinstance(v, PretrainedConfig) else repr(v) for k, v in inside.items()},
        "json": json.dumps(config.to_dict(), default=str, sort_keys=True),
    }


def _generation(model):
    config = getattr(model, "generation_config", None)
    return None if config is None else (id(config), json.dumps(config.to_dict(), default=str, sort_keys=True))
