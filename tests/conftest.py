"""What all tests share: no network, one thread each, and upstream's deprecations are errors."""

import importlib
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from deprecations import WATCH
from hypothesis import settings
from transformers.utils import logging


def pytest_configure(config):
    # its releases before 5.3 compile functions on import, whose warnings the compiler only knows as Python's own
    importlib.import_module("transformers.models.gpt_bigcode.modeling_gpt_bigcode")
    WATCH.start()
    # a shell's background jobs ignore Ctrl-C, those of nohup hang-ups, and so do their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line("markers", "compiled: with torch.compile, which the other tests go without")
    config.addinivalue_line("markers", "deprecated(name): uses on purpose what transformers calls deprecated")
    settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    settings.load_profile("repeatable")
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A deprecation of transformers that our code causes fails the test: it is the next release's error."""
    try:
        result = yield
    finally:
        found = WATCH.take()
    meant = [name for mark in item.iter_markers("deprecated") for name in mark.args]
    ours = [line for line in found if not any(f"`{name}`" in line for name in meant)]
    if ours:
        pytest.fail("\n".join(["our code uses what transformers deprecates:", *ours]), pytrace=False)
    return result


@pytest.fixture(autouse=True)
def _same_global_state():
    """No test leaves the random state, the dtype or the thread count of the process to the next."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True)
def uncompiled(request):
    """Flex attention without its compiler (seconds a model, a minute where it is cold), unless marked `compiled`."""
    stance = "default" if request.node.get_closest_marker("compiled") else "force_eager"
    with torch.compiler.set_stance(stance):
        yield
