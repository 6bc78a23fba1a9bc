"""MSSR's tracked values in a run: every rank knows them all, and a checkpoint holds them."""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roma.advantages import mssr
from roma.advantages.base import OptionalInput
from roma.data import Example
from roma.train import ranks
from roma.train.config import Config
from roma.train.refine.sampled import Metrics, Sampled
from roma.train.scoring import Scores
from roma.views import seed_for
from roma_kernels.errors import fail

_LOOKED_AT = 16
"""Rows by which a dataset is recognised."""


class Mssr:
    """Advantages over a question's tracked value, whitened over all ranks, shaped by entropy.

    Args:
        config: of the run.
        rows: the training set.

    Raises:
        ValueError: more questions a step than the set has, if they are drawn by value.
    """

    def __init__(self, config: Config, rows: Sequence[Example]) -> None:
        """No question has a value yet."""
        self.options = options = config.algorithm.mssr
        self._seed = config.data.seed
        self.tracker = mssr.BetaTracker(
            target_kl=options.target_kl, forgetting=options.forgetting, dataset=identity(rows)
        )
        self._ids: list[str] = []
        if options.prioritised:
            size, limit = config.data.rollout_batch_size, config.data.limit
            self._ids = [rows[i].id for i in range(min(len(rows), limit or len(rows)))]
            if len(self._ids) < size:
                expected = f"at most the {len(self._ids)} rows with algorithm.mssr.prioritised"
                fail("data.rollout_batch_size", expected, str(size), "none is drawn twice a step")

    @property
    def needs(self) -> frozenset[OptionalInput]:
        """What gives the entropy; nothing where it has no weight."""
        if not self.options.entropy_coef:
            return frozenset()
        return frozenset({"logp" if self.options.entropy == "sampled" else "entropy"})

    def __call__(self, sampled: Sampled, scores: Scores | None) -> tuple[Tensor, Metrics]:
        """Advantages [B], or [B, T] with an entropy; and what the tracker had expected.

        Rollouts without a reward are left out of the tracker and of the whitening, and get 0.
        """
        advantages, metrics = self._by_value(sampled)
        if not self.needs:
            return advantages, metrics
        assert scores is not None
        entropy = scores.entropy
        if self.options.entropy == "sampled":
            entropy = mssr.sampled_entropy(scores.logp)
        assert entropy is not None
        shaped = mssr.shape_by_entropy(
            advantages,
            entropy.to(advantages.dtype),
            sampled.rollouts.mask,
            coef=self.options.entropy_coef,
            divisor=self.options.entropy_divisor,
        )
        return shaped, metrics

    def _by_value(self, sampled: Sampled) -> tuple[Tensor, Metrics]:
        rewards, failed = sampled.rewards["overall"], sampled.failed
        ids = [sampled.examples[prompt].id for prompt in sampled.group.tolist()]
        told = ranks.told(list(zip(ids, rewards.tolist(), failed.tolist(), strict=True)))
        first = sum(len(own) for own in told[: ranks.rank()])  # of this rank's
        every = [row for own in told for row in own]
        # In an order that does not depend on the number of ranks, to the bit.
        order = sorted((i for i, row in enumerate(every) if not row[2]), key=lambda i: every[i][0])
        found = torch.zeros(len(every), dtype=torch.float64)
        metrics = {"advantage/mssr_eta": self.tracker.eta}
        if order:
            given = torch.tensor([every[i][1] for i in order], dtype=torch.float64)
            raw = self.tracker.advantage([every[i][0] for i in order], given)
            found[order] = mssr.whiten(raw)
            metrics["advantage/mssr_value"] = float((given - raw).mean())
        return found[first:][: len(ids)].to(rewards), metrics

    def draw(self, step: int, count: int) -> Tensor:
        """[count] int64: the rows of a step, none twice, by what their values promise to teach."""
        weights = self.tracker.sampling_weight(self._ids)
        seed = seed_for(self._seed, "prioritised", step)
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(weights.double().cpu(), count, generator=generator)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Takes the KL of a step's update; one that is not finite, of a lost update, is none."""
        kl = metrics["actor/ppo_kl"]
        if math.isfinite(kl):
            self.tracker.observe_kl(kl)

    def state_dict(self) -> dict[str, Any]:
        """The tracker's."""
        return dict(self.tracker.state_dict())

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes back a tracker; of a run without one, says that all values begin anew.

        Raises:
            ValueError: it is of another dataset.
        """
        if state is not None:
            if state.get("dataset") != self.tracker.dataset:
                expected = "the questions whose values the checkpoint tracks (mssr)"
                remedy = (
                    "resume on that data, or start anew from its weights: trainer.resume=never "
                    "and worker.actor.model_path=…/actor"
                )
                fail("data.train_files", expected, "others", remedy)
            self.tracker.load_state_dict(state)
        elif ranks.rank() == 0:
            line = "the checkpoint is of a run without mssr: the value of each question begins anew"
            print(line, file=sys.stderr)


def identity(rows: Sequence[Example]) -> str:
    """A digest by which a dataset is recognised: its size, and some of its questions and answers.

    Neither where it lies nor a format that is written around a question changes it.
    """
    step = max(len(rows) // _LOOKED_AT, 1)
    seen = [rows[i] for i in range(0, len(rows), step)]
    parts = [str(len(rows)), *(part for row in seen for part in (row.id, row.question, row.answer))]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
