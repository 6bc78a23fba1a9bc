"""verl's worker group under Ray, its batch from TransferQueue as the v1 trainer leaves it there.

Run by a test in a process of its own; prints what the update reported as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from verl_stack import cases


def main(store: Path) -> None:
    """One update_actor of rows that were put under keys, field after field."""
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict
    from verl.workers.engine_workers import TrainingWorker

    class Worker(TrainingWorker):
        """Joins its group first: verl's own names a back end for the CPU and one for the device."""

        def __init__(self, config):
            torch.distributed.init_process_group("gloo")
            super().__init__(config)

    passed = [name for name in os.environ if name.startswith(("VERL_", "ROMA_", "PYTHONPATH"))]
    variables = {name: os.environ[name] for name in passed} | {"TRANSFER_QUEUE_ENABLE": "1"}
    # verl reserves ten CPUs for a worker: fewer, and it waits for ever.
    ray.init(num_cpus=32, runtime_env={"env_vars": variables}, include_dashboard=False)
    tq.init(
        OmegaConf.create(
            {
                "backend": {
                    "storage_backend": "SimpleStorage",
                    "SimpleStorage": {"num_data_storage_units": 1, "total_storage_size": 1000},
                }
            }
        )
    )
    given = torch.load(store, weights_only=False)
    rows = [{name: value for name, value in row.items() if name != "images"} for row in given]
    keys = [f"prompt_{i}_0_0" for i in range(len(rows))]
    late = ("advantages", "old_log_probs")
    first = [{k: v for k, v in row.items() if k not in late} for row in rows]
    second = [{k: row[k] for k in late} for row in rows]
    tags = [{"status": "success"} for _ in rows]
    tq.kv_batch_put(
        keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(first), tags=tags
    )
    # As _compute_advantage does: what it gets back is what the actor is given.
    batch = tq.kv_batch_put(
        keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(second)
    )
    batch.extra_info.update(
        temperature=1.0,
        calculate_entropy=False,
        global_batch_size=len(rows),
        mini_batch_size=len(rows),
        epochs=1,
    )
    pool = RayResourcePool(process_on_nodes=[1], use_gpu=False)
    wrapped = RayClassWithInitArgs(ray.remote(Worker), config=cases.config())
    group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=wrapped, device_name="cpu")
    group.reset()
    group.set_loss_fn(cases.loss_of(cases.actor()))
    output = group.train_mini_batch(batch)
    output = output.get() if hasattr(output, "get") and not hasattr(output, "keys") else output
    metrics = output["metrics"]
    kept = {name: value for name, value in metrics.items() if "roma/" in name}
    kept["grad_norm"] = metrics["grad_norm"]
    print("said " + json.dumps({k: [float(x) for x in v] for k, v in kept.items()}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
