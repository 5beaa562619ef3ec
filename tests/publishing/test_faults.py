"""Connections that drop, a Hub that refuses, and tokens that must not show."""

import pytest
import torch
from architectures import tiny_model
from hub_server import Hub
from publishing.clients import TOKEN, run

import hf_attnpatch as ap
from hf_attnpatch import embedded

PUSH = """
import logging
logging.basicConfig(level=logging.DEBUG)
import hf_attnpatch as ap
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
said["logits"] = logits(model)

def push(name, **options):
    return attempt(lambda: ap.push_to_hub(model, name, license="mit", max_shard_size="30KB", **options))

order({"method": "PUT", "path": "/lfs/", "after": 1000, "skip": 1})
said["dropped once"] = push("me/once")
order({"method": "POST", "path": "/commit/", "late": True})
said["answer lost"] = push("me/lost")
order({"method": "POST", "path": "/commit/", "status": 500})
said["no commit"] = push("me/broken")
order()
said["again"] = push("me/broken")
order({"method": "POST", "path": "/commit/", "status": 412})
said["moved"] = push("me/once", overwrite=True, command="another card")

secret = json.dumps({"error": "no: " + os.environ["HF_TOKEN"]})
for status in (401, 403, 500):
    for method, path in (("GET", "/api/models/me/secret"), ("POST", "/repos/create"), ("POST", "/commit/")):
        order({"method": method, "path": path, "status": status, "times": 9, "body": secret})
        said[f"{status} {path}"] = push(f"me/secret{status}")
    order({"method": "GET", "path": "/resolve/", "status": status, "times": 99, "body": secret},
          {"method": "HEAD", "path": "/resolve/", "status": status, "times": 99, "body": secret})
    said[f"{status} load"] = attempt(lambda: ap.load(f"me/nothing{status}"))
order()
"""

LOAD = """
import hf_attnpatch as ap

order({"method": "GET", "path": "resolve.*safetensors$", "after": 12_000_000, "times": 1})
said["resumed"] = logits(ap.load("me/large", dtype=torch.float32))
"""

BROKEN = """
import hf_attnpatch as ap
from typer.testing import CliRunner
from hf_attnpatch.cli import app

order({"method": "GET", "path": "resolve.*safetensors$", "after": 5000, "times": 1},
      {"method": "GET", "path": "resolve.*safetensors$", "after": 0, "times": 99})
said["gone"] = attempt(lambda: ap.load("me/whole"))
order()
said["after"] = logits(ap.load("me/whole"))
secret = json.dumps({"error": "no: " + os.environ["HF_TOKEN"]})
order({"method": "HEAD", "path": "", "status": 403, "times": 99, "body": secret},
      {"method": "GET", "path": "", "status": 403, "times": 99, "body": secret})
found = CliRunner().invoke(app, ["push", sys.argv[1], "me/other", "--license", "mit"])
said["command line"] = {"code": found.exit_code, "text": found.output}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pushed(hub, base, tmp_path_factory):
    return run(hub, tmp_path_factory.mktemp("home"), PUSH, base)


def test_an_upload_that_drops_is_taken_up_again(pushed, hub):
    assert "published" in pushed[0]["dropped once"]["done"], pushed[0]["dropped once"]
    weights = {n: d for n, d in hub.repositories["me/once"].commits[-1][1].items() if n.endswith("safetensors")}
    assert len(weights) > 2
    assert len(hub.repositories["me/once"].commits) == 2


def test_a_commit_whose_answer_is_lost_is_found_to_be_there(pushed, hub):
    assert "published" in pushed[0]["answer lost"]["done"], pushed[0]["answer lost"]
    assert len(hub.repositories["me/lost"].commits) == 2


def test_nothing_half_published_is_claimed_or_seen(pushed, hub):
    error = pushed[0]["no commit"]["error"]
    assert "me/broken: sending the files: the Hub answered 500" in error
    assert "Nothing of it was published" in error
    assert list(hub.repositories["me/broken"].commits[0][1]) == [".gitattributes"]


def test_the_next_try_sends_no_large_file_again(pushed, hub):
    assert "published" in pushed[0]["again"]["done"]
    sent = [path for _, path, _ in hub.asked("PUT", "/lfs/")]
    assert len(sent) == len(set(sent)) + 1  # the one that was dropped; all pushes are of the same weights


def test_a_repository_that_moved_on_is_not_overwritten(pushed, hub):
    assert "somebody else committed to it meanwhile" in pushed[0]["moved"]["error"]


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("place", ["/api/models/me/secret", "/repos/create", "/commit/", "load"])
def test_a_refusal_is_clear_and_hides_the_token(pushed, status, place):
    found = pushed[0][f"{status} {place}"]
    assert "error" in found, found
    assert str(status) in found["error"] or (status == 401 and "such repository" in found["error"]), found
    if place != "load":
        assert found["kind"] == "AttnPatchError"
    assert TOKEN not in pushed[1]


def test_the_token_was_there_to_be_shown(pushed, hub):
    assert "<token>" in pushed[1]
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for _, _, headers in hub.log)


def test_a_download_that_drops_goes_on_where_it_was(hub, tmp_path):
    model = embedded.load_model()  # larger than the pieces of 10 MB in which the client writes
    ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    model.save_pretrained(tmp_path / "model")
    hub.commit("me/large", {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    said, _ = run(hub, tmp_path / "home", LOAD)
    ids = torch.arange(12)[None] % 7
    with torch.no_grad():
        assert said["resumed"] == model(input_ids=ids).logits.double().flatten()[:200].tolist()
    ranges = [headers.get("range") for _, path, headers in hub.asked("GET", "safetensors$") if "large" in path]
    assert ranges[0] is None
    assert ranges[1].startswith("bytes=1")


def test_a_download_that_breaks_for_good_is_a_clear_error_and_loads_later(pushed, hub, base, tmp_path):
    hub.commit("me/whole", hub.repositories["me/once"].commits[-1][1])
    said, output = run(hub, tmp_path, BROKEN, base)
    assert "me/whole: loading it: the connection to the Hub broke" in said["gone"]["error"]
    assert "run the same again" in said["gone"]["error"]
    assert said["after"] == pushed[0]["logits"]
    assert said["command line"]["code"] == 1
    assert TOKEN not in output + said["command line"]["text"]
