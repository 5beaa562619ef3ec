"""Saves the result of a recipe, whole or not at all, and loads it again to check that it is the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_attnpatch.commands.replacing import replacing

ROOT = Path(__file__).resolve().parents[1]
STOCK_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


class ReloadError(RuntimeError):
    """A saved model cannot be loaded again, or differs when it is."""


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Saves model and tokenizer; the folder appears under its name once all of it is on the disk.

    Raises:
        AttnPatchError: the folder is there and holds something else than a checkpoint.
    """
    with replacing(folder, overwrite=True) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)


@torch.no_grad()
def check_reload(model: PreTrainedModel, folder: Path, input_ids: torch.Tensor, *, stock: bool) -> dict[str, Any]:
    """Loads a saved model in a new process and compares its logits with those of the model in memory, on the CPU.

    Args:
        model: what was saved, in memory.
        folder: where it was saved.
        input_ids: a text to compare on, shape (batch, length).
        stock: whether transformers alone must load it; otherwise the process imports hf_attnpatch.

    Returns:
        `max_difference` of a logit, whether it was `stock` transformers, and the `attention` it was compared under.

    Raises:
        ReloadError: the process failed, or the package took part where it must not.
    """
    model = model.to("cpu").eval()
    probe = folder.with_name(f".{folder.name}-probe.safetensors")
    ids = input_ids.cpu().contiguous()
    save_file({"input_ids": ids, "logits": model(input_ids=ids, use_cache=False).logits.contiguous()}, probe)
    command = [sys.executable, str(Path(__file__).with_name("reload.py")), str(folder), str(probe)]
    command += ["--threads", str(torch.get_num_threads())]
    attention = getattr(model.config, "_attn_implementation", None)
    shared = attention if attention in STOCK_ATTENTION else None  # a key of ours means nothing to stock transformers
    command += ["--attention", shared] if shared else []
    command += [] if stock else ["--import", "hf_attnpatch", "--path", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    probe.unlink()
    if done.returncode:
        raise ReloadError(f"{folder}: saved, but a new process cannot load it:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["stock"] != stock:
        raise ReloadError(f"{folder}: the new process {'imported' if stock else 'did not import'} hf_attnpatch.")
    return {**found, "attention": shared or "default"}
