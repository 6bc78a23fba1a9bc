"""`roma_loss`, from hidden states of the clean view and K degraded views, or from log-probs."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from roma_kernels.arguments import FLOATS, check_dtype, check_shape, check_tensor, check_values
from roma_kernels.backends import resolve
from roma_kernels.linear_logprob.api import (
    bad_tokens,
    check_head,
    check_workspace,
    head_backend,
    rows_logprob,
    vocabulary_size,
)
from roma_kernels.linear_logprob.rows import TRITON_WORKSPACE
from roma_kernels.roma_loss.batch import Count, Layout, Targets, layout_of
from roma_kernels.roma_loss.config import RomaConfig
from roma_kernels.roma_loss.packed import PackedBatch
from roma_kernels.roma_loss.token_local.op import pays, token_local_loss_op
from roma_kernels.roma_loss.torch_backend import surrogate_kl
from roma_kernels.roma_loss.view_api import METRICS, ViewLoss, view_loss


class RomaLoss(NamedTuple):
    """What `roma_loss` returns; the shapes in brackets are those of the packed form."""

    loss: Tensor
    """0-dim fp32, to minimise; the only differentiable member."""
    logp: Tensor
    """[B, T] ([N]) fp32: clean log-probs in nats, 0 on masked positions."""
    view_logp: Tensor
    """[K, B, T] ([K, N]) fp32: the same tokens on each view."""
    worst_view: Tensor
    """int64, the lowest index of a tie. [B] for worst_over "sequence" and "mean"; [B, T] ([N]) for
    "token", −1 on masked positions; 0-dim for "batch"."""
    metrics: dict[str, Tensor]
    """Detached 0-dim tensors; `roma.METRICS` holds the formula of each."""


def roma_loss(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None = None,
    aux_view: Tensor | None = None,
    view_old_logp: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    total_sequences: Count | None = None,
    total_tokens: Count | None = None,
    total_correct: Count | None = None,
    config: RomaConfig = RomaConfig(),
    vocab_group: "dist.ProcessGroup | None" = None,
    workspace: int | None = None,
    backend: str = "auto",
) -> RomaLoss:
    """The ROMA loss: clean objective, clipped loss on a sampled view, penalty on the worst view.

        L = L_main(clean) + λ_aux·L_aux(sampled view) + λ_inv·L_inv
        L_inv = (1/B) Σ_i m_i max_k (1/|y_i|) Σ_t (expm1(δ) − δ),   δ = a_t^k − sg(c_t)

    (arXiv 2605.09262; docs/MATH.md sections 1 to 3, which also tell which readings of the paper are
    our own.) Masked positions cost nothing and may hold anything; the backward computes only rows
    that have a gradient.

    Args:
        hidden: [B, T, D] fp32, bf16 or fp16: last norm's output on the clean image, at the
            positions that predict `tokens`.
        view_hidden: [K, B, T, D], the same rollouts on the K degraded views; None or K = 0 for
            plain GRPO (lambda_inv = 0).
        weight: [V, D], the head's weight.
        tokens: [B, T] int64 in 0..V-1 where counted.
        mask: [B, T] bool, True = counts.
        advantages: [B] or [B, T], from the clean rollouts. (Packed: [B] or [N]; [B] where the two
            coincide.)
        correct: [B] bool: the rollout's answer is right (accuracy alone, not a mix with format).
        old_logp: [B, T] nats: log-probs of the policy that sampled, on the clean image.
        ref_logp: [B, T] nats: log-probs of a reference policy; needed when config.ref_coef > 0.
        aux_view: [B] int64 in 0..K-1: each sequence's sampled view; None: no auxiliary loss.
        view_old_logp: [B, T] nats: the old policy on the sampled view; needed when config.aux_old =
            "view".
        bias: [V] of the head, or None.
        cu_seqlens: [B+1] int32: the packed form, in which [N, …] stands wherever [B, T, …] stands
            above.
        total_sequences: normaliser over all shards and micro-batches whose losses will be summed;
            None: this call's B.
        total_tokens: as above; None: this call's counted tokens.
        total_correct: as above; None: this call's right sequences.
        config: the options. With worst_over = "batch" the maximum is over
            this call's sequences.
        vocab_group: as in `linear_logprob`: the ranks that hold the head between them.
        workspace: as in `linear_logprob`: bytes for the backward's tiles of logits, and for chunks
            of logits where worst_over is "token" or "mean" and 4096 rows of them fit.
        backend: "auto", "triton", "native", "torch" or "reference".

    Returns:
        RomaLoss. Gradients flow to hidden, view_hidden, weight and bias; the clean side of the
        penalty, advantages and all old and reference log-probs are constants. A sequence with no
        counted token gives zero loss and gradient, and counts in B.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device, value or combination does not fit; the message names the
            argument and the remedy.

    Example:
        >>> clean, views, W = torch.randn(2, 3, 8), torch.randn(4, 2, 3, 8), torch.randn(50, 8)
        >>> y, on = torch.randint(50, (2, 3)), torch.ones(2, 3, dtype=torch.bool)
        >>> out = roma_loss(clean, views, W.requires_grad_(), y, mask=on,
        ...                 advantages=torch.randn(2), correct=torch.tensor([True, False]),
        ...                 old_logp=torch.full((2, 3), -1.0))
        >>> out.loss.backward()
    """
    check_tensor("hidden", hidden)
    check_tensor("weight", weight, like=hidden)
    check_workspace(workspace)
    backend = head_backend(backend, hidden, weight, vocab_group)
    layout = layout_of("hidden", hidden, 1, mask, cu_seqlens, wait=backend != "triton")
    check_dtype("hidden", hidden, FLOATS)
    check_head(weight, bias, hidden)
    if view_hidden is None:
        view_hidden = hidden.new_zeros((0, *hidden.shape))
    check_tensor("view_hidden", view_hidden, like=hidden)
    check_dtype("view_hidden", view_hidden, (hidden.dtype,))
    views = len(view_hidden) if view_hidden.ndim else 0
    remedy = "every view needs the clean image's grid and the same completions"
    check_shape(
        "view_hidden",
        view_hidden,
        (f"[K, {layout.letters[1:-1]}, D]", (views, *hidden.shape)),
        remedy=remedy,
    )
    check_tensor("tokens", tokens, like=hidden)
    check_dtype("tokens", tokens, (torch.int64,))
    check_shape("tokens", tokens, (layout.letters, layout.shape))
    labels = layout.pack(tokens)
    vocabulary = vocabulary_size(weight, vocab_group)
    known = (labels >= 0) & (labels < vocabulary) | ~layout.valid
    check_values(known, lambda: bad_tokens(labels[~known], vocabulary))
    targets = Targets(
        advantages, correct, old_logp, ref_logp, aux_view, view_old_logp,
        total_sequences, total_tokens, total_correct,
    )  # fmt: skip
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    constants = targets.pack(layout, "view_hidden", views, dtype, config)
    states = hidden.reshape(-1, hidden.shape[-1])
    view_states = view_hidden.reshape(views, *states.shape)
    room = TRITON_WORKSPACE if workspace is None else workspace
    if backend == "triton" and vocab_group is None and pays(config, states, views, weight, room):
        leaves = (hidden, view_hidden, weight, bias)
        needs = tuple(x is not None and x.requires_grad for x in leaves)
        if torch.is_grad_enabled() and any(needs):
            loss, worst_view, metrics, scored, *_ = token_local_loss_op(
                states, view_states if views else None, weight, bias, labels, layout.counted,
                layout.known, *constants.values(), config.line, room, needs[0] or needs[1],
                *needs[2:],
            )  # fmt: skip
            by_name = dict(zip(METRICS, metrics.unbind(), strict=True))
            return _result(layout, ViewLoss(loss, worst_view, by_name), scored, config)
    scored = rows_logprob(
        states,
        view_states,
        weight,
        labels,
        layout.counted,
        layout.known,
        bias=bias,
        temperature=config.temperature,
        softcap=config.softcap,
        vocab_group=vocab_group,
        workspace=workspace,
        backend=backend,
    )
    return _finish(layout, PackedBatch(scored[0], scored[1:], **constants), config, backend)


def roma_loss_from_logp(
    logp: Tensor,
    view_logp: Tensor | None,
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None = None,
    aux_view: Tensor | None = None,
    view_old_logp: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    total_sequences: Count | None = None,
    total_tokens: Count | None = None,
    total_correct: Count | None = None,
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
        old_logp: [B, T].
        ref_logp: [B, T] or None.
        aux_view: [B] int64 or None.
        view_old_logp: [B, T] or None.
        cu_seqlens: [B+1] int32 or None.
        total_sequences: number, 0-dim tensor or None.
        total_tokens: number, 0-dim tensor or None.
        total_correct: number, 0-dim tensor or None.
        config: temperature and softcap are those of the logits and were applied by the caller; they
            do nothing here.
        backend: as in `roma_loss`.

    Returns:
        RomaLoss; gradients flow to `logp` and `view_logp`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: as in `roma_loss`.

    Example:
        >>> clean = torch.tensor([[-1.0, -2.0]])
        >>> views = torch.tensor([[[-1.5, -2.0]], [[-1.0, -3.0]]])
        >>> roma_loss_from_logp(clean, views, mask=clean < 0, advantages=torch.ones(1),
        ...                     correct=torch.tensor([True]), old_logp=clean).worst_view
        tensor([1])
    """
    check_tensor("logp", logp)
    backend = resolve(backend, logp.device.type, float64=logp.dtype == torch.float64)
    layout = layout_of("logp", logp, 0, mask, cu_seqlens, wait=backend != "triton")
    check_dtype("logp", logp, (torch.float32, torch.float64))
    if view_logp is None:
        view_logp = logp.new_zeros((0, *logp.shape))
    check_tensor("view_logp", view_logp, like=logp)
    check_dtype("view_logp", view_logp, (logp.dtype,))
    views = len(view_logp) if view_logp.ndim else 0
    check_shape("view_logp", view_logp, (f"[K, {layout.letters[1:-1]}]", (views, *layout.shape)))
    targets = Targets(
        advantages, correct, old_logp, ref_logp, aux_view, view_old_logp,
        total_sequences, total_tokens, total_correct,
    )  # fmt: skip
    constants = targets.pack(layout, "view_logp", views, logp.dtype, config)
    batch = PackedBatch(layout.pack(logp), layout.pack(view_logp), **constants)
    return _finish(layout, batch, config, backend)


def view_divergence(
    logp: Tensor, view_logp: Tensor, mask: Tensor, *, config: RomaConfig = RomaConfig()
) -> Tensor:
    """Divergence of each view from the clean one, D_i^k = (1/|y_i|) Σ_t expm1(δ) − δ; no gradient.

    (docs/MATH.md section 2; what a trainer logs per corruption.)

    Args:
        logp: [B, T] fp32 nats, clean image.
        view_logp: [K, B, T] fp32 nats.
        mask: [B, T] bool, True = counts.
        config: gives penalty_ratio and log_ratio_clamp.

    Returns:
        [K, B] nats; 0 for a sequence without counted tokens.

    Example:
        >>> counted = torch.tensor([[True, False]])
        >>> view_divergence(torch.zeros(1, 2), torch.zeros(3, 1, 2), counted).shape
        torch.Size([3, 1])
    """
    # Before the exponential: masked positions may hold anything.
    gap = torch.where(mask, view_logp.detach() - logp.detach(), 0)
    gap = gap if config.penalty_ratio == "view/clean" else -gap
    d = surrogate_kl(gap.clamp(-config.log_ratio_clamp, config.log_ratio_clamp))
    return d.sum(-1) / mask.sum(-1).clamp(min=1)


def _finish(layout: Layout, batch: PackedBatch, config: RomaConfig, backend: str) -> RomaLoss:
    scored = torch.cat([batch.logp.detach()[None], batch.view_logp.detach()])
    return _result(layout, view_loss(batch, config, backend), scored, config)


def _result(layout: Layout, found: ViewLoss, scored: Tensor, config: RomaConfig) -> RomaLoss:
    loss, worst_view, metrics = found
    if config.worst_over == "token":
        worst_view = layout.unpack(worst_view, -1)
    logp = layout.unpack(scored, 0)
    return RomaLoss(loss, logp[0], logp[1:], worst_view, metrics)
