"""The oracle: the reference formulas in float64, on the tokens that a plain loop picks out.

The formulas stand once, in roma_kernels' reference.py, and share no line with a kernel. What stands
here shares no line with the package's own way from [B, T] to counted tokens: masked tokens are
removed one by one before anything is computed, so agreement with the oracle also proves that
masking equals removing. The same in float32 is the "eager" number that a tolerance is built from.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from roma_kernels.linear_logprob.reference import HeadReference, linear_logprob_reference
from roma_kernels.roma_loss.batch import Batch
from roma_kernels.roma_loss.config import LOG_WEIGHTS, RomaConfig
from roma_kernels.roma_loss.reference import LossReference, roma_loss_reference, token_losses


def head(hidden, weight, tokens, *, dtype: torch.dtype = torch.float64, **options) -> HeadReference:
    """Section 1 of MATH.md for hidden [R, D], tokens [R]: `linear_logprob_reference`."""
    return linear_logprob_reference(hidden, weight, tokens, dtype=dtype, **options)


def counted_rows(mask: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """For each sequence, its counted tokens' numbers in flattened [B·T] or packed [N] order."""
    if cu_seqlens is None:
        bounds = [i * mask.shape[1] for i in range(mask.shape[0] + 1)]
    else:
        bounds = cu_seqlens.tolist()
    flat = mask.reshape(-1).tolist()
    return [
        torch.tensor([n for n in range(first, end) if flat[n]], dtype=torch.int64)
        for first, end in itertools.pairwise(bounds)
    ]


@dataclass
class Expected:
    """What sections 2 and 3 of MATH.md say.

    terms: weighted token terms of every scalar, see `LossReference.terms`.
    penalty: what the max runs over: D [B, K], d [positions, K] ("token", 0 where masked) or
    Σ m·D / denominator [1, K] ("batch").
    sets: for each row of `penalty` the counted tokens whose divergence it holds.
    gated: [B, K] bool, what a gate leaves out of the max.
    kink: the smallest distance, in nats, of any log-ratio from a place where a derivative jumps, or
    a gate opens.
    reach: the largest clamped log-ratio, in nats.
    loose: by how much a gradient by "logp" and "view_logp" moves, at most, where all log-ratios are
    off by 1 nat: what its own derivative does not tell, of weights that are constants, and of sums
    over a sequence that cancel.
    loose_terms: the same of the terms "main" and "aux".
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    terms: dict[str, Tensor]
    penalty: Tensor
    sets: list[Tensor]
    worst_view: Tensor
    gated: Tensor
    kink: float
    reach: float
    loose: dict[str, Tensor]
    loose_terms: dict[str, float]
    logp: Tensor | None = None
    view_logp: Tensor | None = None
    entropy: Tensor | None = None
    heads: dict[str, HeadReference] = field(default_factory=dict)

    def scalar(self, name: str) -> Tensor:
        """One part of the loss, before its λ."""
        return self.terms[name].sum()


def view_loss(
    logp: Tensor,
    view_logp: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    old_logp: Tensor | None,
    config: RomaConfig,
    ref_logp: Tensor | None = None,
    aux_view: Tensor | None = None,
    view_old_logp: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    total_sequences: float | Tensor | None = None,
    total_tokens: float | Tensor | None = None,
    total_correct: float | Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    worst_view: Tensor | None = None,
) -> Expected:
    """L = L_main + λ_aux·L_aux + λ_inv·L_inv of section 2.

    worst_view: the choice to take instead of the argmax. A kernel in float32 may choose either of
    two views whose penalties differ by less than rounding; its gradients are then compared under
    its own choice.
    """
    rows = counted_rows(mask, cu_seqlens)
    index = torch.cat(rows)
    sequence = torch.cat([torch.full_like(n, i) for i, n in enumerate(rows)])

    def counted(x: Tensor) -> Tensor:
        lead = x.shape[: x.ndim - mask.ndim]
        return x.reshape(*lead, mask.numel())[..., index].to(dtype)

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else counted(x).detach()

    def number(given: float | Tensor | None, own: int) -> Tensor:
        return torch.tensor(float(own if given is None else given), dtype=dtype)

    def by_token(x: Tensor) -> Tensor:
        packed_twice = x.ndim == 1 and len(x) == len(rows)  # [B] where N = B
        per_token = x.shape == mask.shape and not packed_twice
        return (counted(x) if per_token else x.to(dtype)[sequence]).detach()

    bound = config.gate_bound
    if bound is None and config.gate_tau is not None:
        bound = math.inf
    batch = Batch(
        logp=counted(logp),
        view_logp=counted(view_logp),
        old_logp=constant(logp if old_logp is None else old_logp),
        ref_logp=constant(ref_logp),
        view_old_logp=constant(view_old_logp) if config.aux_old == "view" else None,
        rollout_weight=None if rollout_weight is None else by_token(rollout_weight),
        advantages=by_token(advantages),
        sequence=sequence,
        lengths=torch.tensor([len(n) for n in rows]),
        correct=correct,
        aux_view=aux_view,
        total_sequences=number(total_sequences, len(rows)),
        total_tokens=number(total_tokens, len(index)),
        total_correct=number(total_correct, int(correct.sum())),
        lambda_inv=number(config.lambda_inv, 0),
        lambda_aux=number(config.lambda_aux, 0),
        gate_bound=None if bound is None else number(bound, 0),
    )
    over_tokens = config.worst_over == "token"
    if worst_view is not None and over_tokens:
        worst_view = worst_view.reshape(-1)[index]
    of_tokens = None if entropy is None else counted(entropy)
    found = roma_loss_reference(batch, config, entropy=of_tokens, worst_view=worst_view)
    chosen, penalty, sets = found.worst_view, found.penalty.detach(), rows
    if over_tokens:
        sets = [torch.tensor([n]) for n in range(mask.numel())]
        penalty = penalty.new_zeros(mask.numel(), penalty.shape[1]).index_copy(0, index, penalty)
        chosen = torch.full((mask.numel(),), -1).index_copy(0, index, chosen).reshape(mask.shape)
    elif config.worst_over == "batch":
        right = [n for n, is_right in zip(rows, correct.tolist(), strict=True) if is_right]
        sets = [torch.cat(right) if right else index[:0]]
    kink, reach = _extremes(found.log_ratios, config, gate=_distance_from_gate(batch, found))
    if config.main == "vespo" and rollout_weight is not None:
        reach = max(reach, -LOG_WEIGHTS[0])

    def spread(loose: Tensor) -> Tensor:
        whole = loose.new_zeros(*loose.shape[:-1], mask.numel())
        return whole.index_copy(-1, index, loose).reshape(*loose.shape[:-1], *mask.shape)

    loose, loose_terms = _loose(batch, found, config)
    return Expected(
        loss=found.loss,
        metrics=found.metrics,
        terms=found.terms,
        penalty=penalty,
        sets=sets,
        worst_view=chosen,
        gated=found.gated,
        kink=kink,
        reach=reach,
        loose={name: spread(values) for name, values in loose.items()},
        loose_terms=loose_terms,
    )


def _extremes(
    log_ratios: dict[str, Tensor], config: RomaConfig, gate: float
) -> tuple[float, float]:
    """Distance of the log-ratios from the nearest kink, and the largest of them, clamped."""
    limit = config.log_ratio_clamp
    clips = {
        "grpo": [1 - config.clip_low, 1 + config.clip_high, config.dual_clip or 0.0],
        "cispo": [config.clip_high],  # where it is counted as clipped
    }.get(config.objective, [])
    kinks, reach = [math.inf, gate], 0.0
    for name, values in log_ratios.items():
        sizes = values.detach().abs().reshape(-1)
        if not len(sizes):
            continue
        of_objective = name in ("main", "aux")
        # A constant weight is continuous at the clamp, and so is its product with a log-prob.
        constant = of_objective and config.objective in ("cispo", "vespo")
        if not constant or (name == "main" and config.ref_unbiased):
            kinks.append(float((sizes - limit).abs().min()))
        reach = max(reach, min(float(sizes.max()), limit))
        if of_objective:
            edges = [math.log(edge) for edge in clips if edge > 0]
            kinks += [float((values.detach() - edge).abs().min()) for edge in edges]
    return min(kinks), reach


def _by_sequence(values: Tensor, batch: Batch) -> Tensor:
    """Means [..., N] over each sequence, for each of its tokens."""
    sums = values.new_zeros((*values.shape[:-1], len(batch.lengths)))
    sums = sums.index_add(-1, batch.sequence, values)
    return (sums / batch.lengths.clamp(min=1))[..., batch.sequence]


def _distance_from_gate(batch: Batch, found: LossReference) -> float:
    """How far all log-ratios must be off, in nats, until a gate opens or closes."""
    if batch.gate_bound is None or not found.gated.numel():
        return math.inf
    delta = found.log_ratios["inv"].detach()
    # |expm1 δ| is d's slope; twice, and 1 for what rounding adds to a sum.
    slope = 2 * _by_sequence(torch.expm1(delta.clamp(max=20.0)).abs(), batch) + 1
    steepest = slope.new_ones(found.gated.T.shape)
    steepest[:, batch.sequence] = slope
    return float(((found.penalty.T.detach() - batch.gate_bound).abs() / steepest).min())


def _loose(
    batch: Batch, found: LossReference, config: RomaConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`Expected.loose` [N] and [K, N], and `Expected.loose_terms`."""
    by_token = {name: torch.zeros_like(batch.logp.detach()) for name in ("main", "aux")}
    terms = dict.fromkeys(by_token, 0.0)
    if config.local and config.main != "cispo" and not config.ref_unbiased:
        return {}, terms
    for name, (logp, log_ratio, weight) in found.inputs.items():
        x = log_ratio.detach().requires_grad_()
        loss, _, _, constant = token_losses(logp.detach(), x, batch.advantages, config)
        if constant is not None:
            (steep,) = torch.autograd.grad(constant.sum(), x)
            errors = batch.lengths[batch.sequence] if config.main == "vespo" else 1
            by_token[name] += (weight * batch.advantages * steep).detach().abs() * errors
            terms[name] = float((by_token[name] * logp.detach().abs()).sum())
        elif config.ratio_level == "sequence":
            (rate,) = torch.autograd.grad(loss.sum(), x)
            by_token[name] += _by_sequence((weight * rate).detach().abs(), batch)
    if config.ref_unbiased and "ref" in found.log_ratios:
        delta = found.log_ratios["ref"].detach().clamp(max=config.log_ratio_clamp)
        d = found.terms["ref"].detach()
        rate = d / (torch.expm1(delta) - delta).clamp(min=1e-30)  # weight and ratio
        own = rate * (torch.exp(delta) + 1) + d
        by_token["main"] += 2 * config.ref_coef * (own + _by_sequence(own, batch))
    of_views = torch.zeros_like(batch.view_logp.detach())
    if batch.aux_view is not None:
        index = batch.aux_view[batch.sequence][None]
        of_views.scatter_(0, index, (batch.lambda_aux * by_token["aux"])[None])
    return {"logp": by_token["main"], "view_logp": of_views}, terms


def roma_loss(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor,
    config: RomaConfig,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **of_view_loss,
) -> Expected:
    """The whole loss from hidden states: section 1 on counted rows only, then `view_loss`."""
    counted = mask.reshape(-1).nonzero()[:, 0]
    targets = tokens.reshape(-1)[counted]

    def score(states: Tensor) -> tuple[Tensor, HeadReference]:
        flat = states.reshape(-1, states.shape[-1])[counted]
        options = {"temperature": config.temperature, "softcap": config.softcap}
        out = head(flat, weight, targets, bias=bias, dtype=dtype, **options)
        full = out.logp.new_zeros(mask.numel()).index_copy(0, counted, out.logp)
        return full.reshape(mask.shape), out

    logp, clean_head = score(hidden)
    scored = [] if view_hidden is None else [score(states) for states in view_hidden]
    view_logp = torch.stack([x for x, _ in scored]) if scored else logp.new_zeros(0, *mask.shape)
    entropy = None
    if config.entropy_coef > 0:
        entropy = logp.new_zeros(mask.numel()).index_copy(0, counted, clean_head.entropy)
        entropy = entropy.reshape(mask.shape)
    how = {"entropy": entropy, "dtype": dtype, **of_view_loss}
    expected = view_loss(logp, view_logp, mask=mask, config=config, **how)
    expected.logp, expected.view_logp, expected.entropy = logp, view_logp, entropy
    expected.heads = {"clean": clean_head} | {f"view{k}": h for k, (_, h) in enumerate(scored)}
    return expected
