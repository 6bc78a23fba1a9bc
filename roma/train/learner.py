"""The optimizer steps on one experience: mini-batches of all ranks, micro-batches of each."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from roma.rollout import rollout_weight
from roma.train import ranks
from roma.train.batch import Totals, UpdateBatch
from roma.train.collect import Experience
from roma.train.config import Config
from roma.train.engine import Engine
from roma.train.views import Views, by_corruption, hardest
from roma.views import ViewSpec, seed_for


class Learner:
    """Updates the policy.

    Args:
        config: of the run.
        engine: of the policy.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        """Keeps both."""
        self.config, self.engine = config, engine
        actor = config.worker.actor
        self.share = ranks.share(actor.mini_batch_size, "worker.actor.mini_batch_size")
        self._policy_loss, self._limit = engine.policy_loss, actor.micro_batch_tokens

    def own(self) -> Tensor:
        """Which of a step's prompts are this rank's: a share of each mini-batch."""
        every = torch.arange(self.config.data.rollout_batch_size)
        return every.view(-1, ranks.ranks(), self.share)[:, ranks.rank()].flatten()

    def choose(self, experience: Experience, candidates: Views) -> Views:
        """The K candidates of each prompt on which the policy diverges most."""
        batch = experience.batch(candidates)
        divergence = self.engine.call(self._policy_loss.divergence, batch, limit=self._limit)
        right = experience.correct.view(len(experience.examples), -1)
        kept = hardest(divergence, right, self.config.algorithm.views.k)
        return candidates.keep(experience.prompts, kept)

    def update(self, experience: Experience, views: Views, step: int) -> dict[str, float]:
        """All optimizer steps on one experience; returns the mean of their metrics."""
        actor, size = self.config.worker.actor, self.share
        batch = experience.batch(views, aux_view=self._aux_view(experience, views, step))
        batch, others = self._corrected(batch, experience)
        if self.config.algorithm.roma.ref_coef > 0:
            batch = replace(batch, ref_logp=self.engine.call(self._reference, batch))
        minis = [range(at, at + size) for at in range(0, len(experience.examples), size)]
        # The first one's log-probs are those of its update; after that the policy is another.
        old: list[Tensor | None] = [None]
        for mini in minis[1:]:
            own = batch.select(mini)
            old.append(self._score(own) if own.old_logp is None else own.old_logp)
        found = defaultdict(list)
        for epoch in range(actor.ppo_epochs):
            for number, mini in enumerate(minis):
                specs = [column[mini.start : mini.stop] for column in views.specs]
                own = replace(batch.select(mini), old_logp=old[number])
                metrics, logp = self._optimizer_step(own, specs)
                if not epoch and not number and actor.ppo_epochs > 1:
                    old[0] = logp
                for name, value in metrics.items():
                    found[f"actor/{name}"].append(value)
        # A corruption that an update has not seen has no value there.
        mean = {name: sum(values) / len(values) for name, values in found.items()}
        return mean | others | {"actor/lr": self.engine.lr}

    def _score(self, batch: UpdateBatch) -> Tensor:
        return self.engine.call(self._policy_loss.score, batch, limit=self._limit).logp

    def _reference(self, batch: UpdateBatch) -> Tensor:
        """Log-probs [B, T] of the model without its adapters."""
        with self.engine.policy.reference():
            return self._policy_loss.score(batch, limit=self._limit).logp

    def _corrected(
        self, batch: UpdateBatch, experience: Experience
    ) -> tuple[UpdateBatch, dict[str, float]]:
        """The batch with weights for what the sampler's log-probs differ by from the policy's.

        Both losses are homogeneous in the advantage, min and clip included, so that a weight w ≥ 0
        of a token's losses is a factor of its advantage.
        """
        options, sampled = self.config.worker.rollout, experience.rollouts.logp
        if sampled is None:
            return batch, {}
        logp = self._score(batch)
        how = "truncate" if options.weight == "none" else options.weight
        columns = [ranks.gathered(_flat(x, batch.mask)) for x in (logp, sampled)]
        every = torch.ones_like(columns[0][None], dtype=torch.bool)
        _, metrics = rollout_weight(
            columns[0][None], columns[1][None], every, how=how, cap=options.weight_cap
        )
        batch = replace(batch, old_logp=logp)
        if options.weight == "none":
            return batch, metrics
        weight, _ = rollout_weight(logp, sampled, batch.mask, how=how, cap=options.weight_cap)
        advantages = batch.advantages
        advantages = advantages if advantages.ndim == 2 else advantages[:, None]
        return replace(batch, advantages=advantages * weight), metrics

    def _aux_view(self, experience: Experience, views: Views, step: int) -> Tensor | None:
        """[B]: the view of each rollout on which the auxiliary loss is taken."""
        if not views.pixels or self.config.algorithm.roma.lambda_aux == 0:
            return None
        seed = seed_for(self.config.trainer.seed, "aux_view", step)
        generator = torch.Generator().manual_seed(seed)
        # As on one rank: of all prompts of the step.
        own, prompts = self.own(), len(experience.examples)
        shape = (self.config.data.rollout_batch_size, len(experience.group) // prompts)
        if self.config.algorithm.aux_view == "rollout":
            drawn = torch.randint(len(views.pixels), shape, generator=generator)
            return drawn[own].flatten().to(self.engine.device)
        by_prompt = torch.randint(len(views.pixels), shape[:1], generator=generator)
        return by_prompt[own].to(self.engine.device)[experience.group]

    def _optimizer_step(
        self, batch: UpdateBatch, specs: Sequence[Sequence[ViewSpec]]
    ) -> tuple[dict[str, float], Tensor]:
        """One optimizer step on a mini-batch, by micro-batches: metrics, and log-probs [B, T]."""
        counts = ranks.summed(batch.totals()._asdict())
        totals = Totals(**{name: int(count) for name, count in counts.items()})
        found: dict[str, float] = defaultdict(float)
        logp = torch.zeros_like(batch.mask, dtype=torch.float32)
        divergence = logp.new_full((len(batch.view_pixels), len(batch.group)), torch.nan)
        for rows, out in self.engine.learn(self._policy_loss.parts(batch, self._limit), totals):
            idle = not len(rows)  # for another rank's sake
            for name, value in out.metrics.items():
                if specs or not name.startswith("roma_"):
                    found[name] += 0.0 if idle else float(value)
            found["scored"] += 0 if idle else out.scored
            if not idle:
                logp[rows], divergence[:, rows] = out.logp, out.divergence
        metrics = ranks.summed(found)
        # A mean over what was run.
        metrics["ppo_kl"] *= totals.tokens / max(metrics.pop("scored"), 1)
        metrics["grad_norm"] = self.engine.step()
        if specs:
            metrics.update(_by_corruption(batch, divergence, specs))
        return metrics, logp


def _flat(values: Tensor, mask: Tensor) -> Tensor:
    """The counted ones, as fp32."""
    return values[mask].float()


def _by_corruption(
    batch: UpdateBatch, divergence: Tensor, specs: Sequence[Sequence[ViewSpec]]
) -> dict[str, float]:
    """Over the rollouts of all ranks; text alone has no views."""
    seen = torch.tensor([bool(own) for own in batch.prompts.images], device=divergence.device)
    divergence = divergence.masked_fill(~seen[batch.group], torch.nan)
    told = ranks.told((divergence.cpu(), specs))
    columns = zip(*(own for _, own in told), strict=True)
    every = [[spec for own in column for spec in own] for column in columns]
    return dict(by_corruption(torch.cat([found for found, _ in told], dim=1), every))
