"""Comparing two small models: figures against the measures themselves, interruption, refusals."""

import json

import pytest
import torch
from architectures import tiny_model
from comparing import pairs
from typer.testing import CliRunner

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.cli import app
from hf_attnpatch.comparing import parts as parts_module
from hf_attnpatch.comparing.digest import model_digest
from hf_attnpatch.comparing.store import Store
from hf_attnpatch.evaluation import LayerDifference, layer_difference, perplexity

FILES = {"report.md", "report.html", "metrics.json", "loss_by_length.png", "damage_by_layer.png"}
FILES |= {"retrieval.png", "speed_and_cache.png"}


@pytest.fixture(scope="module")
def pair():
    original, patched = embedded.load_model(), embedded.load_model()
    report = ap.patch_grouped_query(patched, num_kv_heads=4, method="mean")
    return original, patched, report


@pytest.fixture(scope="module")
def comparison(pair, tmp_path_factory):
    return ap.compare(*pair[:2], tmp_path_factory.mktemp("compare"), **pairs.SMALL, say=lambda _: None)


def test_the_folder_holds_report_figures_and_metrics(comparison):
    assert FILES | {"parts"} == {path.name for path in comparison.folder.iterdir()}
    assert json.loads((comparison.folder / "metrics.json").read_text()) == comparison.metrics


def test_the_loss_is_that_of_the_documents(comparison, pair):
    found = comparison.metrics["parts"]["loss"]["patched"]
    tokenizer, settings = embedded.load_tokenizer(), comparison.metrics["settings"]
    # one window from each of the first documents: they are all longer than a window
    documents = [tokenizer(text, verbose=False)["input_ids"] for text in embedded.heldout()[: settings["documents"]]]
    windows = {f"window {i}": torch.tensor(ids[:256]) for i, ids in enumerate(documents)}
    wanted = perplexity(pair[1], windows, lengths=settings["lengths"], targets=settings["targets"])
    assert [s["nats"] for s in found["scores"]] == [s.nats for s in wanted.scores]
    assert found["scores"][-1]["nats"] > comparison.metrics["parts"]["loss"]["original"]["scores"][-1]["nats"]


def test_tables_say_what_the_metrics_say(comparison):
    report, metrics = (comparison.folder / "report.md").read_text(), comparison.metrics
    kl = metrics["parts"]["fidelity"]["kl"]["nats"]
    assert f"| KL from the original, nats/token | 0 | {kl:.4f} | - |" in report
    assert "| cache, bytes/token | 12,288 | 6,144 | -50.0% |" in report  # 2 x 6 layers x 8 heads x 32 x 4 bytes; half
    scores = [metrics["parts"]["loss"][which]["scores"][-1]["nats"] for which in ("original", "patched")]
    assert (
        f"| loss at 256 tokens, nats/token | {scores[0]:.4f} | {scores[1]:.4f} | {scores[1] - scores[0]:+.4f} "
        in report
    )
    assert '`grouped_query(num_kv_heads=4, method="mean"' in report


def test_the_same_command_measures_nothing_again(comparison, pair):
    said = []
    again = ap.compare(*pair[:2], comparison.folder, **pairs.SMALL, say=said.append)
    assert said
    assert all(line.endswith("there already") for line in said)
    assert again.metrics == comparison.metrics


def test_another_setting_measures_only_what_depends_on_it(comparison, pair):
    said = []
    ap.compare(*pair[:2], comparison.folder, **{**pairs.SMALL, "layer_tokens": 64}, say=said.append)
    assert [line.split("] ")[1] for line in said if line.endswith("...")] == ["layers ..."]


def test_an_interruption_loses_no_finished_part(pair, tmp_path, monkeypatch):
    small = {**pairs.SMALL, "parts": ["loss", "layers"]}
    measured = []

    def stop(*_):
        raise KeyboardInterrupt

    settings, loss, both = parts_module.MEASURES["loss"]
    counted = (settings, lambda p, which: measured.append(which) or loss(p, which), both)
    monkeypatch.setitem(parts_module.MEASURES, "loss", counted)
    layers = parts_module.MEASURES["layers"]
    monkeypatch.setitem(parts_module.MEASURES, "layers", (layers[0], stop, True))
    with pytest.raises(KeyboardInterrupt):
        ap.compare(*pair[:2], tmp_path, **small, say=lambda _: None)
    assert not (tmp_path / "metrics.json").exists()  # nothing unfinished looks finished
    monkeypatch.setitem(parts_module.MEASURES, "layers", layers)
    ap.compare(*pair[:2], tmp_path, **small, say=lambda _: None)
    assert measured == ["original", "patched"]
    assert (tmp_path / "report.html").exists()


def test_another_patched_model_keeps_what_is_known_of_the_original(comparison, pair):
    other, said = embedded.load_model(), []
    ap.patch_grouped_query(other, num_kv_heads=2, method="mean")
    ap.compare(pair[0], other, comparison.folder, **{**pairs.SMALL, "parts": ["loss"]}, say=said.append)
    assert [line.split("] ")[1].split(":")[0] for line in said if "there already" in line] == ["loss, original"]


def test_a_damaged_part_is_named(tmp_path):
    store = Store(tmp_path)
    store.put("loss, original", "0123456789abcdefg", {"x": 1})
    assert store.get("loss, original", "0123456789abcdefg") == {"x": 1}
    assert store.get("loss, original", "0123456789abcdefh") is None  # the same first digits, another key
    file = next(tmp_path.iterdir())
    file.write_text(file.read_text()[:20])
    with pytest.raises(ap.AttnPatchError, match=r"loss-original.*not a part of a comparison.*delete it"):
        store.get("loss, original", "0123456789abcdefg")


def test_layers_alone_is_their_own_error_in_place_all_before_too(pair):
    original, patched = embedded.load_model(), embedded.load_model()
    with torch.no_grad():  # a module of which the whole error is known: its output doubled
        patched.model.layers[1].self_attn.o_proj.weight *= 2
    ids = torch.tensor(embedded.load_tokenizer()(embedded.heldout()[0], verbose=False)["input_ids"][:64])
    paths = [f"model.layers.{i}.self_attn" for i in range(6)]
    found = layer_difference(original, patched, [ids], paths=paths)
    outputs = {}
    hook = original.model.layers[1].self_attn.register_forward_hook(lambda _, __, out: outputs.update(x=out[0]))
    with torch.no_grad():
        original(input_ids=ids[None])
    hook.remove()
    truth = outputs["x"][0].double()
    wanted = truth.square().sum() / (truth - truth.mean(dim=0)).square().sum()
    assert found.alone[1] == pytest.approx(float(wanted), rel=1e-6)
    assert [value for i, value in enumerate(found.alone) if i != 1] == [0.0] * 5
    assert found.in_place[0] == 0.0
    assert found.in_place[1] == pytest.approx(float(wanted), rel=1e-6)
    assert all(value > 0 for value in found.in_place[2:])
    assert LayerDifference.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_layers_that_are_not_there_are_named(pair):
    with pytest.raises(ap.AttnPatchError, match=r"has no module model\.layers\.9\.self_attn"):
        layer_difference(*pair[:2], [torch.arange(9)], paths=["model.layers.9.self_attn"])
    with pytest.raises(ap.AttnPatchError, match="takes no hidden states that could be exchanged"):
        layer_difference(*pair[:2], [torch.arange(9)], paths=["model.layers.0.mlp.act_fn.missing"[:0] or "model"])


def test_a_digest_is_of_what_a_model_computes(pair, tmp_path):
    original, patched, _ = pair
    patched.save_pretrained(tmp_path)
    digest = model_digest(patched)
    assert model_digest(ap.load(tmp_path, dtype=torch.float32)) == digest != model_digest(original)
    other = ap.load(tmp_path, dtype=torch.float32)
    ap.patch_rope_scaling(other, kind="linear", factor=2.0)  # no weight changes
    assert model_digest(other) != digest


def test_a_checkpoint_of_our_own_type_has_one_digest(tmp_path):
    model = tiny_model("gpt2")
    ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    model.save_pretrained(tmp_path)
    assert model_digest(ap.load(tmp_path)) == model_digest(model)


def test_a_report_is_held_to_its_model(comparison, pair):
    comparison.check_model(pair[1])
    again = ap.Comparison.load(comparison.folder)
    with pytest.raises(ap.AttnPatchError, match="the report is not of this model"):
        again.check_model(pair[0])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 99}'])
def test_a_folder_that_is_no_report_is_refused(tmp_path, content):
    with pytest.raises(ap.AttnPatchError, match="no comparison there"):
        ap.Comparison.load(tmp_path / "nowhere")
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ap.AttnPatchError, match="run the comparison again"):
        ap.Comparison.load(tmp_path)


def test_models_of_other_structure_say_which_part_is_left_out(pair, tmp_path):
    shallow = embedded.load_model()
    shallow.model.layers = shallow.model.layers[:4]
    small = {**pairs.SMALL, "parts": ["loss", "layers"]}
    found = ap.compare(pair[0], shallow, tmp_path, **small, say=lambda _: None)
    assert found.metrics["left_out"] == {"layers": "the attention modules differ: 6 and 4, under other names"}
    assert "* layers: the attention modules differ" in (tmp_path / "report.md").read_text()


def test_another_tokenizer_or_vocabulary_is_refused(pair, tmp_path):
    with pytest.raises(ap.AttnPatchError, match=r"4,096 and 3\d\d? tokens in their vocabulary|4,096 and \d+ tokens"):
        ap.compare(pair[0], tiny_model("llama"), tmp_path)
    folders = pairs.with_other_tokenizer(tmp_path / "models")
    with pytest.raises(ap.AttnPatchError, match="the tokenizers differ: 4096 and 4096 tokens, 2 of them not the same"):
        ap.compare(*folders, tmp_path, say=lambda _: None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": ["los"]}, "no los; choose from loss"),
        ({"parts": []}, "no part given"),
        ({"lengths": [1, 64]}, "wanted numbers of tokens from 2 up"),
        ({"targets": 64, "lengths": [64]}, "64 tokens do not leave any context"),
        ({"documents": 0}, "documents: 0; wanted 1 or more"),
        ({"text": ["too short"]}, "has 2 tokens|wanted at least one of"),
        ({"length": [64]}, "there is no setting length"),
        ({"retrieval_task": "hide and seek", "parts": ["retrieval"]}, "hide and seek"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(pair, tmp_path, given, message):
    with pytest.raises(ap.AttnPatchError, match=message):
        ap.compare(*pair[:2], tmp_path, **given, say=lambda _: None)
    assert not (tmp_path / "metrics.json").exists()


def test_what_is_no_model_is_refused(pair, tmp_path):
    with pytest.raises(ap.AttnPatchError, match="a int is no model"):
        ap.compare(pair[0], 3, tmp_path)
    with pytest.raises(ap.AttnPatchError, match="nowhere: is not there; wanted the folder of a checkpoint"):
        ap.compare(pair[0], tmp_path / "nowhere", tmp_path, say=lambda _: None)


def test_the_command_line_says_how_far_it_is(pair, tmp_path):
    pair[1].save_pretrained(tmp_path / "patched")
    embedded.load_tokenizer().save_pretrained(tmp_path / "patched")
    out = ["--out", str(tmp_path / "out"), "--parts", "loss", "--documents", "2", "--lengths", "64,128"]
    result = CliRunner().invoke(app, ["compare", "embedded", str(tmp_path / "patched"), *out, "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert "[1/2] loss, original ..." in result.stderr
    assert "| loss at 128 tokens, nats/token |" in result.stdout
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.startswith("# patched against embedded\n")
    assert "attnpatch compare embedded" in report
    for arguments, message in (
        (["embedded", str(tmp_path / "nowhere")], "nowhere"),
        (["embedded", "embedded", "--lengths", "a lot"], "'a lot' is no number of tokens"),
        (["embedded", "embedded", "--text", str(tmp_path / "none.txt")], "--text"),
    ):
        refused = CliRunner().invoke(app, ["compare", *arguments, *out[:2]])
        assert refused.exit_code == 1
        assert message in refused.stderr.splitlines()[-1]


def test_models_without_a_cache_are_compared_by_what_they_have(tmp_path):
    """A state-space model keeps no keys and values; its losses are measured all the same."""
    models = [tiny_model("mamba", seed=seed, vocab_size=4096) for seed in (0, 1)]
    amounts = {"lengths": [32, 64], "targets": 8, "documents": 2}
    tokenizer = embedded.load_tokenizer()
    found = ap.compare(*models, tmp_path, parts=["loss"], tokenizer=tokenizer, say=lambda _: None, **amounts)
    assert not found.metrics["original"]["cache_bytes_per_token"]  # none, or a state that does not grow
    assert "bytes/token" not in str(found)
    assert "loss at 64 tokens" in str(found)
