"""`roma_loss`, from hidden states of the clean image and K degraded views, or from log-probs."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from roma_kernels.arguments import check_dtype, check_shape, check_tensor
from roma_kernels.backends import resolve
from roma_kernels.linear_logprob.head import check_head, score
from roma_kernels.roma_loss.batch import METRICS, Layout
from roma_kernels.roma_loss.checks import (
    Total,
    check_config,
    check_constants,
    check_entropy,
    check_layout,
    check_views,
    layout_for,
)
from roma_kernels.roma_loss.config import RomaConfig
from roma_kernels.roma_loss.op import Combined, combine
from roma_kernels.roma_loss.pairs import check_needed, check_pair_states, check_pairs, score_pairs
from roma_kernels.roma_loss.token_local.op import score_and_combine, token_local_pays
from roma_kernels.roma_loss.torch_backend import k3


class RomaLoss(NamedTuple):
    """What `roma_loss` returns; the shapes in brackets are those of the packed form.

    Attributes:
        loss: 0-dim fp32, to minimise; differentiable.
        logp: [B, T] ([N]) fp32: clean log-probs in nats, 0 on masked positions; differentiable, so
            that with main=None a trainer's own objective shares the sweep of the head.
        view_logp: [K, B, T] ([K, N]) fp32: the same tokens on each view; differentiable.
        worst_view: int64, the lowest index of a tie. [B] for worst_over "sequence" and "mean"; [B,
            T] ([N]) for "token", −1 on masked positions; 0-dim for "batch". Zeros where K = 0; −1
            for a sequence whose views gate_bound leaves out, all of them.
        metrics: Detached 0-dim tensors; `roma.METRICS` holds the formula of each. Given the totals
            over all shards, metrics and losses of shards add up.
    """

    loss: Tensor
    logp: Tensor
    view_logp: Tensor
    worst_view: Tensor
    metrics: dict[str, Tensor]


def roma_loss(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    aux_view: Tensor | None = None,
    view_old_logp: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    view_rows: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    total_sequences: Total | None = None,
    total_tokens: Total | None = None,
    total_correct: Total | None = None,
    config: RomaConfig = RomaConfig(),
    vocab_group: "dist.ProcessGroup | None" = None,
    workspace: int | None = None,
    backend: str = "auto",
) -> RomaLoss:
    """The ROMA loss: clean objective, the same on a sampled view, penalty on the worst view.

        L = L_main(clean) + λ_aux·L_aux(sampled view) + λ_inv·L_inv
        L_inv = (1/B) Σ_i m_i max_k (1/|y_i|) Σ_t (expm1(δ) − δ)
        δ = a_t^k − sg(c_t)

    (arXiv 2605.09262; docs/MATH.md sections 1 to 3, which also tell which readings of the paper are
    our own.) L_main and L_aux are config.main's, one of TRL's (MATH.md's table in section 3).
    Masked positions cost nothing and may hold anything; the backward computes only rows that have a
    gradient: with entropy_coef > 0 all clean ones, with ratio_level="sequence" all of a sequence or
    none.

    Pairs. Most views of most rollouts change neither the loss nor its gradient. A trainer may run
    through its model only

        the clean image: every rollout,
        view k: the rollouts that are right, if λ_inv > 0,
        view k: the rollouts with aux_view = k whose advantage is not 0, if λ_aux > 0,

    and say by view_rows where each pair (view, rollout) stands in view_hidden. Loss, gradients and
    metrics are those of all K·B pairs (with λ_inv = 0 but for roma_penalty_*, which then see the
    auxiliary views alone). A pair that was not run costs nothing here either. It counts as equal to
    the clean image: divergence 0, no gradient, and in view_logp the clean log-probs, detached.

    Two passes. So the maximum is exact over the views that are there. If a first pass without a
    graph has found the worst view, of each right rollout ("sequence") or of the call ("batch"), it
    is enough to run that one with a graph, and the sampled one (with gate_bound any one where all
    views are left out). roma_penalty_mean and roma_gated would count zeros then: take them from the
    first pass (`view_divergence`). "token" and "mean" need every view of a right rollout.
    worst_view means nothing where a rollout has no view.

    Several micro-batches or ranks: pass the totals over all of them. Their losses, gradients and
    metrics then add up to those of one call. A wrapper that averages gradients over ranks (DDP,
    FSDP) needs the loss multiplied by the number of ranks.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16: last norm's output on the clean image, at the
            positions that predict `tokens`.
        view_hidden: [K, B, T, D], the same rollouts on the K degraded views; None or K = 0 for
            plain GRPO (lambda_inv = 0). With view_rows: [R, T, D], or [S, D] in the packed form.
        weight: [V, D], the head's weight.
        tokens: [B, T] int64 in 0..V-1 where counted.
        mask: [B, T] bool, True = counts.
        advantages: [B] or [B, T], from the clean rollouts. (Packed: [B] or [N]; [B] where the two
            coincide.)
        correct: [B] bool: the rollout's answer is correct (accuracy alone, not a mix with format).
        old_logp: [B, T] nats: log-probs of the policy that sampled, on the clean image; None: this
            very policy sampled, and its own log-probs, detached, are used.
        ref_logp: [B, T] nats: log-probs of a reference policy; needed when config.ref_coef > 0.
        aux_view: [B] int64 in 0..K-1: each sequence's sampled view; None: no auxiliary loss.
        view_old_logp: [B, T] nats: the old policy on the sampled view; needed when config.aux_old =
            "view".
        rollout_weight: [B] or [B, T], finite and ≥ 0: a sampler's correction, as exp(old_logp −
            sampler_logp), cut off. It multiplies the token losses of L_main and L_aux, before the
            KL to a reference; 0 leaves a token out, at no cost. With main="vespo" [B, T], a part of
            the sequence's weight instead. None: 1. (Packed: [B] or [N]; [B] where they coincide.)
        view_rows: [K, B] int64: row of view_hidden, 0..R-1, that is view k of sequence i; packed:
            position 0..S-1 at which it begins there, with as many tokens as in hidden, masked ones
            too. No two pairs share one. −1: that pair was not run. None: view_hidden has all pairs.
        bias: [V] of the head, or None.
        cu_seqlens: [B+1] int32: the packed form, in which [N, …] stands wherever [B, T, …] stands
            above.
        total_sequences: normaliser over all shards and micro-batches whose losses are summed; None:
            this call's B. Give all totals (total_correct for penalty_over="correct") or none.
        total_tokens: the same; None: this call's counted tokens.
        total_correct: the same; None: this call's correct sequences.
        config: the options. With worst_over = "batch" the maximum is over this call's sequences.
        vocab_group: as in `linear_logprob`: the ranks that hold the head between them.
        workspace: as in `linear_logprob`: bytes for the backward's tiles of logits. Back end
            "triton" keeps a chunk of logits in it, and recomputes none, where worst_over is "token"
            or "mean", or K ≤ 1, or lambda_inv = 0, and 4096 rows (or all of them) fit; but not with
            ratio_level "sequence", "vespo", an entropy bonus, a gate or view_rows. Those last cost
            a copy of hidden and view_hidden instead.
        backend: "auto", "triton", "native", "torch" or "reference".

    Returns:
        RomaLoss. Gradients flow to hidden, view_hidden, weight and bias; the clean side of the
        penalty, advantages, weights, the lambdas and all old and reference log-probs are constants.
        A sequence with no counted token gives zero loss and gradient, and counts in B.

    Raises:
        TypeError: an argument is not a tensor, or config is not a RomaConfig.
        ValueError: a shape, dtype, device, value or combination does not fit; the message names the
            argument and the remedy.
        RuntimeError: forward-mode autograd or torch.func (backend "reference" alone supports them).

    Example:
        >>> clean, views, W = torch.randn(2, 3, 8), torch.randn(4, 2, 3, 8), torch.randn(50, 8)
        >>> y, on = torch.randint(50, (2, 3)), torch.ones(2, 3, dtype=torch.bool)
        >>> out = roma_loss(clean, views, W.requires_grad_(), y, mask=on,
        ...                 advantages=torch.randn(2), correct=torch.tensor([True, False]))
        >>> out.loss.backward()
    """
    check_config(config)
    layout = check_layout("hidden", hidden, mask, cu_seqlens, features=1)
    head = check_head(
        hidden,
        weight,
        bias,
        softcap=config.softcap,
        vocab_group=vocab_group,
        workspace=workspace,
        backend=backend,
    )
    layout = layout_for(head.backend, layout)
    pairs = None
    if view_rows is None:
        views = check_views("view_hidden", view_hidden, hidden, layout, config)
        count = len(views)
    else:
        views = check_pair_states(view_hidden, hidden, layout)
        pairs = check_pairs(view_rows, views, layout, cu_seqlens, config)
        count = len(view_rows)
    check_tensor("tokens", tokens, like=hidden)
    check_dtype("tokens", tokens, (torch.int64,))
    check_shape("tokens", tokens, (layout.letters, layout.shape))
    labels = layout.pack(tokens)
    head.check_tokens(labels, layout.valid)
    constants = check_constants(
        layout,
        count,
        torch.promote_types(hidden.dtype, torch.float32),
        config,
        advantages=advantages,
        correct=correct,
        old_logp=old_logp,
        ref_logp=ref_logp,
        aux_view=aux_view,
        view_old_logp=view_old_logp,
        rollout_weight=rollout_weight,
        total_sequences=total_sequences,
        total_tokens=total_tokens,
        total_correct=total_correct,
    )

    if pairs is not None:
        check_needed(pairs, layout, constants, config)
        logp, entropy = score_pairs(head, hidden, views, tokens, mask, layout, pairs, config)
        combined = combine(logp[0], logp[1:], constants, config, head.backend, entropy=entropy)
        return _unpacked(layout, combined, logp, config)
    states = hidden.reshape(-1, hidden.shape[-1])
    view_states = views.reshape(len(views), *states.shape) if len(views) else None
    if token_local_pays(head, states, view_states, config):
        logp, combined = score_and_combine(
            head, states, view_states, labels, layout, constants, config
        )
    else:
        logp, _, entropies = score(
            head,
            states,
            labels,
            temperature=config.temperature,
            view_hidden=view_states,
            index=layout.index,
            num_tokens=layout.num_tokens,
            entropy=config.entropy_coef > 0,
        )
        entropy = None if entropies is None else entropies[0]
        combined = combine(logp[0], logp[1:], constants, config, head.backend, entropy=entropy)
    return _unpacked(layout, combined, logp, config)


def roma_loss_from_logp(
    logp: Tensor,
    view_logp: Tensor | None,
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    aux_view: Tensor | None = None,
    view_old_logp: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    total_sequences: Total | None = None,
    total_tokens: Total | None = None,
    total_correct: Total | None = None,
    config: RomaConfig = RomaConfig(),
    backend: str = "auto",
) -> RomaLoss:
    """`roma_loss` for a trainer that already has the log-probs of the sampled tokens.

    Args:
        logp: [B, T] fp32 nats, clean image; differentiable. (Half precision is too coarse: MATH.md
            section 7.)
        view_logp: [K, B, T] fp32 nats, each view; differentiable. None or K = 0 for plain GRPO.
        mask: [B, T] bool, True = counts; masked positions may hold anything, NaN and ±inf too.
        advantages: as in `roma_loss`, and so are all arguments below.
        correct: [B] bool.
        old_logp: [B, T] or None.
        ref_logp: [B, T] or None.
        aux_view: [B] int64 or None.
        view_old_logp: [B, T] or None.
        rollout_weight: [B], [B, T] or None.
        entropy: [B, T] nats, of the clean image's distributions, in logp's dtype; differentiable.
            Needed when config.entropy_coef > 0, and refused when it is 0.
        cu_seqlens: [B+1] int32 or None.
        total_sequences: number, 0-dim tensor or None.
        total_tokens: number, 0-dim tensor or None.
        total_correct: number, 0-dim tensor or None.
        config: temperature and softcap are those of the logits and were applied by the caller; they
            do nothing here.
        backend: as in `roma_loss`.

    Returns:
        RomaLoss; gradients flow to `logp`, `view_logp` and `entropy`.

    Raises:
        TypeError: an argument is not a tensor, or config is not a RomaConfig.
        ValueError: as in `roma_loss`.
        RuntimeError: as in `roma_loss`.

    Example:
        >>> clean = torch.tensor([[-1.0, -2.0]])
        >>> views = torch.tensor([[[-1.5, -2.0]], [[-1.0, -3.0]]])
        >>> roma_loss_from_logp(clean, views, mask=clean < 0, advantages=torch.ones(1),
        ...                     correct=torch.tensor([True])).worst_view
        tensor([1])
    """
    check_config(config)
    layout = check_layout("logp", logp, mask, cu_seqlens, features=0)
    check_dtype("logp", logp, (torch.float32, torch.float64))
    backend = resolve(backend, logp.device.type, float64=logp.dtype == torch.float64)
    layout = layout_for(backend, layout)
    views = check_views("view_logp", view_logp, logp, layout, config)
    check_entropy(entropy, logp, layout, config)
    constants = check_constants(
        layout,
        len(views),
        logp.dtype,
        config,
        advantages=advantages,
        correct=correct,
        old_logp=old_logp,
        ref_logp=ref_logp,
        aux_view=aux_view,
        view_old_logp=view_old_logp,
        rollout_weight=rollout_weight,
        total_sequences=total_sequences,
        total_tokens=total_tokens,
        total_correct=total_correct,
    )
    packed = torch.cat([layout.pack(logp)[None], layout.pack(views)])
    of_tokens = None if entropy is None else layout.pack(entropy)
    combined = combine(packed[0], packed[1:], constants, config, backend, entropy=of_tokens)
    return _unpacked(layout, combined, packed, config)


def view_divergence(
    logp: Tensor,
    view_logp: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    config: RomaConfig = RomaConfig(),
) -> Tensor:
    """Divergence of each view from the clean image; no gradient.

        D_i^k = (1/|y_i|) Σ_t (expm1(δ) − δ)

    (docs/MATH.md section 2; what a trainer logs per corruption.)

    Args:
        logp: [B, T] fp32 nats, clean image.
        view_logp: [K, B, T] fp32 nats.
        mask: [B, T] bool, True = counts.
        cu_seqlens: [B+1] int32: the packed form, in which [N] stands for [B, T].
        config: gives penalty_ratio and log_ratio_clamp.

    Returns:
        [K, B] nats; 0 for a sequence without counted tokens.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> counted = torch.tensor([[True, False]])
        >>> view_divergence(torch.zeros(1, 2), torch.zeros(3, 1, 2), counted).shape
        torch.Size([3, 1])
    """
    check_config(config)
    layout = check_layout("logp", logp, mask, cu_seqlens, features=0)
    check_tensor("view_logp", view_logp, like=logp)
    views = (len(view_logp), *layout.shape) if view_logp.ndim else layout.shape
    check_shape("view_logp", view_logp, (f"[K, {layout.letters[1:]}", views))
    # Before the exponential: masked positions may hold anything.
    gap = torch.where(mask, view_logp.detach() - logp.detach(), 0)
    gap = gap if config.penalty_ratio == "view/clean" else -gap
    d = k3(gap.clamp(-config.log_ratio_clamp, config.log_ratio_clamp))
    if cu_seqlens is None:
        return d.sum(-1) / layout.lengths.clamp(min=1)
    spans = cu_seqlens.diff().long()
    # unsafe: without a check of the spans, which would wait for a device; check_layout made it.
    sums = torch.segment_reduce(d.T.contiguous(), "sum", lengths=spans, axis=0, unsafe=True)
    return sums.T / layout.lengths.clamp(min=1)


def _unpacked(layout: Layout, combined: Combined, logp: Tensor, config: RomaConfig) -> RomaLoss:
    loss, worst_view, metrics = combined
    if config.worst_over == "token":
        worst_view = layout.unpack(worst_view, -1)
    scored = layout.unpack(logp, 0)
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    return RomaLoss(loss, scored[0], scored[1:], worst_view, named)
