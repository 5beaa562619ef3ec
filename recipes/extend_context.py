"""How far beyond its trained context does a model read, by which method? All figures in one command.

    python recipes/extend_context.py                        # the embedded model, `make results-extend-context`
    python recipes/extend_context.py --cells original yarn 'yarn/*'
    python recipes/extend_context.py --render               # tables and figures of what is there

A cell is one method, with or without a short training; each is one line of `metrics.jsonl` once it is finished, so the
same command goes on after a stop (a training from its last checkpoint). Then `README.md` and the figures are written.
The configuration names model, text, lengths and methods; run it in the project's root.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_attnpatch.errors import AttnPatchError
from recipes import settings
from recipes.data import DataError
from recipes.positions import command, extend_page
from recipes.settings import SettingsError

CONFIG = str(Path(__file__).parent / "configs/extend_context_embedded.yaml")

if __name__ == "__main__":
    settings.clearly(lambda: command.main(__doc__, CONFIG, extend_page.write), SettingsError, DataError, AttnPatchError)
