"""The oracle: MATH.md in plain PyTorch, float64, full logits, loops over sequences.

Autograd differentiates.

It shares no line with a kernel and is slow on purpose. The same lines run in float32 are the
"eager" number that a tolerance is built from (`dtype=torch.float32`). Masked tokens are *removed*
before anything is computed, so agreement with the oracle is also the proof that masking equals
removing.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Section 1 for rows [R, D]: every intermediate that a test may want to differentiate by.

    raw is the bare product W h [R, V], z the final logits, p the softmax; logp, lse, entropy are
    [R].
    """

    raw: Tensor
    z: Tensor
    p: Tensor
    logp: Tensor
    lse: Tensor
    entropy: Tensor


def head(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Head:
    """Log-probabilities of section 1 for hidden [R, D], tokens [R]; temperature a float or [R]."""
    raw = hidden.to(dtype) @ weight.to(dtype).T
    z = raw if bias is None else raw + bias.to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    lse = torch.logsumexp(z, dim=1)
    p = torch.exp(z - lse[:, None])
    logp = z.gather(1, tokens[:, None])[:, 0] - lse
    # H = lse - Σ p z, written so that p's own rounding is not multiplied by |z|.
    entropy = -(p * (z - lse[:, None])).sum(dim=1)
    return Head(raw=raw, z=z, p=p, logp=logp, lse=lse, entropy=entropy)


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
    """What sections 2 and 3 say.

    Every scalar is a sum of weighted token terms, kept for the error bounds.

    terms: "main" (without the reference KL), "ref", "aux", "inv": weighted token losses, no λ.
    penalty: what the max runs over: D [B, K], d [N, K] ("token") or Σ m·D / denominator [1, K]
    ("batch").
    kink: the smallest distance, in nats, of any log-ratio from a place where a derivative jumps.
    reach: the largest clamped log-ratio, in nats.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    penalty: Tensor
    worst_view: Tensor
    kink: float
    reach: float
    logp: Tensor | None = None
    view_logp: Tensor | None = None
    heads: dict[str, Head] = field(default_factory=dict)

    def scalar(self, name: str) -> Tensor:
        """One part of the loss, before its λ."""
        return self.terms[name].sum()


def _clamp(log_ratio: Tensor, limit: float) -> Tensor:
    # Written out so that the derivative is plain to see: 1 up to and at the limit, 0 beyond.
    inside = log_ratio.abs() <= limit
    return torch.where(inside, log_ratio, limit * torch.sign(log_ratio).detach())


def k3(delta: Tensor) -> Tensor:
    """e^δ - 1 - δ, never negative."""
    return torch.expm1(delta) - delta


def surrogate(log_ratio: Tensor, advantages: Tensor, config) -> Tensor:
    """Section 3: the clipped surrogate's loss per token, dual clip included.

    log_ratio already clamped.
    """
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
    plain, cut = ratio * advantages, clipped * advantages
    loss = -torch.where(plain <= cut, plain, cut)
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        loss = torch.where((advantages < 0) & (loss > ceiling), ceiling, loss)
    return loss


def _lowest_argmax(values: list[float]) -> int:
    return max(range(len(values)), key=lambda k: (values[k], -k)) if values else 0


def view_loss(
    logp: Tensor,
    view_logp: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    old_logp: Tensor,
    config,
    ref_logp: Tensor | None = None,
    aux_view: Tensor | None = None,
    view_old_logp: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    total_sequences: float | Tensor | None = None,
    total_tokens: float | Tensor | None = None,
    total_correct: float | Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    worst_view: Tensor | None = None,
) -> Expected:
    """L = L_main + λ_aux·L_aux + λ_inv·L_inv of section 2, one sequence at a time.

    worst_view: the choice to take in the place of the argmax. A kernel in float32 may choose either
    of two views whose penalties differ by less than rounding; its gradients are then compared under
    its own choice.
    """
    sequences = counted_rows(mask, cu_seqlens)
    views, size = view_logp.shape[0], len(sequences)
    per_token = advantages.shape == mask.shape and advantages.numel() != size
    clean, old = logp.to(dtype).reshape(-1), old_logp.to(dtype).reshape(-1)
    view = view_logp.to(dtype).reshape(views, clean.shape[0])
    ref = None if ref_logp is None else ref_logp.to(dtype).reshape(-1)
    view_old = None if view_old_logp is None else view_old_logp.to(dtype).reshape(-1)
    limit = config.log_ratio_clamp

    def count(given, own):
        return float(own if given is None else given)

    over_sequences = count(total_sequences, size)
    over_tokens = max(count(total_tokens, sum(len(n) for n in sequences)), 1.0)
    over_correct = max(count(total_correct, int(correct.sum())), 1.0)
    over_penalty = over_correct if config.penalty_over == "correct" else over_sequences

    def token_weight(length: int) -> float:
        if config.aggregation == "grpo":
            return 1 / (length * over_sequences)
        if config.aggregation == "dapo":
            return 1 / over_tokens
        return 1 / (over_sequences * config.max_length)

    kinks, reaches = [math.inf], [0.0]

    def clamped(log_ratio: Tensor) -> Tensor:
        kinks.extend((log_ratio.detach().abs() - limit).abs().reshape(-1).tolist())
        result = _clamp(log_ratio, limit)
        reaches.extend(result.detach().abs().reshape(-1).tolist())
        return result

    def clipped(log_ratio: Tensor, a: Tensor) -> Tensor:
        edges = [1 - config.clip_low, 1 + config.clip_high, config.dual_clip or 0.0]
        kinks.extend(
            abs(x - math.log(edge))
            for x in log_ratio.detach().tolist()
            for edge in edges
            if edge > 0
        )
        return surrogate(log_ratio, a, config)

    empty = clean.new_zeros(0)
    terms: dict[str, list[Tensor]] = {
        "main": [empty],
        "ref": [empty],
        "aux": [empty],
        "inv": [empty],
    }
    by_sequence: list[Tensor] = []  # each [K, counted tokens]: d of every view
    for i, rows in enumerate(sequences):
        delta = view[:, rows] - clean[rows].detach()
        by_sequence.append(k3(clamped(delta if config.penalty_ratio == "view/clean" else -delta)))
        if len(rows) == 0:
            continue
        weight = token_weight(len(rows))
        a = (
            advantages.to(dtype).reshape(-1)[rows]
            if per_token
            else advantages[i].to(dtype).expand(len(rows))
        )
        if config.main is not None:
            terms["main"].append(weight * clipped(clamped(clean[rows] - old[rows]), a))
            if config.ref_coef > 0:
                assert ref is not None
                terms["ref"].append(weight * k3(clamped(ref[rows] - clean[rows])))
        if aux_view is not None:
            before = old[rows]
            if config.aux_old == "view":
                assert view_old is not None
                before = view_old[rows]
            log_ratio = clamped(view[int(aux_view[i])][rows] - before)
            terms["aux"].append(weight * clipped(log_ratio, a))

    # The penalty: share[i] weighs sequence i; |y_i| at least 1 so that an empty sequence has D = 0.
    share = [float(correct[i]) / over_penalty for i in range(size)]
    mean_d = [d.sum(dim=1) / max(d.shape[1], 1) for d in by_sequence]
    penalty = torch.stack(mean_d)
    chosen: Tensor
    if config.worst_over == "token":
        penalty = clean.new_zeros(clean.shape[0], views)
        chosen = torch.full((clean.shape[0],), -1, dtype=torch.int64)
        for i, (rows, d) in enumerate(zip(sequences, by_sequence, strict=True)):
            for column, n in enumerate(rows.tolist()):
                penalty[n] = d[:, column].detach()
                chosen[n] = _lowest_argmax(d[:, column].tolist())
                if views:
                    pick = int(chosen[n] if worst_view is None else worst_view.reshape(-1)[n])
                    terms["inv"].append((share[i] / len(rows) * d[pick, column])[None])
        chosen = chosen.reshape(mask.shape)
    elif config.worst_over == "batch":
        penalty = torch.stack([s * m for s, m in zip(share, mean_d, strict=True)]).sum(
            dim=0, keepdim=True
        )
        chosen = torch.tensor(_lowest_argmax(penalty[0].tolist()))
        pick = int(chosen if worst_view is None else worst_view)
        if views:
            terms["inv"] += [
                s * d[pick] / max(d.shape[1], 1) for s, d in zip(share, by_sequence, strict=True)
            ]
    else:
        chosen = torch.tensor([_lowest_argmax(row.tolist()) for row in penalty], dtype=torch.int64)
        for i, d in enumerate(by_sequence):
            if views and d.shape[1]:
                pick = int(chosen[i] if worst_view is None else worst_view[i])
                token_d = d.mean(dim=0) if config.worst_over == "mean" else d[pick]
                terms["inv"].append(share[i] / d.shape[1] * token_d)

    joined = {name: torch.cat(parts) for name, parts in terms.items()}
    loss = (
        joined["main"].sum()
        + config.ref_coef * joined["ref"].sum()
        + config.lambda_aux * joined["aux"].sum()
        + config.lambda_inv * joined["inv"].sum()
    )
    return Expected(
        loss=loss,
        terms=joined,
        penalty=penalty.detach(),
        worst_view=chosen,
        kink=min(kinks),
        reach=max(reaches),
    )


def roma_loss(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor,
    config,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **of_view_loss,
) -> Expected:
    """The whole loss from hidden states: section 1 on counted rows only, then `view_loss`."""
    counted = mask.reshape(-1).nonzero()[:, 0]
    targets = tokens.reshape(-1)[counted]

    def score(states: Tensor) -> tuple[Tensor, Head]:
        flat = states.reshape(-1, states.shape[-1])[counted]
        out = head(
            flat,
            weight,
            targets,
            bias=bias,
            temperature=config.temperature,
            softcap=config.softcap,
            dtype=dtype,
        )
        full = out.logp.new_zeros(mask.numel()).index_copy(0, counted, out.logp)
        return full.reshape(mask.shape), out

    logp, clean_head = score(hidden)
    scored = [] if view_hidden is None else [score(states) for states in view_hidden]
    view_logp = torch.stack([x for x, _ in scored]) if scored else logp.new_zeros(0, *mask.shape)
    expected = view_loss(logp, view_logp, mask=mask, config=config, dtype=dtype, **of_view_loss)
    expected.logp, expected.view_logp = logp, view_logp
    expected.heads = {"clean": clean_head} | {f"view{k}": h for k, (_, h) in enumerate(scored)}
    return expected
