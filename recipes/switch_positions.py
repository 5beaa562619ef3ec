"""What does it cost to replace the positions of a pretrained model, and how much does a short training recover?

    python recipes/switch_positions.py                      # `make results-switch-positions`
    python recipes/switch_positions.py --cells 'rope/*'
    python recipes/switch_positions.py --render             # tables and figures of what is there

Learned positions come from `recipes/pretrain.py --config recipes/configs/pretrain_learned.yaml`. Each model is measured
before the switch, directly after it, and after a training, with slopes of ALiBi that rise and with full ones from the
start. A cell is one line of `metrics.jsonl` once it is finished, so the same command goes on after a stop (a training
from its last checkpoint). Run it in the project's root.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_attnpatch.errors import AttnPatchError
from recipes import settings
from recipes.data import DataError
from recipes.positions import command, switch_page
from recipes.settings import SettingsError

CONFIG = str(Path(__file__).parent / "configs/switch_positions.yaml")

if __name__ == "__main__":
    settings.clearly(lambda: command.main(__doc__, CONFIG, switch_page.write), SettingsError, DataError, AttnPatchError)
