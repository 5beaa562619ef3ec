"""Does a project install, import, patch a tiny Llama on this machine, leave others alone, and undo itself?

Reads a request `{"peer": name, "threads": n}` from the file named first and writes `{"steps": [...], "versions": {}}`
into the file named second. Steps end at the first that fails, with the last line of its error.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(48)[None] * 7 % 128
Applied = tuple[AbstractContextManager[Any], Callable[[], object] | None]  # holds while entered; what undoes it


def tiny() -> LlamaForCausalLM:
    """A Llama with random weights, 4 heads, and attention as anybody can compute it."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="eager")).eval()


def ours(model: LlamaForCausalLM) -> Applied:
    """Eager attention to torch's flash kernel."""
    import hf_attnpatch as ap

    report = ap.patch_flash(model, backend="sdpa")
    return nullcontext(), report.revert


def liger(model: LlamaForCausalLM) -> Applied:
    """Its kernels for Llama, on one instance."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)
    return nullcontext(), None


def kvpress(model: LlamaForCausalLM) -> Applied:
    """A press that keeps the whole cache."""
    from kvpress import KnormPress

    return KnormPress(compression_ratio=0.0)(model), nullcontext


def better_transformer(model: LlamaForCausalLM) -> Applied:
    """Optimum's one-liner."""
    kind = importlib.import_module("optimum.bettertransformer").BetterTransformer
    kind.transform(model)
    return nullcontext(), None


def unsloth(model: LlamaForCausalLM) -> Applied:
    """Importing it is what patches."""
    importlib.import_module("unsloth")
    return nullcontext(), None


APPLY = {
    "hf_attnpatch": ("hf_attnpatch", ours),
    "liger-kernel": ("liger_kernel.transformers", liger),
    "kvpress": ("kvpress", kvpress),
    "optimum": ("optimum.bettertransformer", better_transformer),
    "unsloth": ("unsloth", unsloth),
}


def code(model: LlamaForCausalLM) -> dict[str, Any]:
    """What the classes of a model, and the functions its module calls, are at this moment."""
    module = sys.modules[type(model).__module__]
    kinds = {type(part) for part in model.modules()}
    methods = {f"{kind.__qualname__}.{name}": value for kind in kinds for name, value in vars(kind).items()}
    return {**methods, **{name: value for name, value in vars(module).items() if callable(value)}}


def steps(peer: str) -> list[dict[str, Any]]:
    """What was tried, in order."""
    package, apply = APPLY[peer]
    model, bystander = tiny(), tiny()
    with torch.no_grad():
        wanted = copy.deepcopy(model)(IDS).logits
    found: list[dict[str, Any]] = []
    before, registry = code(bystander), attention_functions()
    try:
        step = "imports"
        importlib.import_module(package)
        found.append({"step": step, "ok": True, "detail": ""})
        step = "patches a Llama"
        context, undo = apply(model)
        with context, torch.no_grad():
            found.append({"step": step, "ok": True, "detail": ""})
            step = "leaves other models alone"
            after, functions = code(bystander), attention_functions()
            changed = sorted(n for n in before if after.get(n) is not before[n])
            changed += [f"attention function {n}" for n, f in registry.items() if functions.get(n) is not f]
            found.append({"step": step, "ok": not changed, "detail": ", ".join(changed[:3])})
            step = "runs here, same logits"
            off = float((model(IDS, use_cache=True).logits - wanted).abs().max())
            found.append({"step": step, "ok": off < 1e-5, "detail": f"{off:.1e}"})
        step = "can be undone"
        if undo is not None:
            undo()
        with torch.no_grad():
            same = undo is not None and torch.equal(model(IDS).logits, wanted)
        found.append({"step": step, "ok": same, "detail": "" if undo else "no way offered"})
    except (Exception, SystemExit) as error:  # whatever a peer raises is the finding
        lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        found.append({"step": step, "ok": False, "detail": lines[0][:200]})
    return found


def attention_functions() -> dict[str, Any]:
    """Transformers' registry of attention functions, which a whole process shares."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys()}


def main() -> None:
    """Answer one request."""
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(request["threads"])
    found = {}
    for package in (request["peer"], "transformers", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    Path(sys.argv[2]).write_text(json.dumps({"steps": steps(request["peer"]), "versions": found}), "utf-8")


if __name__ == "__main__":
    main()
