"""Importing the package: the model type is known at once, the rest when it is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import tiny_model

import hf_attnpatch as ap
from hf_attnpatch.probe import default_inputs, trace

ROOT = Path(__file__).parents[1]


def _fresh(code, *arguments):
    """Run code in a new process and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_patched_checkpoint_loads_right_after_the_import(tmp_path):
    model = tiny_model("gpt2")
    ap.patch_grouped_query(model, num_kv_heads=2)
    model.save_pretrained(tmp_path)
    torch.save(default_inputs(model), tmp_path / "inputs.pt")
    _fresh(
        """
import sys, torch
import hf_attnpatch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
from hf_attnpatch.probe import trace
torch.save(trace(model, torch.load(sys.argv[1] + "/inputs.pt")).logits, sys.argv[1] + "/logits.pt")
""",
        tmp_path,
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), trace(model, default_inputs(model)).logits)


@pytest.mark.parametrize(
    "statement",
    ["import hf_attnpatch", "import hf_attnpatch.cli, sys; sys.argv[1:] = ['--help']; hf_attnpatch.cli.main()"],
)
def test_what_takes_long_is_not_imported(statement):
    code = f"""
import sys
from transformers import AutoConfig  # without which the model type cannot be made known
from transformers.models.auto import modeling_auto
before = set(sys.modules)
try:
    {statement}
finally:
    slow = "torch", "transformers", "accelerate", "datasets", "peft"
    print("imported:", [m for m in {{*sys.modules}} - before if m.startswith(slow) or m == "hf_attnpatch.api"])
"""
    assert _fresh(code).endswith("imported: []\n")


@pytest.mark.parametrize("order", [1, -1])
def test_a_function_is_not_hidden_by_the_module_of_its_name(order):
    first, second = ["import hf_attnpatch.plan, hf_attnpatch.verify", "from hf_attnpatch import plan, verify"][::order]
    code = f"""
import hf_attnpatch as ap
{first}
{second}
assert callable(ap.plan) and callable(ap.verify)
from hf_attnpatch import plan, verify
from hf_attnpatch.plan import Plan, plan as same
assert plan is same is ap.plan and ap.Plan is Plan
"""
    _fresh(code)


def test_every_patch_is_known_by_name_before_any_was_asked_for():
    code = "from hf_attnpatch.patch import from_spec; print(from_spec({'patch': 'flash'}))"
    assert _fresh(code).strip() == str(ap.Flash())


def test_its_names_are_listed_and_others_are_not_there():
    assert set(ap.__all__) <= set(dir(ap))
    assert len(set(ap.__all__)) == len(ap.__all__)
    assert not hasattr(ap, "gropued_query")
    for name in ap.__all__:
        assert getattr(ap, name) is getattr(ap, name)
