"""What holds weights, gradients and optimizer: one process, DDP, DeepSpeed's ZeRO, FSDP2."""

from typing import Any

import torch

from roma.models.prompts import PromptBatch
from roma.rollout.base import Rollouts, Sampler
from roma.train import ranks
from roma.train.config.sections import Config
from roma.train.engine.base import Engine, Rate
from roma.train.update import PolicyLoss
from roma_kernels.errors import fail

__all__ = ["SHARDED", "Engine", "Within", "chosen", "make_engine"]

SHARDED = ("zero3", "fsdp2")


class Within:
    """A sampler that reads the policy's own weights, called where they are whole."""

    def __init__(self, engine: Engine, sampler: Sampler) -> None:
        """Keeps both."""
        self.engine, self.sampler = engine, sampler

    def sample(self, prompts: PromptBatch, **options: Any) -> Rollouts:
        """See `roma.rollout.base.Sampler`."""
        return self.engine.call(self.sampler.sample, prompts, **options)


def chosen(config: Config) -> str:
    """The engine of `trainer.engine`; "auto" depends on the number of ranks.

    Raises:
        ValueError: one process is asked for, and there are several.
    """
    name, several = config.trainer.engine, ranks.ranks() > 1
    if name == "auto":
        return "fsdp2" if several else "single"
    if name == "single" and several:
        remedy = "start one, or choose ddp, zero1, zero2, zero3 or fsdp2"
        fail("trainer.engine", "one process", f"{ranks.ranks()} of them", remedy)
    return name


def make_engine(
    config: Config, policy_loss: PolicyLoss, device: torch.device, rate: Rate
) -> Engine:
    """The engine of a run around a policy; every rank calls.

    Args:
        config: of the run.
        policy_loss: the policy and its loss, on the CPU where the engine shards weights.
        device: of this process.
        rate: the learning rate of an optimizer step, as a share of the peak.
    """
    name = chosen(config)
    given: Any = (policy_loss, device, config.worker.actor, config.trainer.dtype, rate)
    if name == "single":
        from roma.train.engine.whole import Single

        return Single(*given)
    if name == "ddp":
        from roma.train.engine.whole import Ddp

        return Ddp(*given)
    if name == "fsdp2":
        from roma.train.engine.fsdp2 import Fsdp2

        return Fsdp2(*given)
    from roma.train.engine.zero import Zero

    return Zero(*given, stage=int(name[-1]), options=config.trainer.deepspeed_config)
