"""What all tests share: no network, one thread each, and upstream's deprecations are errors."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

# transformers' own deprecations are build failures here: they are the next release's errors
DEPRECATIONS = (
    "error::FutureWarning:transformers",
    "error::DeprecationWarning:transformers",
    "ignore:_compile flag on create_block_mask:DeprecationWarning",  # torch's, of a call inside transformers
)


def pytest_configure(config):
    for line in DEPRECATIONS:  # a later line wins
        config.addinivalue_line("filterwarnings", line)
    config.addinivalue_line("markers", "compiled: with torch.compile, which the other tests go without")
    settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    settings.load_profile("repeatable")
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other


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
