"""A tiny uptraining: its model, its configuration, and what it leaves behind. Shared by the tests of the recipe."""

import json

import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from recipes import uptrain

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "o_proj", "up_proj"],
    "modules_to_save": ["k_proj", "v_proj"],
}


def material(folder, tokenizer):
    """A folder with a model of 4 key-value heads, a tokenizer and text."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, num_key_value_heads=4, max_position_embeddings=64, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, number in (("train", 6), ("heldout", 4)):
        (folder / name).mkdir()
        for index in range(number):
            text = f"{name} {index}: the quick brown fox jumps over the lazy dog\n" * (5 + index)
            (folder / name / f"{index}.txt").write_text(text)
    return folder


def settings(folder, **changes):
    values = {
        "model": str(folder / "model"),
        "patches": [{"patch": "grouped_query", "num_kv_heads": 2, "method": "mean_rescaled"}],
        "data": {"source": str(folder / "train"), "block": 16, "cache": str(folder / "cache")},
        "heldout": {"source": str(folder / "heldout"), "windows": 3, "during": 4},
        "train": {"output": str(folder / "out"), "steps": 2, "batch_size": 4, "lr": 1e-2, "log_every": 1},
        "threads": 1,
    }
    for key, value in changes.items():
        section = values.get(key)
        values[key] = section | value if isinstance(section, dict) else value
    return values


def written(folder, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    return path


def launch(monkeypatch, path, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)  # a run is a process's first, outside of tests
    monkeypatch.setattr("sys.argv", ["uptrain.py", "--config", str(path), *flags])
    uptrain.main()


def outcome(output):
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return json.loads((output / "metrics.json").read_text()), log


def weights(output, name="model"):
    return AutoModelForCausalLM.from_pretrained(output / name).state_dict()
