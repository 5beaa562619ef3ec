"""Several threads and one model: writes wait for each other, streams and requests belong to a thread."""

import contextvars
import copy
import gc
import pickle
import threading
import time

import pytest
import torch
from architectures import tiny_model
from snapshot import registries, snapshot

import hf_attnpatch as ap
from hf_attnpatch import exclusive
from hf_attnpatch.exclusive import lock_of

TOKENS = torch.randint(5, 99, (2, 40), generator=torch.Generator().manual_seed(2))


def elsewhere(call):
    """Run in another thread; its result, or its exception raised here."""
    found = []

    def run():
        try:
            found.append(call())
        except BaseException as error:  # noqa: BLE001 - raised below
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def recurrent():
    model = tiny_model("gpt2")
    ap.patch_segment_recurrence(model, segment_length=8, memory_length=8, positions="bounded")
    return model


def scaled():
    model = tiny_model("llama", max_position_embeddings=16).requires_grad_(False)
    ap.patch_rope_scaling(model, kind="yarn", factor=4.0, per_request=True)
    return model


def test_patches_of_several_threads_come_one_after_the_other():
    model = tiny_model("llama")
    registries()
    before, start = snapshot(model), threading.Barrier(3)
    patches = (ap.GroupedQuery(num_kv_heads=2, method="mean"), ap.Alibi(), ap.RopeScaling(kind="linear", factor=2.0))
    failed = []

    def work(patch):
        start.wait()
        try:
            report = ap.apply(model, patch)
        except ap.AttnPatchError as error:  # it cannot stand on what another has just applied
            failed.append(error)
            return
        for _ in range(200):
            try:
                return report.revert()
            except ap.PatchConflict:  # another stands on top
                time.sleep(0.05)
        failed.append(patch)

    threads = [threading.Thread(target=work, args=(patch,)) for patch in patches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(isinstance(error, ap.AttnPatchError) for error in failed), failed
    assert snapshot(model) == before


def test_who_patches_waits_for_who_probes_and_for_models_of_the_same_config():
    model = tiny_model("gpt2")
    other = type(model)(model.config)
    done = threading.Event()
    with exclusive.alone(lock_of(model)):
        assert lock_of(model.transformer) is lock_of(other) is lock_of(model)
        thread = threading.Thread(target=lambda: (ap.plan(other, ap.PositionTable(length=200)), done.set()))
        thread.start()
        assert not done.wait(0.3)
        ap.plan(model, ap.PositionTable(length=200))  # the same thread may go on
    assert done.wait(60)
    thread.join()


def test_a_lock_is_no_part_of_the_model_and_goes_with_it():
    model = tiny_model("gpt2")
    ap.apply(model, ap.PositionTable(length=200))
    assert pickle.loads(pickle.dumps(model)).config.n_positions == 200
    twin = copy.deepcopy(model)
    assert lock_of(twin) is not lock_of(model)
    key = id(twin.config)
    assert key in exclusive._LOCKS
    del twin
    gc.collect()
    assert key not in exclusive._LOCKS


def test_a_forward_of_another_thread_in_the_self_check_is_counted():
    model, ran = tiny_model("gpt2"), []

    def serve(*_):
        if model.config.n_positions == 200 and not ran:
            ran.append(True)
            elsewhere(lambda: model(TOKENS))

    model.register_forward_pre_hook(serve)
    registries()
    before = snapshot(model)
    with pytest.raises(ap.SelfCheckFailed, match="ran 2 times on the probe, 1 before"):
        ap.apply(model, ap.PositionTable(length=200))
    assert ran
    assert snapshot(model) == before


def test_another_thread_does_not_move_the_memory_of_a_stream():
    model, parts = recurrent(), TOKENS.split(10, 1)
    with torch.no_grad(), ap.stream(model) as stream:
        alone = [model(part).logits for part in parts]
        count = stream.tokens
    with torch.no_grad(), ap.stream(model) as stream:
        found = []
        for part in parts:
            with pytest.raises(ap.AttnPatchError, match=r"another thread has a stream open.*Open one here, too"):
                elsewhere(lambda: model(TOKENS[:1]))
            found.append(model(part).logits)
        assert stream.tokens == count
    assert all(map(torch.equal, found, alone))
    with torch.no_grad():  # closed: everyone may
        assert torch.equal(elsewhere(lambda: model(TOKENS).logits), model(TOKENS).logits)


def test_each_thread_has_a_stream_of_its_own():
    model, parts = recurrent(), TOKENS.split(10, 1)

    def read(ids):
        with torch.no_grad(), ap.stream(model):
            return [model(part).logits for part in ids]

    alone, backwards = read(parts), read(parts[::-1])
    with torch.no_grad(), ap.stream(model):
        found = []
        for part in parts:
            assert all(map(torch.equal, elsewhere(lambda: read(parts[::-1])), backwards))
            found.append(model(part).logits)
    assert all(map(torch.equal, found, alone))


def test_a_copy_has_no_stream_open():
    model = recurrent()
    with torch.no_grad(), ap.stream(model):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.isfinite(elsewhere(lambda twin=twin: twin(TOKENS).logits)).all()


def test_a_request_that_another_thread_told_is_not_guessed():
    model = scaled()
    with ap.request(model, 60):
        wanted = model(TOKENS[:, :20]).logits
        with pytest.raises(ap.AttnPatchError, match=r"requests of 60 tokens.*would choose 20\. Say it here, too"):
            elsewhere(lambda: model(TOKENS[:, :20]))
        with pytest.raises(ap.AttnPatchError, match="requests of 60 tokens"):
            elsewhere(lambda: model.generate(TOKENS[:, :20], max_new_tokens=3, pad_token_id=0))

        def told():
            with ap.request(model, 60):
                return model(TOKENS[:, :20]).logits

        assert torch.equal(elsewhere(told), wanted)
        context = contextvars.copy_context()  # as asyncio.to_thread does
        assert torch.equal(elsewhere(lambda: context.run(lambda: model(TOKENS[:, :20]).logits)), wanted)
    elsewhere(lambda: model(TOKENS[:, :20]))  # nobody says anything now
    short = model(TOKENS[:, :10]).logits
    with ap.request(model, 12):  # within the window there is no choice
        assert torch.equal(elsewhere(lambda: model(TOKENS[:, :10]).logits), short)


def test_random_numbers_of_another_thread_go_on():
    model, torch_before = tiny_model("gpt2"), torch.get_rng_state()
    torch.manual_seed(7)
    wanted = torch.cat([torch.rand(1) for _ in range(400)])
    torch.manual_seed(7)
    found, enough = [], threading.Event()

    def draw():
        while not enough.is_set() or len(found) < 400:
            found.append(torch.rand(1))
            time.sleep(0.0005)

    thread = threading.Thread(target=draw)
    thread.start()
    ap.apply(model, ap.PositionTable(length=200)).revert()
    enough.set()
    thread.join(60)
    torch.set_rng_state(torch_before)
    assert torch.equal(torch.cat(found[:400]), wanted)


def test_own_text_takes_numbers_from_nobody():
    from hf_attnpatch.heads.own_text import OwnText

    model, before = tiny_model("gpt2"), torch.get_rng_state()
    text = OwnText(sequences=2, length=6, seed=3, start=5)
    assert torch.equal(text.write(model), text.write(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_s_random_state_is_left_alone_where_the_model_is_elsewhere(monkeypatch):
    def asked(*_):
        raise AssertionError("the model is on the CPU")

    monkeypatch.setattr(torch.cuda, "get_rng_state", asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    model = tiny_model("gpt2")
    ap.apply(model, ap.PositionTable(length=200))
    assert ap.verify(model, save=False).passed
