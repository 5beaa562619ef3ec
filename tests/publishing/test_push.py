"""Publishing over HTTP: what is on the Hub afterwards, who can load it, and what is refused."""

import hashlib
import json

import pytest
from architectures import tiny_model
from hub_server import Hub
from huggingface_hub import ModelCard
from publishing.clients import TOKEN, run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast as Fast

BASE_CARD = b"""---
license: other
license_name: llama3
license_link: LICENSE
language: [en, de]
tags: [not-carried-over]
---
# Base
"""

PUSH = """
import logging
logging.basicConfig(level=logging.DEBUG)
import hf_attnpatch as ap
from transformers import AutoModelForCausalLM

llama, gpt2, embedded = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(llama)
unpatched = attempt(lambda: ap.push_to_hub(model, "me/stock", base_model="org/base"))
first = ap.patch_rope_scaling(model, kind="linear", factor=2.0)
report = ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
said["logits"] = {"me/stock": logits(model)}
stock = dict(base_model="org/base", command="python 'make it.py' --heads 2", max_shard_size="30KB")
said["stock"] = attempt(lambda: ap.push_to_hub(model, "me/stock", report=report, private=True, **stock))
said["again"] = attempt(lambda: ap.push_to_hub(model, "me/stock", **stock))
said["public"] = attempt(lambda: ap.push_to_hub(model, "me/stock", private=False, overwrite=True, **stock))

own = AutoModelForCausalLM.from_pretrained(gpt2)
ap.patch_grouped_query(own, num_kv_heads=2, method="mean")
said["logits"]["me/own"] = logits(own)
said["own"] = attempt(lambda: ap.push_to_hub(own, "me/own", license="mit"))

refused = said["refused"] = {"unpatched": unpatched}
def refuse(name, *arguments, **options):
    refused[name] = attempt(lambda: ap.push_to_hub(*arguments, **options))
refuse("no licence", own, "me/other")
refuse("no such base", own, "me/other", base_model="org/nowhere")
refuse("base is a folder", own, "me/other", base_model="./here/it/is")
refuse("report of before", model, "me/other", license="mit", report=first)
refuse("report of another", own, "me/other", license="mit", report=report)
refuse("no folder", own, "me/other", license="mit", report="/no/such/folder")
refuse("a number", own, "me/other", license="mit", report=3)
refuse("token", own, "me/other", license="mit", command="HF_TOKEN=" + os.environ["HF_TOKEN"] + " python x.py")
refuse("name", own, "just a name", license="mit")
refuse("no owner", own, "name", license="mit")
refuse("no model", "me/own", "me/other", license="mit")
"""

LOAD = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

stock = AutoModelForCausalLM.from_pretrained("me/stock")
said["tokens"] = AutoTokenizer.from_pretrained("me/stock")("b")["input_ids"]
said["refused"] = attempt(lambda: AutoModelForCausalLM.from_pretrained("me/own"))
said["concrete"] = attempt(lambda: GPT2LMHeadModel.from_pretrained("me/own"))
said["package"] = "hf_attnpatch" in sys.modules
trusted = AutoModelForCausalLM.from_pretrained("me/own", trust_remote_code=True)
import hf_attnpatch as ap
said["logits"] = {"me/stock": logits(stock), "me/own": logits(trusted)}
said["with the package"] = logits(ap.load("me/own"))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), token=TOKEN) as server:
        server.commit("org/base", {"README.md": BASE_CARD, "LICENSE": b"as is", "weights.bin": b"1"})
        yield server


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name in ("llama", "gpt2"):
        tiny_model(name).save_pretrained(root / name)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    Fast(tokenizer_object=words, unk_token="?").save_pretrained(root / "llama")
    return root


@pytest.fixture(scope="module")
def pushed(hub, bases, tmp_path_factory):
    from hf_attnpatch import embedded

    return run(hub, tmp_path_factory.mktemp("home"), PUSH, bases / "llama", bases / "gpt2", embedded.path())


@pytest.fixture(scope="module")
def loaded(hub, pushed, tmp_path_factory):
    return run(hub, tmp_path_factory.mktemp("empty"), LOAD)[0]


def test_a_push_says_where_it_is(pushed, hub):
    said = pushed[0]["stock"]
    assert f"published {hub.url}/me/stock at {hub.repositories['me/stock'].commits[-1][0][:12]}" in said["done"]
    assert hub.repositories["me/stock"].private
    assert not hub.repositories["me/own"].private
    assert [len(hub.repositories[name].commits) for name in ("me/stock", "me/own")] == [2, 2]  # made, then one commit


def test_weights_go_as_large_files_in_pieces(pushed, hub):
    shards = {n: d for n, d in hub.repositories["me/stock"].commits[-1][1].items() if n.endswith(".safetensors")}
    assert len(shards) > 2
    assert set(shards.values()) <= hub.large


def test_stock_transformers_loads_a_stock_checkpoint_without_the_package(pushed, loaded):
    assert not loaded["package"]
    assert loaded["logits"]["me/stock"] == pushed[0]["logits"]["me/stock"]
    assert loaded["tokens"] == [1]


def test_another_checkpoint_is_refused_trusted_or_loaded_by_the_package(pushed, loaded):
    assert "trust_remote_code=True" in loaded["refused"]["error"]
    assert "hf_attnpatch" in loaded["concrete"]["error"]
    assert loaded["logits"]["me/own"] == pushed[0]["logits"]["me/own"] == loaded["with the package"]


def test_the_card_names_base_relation_and_licence(pushed, hub):
    data = ModelCard(hub.files("me/stock")["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation) == ("org/base", "finetune")
    assert (data.license, data.license_name, data.license_link) == ("other", "llama3", "LICENSE")
    assert data.language == ["en", "de"]
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["hf_attnpatch", "rope_scaling", "grouped_query"]
    assert hub.files("me/stock")["LICENSE"] == b"as is"
    other = ModelCard(hub.files("me/own")["README.md"].decode()).data
    assert (other.license, other.base_model) == ("mit", None)
    assert "base_model='owner/name'" in pushed[0]["own"]["done"]


def test_the_card_says_how_to_load_it(pushed, hub):
    stock, own = (hub.files(name)["README.md"].decode() for name in ("me/stock", "me/own"))
    assert 'model = AutoModelForCausalLM.from_pretrained("me/stock", revision=revision)' in stock
    assert "trust_remote_code" not in stock
    assert 'AutoModelForCausalLM.from_pretrained("me/own", revision=revision, trust_remote_code=True)' in own
    for name, card in (("me/stock", stock), ("me/own", own)):
        assert f'ap.load("{name}", revision=revision)' in card
        assert f'AutoTokenizer.from_pretrained("{name}", revision=revision)' in card
        blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
        assert all(block.count("revision = ") == 1 and compile(block, "card", "exec") for block in blocks)


def test_the_card_carries_the_command_the_report_and_the_record(pushed, hub):
    card = hub.files("me/stock")["README.md"].decode()
    assert "```sh\npython 'make it.py' --heads 2\n```" in card
    assert "sites called" in card
    record = json.loads(card.split("```json\n")[1].split("```")[0])
    assert record == json.loads(hub.files("me/stock")["config.json"])["attnpatch"]
    assert record["base_model"] == "org/base"
    assert [spec["patch"] for spec in record["patches"]] == ["rope_scaling", "grouped_query"]
    own = hub.files("me/own")["README.md"].decode()
    assert "attnpatch apply BASE OUT --patch grouped_query:num_kv_heads=2,method=mean" in own


def test_no_path_of_this_machine_is_published(pushed, hub, bases):
    for name in ("me/stock", "me/own"):
        for file, data in hub.files(name).items():
            assert str(bases.parent).encode() not in data, (name, file)


def test_a_repository_that_holds_files_is_left_alone(pushed, hub):
    again, public = pushed[0]["again"]["error"], pushed[0]["public"]["error"]
    assert "holds" in again
    assert "overwrite=True (--overwrite)" in again
    assert "is there and private, public was asked for" in public


REFUSED = {
    "unpatched": "has no record of a patch in its config",
    "no licence": "the licence of the base model (gpt2) is not known: the record names no repository",
    "no such base": "base model org/nowhere: the Hub shows no such repository",
    "base is a folder": "'./here/it/is' is no repository of the Hub",
    "report of before": "is of another model, or of before another patch",
    "report of another": "is of another model, or of before another patch",
    "no folder": "/no/such/folder",
    "a number": "report is a int",
    "token": "README.md would publish a token",
    "name": "'just a name' is no repository; write it as user/name",
    "no owner": "'name' is no repository; write it as user/name",
    "no model": "model is a str; it must be a transformers model",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_is_made(pushed, hub, case):
    found = pushed[0]["refused"][case]
    assert found.get("kind") == "AttnPatchError", found
    assert REFUSED[case] in found["error"]
    assert "me/other" not in hub.repositories
    assert "me/name" not in hub.repositories


def test_the_token_is_in_no_output_and_in_no_file(pushed, hub):
    assert TOKEN not in pushed[1]
    assert "DEBUG" in pushed[1]  # logging was on
    assert not any(TOKEN.encode() in path.read_bytes() for path in hub.folder.iterdir())
    assert hub.asked("PUT", "/lfs/")
    assert any(TOKEN in headers.get("authorization", "") for _, _, headers in hub.log)  # it was there to be leaked


def test_what_the_server_holds_is_what_git_says_it_is(hub):
    data = b"*.safetensors filter=lfs\n"
    entry = hub.entry("x", hub.put(data))
    assert entry["oid"] == hashlib.sha1(b"blob 25\0" + data).hexdigest()
