"""From questions to experience: prompts, rollouts, rewards, advantages."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from roma.advantages import ESTIMATORS, AdvantageInputs
from roma.data import Example
from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.rewards import RewardFunction
from roma.rollout.base import Rollouts, Sampler
from roma.train.batch import UpdateBatch
from roma.train.config import Config
from roma.train.states import distinct_rows
from roma.train.update import PolicyLoss
from roma.train.views import ViewMaker, Views
from roma.views import seed_for


@dataclass(frozen=True)
class Experience:
    """P prompts and their rollouts, B = P·G, rewarded: what a step learns from."""

    examples: list[Example]
    prompts: PromptBatch  # as the policy saw them when it sampled
    rollouts: Rollouts
    group: Tensor  # [B] int64, the prompt of each rollout
    rewards: dict[str, Tensor]  # each [B]
    advantages: Tensor  # [B] or [B, T]
    views: "Future[Views]"  # a thread may still be making them

    @property
    def correct(self) -> Tensor:
        """[B] bool: the answer is right, by the accuracy part of the reward."""
        return self.rewards["accuracy"] >= 0.5

    def batch(self, views: Views, *, aux_view: Tensor | None = None) -> UpdateBatch:
        """All of it as one batch, with views of its prompts."""
        return UpdateBatch(
            prompts=self.prompts,
            view_pixels=views.pixels,
            group=self.group,
            tokens=self.rollouts.tokens,
            mask=self.rollouts.mask,
            advantages=self.advantages,
            correct=self.correct,
            aux_view=aux_view,
            old_logp=None,
            clean_features=self.rollouts.features,
        )


class Collector:
    """Samples completions, rewards them and estimates advantages.

    Args:
        config: of the run.
        policy_loss: the policy, and how its log-probs are computed where an estimator needs them.
        sampler: the engine.
        score: the reward function.
        view_maker: starts on the views of the prompts before sampling begins.
    """

    def __init__(
        self,
        config: Config,
        policy_loss: PolicyLoss,
        sampler: Sampler,
        score: RewardFunction,
        view_maker: ViewMaker,
    ) -> None:
        """Keeps all parts."""
        self.config, self.policy_loss, self.sampler = config, policy_loss, sampler
        self.score, self.view_maker = score, view_maker
        self.estimator = ESTIMATORS[config.algorithm.adv_estimator]

    @property
    def policy(self) -> Policy:
        """The model that samples."""
        return self.policy_loss.policy

    def collect(self, examples: list[Example], step: int) -> tuple[Experience, dict[str, float]]:
        """The experience of a step, and its metrics."""
        config = self.config
        prompts = self.encode(examples)
        views = self.view_maker.start(self.policy, prompts, examples, step)
        if self.view_maker.rollouts_see_views:
            prompts = views.result().applied_to(prompts)
        with self.policy.autocast(config.trainer.dtype):
            rollouts = self.sampler.sample(
                prompts,
                group_size=config.worker.rollout.n,
                max_new_tokens=config.data.max_response_length,
                temperature=config.worker.rollout.temperature,
                seed=seed_for(config.trainer.seed, "rollout", step),
            )
        group = torch.arange(len(examples), device=self.policy.device)
        group = group.repeat_interleave(config.worker.rollout.n)
        rewards = self.reward(examples, group, rollouts)
        advantages = self._advantages(prompts, rollouts, group, rewards)
        if not self.policy.vision_is_frozen:
            # Megabytes an image, through the whole update, and soon those of older weights.
            rollouts = replace(rollouts, features=None)
        found = Experience(examples, prompts, rollouts, group, rewards, advantages, views)
        return found, _metrics(found)

    def answer(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Rewards [n] of one greedy answer to each example, on its clean images."""
        rollouts = self.sampler.sample(
            self.encode(examples),
            group_size=1,
            max_new_tokens=self.config.data.max_response_length,
            temperature=None,
            seed=0,
        )
        return self.reward(examples, torch.arange(len(examples)), rollouts)

    def encode(self, examples: Sequence[Example]) -> PromptBatch:
        """The prompts of examples."""
        images = [example.load_images() for example in examples]
        return self.policy.encode_prompts([example.problem for example in examples], images)

    def reward(
        self, examples: Sequence[Example], group: Tensor, rollouts: Rollouts
    ) -> dict[str, Tensor]:
        """Every part of the reward, [B] each."""
        texts = self.policy.processor.decode(rollouts.tokens, rollouts.mask)
        lengths, finished = rollouts.mask.sum(-1).tolist(), rollouts.finished.tolist()
        answers = [examples[prompt].answer for prompt in group.tolist()]
        keys = ("response", "response_length", "ground_truth", "finished")
        rows = zip(texts, lengths, answers, finished, strict=True)
        scores = self.score([dict(zip(keys, row, strict=True)) for row in rows])
        device = self.policy.device
        return {
            part: torch.tensor([float(s[part]) for s in scores], device=device)
            for part in scores[0]
        }

    def _advantages(
        self, prompts: PromptBatch, rollouts: Rollouts, group: Tensor, rewards: dict[str, Tensor]
    ) -> Tensor:
        needs, scored = self.estimator.needs, dict[str, Tensor]()
        if needs:
            batch = UpdateBatch.to_score(prompts, rollouts, group)
            with self.policy.autocast(self.config.trainer.dtype):
                limit = self.config.worker.actor.micro_batch_tokens
                asked = {name: name in needs for name in ("hidden", "entropy")}
                scores = self.policy_loss.score(batch, limit=limit, **asked)
            scored = {name: getattr(scores, name) for name in needs}
        return self.estimator(AdvantageInputs(rewards["overall"], group, rollouts.mask, **scored))


def _metrics(experience: Experience) -> dict[str, float]:
    rollouts, group = experience.rollouts, experience.group
    lengths = rollouts.mask.sum(-1).float()
    nonzero = (experience.advantages != 0).view(len(group), -1).any(1)
    distinct = distinct_rows(group, rollouts.tokens, rollouts.mask)[0]
    return {
        **{f"reward/{part}": float(values.mean()) for part, values in experience.rewards.items()},
        "advantage/nonzero_share": float(nonzero.float().mean()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/clip_ratio": float((~rollouts.finished).float().mean()),
        "rollout/distinct_share": len(distinct) / len(group),
    }
