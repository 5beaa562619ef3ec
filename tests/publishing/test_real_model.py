"""SmolLM2, patched, compared, published, pulled into an empty cache by another process: the same figures."""

import json
from pathlib import Path

import pytest
from hub_server import Hub
from publishing.clients import TOKEN, run
from transformers import AutoModelForCausalLM

import hf_attnpatch as ap
from hf_attnpatch.checkpoint import tokenizer_of

SMOLLM2 = Path(__file__).resolve().parents[2] / "data/smollm2"
BASE = b"---\nlicense: apache-2.0\nlanguage: en\n---\n# SmolLM2\n"
SMALL = {"parts": ["loss", "layers"], "documents": 2, "lengths": [64, 256], "targets": 32, "layer_tokens": 64}

PUSH = """
import hf_attnpatch as ap
model = ap.load(sys.argv[1])
said["pushed"] = attempt(lambda: ap.push_to_hub(model, "me/smol", report=sys.argv[2], base_model="org/base"))
said["of another"] = attempt(lambda: ap.push_to_hub(
    ap.load(sys.argv[3]), "me/other", report=sys.argv[2], base_model="org/base"
))
"""

PULL = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/smol", dtype="auto")
said["without the package"] = "hf_attnpatch" not in sys.modules
import hf_attnpatch as ap
from hf_attnpatch.evaluation import perplexity
from hf_attnpatch.comparing import texts
from hf_attnpatch import embedded
from transformers import AutoTokenizer
text = texts.read(embedded.heldout(), AutoTokenizer.from_pretrained("me/smol"), name="x", count=2, length=256)
torch.set_num_threads(1)
found = perplexity(model, dict(enumerate(text.documents)), lengths=[64, 256], targets=32)
said["nats"] = [score.nats for score in found.scores]
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_published_model_is_the_one_that_was_measured(tmp_path):
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip(f"{SMOLLM2} is not there; python scripts/fetch_smollm2.py --out {SMOLLM2} makes it")
    model, original = (AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="auto") for _ in range(2))
    ap.patch_grouped_query(model, num_kv_heads=1)
    comparison = ap.compare(original, model, tmp_path / "report", **SMALL)
    for name, each in (("patched", model), ("other", original)):
        if name == "other":
            ap.patch_grouped_query(each, num_kv_heads=1, method="mean")
        each.save_pretrained(tmp_path / name)
    tokenizer = tokenizer_of(str(SMOLLM2))
    tokenizer.save_pretrained(tmp_path / "patched")
    with Hub(tmp_path / "hub", token=TOKEN) as hub:
        hub.commit("org/base", {"README.md": BASE})
        folders = [tmp_path / name for name in ("patched", "report", "other")]
        said, output = run(hub, tmp_path / "home", PUSH, *folders)
        assert "published" in said["pushed"].get("done", ""), said
        assert "the report is not of this model" in said["of another"]["error"]
        assert "me/other" not in hub.repositories
        found, _ = run(hub, tmp_path / "empty", PULL)
        files = hub.files("me/smol")
    assert found["without the package"]
    wanted = comparison.metrics["parts"]["loss"]["patched"]["scores"]
    assert found["nats"] == pytest.approx([score["nats"] for score in wanted], abs=1e-6)
    card = files["README.md"].decode()
    assert f"{wanted[-1]['nats']:.4f}" in card
    assert "![loss in nats per token" in card
    assert "(attnpatch/loss_by_length.png)" in card
    assert files["attnpatch/loss_by_length.png"].startswith(b"\x89PNG")
    assert json.loads(files["attnpatch/metrics.json"]) == comparison.metrics
    assert "license: apache-2.0" in card
    assert TOKEN not in output
