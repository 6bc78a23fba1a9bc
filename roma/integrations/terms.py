"""The two terms of ROMA that look at views, on log-probs that a trainer's own forward gave.

    pairs = pairs_of(correct, aux_view, advantages, options)      which (view, row) to run
    …                                                             one forward: clean rows and pairs
    out = view_terms(logp, pair_logp, pairs, …)                   λ_aux·L_aux + λ_inv·L_inv

The clean objective stays the trainer's, and so does the clean side: it is a constant here.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from roma import RomaConfig, RomaLoss, roma_loss_from_logp, view_divergence
from roma.integrations.options import RomaOptions
from roma.integrations.views import Pair

PREFIX = "roma/"


class Totals(NamedTuple):
    """What the sums of a micro-batch are divided by: counts over a step and all its ranks.

    The losses of micro-batches and ranks then add up (docs/MATH.md section 3). Where data
    parallelism averages gradients, a trainer multiplies the loss by the number of ranks.
    """

    sequences: float | Tensor
    tokens: float | Tensor
    correct: float | Tensor | None = None


def pairs_of(
    correct: Tensor,
    aux_view: Tensor,
    advantages: Tensor,
    has_views: Tensor,
    options: RomaOptions,
    *,
    lean: bool = True,
) -> list[Pair]:
    """The pairs (view, row) that have a gradient or take part in a maximum, view after view.

    Args:
        correct: [B] bool: the answer is right.
        aux_view: [B] int64: each row's sampled view.
        advantages: [B] or [B, T].
        has_views: [B] bool: rows that have an image, or whatever else there are views of.
        options: the λ's and K.
        lean: False: all pairs of rows that have views.
    """
    moved = (advantages.reshape(len(correct), -1) != 0).any(1)
    right, drawn = correct.tolist(), aux_view.tolist()
    rows = zip(right, drawn, moved.tolist(), has_views.tolist(), strict=True)
    needs = [
        (seen, penalised and options.lambda_inv > 0, own if gain and options.lambda_aux > 0 else -1)
        for penalised, own, gain, seen in rows
    ]
    return [
        (view, row)
        for view in range(options.num_views)
        for row, (seen, penalised, own) in enumerate(needs)
        if seen and (penalised or own == view or not lean)
    ]


def view_terms(
    logp: Tensor,
    pair_logp: Tensor,
    pairs: Sequence[Pair],
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    aux_view: Tensor,
    has_views: Tensor,
    totals: Totals,
    config: RomaConfig,
    num_views: int,
    old_logp: Tensor | None = None,
    weight: Tensor | None = None,
) -> RomaLoss:
    """λ_aux·L_aux + λ_inv·L_inv of one micro-batch (arXiv 2605.09262; docs/MATH.md section 2).

    A pair that was not run counts as equal to the clean row: divergence 0, no gradient. A row
    without views counts among sequences and tokens, and not among the right ones.

    Args:
        logp: [B, T] nats, clean; detached here.
        pair_logp: [R, T] nats of the pairs, with their graph.
        pairs: R pairs (view, row).
        mask: [B, T], nonzero where a token counts.
        advantages: [B] or [B, T], the trainer's.
        correct: [B] bool.
        aux_view: [B] int64.
        has_views: [B] bool.
        totals: denominators. They may be a step's shares of the counts of a generation that spans
            several, and so be less than what a micro-batch has of its own.
        config: from `RomaOptions.loss_config`.
        num_views: K.
        old_logp: [B, T] nats of the policy that sampled; None: this very policy.
        weight: [B, T] or [B, 1], the sampler correction that multiplies the auxiliary loss, or
            None (docs/MATH.md section 3).

    Returns:
        RomaLoss; the gradient flows to pair_logp.
    """
    clean, counted = logp.detach().float(), mask.bool()
    views = clean.expand(num_views, *clean.shape)
    if pairs:
        view, row = (torch.tensor(index, device=logp.device) for index in zip(*pairs, strict=True))
        views = views.clone().index_put((view, row), pair_logp.float())
    seen = has_views.to(logp.device)
    gains = advantages if advantages.ndim == 2 else advantages[:, None].expand_as(clean)
    if weight is not None:
        gains = gains * weight  # min and clip scale with a positive factor
    correct = correct.to(logp.device) & seen
    # Both terms are linear in their denominators, and a trainer's share of a count may be less than
    # a micro-batch's own: so the loss divides by its own counts, and λ carries the rest.
    shares = _shares(totals, counted, correct)
    by_token = "tokens" if config.aggregation == "dapo" else "sequences"
    by_row = "correct" if config.penalty_over == "correct" else "sequences"
    scaled = replace(
        config,
        lambda_aux=config.lambda_aux * shares[by_token],
        lambda_inv=config.lambda_inv * shares[by_row],
    )
    out = roma_loss_from_logp(
        clean,
        views,
        mask=counted,
        advantages=(gains * seen[:, None]).float().contiguous(),
        correct=correct,
        old_logp=clean if old_logp is None else old_logp.detach().float(),
        aux_view=aux_view.to(logp.device),
        config=scaled,
    )
    divided = {
        "roma_penalty_worst": by_row,
        "roma_penalty_mean": "sequences",
        "roma_aux_loss": by_token,
        "roma_aux_clipfrac": "tokens",
    }
    for name, count in divided.items():
        out.metrics[name] = out.metrics[name] * shares[count]
    return out


def _shares(totals: Totals, counted: Tensor, correct: Tensor) -> dict[str, Tensor]:
    """A micro-batch's own counts, as the loss takes them, over those of the step."""
    own = {
        "sequences": correct.new_tensor(len(correct), dtype=torch.float32),
        "tokens": counted.sum().clamp(min=1).float(),
        "correct": correct.sum().clamp(min=1).float(),
    }
    right = 1 if totals.correct is None else totals.correct
    given = {"sequences": totals.sequences, "tokens": totals.tokens, "correct": right}
    return {
        name: count / torch.as_tensor(given[name], device=count.device).float().clamp(min=1)
        for name, count in own.items()
    }


def by_corruption(
    out: RomaLoss,
    mask: Tensor,
    correct: Tensor,
    pairs: Sequence[Pair],
    names: Sequence[str],
    config: RomaConfig,
) -> dict[str, Tensor]:
    """Sums for the metrics of each corruption, over right rows whose views were all run.

    Args:
        out: what `view_terms` returned.
        mask: as there.
        correct: [B] bool: rows that are right and have views.
        pairs: R pairs.
        names: R names of corruptions.
        config: as there.

    Returns:
        Per corruption [3] float64, CPU: Σ of divergences in nats, their number, and how often it
        was the worst view of its row. Sums of shards add up.
    """
    divergence = view_divergence(out.logp, out.view_logp, mask.bool(), config=config).cpu().double()
    worst, right = divergence.argmax(0).tolist(), correct.tolist()
    sums: dict[str, Tensor] = {}
    for (view, row), name in zip(pairs, names, strict=True):
        if right[row]:
            own = sums.setdefault(name, torch.zeros(3, dtype=torch.float64))
            own += torch.tensor([float(divergence[view, row]), 1.0, float(worst[row] == view)])
    return sums


def metrics_of(out: RomaLoss, shards: int = 1) -> dict[str, float]:
    """The loss's metrics of a micro-batch; their mean over all shards of a step is the step's.

    Args:
        out: what `view_terms` returned.
        shards: micro-batches times ranks that the totals were over.
    """
    kept = ("roma_penalty_worst", "roma_penalty_mean", "roma_aux_loss", "roma_aux_clipfrac")
    return {PREFIX + name.removeprefix("roma_"): float(out.metrics[name]) * shards for name in kept}


def corruption_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Mean divergence under each corruption, in nats, and how often it was the worst view.

    Args:
        sums: from `by_corruption`, added over micro-batches and ranks.

    Returns:
        roma/penalty/<corruption>, and roma/worst_view/<corruption> as a share of its rows.
    """
    named = {}
    for name, (total, count, worst) in sorted((k, v.tolist()) for k, v in sums.items()):
        if count:
            named[f"{PREFIX}penalty/{name}"] = total / count
            named[f"{PREFIX}worst_view/{name}"] = worst / count
    return named
