"""From questions to experience: prompts, rollouts, rewards, advantages."""

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from roma.advantages import Estimator
from roma.data import Example
from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.rewards import Failed, MarkedReward
from roma.rewards.loader import KEYS
from roma.rollout.base import Rollouts, Sampler
from roma.train import ranks
from roma.train.batch import UpdateBatch
from roma.train.config import Config
from roma.train.engine import Engine
from roma.train.mixed import Mix, level_share
from roma.train.refine import Advantages, ByGroup, Sampled
from roma.train.saved.agree import on_all
from roma.train.states import distinct_rows
from roma.train.views import ViewMaker, Views
from roma.views import seed_for


@dataclass(frozen=True)
class Experience:
    """P prompts and their rollouts, B = P·G, rewarded: what a step learns from."""

    examples: list[Example]
    prompts: PromptBatch  # as the policy saw them when it sampled
    rollouts: Rollouts
    group: Tensor  # [B] int64, the prompt of each rollout
    rewards: dict[str, Tensor]  # each [B]; "failed" is 1 where there is none, and the others 0
    advantages: Tensor  # [B] or [B, T]
    views: "Future[Views]"  # a thread may still be making them
    noisy: Tensor | None = None  # [B] bool: sampled on the first view; None: all on one image
    every_penalised: bool = False  # whatever the answer: the ablation without the correctness mask

    @property
    def correct(self) -> Tensor:
        """[B] bool: the answer is right, by the accuracy part of the reward."""
        return (self.rewards["accuracy"] >= 0.5) & ~self.failed

    @property
    def failed(self) -> Tensor:
        """[B] bool: the rollout has no reward. It is not right, and its advantage is 0."""
        return self.rewards["failed"] > 0

    @property
    def penalised(self) -> Tensor:
        """[B] bool: the penalty is on it, by `algorithm.penalised`; nothing else asks who is."""
        return ~self.failed if self.every_penalised else self.correct

    def batch(self, views: Views, *, aux_view: Tensor | None = None) -> UpdateBatch:
        """All of it as one batch, with views of its prompts."""
        return UpdateBatch(
            prompts=self.prompts,
            view_pixels=views.pixels,
            group=self.group,
            tokens=self.rollouts.tokens,
            mask=self.rollouts.mask,
            advantages=self.advantages,
            correct=self.penalised,
            aux_view=aux_view,
            old_logp=None,
            clean_features=self.rollouts.features,
        )


class Collector:
    """Samples completions, rewards them and estimates advantages.

    Args:
        config: of the run.
        engine: of the policy, whose log-probs an estimator may need.
        sampler: samples from the policy.
        score: the reward function.
        view_maker: starts on the views of the prompts before sampling begins.
        rows: the training set; None: no method has a value of its questions.

    Attributes:
        advantages: makes advantages of rewards.
        failure_log: called with the step and a row of reward_failures.jsonl for each rollout
            without a reward, on the first rank; None: they are counted and told on stderr alone.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        sampler: Sampler,
        score: MarkedReward,
        view_maker: ViewMaker,
        rows: Sequence[Example] = (),
    ) -> None:
        """Keeps all parts."""
        self.config, self.engine, self.sampler = config, engine, sampler
        self.score, self.view_maker = score, view_maker
        self.failure_log: Callable[[int, Sequence[Mapping[str, Any]]], None] | None = None
        self._step = 0
        self.advantages = Advantages(config, engine, view_maker, rows)
        self._mix = Mix.of(config) if view_maker.some_rollouts_see_views else None
        if self._mix:
            view_maker.level_share = lambda step: level_share(config, step)

    @property
    def estimator(self) -> Estimator | None:
        """The pure function that makes advantages of a group's rewards; None: none does."""
        base = self.advantages.base
        return base.estimator if isinstance(base, ByGroup) else None

    @estimator.setter
    def estimator(self, estimator: Estimator) -> None:
        self.advantages.base = ByGroup(estimator)

    @property
    def policy(self) -> Policy:
        """The model that samples."""
        return self.engine.policy

    def collect(self, examples: list[Example], step: int) -> tuple[Experience, dict[str, float]]:
        """The experience of a step, and its metrics."""
        self._step = step
        encoded: list[PromptBatch] = []
        # An image that cannot be read on one rank is an error on all of them.
        on_all(lambda: encoded.append(self.encode(examples)))
        (prompts,) = encoded
        views = self.view_maker.start(self.policy, prompts, examples, step)
        if self.view_maker.rollouts_see_views:
            prompts = views.result().applied_to(prompts)
        masked = self.advantages.start(prompts, examples, step)  # of what the policy sees
        rollouts = self._sample(prompts, views, step)
        group = torch.arange(len(examples), device=self.policy.device)
        group = group.repeat_interleave(self.config.worker.rollout.n)
        rewards = self.reward(examples, group, rollouts)
        sampled = Sampled(step, examples, prompts, rollouts, group, rewards, masked)
        advantages, metrics = self.advantages(sampled)
        if not self.policy.vision_is_frozen:
            # Megabytes an image, through the whole update, and soon those of older weights.
            rollouts = replace(rollouts, features=None)
        noisy = self._mix.is_noisy(group) if self._mix else None
        found = Experience(
            examples=examples,
            prompts=prompts,
            rollouts=rollouts,
            group=group,
            rewards=rewards,
            advantages=advantages,
            views=views,
            noisy=noisy,
            every_penalised=self.config.algorithm.penalised == "every",
        )
        return found, _metrics(found) | metrics

    def _sample(self, prompts: PromptBatch, views: "Future[Views]", step: int) -> Rollouts:
        """G completions of each prompt, all on its images or some on its first view."""
        size = self.config.worker.rollout.n
        if self._mix is None:
            return self._sample_on(prompts, size, "rollout", step)
        clean = self._sample_on(prompts, self._mix.clean, "rollout", step)
        degraded = views.result().applied_to(prompts)
        noisy = self._sample_on(degraded, self._mix.noisy, "noisy rollout", step)
        return self._mix.joined(clean, noisy, pad=self.policy.pad_id)

    def _sample_on(self, prompts: PromptBatch, size: int, key: str, step: int) -> Rollouts:
        # The ranks have prompts of their own, the first one those of a run in one process.
        place = (ranks.rank(),) if ranks.rank() else ()
        return self.sampler.sample(
            prompts,
            group_size=size,
            max_new_tokens=self.config.data.max_response_length,
            temperature=self.config.worker.rollout.temperature,
            seed=seed_for(self.config.trainer.seed, key, step, *place),
        )

    def answer(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Rewards [n] of one greedy answer to each example, on its clean images.

        An answer without a reward counts as a wrong one, in all parts 0, and 1 in "failed".
        """
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
        """Every part of the reward that all rollouts have, [B] each; 0 where it failed.

        "failed" is 1 there, else 0. The failures are told and logged.
        """
        texts = self.policy.processor.decode(rollouts.tokens, rollouts.mask)
        asked = [examples[prompt] for prompt in group.tolist()]
        rows = [
            {
                "response": text,
                "response_length": length,
                "ground_truth": example.answer,
                "finished": finished,
                "problem": example.question,
                "id": example.id,
            }
            for text, length, finished, example in zip(
                texts,
                rollouts.mask.sum(-1).tolist(),
                rollouts.finished.tolist(),
                asked,
                strict=True,
            )
        ]
        scores = self.score(rows)
        self._tell(rows, scores)
        parts = _parts(scores)
        found = [
            [0.0] * len(parts) if isinstance(s, Failed) else [s[p] for p in parts] for s in scores
        ]
        table = torch.tensor(found, dtype=torch.float32, device=rollouts.mask.device)
        failed = [float(isinstance(score, Failed)) for score in scores]
        rewards = dict(zip(parts, table.view(len(scores), -1).unbind(1), strict=True))
        return rewards | {"failed": table.new_tensor(failed)}

    def _tell(
        self, rows: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, float] | Failed]
    ) -> None:
        """One line on stderr for all failures of a call, and one each for the log."""
        failures = [
            {"id": row["id"], "reason": score.reason, "response": row["response"][:500]}
            for row, score in zip(rows, scores, strict=True)
            if isinstance(score, Failed)
        ]
        told = ranks.told((failures, len(rows)))
        every = [failure for own, _ in told for failure in own]
        if not every or ranks.rank():
            return
        count, first = sum(size for _, size in told), every[0]
        print(
            f"step {self._step}: no reward for {len(every)} of {count} rollouts; "
            f"the first, of row {first['id']}: {first['reason']}",
            file=sys.stderr,
        )
        if self.failure_log:
            self.failure_log(self._step, every)


def _parts(scores: Sequence[Mapping[str, float] | Failed]) -> list[str]:
    """The parts that all scores have, the same on every rank."""
    keys = [list(score) for score in scores if not isinstance(score, Failed)]
    told = [own for every in ranks.told(keys) for own in every] or [list(KEYS)]
    return [key for key in told[0] if all(key in own for own in told)]


def _metrics(experience: Experience) -> dict[str, float]:
    """Means over the rollouts of all ranks; of a reward's parts, over those that have one."""
    rollouts, group, noisy = experience.rollouts, experience.group, experience.noisy
    columns = {
        **experience.rewards,
        "nonzero": (experience.advantages != 0).view(len(group), -1).any(1),
        "length": rollouts.mask.sum(-1),
        "cut": ~rollouts.finished,
        "noisy": torch.zeros_like(rollouts.finished) if noisy is None else noisy,
    }
    table = ranks.gathered(torch.stack([column.double() for column in columns.values()], 1)).cpu()
    found = dict(zip(columns, table.unbind(1), strict=True))
    scored = found["failed"] == 0
    rewards = {part: found[part][scored] for part in experience.rewards if part != "failed"}
    kinds = {} if noisy is None else _by_kind(rewards, found["noisy"][scored] > 0)
    distinct = distinct_rows(group, rollouts.tokens, rollouts.mask)[0]
    return {
        **{f"reward/{part}": float(own.mean()) for part, own in rewards.items() if len(own)},
        **kinds,
        "reward/failed": float(found["failed"].mean()),
        "advantage/nonzero_share": float(found["nonzero"].mean()),
        "response_length/mean": float(found["length"].mean()),
        "response_length/max": float(found["length"].max()),
        "response_length/clip_ratio": float(found["cut"].mean()),
        "rollout/distinct_share": sum(ranks.told(len(distinct))) / len(table),
    }


def _by_kind(rewards: Mapping[str, Tensor], noisy: Tensor) -> dict[str, float]:
    """Means of the rewards on clean and on degraded images, where there are any."""
    kinds = {"clean": ~noisy, "noisy": noisy}
    return {
        f"reward/{part}/{kind}": float(own[rows].mean())
        for part, own in rewards.items()
        for kind, rows in kinds.items()
        if rows.any()
    }
