"""The uptraining recipe on a model sharded by torch's own `fully_shard`; Accelerate shards on accelerators only.

python sharded_worker.py --config CONFIG
"""

import copy
import sys
from pathlib import Path

from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes import loop, sharding, uptrain
from recipes.schedule import TrainConfig


def prepare(self, model, optimizer):
    """What Accelerate does with FSDP 2: the model is sharded in place, the optimizer is of the shards."""
    mesh = init_device_mesh("cpu", (self.num_processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    lr, betas = optimizer.defaults["lr"], optimizer.defaults["betas"]
    return model, loop.make_optimizer(model, TrainConfig(output="", steps=1, batch_size=1, lr=lr, betas=betas))


if __name__ == "__main__":
    Accelerator.prepare = prepare
    sharding.blueprint = lambda _, model: copy.deepcopy(model)
    uptrain.main()
