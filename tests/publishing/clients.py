"""Programs that talk to the local Hub, each run in a process of its own: HF_ENDPOINT is read on import."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "NeverShowThisToAnybody42"

PREAMBLE = """
import json, os, sys, traceback, urllib.request
import torch

def order(*faults):
    data = json.dumps(faults).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/faults", data=data)).read()

def attempt(action):
    try:
        return {"done": str(action())}
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr)
        return {"error": str(error), "kind": type(error).__name__}

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12)[None] % 7).logits.double().flatten()[:200].tolist()

said = {}
"""


def run(hub, home, code, *arguments, token=TOKEN, offline=False):
    """Run a program; returns what it put into `said`, and all that it printed."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        **{"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"},
        **({"HF_TOKEN": token} if token else {}),
        **({"HF_HUB_OFFLINE": "1"} if offline else {}),
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent))),
    }
    program = PREAMBLE + code + "\nprint('SAID' + json.dumps(said))\n"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,  # transformers asks whether to trust code
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("SAID")[1]), done.stdout + done.stderr
