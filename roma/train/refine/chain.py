"""The advantages of a step: scores of the rollouts if any are needed, estimator, weights."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from torch import Tensor

from roma.advantages import ESTIMATORS
from roma.data import Example
from roma.models.prompts import PromptBatch
from roma.train import ranks
from roma.train.batch import UpdateBatch
from roma.train.config import Config
from roma.train.engine import Engine
from roma.train.refine.group import ByGroup
from roma.train.refine.mssr import Mssr
from roma.train.refine.sampled import Base, Metrics, Sampled, Weights
from roma.train.refine.srpo import Srpo
from roma.train.refine.vgpo import Vgpo
from roma.train.scoring import Scores
from roma.train.views import ViewMaker, Views
from roma_kernels.errors import fail


class Advantages:
    """Rewards of a step's rollouts to advantages.

    Args:
        config: of the run.
        engine: of the policy, which scores the rollouts where a method reads scores.
        view_maker: makes the views that a method compares with.
        rows: the training set, whose questions a method may keep a value of.

    Attributes:
        base: makes advantages of rewards.
        weights: factors of them, token by token; None: none.
        mssr: the base, if it is MSSR.

    Raises:
        ValueError: the rows cannot be drawn as the options ask for.
    """

    def __init__(
        self, config: Config, engine: Engine, view_maker: ViewMaker, rows: Sequence[Example]
    ) -> None:
        """Keeps all."""
        algorithm = config.algorithm
        self._engine, self._view_maker = engine, view_maker
        self._limit = config.worker.actor.micro_batch_tokens
        self._reweight = algorithm.reweight
        self.mssr = Mssr(config, rows) if algorithm.adv_estimator == "mssr" else None
        self.base: Base = self.mssr or ByGroup(ESTIMATORS[algorithm.adv_estimator])
        self.weights: Weights | None = None
        if algorithm.reweight == "srpo":
            self.weights = Srpo(algorithm.srpo, engine, self._limit)
        elif algorithm.reweight == "vgpo":
            self.weights = Vgpo(algorithm.vgpo)

    def start(
        self, prompts: PromptBatch, examples: list[Example], step: int
    ) -> "Future[Views] | None":
        """Has a thread make the views of `Sampled.masked` while the policy samples, if any."""
        if self.weights is None or not self.weights.wants_masked:
            return None
        return self._view_maker.start_masked(self._engine.policy, prompts, examples, step)

    def __call__(self, sampled: Sampled) -> tuple[Tensor, Metrics]:
        """Advantages [B] or [B, T], and metrics; every rank calls.

        Raises:
            ValueError: in the first step, no response or no question of any rank has what the
                weights read.
        """
        scores = self._scores(sampled)
        advantages, metrics = self.base(sampled, scores)
        if self.weights is None:
            return advantages, metrics
        assert scores is not None  # weights read them
        self._check_images(sampled)
        factors, more = self.weights(sampled, scores)
        if advantages.ndim == 1:
            advantages = advantages[:, None]
        weighed = (advantages.double() * factors).to(advantages.dtype)
        return weighed, metrics | more | _spread(factors, sampled.rollouts.mask)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of the update that the advantages led to."""
        if self.mssr is not None:
            self.mssr.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty for methods without a memory."""
        return {} if self.mssr is None else {"mssr": self.mssr.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` of a run gave.

        Raises:
            ValueError: it is of a run on other questions.
        """
        if self.mssr is not None:
            self.mssr.load_state_dict(state.get("mssr"))

    def _scores(self, sampled: Sampled) -> Scores | None:
        needs, read = self.base.needs, None
        if self.weights is not None:
            needs, read = needs | self.weights.needs, self.weights.reader(sampled)
        if not needs and read is None:
            return None
        batch = UpdateBatch.to_score(sampled.prompts, sampled.rollouts, sampled.group)
        batch = replace(batch, advantages=(~sampled.failed).float())
        asked = {name: name in needs for name in ("hidden", "entropy")}
        score = self._engine.policy_loss.score
        return self._engine.call(score, batch, read=read, limit=self._limit, **asked)

    def _check_images(self, sampled: Sampled) -> None:
        if sampled.step > 1 or any(ranks.told(bool(len(sampled.prompts.grids)))):
            return
        expected = f"questions with images for {self._reweight}"
        remedy = "it weighs tokens by what they owe to an image: take algorithm.reweight=none"
        fail("algorithm.reweight", expected, "a first step without any", remedy)


def _spread(factors: Tensor, mask: Tensor) -> Metrics:
    """Over the counted tokens of all ranks."""
    size = factors[mask].log().abs()
    total = ranks.summed({"size": float(size.sum()), "count": len(size)})
    return {"advantage/log_weight": total["size"] / max(total["count"], 1.0)}
