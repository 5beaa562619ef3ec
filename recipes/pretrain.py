"""Pretrains a small model from nothing, or goes on from a model that there is: tokenizer, data, model, training.

    python recipes/pretrain.py --config recipes/configs/pretrain_embedded.yaml

The embedded model of this package was made by exactly this, on the corpus of `scripts/build_corpus.py`. `model` is the
configuration of a new one, or the name of the one to go on from: a folder, a hub name, `embedded`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import settings
from recipes.checkpoints import ResumeError
from recipes.data import Blocks, DataConfig, DataError, documents, load_blocks
from recipes.log import LossError
from recipes.loop import Evaluate, new_accelerator, next_token_loss, train
from recipes.schedule import TrainConfig
from recipes.settings import SettingsError
from recipes.sources import load_model, locate, resolve
from recipes.tokenizer import train_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to load from `path` (or `embedded`), or to train on the training text if nothing is there."""

    path: str
    vocab_size: int = 4096


def load_tokenizer(config: TokenizerConfig, data: DataConfig) -> Any:
    """The tokenizer at `config.path`; trains it first where there is none."""
    path = locate(config.path)
    if not (Path(path) / "tokenizer.json").is_file():
        train_tokenizer(documents(data), path, vocab_size=config.vocab_size, context=data.block)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def first_model(values: dict[str, Any] | str, tokenizer: Any, seed: int) -> PreTrainedModel:
    """The model that the training begins with: one that there is, by name, or a new one.

    Raises:
        SettingsError: the model that there is has fewer embeddings than the tokenizer tokens.
    """
    if not isinstance(values, str):
        return new_model(values, tokenizer, seed)
    model = load_model(values, "float32")
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise SettingsError(
            f"model: {values} embeds {rows} tokens, and tokenizer.path has {len(tokenizer)}; give the model's own."
        )
    return model.train()


def new_model(values: dict[str, Any], tokenizer: Any, seed: int) -> PreTrainedModel:
    """A model with random weights; matrices that write to the residual stream start smaller, as in GPT-2.

    Args:
        values: fields of the configuration, and `model_type`, transformers' name for its kind; without it, `llama`.
        tokenizer: gives the size of the vocabulary and the special tokens.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **special, **values}
    config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # GPT-2's own are scaled already
                parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def heldout_loss(blocks: Blocks, count: int, batch: int = 8) -> Evaluate:
    """An evaluation for the loop: mean loss in nats a token over `count` blocks spread evenly over `blocks`."""
    chosen = [position * len(blocks) // count for position in range(min(count, len(blocks)))]

    def evaluate(model: nn.Module) -> dict[str, float]:
        total, tokens = 0.0, 0
        device = next(model.parameters()).device
        for start in range(0, len(chosen), batch):
            examples = [blocks[index] for index in chosen[start : start + batch]]
            part = {key: torch.stack([each[key] for each in examples]).to(device) for key in examples[0]}
            value, number = next_token_loss(model, part)
            total, tokens = total + float(value), tokens + int(number)
        return {"heldout_loss": total / tokens}

    return evaluate


def main() -> None:
    """Reads the configuration, checks the data, then makes the model, trains and saves it."""
    arguments = settings.parser(__doc__).parse_args()
    values = settings.read(arguments.config, arguments.overrides)
    data = resolve(settings.build(DataConfig, values["data"], "data"))
    config = settings.build(TrainConfig, values["train"], "train")
    accelerator = new_accelerator(config)
    with accelerator.main_process_first():
        tokenizer = load_tokenizer(settings.build(TokenizerConfig, values["tokenizer"], "tokenizer"), data)
        blocks = load_blocks(data, tokenizer)
        text = resolve(dataclasses.replace(data, source=values["heldout"], max_tokens=None))
        heldout = load_blocks(text, tokenizer)
    model = first_model(values["model"], tokenizer, config.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {blocks.tokens.size:,} training tokens, {len(heldout)} held-out blocks", flush=True)
    evaluate = heldout_loss(heldout, 64)
    train(model, blocks, next_token_loss, config, accelerator=accelerator, evaluate=evaluate, resume=arguments.resume)
    if accelerator.is_main_process:
        model.save_pretrained(Path(config.output) / "model")
        tokenizer.save_pretrained(Path(config.output) / "model")
        print(f"saved {config.output}/model")


if __name__ == "__main__":
    settings.clearly(main, SettingsError, DataError, ResumeError, LossError)
