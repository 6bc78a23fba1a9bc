"""The module whose forward uses every weight: policy, views and loss.

Everything that reads a weight happens in `PolicyLoss.forward`, the head included, so that whatever
wraps the module (DDP, FSDP, ZeRO-3) sees each use of each parameter. Forms of the update, all with
the same gradients:

    joint      every rollout on its clean images and on every view, one graph
    lean       only the pairs that can matter (`roma.train.plan`)
    two_pass   lean, and of a right rollout's views the worst alone has a graph: they are scored
               without one first

each with a row per completion, or with a prompt once for all its rollouts (docs/COST.md).

PAPO's and DVRP's views have no gradient (`roma.train.contrast`): every rollout is scored on them
first, without a graph, and what follows is an update without views.
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from roma import RomaConfig, RomaLoss, roma_loss, view_divergence
from roma.models.flops import TextShape, VisionShape
from roma.models.prefix.groups import Integers
from roma.models.qwen_vl import Policy
from roma.train.batch import Totals, UpdateBatch
from roma.train.contrast import Contrast
from roma.train.gradients import squared_norms
from roma.train.parts import Parts, to_learn
from roma.train.plan import (
    PAYS_FROM,
    Flags,
    Plan,
    check_update,
    passes_can_be_two,
    two_passes_pay,
)
from roma.train.ranks import ranks
from roma.train.scoring import Scorer, ends_of
from roma.train.states import States
from roma_kernels.errors import fail

PENALTY_METRICS = ("roma_penalty_worst", "roma_penalty_mean", "roma_gated")


class Update(NamedTuple):
    """The loss of a micro-batch, and what is logged of it."""

    loss: Tensor  # 0-dim, differentiable
    metrics: dict[str, Tensor]  # those of `roma_loss`; of the penalty only if λ_inv > 0
    logp: Tensor  # [B, T] nats, clean images, detached; 0 where masked or not run
    divergence: Tensor  # [K, B] nats, of right rollouts if λ_inv > 0; NaN for all others
    scored: int  # tokens of the rollouts that were run


class PolicyLoss(Scorer):
    """The trainable module: a policy and the loss on it.

    Args:
        policy: the model.
        config: of the loss. A batch without views has no view terms, whatever the lambdas are.
        update: the form. "auto" takes lean or two_pass, whichever `roma.models.flops` predicts to
            be cheaper; lean for a model that it does not know; on several ranks, which must do the
            same, two_pass from K = 6 on.
        share_prompt: a prompt once for all its rollouts, where the policy can.
        contrast: terms on views without a gradient; then there are no others on views.

    Attributes:
        measures: whether the norms of the loss's gradients are measured, too
            (`roma.train.gradients`): "grad_sq_inv" and "grad_sq_rest" of the metrics.

    Raises:
        ValueError: no such form, two passes where no view of a rollout is its worst one, or an
            aggregation that depends on how a batch is cut.
    """

    def __init__(
        self,
        policy: Policy,
        config: RomaConfig,
        *,
        update: str = "auto",
        share_prompt: bool = True,
        contrast: Contrast | None = None,
    ) -> None:
        """Keeps all."""
        clean = replace(config, lambda_inv=0.0, lambda_aux=0.0, gate_bound=None, gate_tau=None)
        super().__init__(policy, clean if contrast else config, share_prompt=share_prompt)
        check_update(update, config)
        if contrast and update == "two_pass":
            remedy = "no view has a gradient, so that none is chosen: take update=lean"
            fail("update", "'auto', 'joint' or 'lean' with PAPO or DVRP", "'two_pass'", remedy)
        self.update, self.contrast, self.measures = update, contrast, False
        self._clean = clean
        self._shapes: tuple[TextShape, VisionShape] | None = None
        with suppress(ValueError):  # a model whose cost is not predicted
            model = policy.model.config
            self._shapes = TextShape.of(model), VisionShape.of(model)

    def forward(self, batch: UpdateBatch, totals: Totals) -> Update:
        """The loss of a micro-batch; over those that share `totals` the losses add up.

        On several ranks the calls of the model depend on `update`, `share_prompt` and K alone: a
        rank that skipped one would leave the others waiting (`roma.train.states`).
        """
        # ZeRO-3 gathers the head when it is read first: at the same place on every rank.
        _ = self.policy.head_weight
        if self.contrast and batch.view_pixels:
            return self._contrasted(batch, totals)
        return self._update(batch, totals)

    def _contrasted(self, batch: UpdateBatch, totals: Totals) -> Update:
        """Views first, without a graph; then an update that has none."""
        out = self._update(batch.without_views(), totals, self.view_logp(batch))
        shape = len(batch.view_pixels), len(batch.group)
        return out._replace(divergence=out.divergence.new_full(shape, torch.nan))

    def _update(
        self, batch: UpdateBatch, totals: Totals, view_logp: Tensor | None = None
    ) -> Update:
        if self.update == "joint" and not self.share_prompt:
            return self._joint_rows(batch, totals, view_logp)
        plan = self.plan(batch)
        states = self._states(batch)
        divergence = None
        if self._two_passes(batch, plan):
            plan, divergence = self._choose(plan, states)
        plan = self._run(plan, states)
        return self._loss(batch, totals, plan, states, divergence, view_logp)

    def plan(self, batch: UpdateBatch) -> Plan:
        """What is run of a batch; of one pass, or before the worst views are known."""
        lean = self.update != "joint" and not self.contrast
        return Plan.of(batch, self.config, lean=lean)

    def parts(self, batch: UpdateBatch, limit: int) -> Parts:
        """What an update runs of a batch, as micro-batches of at most `limit` tokens.

        Tokens are the text model's, those of all images together. A prompt stays whole, even one
        that is larger; a prompt of which nothing is run is left out. On every rank there are as
        many (`roma.train.parts`).
        """
        sizes = self._states(batch).tokens_by_prompt(self.plan(batch).wanted())
        return to_learn(batch, sizes.tolist(), limit)

    def _two_passes(self, batch: UpdateBatch, plan: Plan) -> bool:
        if not self.config.penalises:  # no view is the worst
            return False
        if self.update != "auto" or not passes_can_be_two(self.config):
            return self.update == "two_pass"
        if ranks() > 1:  # which must agree, and have different batches
            return len(plan.views) >= PAYS_FROM
        return self._shapes is not None and two_passes_pay(
            batch,
            plan,
            *self._shapes,
            share_prompt=self.share_prompt,
            vision_trained=not self.policy.vision_is_frozen,
            checkpointed=self.policy.is_checkpointed,
            adapters=self.policy.adapters,
        )

    @torch.no_grad()
    def _choose(self, plan: Plan, states: States) -> tuple[Plan, Tensor]:
        """The first of two passes: of every right rollout the worst view, and all divergences."""
        views, count = len(plan.views), len(plan.clean)
        first = np.broadcast_to(plan.penalised, (views + 1, count)).copy()
        rollouts = np.flatnonzero(plan.penalised & (states.lengths > 0))
        weight = self.policy.head_weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        divergence = weight.new_full((views, count), torch.nan, dtype=dtype)
        divergence[:, torch.from_numpy(plan.penalised)] = 0  # of a rollout without a token
        if views:
            states.run(first)
        if not len(rollouts):
            return plan, divergence
        found = self._divergences(states, rollouts)
        divergence[:, torch.from_numpy(rollouts)] = found
        worst = np.zeros(count, dtype=np.int64)
        by = found.sum(1, keepdim=True) if self.config.worst_over == "batch" else found
        if self.config.gate_bound is not None:  # where it leaves out all views, one is run
            by = by.masked_fill(by > self.config.gate_bound, -torch.inf)
        worst[rollouts] = by.argmax(0).numpy(force=True)
        return plan.with_worst(worst), divergence

    def _run(self, plan: Plan, states: States) -> Plan:
        """The pass with a graph, and before it one without, of clean rollouts that need none."""
        wanted, prompt = plan.wanted(), states.batch.group.numpy(force=True)
        # A prompt with a gain among its rollouts has a graph; there the others cost little.
        frozen = plan.clean & ~np.isin(prompt, prompt[plan.gain])
        if ranks() == 1:
            without = np.zeros_like(wanted)
            without[0] = frozen & ~states.has(0)
            with torch.no_grad():
                states.run(without)
        wanted[0] &= ~(frozen & states.has(0))
        if not wanted.any():
            wanted = _one(wanted)
            plan = replace(plan, clean=plan.clean | wanted[0])
        states.run(wanted)
        return plan

    def _loss(
        self,
        batch: UpdateBatch,
        totals: Totals,
        plan: Plan,
        states: States,
        divergence: Tensor | None,
        view_logp: Tensor | None,
    ) -> Update:
        # One without a token adds nothing; with it there may be as many rollouts as tokens, where
        # the loss would take what is by token for what is by rollout.
        some = plan.clean & (states.lengths > 0)
        kept = np.flatnonzero(some if some.any() else plan.clean)
        lengths = states.lengths[kept]
        views, rollouts = np.nonzero(plan.views[:, kept])
        device = batch.tokens.device
        rows = torch.from_numpy(kept).to(device)
        mask = batch.mask[rows]
        variants = np.concatenate([np.zeros_like(kept), views + 1])
        picked = states.read(variants, np.concatenate([kept, kept[rollouts]]))
        hidden, view_hidden = picked.tensor_split([int(lengths.sum())])
        view_rows = None
        if len(plan.views):
            long = lengths[rollouts]
            at = np.full((len(plan.views), len(kept)), -1, dtype=np.int64)
            at[views, rollouts] = np.cumsum(long) - long
            view_rows = torch.from_numpy(at).to(device)
        given = batch.constants(rows, mask)
        given |= {"view_rows": view_rows, "cu_seqlens": ends_of(lengths).to(device)}
        found = None if view_rows is None else view_hidden
        out, metrics = self._terms(hidden, found, batch.tokens[rows][mask], totals, given)
        loss, contrasts = self._contrasts(out.loss, out.logp, view_logp, lengths, totals)
        metrics, penalised = metrics | contrasts, plan.penalised
        if divergence is None:
            divergence = out.logp.new_full(plan.views.shape, torch.nan)
            divergence[:, torch.from_numpy(penalised)] = 0  # of a rollout without a token
            found = self._divergence(torch.cat([out.logp[None], out.view_logp]), lengths)
            divergence[:, rows] = found.masked_fill(
                ~torch.from_numpy(penalised[kept]).to(device), torch.nan
            )
        else:
            # Of the views that are run now the worst alone: these are the first pass's.
            mean = divergence.mean(0).nansum()  # NaN: not right
            metrics["roma_penalty_mean"] = mean / totals.sequences
            if self.config.gate_bound is not None:
                gated = (divergence > self.config.gate_bound).to(divergence.dtype).sum()
                metrics["roma_gated"] = gated / (len(divergence) * totals.sequences)
        logp = torch.zeros_like(batch.mask, dtype=out.logp.dtype)
        logp[rows] = logp[rows].masked_scatter(mask, out.logp.detach())
        loss = 0.0 * loss if batch.idle else loss
        return Update(loss, metrics, logp, divergence, int(lengths.sum()))

    def _joint_rows(self, batch: UpdateBatch, totals: Totals, view_logp: Tensor | None) -> Update:
        """Every rollout on every image, a row per completion: what the other forms are held to."""
        hidden, *view_hidden = self._padded(batch)
        views = torch.stack(view_hidden) if view_hidden else None
        out, metrics = self._terms(hidden, views, batch.tokens, totals, batch.constants())
        lengths = batch.mask.sum(-1).numpy(force=True)
        own = out.logp[batch.mask]
        loss, contrasts = self._contrasts(out.loss, own, view_logp, lengths, totals)
        found = view_divergence(out.logp, out.view_logp, batch.mask, config=self.config)
        counted = batch.correct & self.config.penalises
        divergence = found.masked_fill(~counted, torch.nan)
        loss = 0.0 * loss if batch.idle else loss
        return Update(loss, metrics | contrasts, out.logp.detach(), divergence, len(own))

    def _terms(
        self,
        hidden: Tensor,
        view_hidden: Tensor | None,
        tokens: Tensor,
        totals: Totals,
        given: dict[str, Any],
    ) -> tuple[RomaLoss, dict[str, Tensor]]:
        """The fused loss, and what is logged of it."""
        weight = self.policy.head_weight
        given = {**given, **totals.arguments()}
        config = self._clean if view_hidden is None else self.config
        out = roma_loss(hidden, view_hidden, weight, tokens, config=config, **given)
        metrics = self._logged(out.metrics)
        if self.measures and view_hidden is not None:
            norms = squared_norms(hidden, view_hidden, weight, tokens, config=config, **given)
            metrics |= {f"grad_sq_{term}": square for term, square in norms.items()}
        return out, metrics

    def _contrasts(
        self,
        loss: Tensor,
        logp: Tensor,
        view_logp: Tensor | None,
        lengths: Integers,
        totals: Totals,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with the terms on views without a gradient, if there are any, and their metrics.

        Log-probs are those of whole rollouts [N], [K, N], end to end.
        """
        if not self.contrast or view_logp is None:
            return loss, {}
        long = torch.from_numpy(lengths).to(logp.device)
        added, metrics = self.contrast(logp, view_logp, long, totals, self.config)
        loss = loss + added
        return loss, {**metrics, "loss": loss.detach()}

    def _logged(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those that mean the same in every form: without a term, none of it."""
        config, left_out = self.config, set()
        if not config.penalises:
            left_out |= set(PENALTY_METRICS)
        if not config.gates:
            left_out.add("roma_gated")
        if config.entropy_coef == 0:
            left_out.add("entropy")
        return {
            name: value
            for name, value in metrics.items()
            if name not in left_out and not (self.contrast and name.startswith("roma_"))
        }


def _one(wanted: Flags) -> Flags:
    """The first rollout on its clean image, so that a call has a row."""
    alone = np.zeros_like(wanted)
    alone[0, 0] = True
    return alone
