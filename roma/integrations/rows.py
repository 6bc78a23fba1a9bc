"""ROMA as rows, for a trainer whose loss is handed the log-probs of one forward and nothing else.

The clean side of ROMA is a constant. So its two view terms are GRPO on further rows:

    auxiliary row   the same completion, a degraded image, the clean old log-probs and advantage
    penalty row     the same completion, its worst view, and a penalty in place of a reward

`add_rows` lays them out after the clean rows and gives the weights with which the trainer's own
loss of all rows is L_main + λ_aux·L_aux + λ_inv·L_inv (arXiv 2605.09262; docs/MATH.md section 2)
of the clean ones. docs/ROWS.md has the order of a step, and what this cannot do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from roma import RomaConfig, view_divergence
from roma.integrations.options import RomaOptions
from roma_kernels.arguments import check_dtype, check_shape, check_tensor, check_values
from roma_kernels.errors import fail

CLEAN, AUXILIARY, PENALTY, FILLER = range(4)  # Rows.kind

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """R rows for a trainer's loss: the B clean ones in their order, then what ROMA adds.

    The trainer's loss of a token, before its mean over tokens and rows, is to become

        weight_r · policy(logp, old_logp, advantages) + kl_coef · kl_weight_r · k3(ref_logp − logp)

    Attributes:
        source: [R] int64: the clean row whose prompt, completion and answer this one repeats.
        view: [R] int64: −1 for the clean image, else the view k of `source`.
        kind: [R] int64: CLEAN, AUXILIARY, PENALTY or FILLER (a row that weighs nothing).
        mask: [R, T] bool.
        advantages: [R, T].
        old_logp: [R, T] nats.
        ref_logp: [R, T] nats; None where no row has a KL term.
        weight: [R], of the policy term.
        kl_weight: [R], of the KL term.
    """

    source: Tensor
    view: Tensor
    kind: Tensor
    mask: Tensor
    advantages: Tensor
    old_logp: Tensor
    ref_logp: Tensor | None
    weight: Tensor
    kl_weight: Tensor

    def __len__(self) -> int:
        """R."""
        return len(self.source)

    def take(self, values: Tensor) -> Tensor:
        """[B, …] of the clean rows to [R, …]: token ids, masks, positions."""
        return values[self.source.to(values.device)]

    def pick(self, clean: Sequence[T], views: Sequence[Sequence[T]]) -> list[T]:
        """The image (or list of images) of each row, R of them.

        Args:
            clean: B clean ones.
            views: K lists of B, view after view; what no row asks for may be anything.
        """
        chosen = zip(self.source.tolist(), self.view.tolist(), strict=True)
        return [clean[row] if view < 0 else views[view][row] for row, view in chosen]

    def folded(self) -> "Rows":
        """The weights as part of the advantages, for a loss that has no weight of a row.

        Exact: a clipped objective, with a dual clip or without, scales with its advantage, and so
        do CISPO and SAPO. kl_weight stays.
        """
        scaled = self.advantages * self.weight[:, None]
        return replace(self, advantages=scaled, weight=torch.ones_like(self.weight))


def worst_of(
    logp: Tensor,
    view_logp: Tensor,
    mask: Tensor,
    correct: Tensor,
    *,
    options: RomaOptions,
) -> Tensor:
    """The worst view of each rollout, from a scoring pass; the lowest index of a tie.

        k*_i = argmax_k D_i^k;  worst_over="batch": argmax_k Σ_i m_i D_i^k for every i

    Args:
        logp: [B, T] nats, clean.
        view_logp: [K, B, T] nats, every view, by the policy of logp.
        mask: [B, T] bool.
        correct: [B] bool.
        options: penalty_ratio and worst_over ("sequence" or "batch").

    Returns:
        [B] int64 in 0..K-1.

    Raises:
        ValueError: worst_over is "token" or "mean", or a shape does not fit.
    """
    if options.worst_over not in ("sequence", "batch"):
        expected, remedy = "'sequence' or 'batch'", "a row is one view of a whole completion"
        fail("worst_over", expected, repr(options.worst_over), remedy)
    ratio = RomaConfig(penalty_ratio=options.penalty_ratio)
    divergence = view_divergence(logp, view_logp, mask, config=ratio)  # [K, B]
    if options.worst_over == "batch":
        total = torch.where(correct, divergence, 0).sum(1, keepdim=True)
        divergence = total.expand_as(divergence)
    return divergence.argmax(0)


def add_rows(
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    logp: Tensor,
    view_logp: Tensor,
    aux_view: Tensor | None,
    options: RomaOptions,
    aggregation: Literal["grpo", "dapo", "dr_grpo"],
    penalty: Literal["gradient", "k3"] = "gradient",
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    max_length: int | None = None,
    has_views: Tensor | None = None,
    multiple_of: int = 1,
) -> Rows:
    """Clean rows, auxiliary rows and penalty rows of the rollouts of one optimizer step.

    The penalty. With d = expm1(δ) − δ, a = logp on the worst view and c = sg(logp) on the clean
    image, a penalty row carries

        "gradient": old_logp := a, advantage_t := −∂d/∂a, in either penalty_ratio. At the policy
            that scored, the row's ratio is 1 and its gradient is that of λ_inv·L_inv exactly; the
            value of the trainer's loss is not. Needs no KL term.
        "k3": reference := c, advantage := 0: the trainer's own k3 gives value and gradient, after
            updates too. Its direction is penalty_ratio="clean/view" alone, whose slope has no
            bound; needs kl_coef > 0 and a trainer that multiplies its KL term by kl_weight.

    Normalisers. A trainer divides by its rows: by R ("grpo", then a mean over a row's tokens), by
    R·L_max ("dr_grpo"), or by the tokens of all R rows ("dapo"). `weight` undoes that the rows are
    more than B, and takes the penalty to (1/B)(1/|y_i|) in each of the three. So call this on
    exactly the rows that are averaged together, after advantages are known: a group's mean and
    deviation, and a filter of groups, are those of the clean rows.

    Args:
        mask: [B, T] bool, True = counts.
        advantages: [B] or [B, T], of the clean rollouts.
        correct: [B] bool: the answer is right.
        logp: [B, T] nats: clean log-probs by the policy that is about to learn, in the engine that
            learns (not the sampler's).
        view_logp: [K, B, T] nats: the same tokens on each view, in the same pass. Views of wrong
            rollouts may hold anything.
        aux_view: [B] int64 in 0..K-1: the view of each auxiliary row; None if lambda_aux is 0.
        options: num_views = K, the λ's, penalty_ratio, worst_over, penalty_over. The clip range is
            the trainer's.
        aggregation: the trainer's.
        penalty: what a penalty row carries; see above.
        old_logp: [B, T] nats of the policy that sampled; None: logp.
        ref_logp: [B, T] nats of the trainer's reference policy, if it has one.
        kl_coef: β of the trainer's KL term.
        max_length: L_max of "dr_grpo".
        has_views: [B] bool: rows that have an image; None: all.
        multiple_of: R becomes a multiple of this by rows that weigh nothing: what ranks times
            micro-batch asks for.

    Returns:
        Rows. Those without effect (a wrong rollout's penalty, an auxiliary row without an
        advantage) are left out.

    Raises:
        ValueError: a shape or an option does not fit; the message names it and the remedy.
    """
    _check_tensors(mask, advantages, correct, logp, view_logp, aux_view, options)
    _check(options, aggregation, penalty, kl_coef, max_length, aux_view)
    count, device = len(mask), mask.device
    lengths, seen = mask.sum(1), torch.ones_like(correct) if has_views is None else has_views
    gains = advantages if advantages.ndim == 2 else advantages[:, None].expand(mask.shape)
    old = logp if old_logp is None else old_logp

    moved, right = ((gains * mask) != 0).any(1), correct & seen & (lengths > 0)
    drawn = (seen & moved & (options.lambda_aux > 0)).nonzero()[:, 0]
    penal = (right & (options.lambda_inv > 0)).nonzero()[:, 0]
    worst = torch.zeros(count, dtype=torch.int64, device=device)
    if len(penal):
        worst = worst_of(logp, view_logp, mask, right, options=options)
    short = lengths.argmin()  # the cheapest row to fill with
    added = count + len(drawn) + len(penal)
    filler = short.expand(-added % multiple_of)
    every = torch.arange(count, device=device)
    source = torch.cat([every, drawn, penal, filler])
    none = torch.full_like(every, -1)
    aux = drawn if aux_view is None else aux_view.to(device)[drawn]
    view = torch.cat([none, aux, worst[penal], none[:1].expand(len(filler))])
    sizes = torch.tensor([count, len(drawn), len(penal), len(filler)], device=device)
    kind = torch.arange(4, device=device).repeat_interleave(sizes)

    # What the trainer divides a token of each row by: now, and with the clean rows alone.
    spans = lengths[source].to(logp.dtype)
    if aggregation == "dapo":
        grew = spans.sum() / lengths.sum().clamp(min=1)
        divisor = spans.sum().expand_as(spans)
    else:
        grew = spans.new_tensor(len(source) / count)
        divisor = len(source) * (spans if aggregation == "grpo" else spans.new_tensor(max_length))
    rollouts = count if options.penalty_over == "all" else max(1, int(correct.sum()))
    share = options.lambda_inv * divisor / (rollouts * spans.clamp(min=1))

    own = torch.tensor([1.0, options.lambda_aux, 0, 0], dtype=logp.dtype, device=device)[kind]
    weight, kl_weight = own * grew, torch.zeros_like(own)
    if ref_logp is not None:
        kl_weight = torch.where(kind == CLEAN, weight, 0)
    is_penalty = kind == PENALTY
    scored = view_logp[view.clamp(min=0), source]
    clean, span = logp[source], is_penalty[:, None] & mask[source]
    reference: Tensor | None = None
    if penalty == "k3":
        kl_weight = torch.where(is_penalty, share / (kl_coef or 1), kl_weight)
        slope = torch.zeros_like(clean)
        reference = torch.where(span, clean, (old if ref_logp is None else ref_logp)[source])
    else:
        weight = torch.where(is_penalty, share, weight)
        slope = _slope(torch.where(span, scored - clean, 0), options)
        if ref_logp is not None:
            reference = ref_logp[source]
    ours = is_penalty | (kind == FILLER)
    return Rows(
        source=source,
        view=view,
        kind=kind,
        mask=mask[source],
        advantages=torch.where(ours[:, None], -slope, gains[source].to(logp.dtype)),
        old_logp=torch.where(span, scored, old[source]),
        ref_logp=reference,
        weight=weight,
        kl_weight=kl_weight,
    )


def _slope(gap: Tensor, options: RomaOptions) -> Tensor:
    """∂d/∂a at gap = a − c, zero beyond the clamp of the log-ratio."""
    limit = RomaConfig().log_ratio_clamp
    slope = torch.expm1(gap) if options.penalty_ratio == "view/clean" else -torch.expm1(-gap)
    return torch.where(gap.abs() > limit, 0, slope)


def _check_tensors(
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    logp: Tensor,
    view_logp: Tensor,
    aux_view: Tensor | None,
    options: RomaOptions,
) -> None:
    """Types, shapes and, where they can be read without a wait, values."""
    check_tensor("mask", mask)
    check_dtype("mask", mask, (torch.bool,))
    count, by_token = len(mask), tuple(mask.shape)
    given = {"advantages": advantages, "correct": correct, "logp": logp, "view_logp": view_logp}
    given |= {} if aux_view is None else {"aux_view": aux_view}
    for name, value in given.items():
        check_tensor(name, value, like=mask)
    check_dtype("correct", correct, (torch.bool,))
    check_shape("correct", correct, ("[B]", (count,)))
    check_shape("advantages", advantages, ("[B]", (count,)), ("[B, T]", by_token))
    check_shape("logp", logp, ("[B, T]", by_token))
    remedy = "score every view of the clean rows"
    check_shape(
        "view_logp", view_logp, ("[K, B, T]", (options.num_views, *by_token)), remedy=remedy
    )
    finite = logp[mask].isfinite().all()
    check_values(finite, lambda: "logp: expected finite nats where mask is, got NaN or inf")
    if aux_view is not None:
        check_shape("aux_view", aux_view, ("[B]", (count,)))
        inside = ((aux_view >= 0) & (aux_view < options.num_views)).all()
        top = options.num_views - 1
        check_values(inside, lambda: f"aux_view: expected 0 to {top}, num_views - 1, got others")


def _check(
    options: RomaOptions,
    aggregation: str,
    penalty: str,
    kl_coef: float,
    max_length: int | None,
    aux_view: Tensor | None,
) -> None:
    """Refuses what rows cannot say, before anything is laid out."""
    if aggregation not in ("grpo", "dapo", "dr_grpo"):
        expected, remedy = "'grpo', 'dapo' or 'dr_grpo'", "name how the trainer averages"
        fail("aggregation", expected, repr(aggregation), remedy)
    if aggregation == "dr_grpo" and not max_length:
        remedy = "give the length that the trainer divides by"
        fail("max_length", "tokens, for dr_grpo", repr(max_length), remedy)
    if penalty not in ("gradient", "k3"):
        fail("penalty", "'gradient' or 'k3'", repr(penalty), "choose one of them")
    if penalty == "k3" and options.lambda_inv > 0:
        if options.penalty_ratio != "clean/view":
            remedy = "choose it, or penalty='gradient'"
            got = repr(options.penalty_ratio)
            fail("penalty_ratio", "'clean/view', the direction of a trainer's k3", got, remedy)
        if not kl_coef > 0:
            remedy = "give the trainer a KL coefficient, or choose penalty='gradient'"
            fail("kl_coef", "more than 0, for penalty='k3'", repr(kl_coef), remedy)
    for name in ("clip_low", "clip_high", "dual_clip"):
        if getattr(options, name) is not None:
            remedy = "set it in the trainer: its own loss clips the auxiliary rows"
            fail(name, "None", repr(getattr(options, name)), remedy)
    if options.lambda_aux > 0 and aux_view is None:
        remedy = "draw one for each rollout, or set lambda_aux=0"
        fail("aux_view", "[B] int64, as lambda_aux is above 0", "None", remedy)
