"""What a small run takes, measured: bytes of its tensors, each storage once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import small_model, small_run
from support.ranks import RANKS
from torch import Tensor, nn

from roma.models.qwen_vl import Policy
from roma.train.batch import UpdateBatch
from roma.train.config import Config
from roma.train.engine import make_engine
from roma.train.estimate import Parameters, states
from roma.train.update import PolicyLoss

RESPONSE = 20  # tokens


def batch(policy: Policy, *, prompts: int = 3, group: int = 4, views: int = 2) -> UpdateBatch:
    """Right answers of equal lengths to questions of one shape, all with an advantage."""
    generator = torch.Generator().manual_seed(0)

    def image() -> Any:
        return torch.randint(256, (64, 96, 3), generator=generator).to(torch.uint8).numpy()

    def pictures() -> list[list[Any]]:
        return [[image()] for _ in range(prompts)]

    encoded = policy.encode_prompts(["<image> sum ?"] * prompts, pictures())
    count = prompts * group
    return UpdateBatch(
        prompts=encoded,
        view_pixels=[policy.view_pixels(encoded, pictures()) for _ in range(views)],
        group=torch.arange(prompts).repeat_interleave(group),
        tokens=torch.randint(12, 30, (count, RESPONSE), generator=generator),
        mask=torch.ones(count, RESPONSE, dtype=torch.bool),
        advantages=torch.randn(count, generator=generator),
        correct=torch.ones(count, dtype=torch.bool),
        aux_view=torch.randint(max(views, 1), (count,), generator=generator) if views else None,
        old_logp=None,
    )


def size(tensors: Iterable[Tensor | None]) -> int:
    """Bytes, each storage once."""
    held = {}
    for tensor in tensors:
        if tensor is not None:
            local = getattr(tensor, "_local_tensor", tensor)
            storage = local.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def hold_states_to_measured(
    rank: int, folder: str, engine: str, several: bool, frozen: bool, ranks: int = RANKS
) -> None:
    """Weights, gradients and optimizer of an engine on this rank, within 15 % of the estimate."""
    config = small_run.config(Path(folder), f"trainer.engine={engine}")
    _start(rank, Path(folder), ranks)
    found = _measured(config, several=several, frozen=frozen)
    model = small_model.policy().model
    freeze = f"worker.actor.freeze_vision={str(frozen).lower()}"
    parameters = Parameters.count(model, small_run.config(Path(folder), freeze))
    expected = states(parameters, engine, ranks, half=False, cuda=False)
    for name, value in found.items():
        assert abs(getattr(expected, name) / value - 1) < 0.15, (name, expected, found)


def _start(rank: int, folder: Path, ranks: int) -> None:
    if ranks > 1 and not dist.is_initialized():  # DeepSpeed keeps the first group that it sees
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
        )


def _measured(config: Config, *, several: bool, frozen: bool) -> dict[str, int]:
    policy = small_model.policy()
    policy.model.model.visual.requires_grad_(not frozen)
    loss = PolicyLoss(policy, config.algorithm.roma, update="lean")
    made = make_engine(config, loss, torch.device("cpu"), lambda _: 1.0)
    whole = batch(policy)
    limit = 400 if several else 10**9
    parts = list(loss.parts(whole, limit))
    assert (len(parts) > 1) == several
    gradients = 0
    for _ in made.learn(parts, whole.totals()):
        held = [weight.grad for weight in made.parameters.values()]
        gradients = max(gradients, size(held + _whole_gradients(made.door)))
    inner = getattr(getattr(made, "ds", None), "optimizer", None)
    if inner is not None:  # DeepSpeed's share, summed over the ranks
        gradients += size(_tensors(inner.averaged_gradients))
    made.step()
    optimizer = size(_tensors([state for state in made.optimizer.state.values()]))
    if inner is not None:
        optimizer = size(_tensors([*inner.optimizer.state.values()]))
        optimizer += size(
            inner.fp32_partitioned_groups_flat
            if config.trainer.engine == "zero3"
            else inner.single_partition_of_fp32_groups
        )
    weights = size(getattr(weight, "ds_tensor", weight) for weight in made.parameters.values())
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def _whole_gradients(door: nn.Module) -> list[Tensor | None]:
    """Those that FSDP2 keeps until the last micro-batch; it has no public name for them."""
    found: list[Tensor | None] = []
    for module in door.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        group = module._get_fsdp_state()._fsdp_param_group
        for weight in group.fsdp_params if group else []:
            unsharded = getattr(weight, "_unsharded_param", None)
            found += [weight.unsharded_accumulated_grad, getattr(unsharded, "grad", None)]
    return found


def _tensors(found: Any) -> Iterable[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _tensors(item)
