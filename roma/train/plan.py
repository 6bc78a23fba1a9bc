"""Which rollouts an update runs on which images, chosen before the forward.

    clean     every rollout with a gain (A ≠ 0, or a KL to a reference, or an entropy bonus), and
              every right one: its log-probs are what the views are compared with
    view k    right rollouts, if λ_inv > 0; rollouts with a gain that drew k, if λ_aux > 0

No other pair has a gradient, takes part in a maximum or changes a metric (docs/MATH.md section 6).
Right rollouts are those of `UpdateBatch.correct`: all, if `algorithm.penalised` is "every".
Without a penalty (λ_inv = 0) its metrics are not logged: the right rollouts have no views then.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from roma import RomaConfig
from roma.models.flops import Adapters, Prompt, TextShape, VisionShape, cheaper
from roma.train.batch import UpdateBatch
from roma_kernels.errors import fail

Flags = NDArray[np.bool_]

UPDATES = ("auto", "joint", "lean", "two_pass")
PAYS_FROM = 6  # K, for prompts longer than their answers, half of these right (docs/COST.md)


@dataclass(frozen=True)
class Plan:
    """What is run of B rollouts on their clean images and K views."""

    gain: Flags  # [B]: the clean log-probs have a gradient
    clean: Flags  # [B]: they are needed
    penalised: Flags  # [B]: right, and λ_inv > 0
    auxiliary: Flags  # [K, B]: the auxiliary loss is taken here
    views: Flags  # [K, B]: this pair is run

    @classmethod
    def of(cls, batch: UpdateBatch, config: RomaConfig, *, lean: bool) -> "Plan":
        """The pairs of a batch: those that matter, or all of them."""
        rollouts, views = len(batch.group), len(batch.view_pixels)
        moved = ((batch.advantages != 0).view(rollouts, -1)).any(1).numpy(force=True)
        others = config.ref_coef > 0 or config.entropy_coef > 0
        gain = moved | others if config.main else np.zeros(rollouts, dtype=bool)
        right = batch.correct.numpy(force=True)
        penalised = right & bool(views and config.penalises)
        auxiliary = np.zeros((views, rollouts), dtype=bool)
        if batch.aux_view is not None and _positive(config.lambda_aux):
            drawn = batch.aux_view.numpy(force=True)
            auxiliary = (drawn == np.arange(views)[:, None]) & moved
        clean = gain | penalised | auxiliary.any(0)
        plan = cls(gain, clean, penalised, auxiliary, auxiliary | penalised)
        if lean:
            return plan
        every = np.ones_like(right)
        return replace(
            plan, gain=every, clean=every, views=np.ones_like(auxiliary) if views else auxiliary
        )

    def with_worst(self, worst: NDArray[np.int64]) -> "Plan":
        """The same after a first pass: of the views of a right rollout the worst alone.

        Args:
            worst: [B]; of rollouts that are not right, anything.
        """
        chosen = (worst == np.arange(len(self.views))[:, None]) & self.penalised
        return replace(self, views=self.auxiliary | chosen)

    def wanted(self) -> Flags:
        """[K + 1, B]: the clean images, then each view."""
        return np.concatenate([self.clean[None], self.views])


def _positive(weight: float | torch.Tensor) -> bool:
    return isinstance(weight, torch.Tensor) or weight > 0


def check_update(update: str, config: RomaConfig) -> None:
    """Checks that a form of the update exists and can have this loss.

    Raises:
        ValueError: an unknown name, two passes where the worst view is not one of a sequence, or
            an aggregation that depends on how a batch is cut.
    """
    if config.aggregation == "bnpo":
        expected = "'grpo', 'dapo', 'dr_grpo' or 'luspo'"
        remedy = "its divisor is the tokens of a call, which depend on what is run in it: take dapo"
        fail("aggregation", expected, "'bnpo'", remedy)
    if update not in UPDATES:
        fail("update", "one of " + ", ".join(UPDATES), repr(update), "choose one of them")
    if update == "two_pass" and not passes_can_be_two(config):
        expected = "'sequence' or 'batch', because update is two_pass"
        remedy = "every view of a token needs a gradient: take update=lean"
        fail("worst_over", expected, repr(config.worst_over), remedy)


def passes_can_be_two(config: RomaConfig) -> bool:
    """Whether one view of a right rollout has all of its penalty's gradient."""
    return config.worst_over in ("sequence", "batch")


def two_passes_pay(
    batch: UpdateBatch,
    plan: Plan,
    text: TextShape,
    vision: VisionShape,
    *,
    share_prompt: bool,
    vision_trained: bool,
    checkpointed: bool,
    adapters: Adapters | None = None,
) -> bool:
    """Whether two passes are predicted to cost less than one, for this very batch."""
    prompts, count = batch.prompts, len(batch.prompts.images)
    patches = prompts.grids.prod(-1).tolist()
    by_prompt = [
        x.reshape(count, -1).tolist()
        for x in (batch.mask.sum(-1).numpy(force=True), plan.penalised, plan.gain)
    ]
    drawn = None
    if batch.aux_view is not None:
        drawn = batch.aux_view.numpy(force=True).reshape(count, -1).tolist()
    described = [
        Prompt(
            tokens=prompts.lengths[p],
            frames=[patches[i] for i in prompts.images_of(p)],
            completions=lengths,
            right=right,
            learns=gain,
            aux=None if drawn is None else drawn[p],
        )
        for p, (lengths, right, gain) in enumerate(zip(*by_prompt, strict=True))
    ]
    form = cheaper(
        text,
        vision,
        described,
        views=len(plan.views),
        share_prompt=share_prompt,
        auxiliary=bool(plan.auxiliary.any()),
        vision_trained=vision_trained,
        checkpointed=checkpointed,
        adapters=adapters,
    )
    return form == "two_pass"
