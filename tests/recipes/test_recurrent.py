"""Rows that go on from batch to batch, a training with memory that can be killed, and how far back context helps."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recurrent_worker import LENGTHS, lanes, run
from safetensors.torch import load_file, save_file

from recipes import recurrence_page
from recipes.checkpoints import complete
from recipes.data import DataConfig, DataError
from recipes.effective_context import effective_context
from recipes.lanes import IGNORED, Lanes, load_lanes

WORKER = str(Path(__file__).with_name("recurrent_worker.py"))


def start(output, changes, *flags, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, WORKER, str(output), json.dumps(changes), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def losses(log):
    return [(record["step"], record["loss"], record["tokens"]) for record in log]


def test_rows_read_every_document_once_an_epoch_in_order():
    data = lanes()
    epochs = 3
    steps = epochs * max(map(len, data._plan(0))) + 9
    read = [[] for _ in range(data.rows)]
    for step in range(steps):
        for row, index in enumerate(data.order(step)):
            item = data[index]
            if item["reset"]:
                read[row].append([])
            count = int(item["attention_mask"].sum())
            assert item["attention_mask"].tolist() == [1] * count + [0] * (8 - count)
            assert (item["labels"][count:] == IGNORED).all()
            assert (item["labels"][:count] != IGNORED).all()
            if read[row][-1]:
                assert read[row][-1][-1] == int(item["input_ids"][0])  # the label before is the token now
            read[row][-1] += [*([] if read[row][-1] else [int(item["input_ids"][0])]), *item["labels"][:count].tolist()]
    texts = [text.tolist() for text in data.texts]
    assert [len(text) for text in texts] == list(LENGTHS)
    whole = [document for row in read for document in row[:-1]]
    assert all(document in texts for document in whole)
    first = [sum(1 for row in read for document in row if document == text) for text in texts]
    assert min(first) >= epochs - 1


def test_what_a_row_reads_depends_on_nothing_before():
    one, other = lanes(), lanes()
    for index in reversed(range(120)):
        assert all(torch.equal(one[index][key], other[index][key]) for key in one[index])


def test_documents_of_a_folder_become_rows(tmp_path, tokenizer):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("the quick brown fox " * (number + 2))
    config = DataConfig(source=str(tmp_path), block=16)
    data = load_lanes(config, tokenizer, 2, 0)
    assert len(data.texts) == 3
    assert data.texts[0][0] == data.texts[0][-1] == tokenizer.eos_token_id
    assert data.fingerprint != load_lanes(DataConfig(source=str(tmp_path), block=8), tokenizer, 2, 0).fingerprint
    with pytest.raises(DataError, match="3 documents for 4 rows"):
        load_lanes(config, tokenizer, 4, 0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_killed_run_resumes_bit_equal_with_its_memory(tmp_path, accumulation):
    torch.set_num_threads(1)
    changes = {"save_every": 3, "accumulation": accumulation}
    whole, model, _ = run(tmp_path / "whole", changes)
    done = start(tmp_path / "cut", changes, "--kill-step", "5")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in complete(tmp_path / "cut/checkpoints")] == ["step_00000003"]
    resumed, again, _ = run(tmp_path / "cut", changes, resume=True)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_the_memory_is_part_of_what_a_run_resumes_from(tmp_path):
    """A resumed run whose memory is thrown away differs: the test above would see it."""
    torch.set_num_threads(1)
    whole, *_ = run(tmp_path, {"save_every": 3, "steps": 6})
    file = complete(tmp_path / "checkpoints")[0] / "memory_0_process_0.safetensors"
    held = load_file(file)
    assert 8 <= held["0.k"].shape[2] < 8 + 4
    for name in ("0.v", "1.v"):
        held[name].zero_()
    save_file(held, file)
    last = complete(tmp_path / "checkpoints")[-1]
    last.rename(tmp_path / "gone")
    resumed, *_ = run(tmp_path, {"save_every": 3, "steps": 6}, resume=True)
    assert losses(resumed)[:3] == losses(whole)[:3]
    assert losses(resumed)[3][1] != losses(whole)[3][1]


def test_two_processes_are_the_same_training_as_one(tmp_path):
    torch.set_num_threads(1)
    one, model, _ = run(tmp_path / "one", {})
    done = start(tmp_path / "two", {"save_every": 4}, processes=2)
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two/result.pt")
    assert two["processes"] == 2
    for left, right in zip(one, two["log"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["tokens"] == right["tokens"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(two["model"][name], tensor, atol=1e-4, rtol=0)
    kept = sorted(path.name for path in complete(tmp_path / "two/checkpoints")[0].glob("memory_*"))
    assert kept == ["memory_0_process_0.safetensors", "memory_0_process_1.safetensors"]


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_passes_are_the_same_training(tmp_path, accumulation):
    torch.set_num_threads(1)
    one, model, _ = run(tmp_path / "one", {})
    many, again, _ = run(tmp_path / "many", {"accumulation": accumulation})
    for left, right in zip(one, many, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["tokens"] == right["tokens"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-4, rtol=0)


def test_effective_context_counts_gains_of_the_hardest_targets():
    flat = {8: torch.tensor([4.0, 1.0]), 16: torch.tensor([4.0, 1.0]), 32: torch.tensor([2.0, 1.0])}
    useful = {8: torch.tensor([4.0, 1.0]), 16: torch.tensor([3.0, 1.0]), 32: torch.tensor([2.99, 1.0])}
    assert effective_context({"flat": flat, "useful": useful}) == {"flat": 8, "useful": 16}
    assert effective_context({"useful": useful}, threshold=0.001) == {"useful": 32}


def test_more_rows_than_documents():
    with pytest.raises(DataError, match="1 documents for 2 rows"):
        Lanes([torch.arange(5)], rows=2, block=4)


def test_the_page_and_its_figure_follow_from_the_files_that_are_there(tmp_path, monkeypatch):
    for path in recurrence_page.OUT.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr("sys.argv", ["recurrence_page.py", "--out", str(tmp_path)])
    recurrence_page.main()
    written = (tmp_path / "README.md").read_text()
    assert written == (recurrence_page.OUT / "README.md").read_text()
    after = json.loads((tmp_path / "train_recurrent_embedded.json").read_text())["memory_segments"]["3"]["after"][
        "nats"
    ]
    assert f"{after:.3f} (" in written
    assert (tmp_path / "train_recurrent_embedded.png").stat().st_size > 10_000
