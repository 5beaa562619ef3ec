"""A Llama of random numbers, the same in each layer, in shards; as large as asked, and never in memory as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from hf_attnpatch import embedded

SHARD = 256 << 20  # bytes of a file of weights
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def config(hidden: int, layers: int) -> LlamaConfig:
    """Multi-head attention of heads of 64, with the vocabulary of the embedded model, whose tokenizer it has."""
    found = LlamaConfig(
        **{"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": layers},
        **{"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "max_position_embeddings": 512},
        vocab_size=embedded.load_model().config.vocab_size,
        dtype="bfloat16",
    )
    found.architectures = ["LlamaForCausalLM"]
    return found


def layer_bytes(hidden: int) -> int:
    """Bytes of a layer in bfloat16."""
    return 2 * (4 * hidden * hidden + 3 * hidden * (11 * hidden // 4) + 2 * hidden)


def write(folder: Path, hidden: int, layers: int, shard: int = SHARD) -> int:
    """Write a checkpoint; return the bytes of its weights."""
    folder.mkdir(parents=True)
    made = config(hidden, layers)
    made.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(embedded.path() / name, folder / name)
    wide, table, size = made.intermediate_size, made.vocab_size, 0
    shapes = {"model.embed_tokens.weight": (table, hidden)}
    for number in range(layers):
        at = f"model.layers.{number}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, wide)}
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (table, hidden)}
    parts: list[list[str]] = [[]]
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if size and size + nbytes > shard:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += nbytes
    numbers = {shape: _numbers(shape, torch.Generator().manual_seed(0)) for shape in {*shapes.values()}}
    names, total = {}, 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: numbers[shapes[name]].clone() for name in part}
        save_file(tensors, folder / file, {"format": "pt"})
        names |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def _numbers(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape, generator=generator).bfloat16()
    return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()
