"""The optimizer steps on one experience: mini-batches of all ranks, micro-batches of each."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from roma.rollout import rollout_weight
from roma.rollout.correction import off_policy_mask
from roma.train import ranks
from roma.train.batch import Totals, UpdateBatch
from roma.train.collect import Experience
from roma.train.config import Config
from roma.train.control import Gate, LambdaControl, as_scalar
from roma.train.engine import Engine
from roma.train.views import Views, by_corruption, hardest
from roma.views import ViewSpec, seed_for


class Learner:
    """Updates the policy.

    Args:
        config: of the run.
        engine: of the policy.

    Attributes:
        control: λ_inv, which moves from step to step if the options say so.
        gate: the bound of the legibility gate, if it is a quantile.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        """Keeps both."""
        self.config, self.engine = config, engine
        algorithm = config.algorithm
        self.control = LambdaControl(algorithm.control, float(algorithm.roma.lambda_inv))
        self.gate = Gate(algorithm.views.gate_quantile)
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
        counted = experience.penalised.view(len(experience.examples), -1)
        kept = hardest(divergence, counted, self.config.algorithm.views.k)
        return candidates.keep(experience.prompts, kept)

    def update(self, experience: Experience, views: Views, step: int) -> dict[str, float]:
        """All optimizer steps on one experience; returns the mean of their metrics."""
        actor, size = self.config.worker.actor, self.share
        moved = self._moved()
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
        found, seen = defaultdict(list), list[Tensor]()
        for epoch in range(actor.ppo_epochs):
            for number, mini in enumerate(minis):
                specs = [column[mini.start : mini.stop] for column in views.specs]
                own = replace(batch.select(mini), old_logp=old[number])
                first = not epoch and not number
                self._policy_loss.measures = first and self.control.measures(step)
                metrics, logp, divergence = self._optimizer_step(own, specs)
                if not epoch:
                    seen.append(divergence)
                if first and actor.ppo_epochs > 1:
                    old[0] = logp
                for name, value in metrics.items():
                    found[f"actor/{name}"].append(value)
        # A corruption that an update has not seen has no value there.
        mean = {name: sum(values) / len(values) for name, values in found.items()}
        self.control.on_penalty(step, mean.get("actor/roma_penalty_right"))
        norms = [mean.get(f"actor/grad_norm/{term}", 0.0) for term in ("inv", "rest")]
        self.control.on_norms(step, *norms)
        self.gate.observe(torch.cat(seen, dim=1))
        return mean | moved | others | {"actor/lr": self.engine.lr}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, beside the engine's; the same on every rank."""
        return self.control.state_dict() | self.gate.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; what this run does not move stays as it is given."""
        self.control.load_state_dict(state)
        self.gate.load_state_dict(state)

    def _moved(self) -> dict[str, float]:
        """Gives the loss what the steps before have moved; what is logged of it."""
        changed, logged = dict[str, Any](), dict[str, float]()
        if self.control.on:
            changed["lambda_inv"] = as_scalar(self.control.value, self.engine.device)
            logged["actor/lambda_inv"] = self.control.value
        if self.gate.quantile is not None:
            bound = math.inf if self.gate.bound is None else self.gate.bound
            changed["gate_bound"] = as_scalar(bound, self.engine.device)
            if self.gate.bound is not None:
                logged["actor/roma_gate_bound"] = self.gate.bound
        if changed:
            self._policy_loss.config = replace(self._policy_loss.config, **changed)
        return logged

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

        Nothing without such log-probs: then the policy itself has sampled.
        """
        options, sampled = self.config.worker.rollout, experience.rollouts.logp
        if sampled is None:
            return batch, {}
        logp = self._score(batch)
        batch = replace(batch, old_logp=logp)
        how = "truncate" if options.weight == "none" else options.weight
        columns = [ranks.gathered(_flat(x, batch.mask)) for x in (logp, sampled)]
        every = torch.ones_like(columns[0][None], dtype=torch.bool)
        _, metrics = rollout_weight(
            columns[0][None], columns[1][None], every, how=how, cap=options.weight_cap
        )
        if options.off_policy is not None:
            batch, share = _on_policy(batch, sampled, options.off_policy)
            metrics["rollout/off_policy_share"] = share
        if options.weight == "none":
            return batch, metrics
        advantages = batch.advantages
        weight, own = rollout_weight(
            logp,
            sampled,
            batch.mask,
            how=how,
            cap=options.weight_cap,
            level=options.weight_level,
        )
        if options.weight_level == "sequence":
            clipped = "rollout/weight_clipped_share"
            count = int(batch.mask.sum())
            both = ranks.summed({"clipped": own[clipped] * count, "count": count})
            metrics[clipped] = both["clipped"] / max(both["count"], 1)
            weight = weight[:, None].expand(batch.mask.shape)
        batch = replace(batch, rollout_weight=weight)
        if how == "mask" and self.config.algorithm.roma.main != "vespo":
            # What counts nothing has no advantage: the update does not run it. To vespo 0 stands
            # for a small factor of a rollout's ratio.
            by_token = advantages if advantages.ndim == 2 else advantages[:, None]
            batch = replace(batch, advantages=by_token.where(weight > 0, 0))
        return batch, metrics

    def _aux_view(self, experience: Experience, views: Views, step: int) -> Tensor | None:
        """[B]: the view of each rollout on which the auxiliary loss is taken."""
        if not views.pixels or self._policy_loss.config.lambda_aux == 0:
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
    ) -> tuple[dict[str, float], Tensor, Tensor]:
        """One optimizer step on a mini-batch, by micro-batches.

        Returns:
            Metrics; log-probs [B, T]; divergences [K, B] as in `Update`, NaN for text alone, too.
        """
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
        metrics |= _norms(metrics) | self._penalty_of_right(metrics, totals, divergence)
        pictured = torch.tensor([bool(own) for own in batch.prompts.images], device=logp.device)
        divergence = divergence.masked_fill(~pictured[batch.group], torch.nan)
        if specs:
            metrics.update(_by_corruption(divergence, specs))
        return metrics, logp, divergence

    def _penalty_of_right(
        self, metrics: dict[str, float], totals: Totals, divergence: Tensor
    ) -> dict[str, float]:
        """The penalty's mean over right rollouts that have a view in it, nats; nothing without any.

        One that the gate takes all views of would count as 0, and λ_inv fall the more of them.
        """
        if self.config.algorithm.control.target != "penalty":
            return {}
        bound, right = self._policy_loss.config.gate_bound, totals.correct
        if bound is not None:
            right -= int(ranks.summed({"out": int((divergence > bound).all(0).sum())})["out"])
        if not right:
            return {}
        over = self.config.algorithm.roma.penalty_over
        count = totals.sequences if over == "all" else totals.correct
        return {"roma_penalty_right": metrics["roma_penalty_worst"] * count / right}


def _flat(values: Tensor, mask: Tensor) -> Tensor:
    """The counted ones, as fp32."""
    return values[mask].float()


def _on_policy(batch: UpdateBatch, sampled: Tensor, threshold: float) -> tuple[UpdateBatch, float]:
    """The batch with advantages of 0 for rollouts that are off-policy, and their share."""
    advantages, logp = batch.advantages, batch.old_logp
    assert logp is not None  # the caller has scored it
    # Weights of tokens do not change its sign.
    sign = advantages if advantages.ndim == 1 else advantages.where(batch.mask, 0).sum(-1)
    kept = off_policy_mask(sign, logp, sampled, batch.mask, threshold=threshold)
    share = float(1 - ranks.gathered(kept).double().mean())
    advantages = advantages * (kept if advantages.ndim == 1 else kept[:, None])
    return replace(batch, advantages=advantages), share


def _norms(metrics: dict[str, float]) -> dict[str, float]:
    """The gradients' norms from their squares, which are taken out of the metrics."""
    squares = [metrics.pop(f"grad_sq_{term}", None) for term in ("inv", "rest")]
    if squares[0] is None or squares[1] is None:
        return {}
    inv, rest = (math.sqrt(square) for square in squares if square is not None)
    share = inv / (inv + rest) if inv + rest > 0 else 0.0
    return {"grad_norm/inv": inv, "grad_norm/rest": rest, "gradient_share": share}


def _by_corruption(divergence: Tensor, specs: Sequence[Sequence[ViewSpec]]) -> dict[str, float]:
    """Over the rollouts of all ranks."""
    told = ranks.told((divergence.cpu(), specs))
    columns = zip(*(own for _, own in told), strict=True)
    every = [[spec for own in column for spec in own] for column in columns]
    return dict(by_corruption(torch.cat([found for found, _ in told], dim=1), every))
