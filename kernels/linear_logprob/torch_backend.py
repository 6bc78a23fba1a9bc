"""Linear log-probabilities in plain PyTorch: a bounded workspace, a backward over active rows only.

    forward   z = W h + b ; z = s·tanh(z/s) ; z = z/τ
              lse = log Σ_v exp z_v ; logp = z_y − lse ; H = lse − Σ_v p_v z_v
    backward  dz = g·(1[v=y] − p) − e·p·(log p + H)
              dh = Wᵀ dz ; dW = Σ_rows dz hᵀ ; db = Σ_rows dz

Workspace: two tiles of logits, `WORKSPACE_BYTES` together, and one tile of W in the accumulation
dtype. The forward reads W once per block of rows. The backward reads W once: it walks the
vocabulary outside and the rows inside, so a tile of dW is complete when its sweep ends, is summed
in fp32 and rounded once. Rows whose upstream gradients are all zero are left out. Accumulates in
fp32 (float64 for float64 inputs) whatever the inputs' dtype, also under autocast. Two runs on a CPU
are bitwise equal.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 2 × 1024 rows × 2048 entries in fp32: within 4 % of the fastest of the sizes tried on a CPU (4 to
# 128 MiB).
WORKSPACE_BYTES = 16 * 2**20
VOCAB_TILE = 2048


def _tiles(size: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, size)) for start in range(0, size, tile))


def _row_tile(dtype: torch.dtype) -> int:
    return max(WORKSPACE_BYTES // (2 * VOCAB_TILE * dtype.itemsize), 1)


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocab: slice,
    scale: Tensor | float,
    softcap: float | None,
) -> Tensor:
    """One tile of z, from rows and weights already in the accumulation dtype; `scale` is 1/τ."""
    logits = hidden @ weight.T
    if bias is not None:
        logits += bias[vocab].to(logits.dtype)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits.mul_(scale)


def linear_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    scale: Tensor | float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One online-softmax sweep over the vocabulary: logp, lse and (asked for) entropy, each [R]."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logp = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    lse = torch.zeros_like(logp)
    mean_logit = torch.zeros_like(logp) if entropy else None
    for rows in _tiles(len(hidden), _row_tile(dtype)):
        states, labels = hidden[rows].to(dtype), tokens[rows]
        row_scale = scale[rows, None] if isinstance(scale, Tensor) else scale
        # The lowest finite number, not −inf: a tile may hold nothing but −inf (a vocabulary masked
        # by its bias).
        peak = torch.full_like(logp[rows], torch.finfo(dtype).min)
        total, target, moment = (
            torch.zeros_like(peak) for _ in range(3)
        )  # Σ e^(z−peak), z_y, Σ e^(z−peak)·z
        for vocab in _tiles(len(weight), VOCAB_TILE):
            logits = _logits(states, weight[vocab].to(dtype), bias, vocab, row_scale, softcap)
            inside = (labels >= vocab.start) & (labels < vocab.stop)
            picked = logits.gather(
                1, (labels - vocab.start).clamp(0, logits.shape[1] - 1)[:, None]
            )[:, 0]
            target = torch.where(inside, picked, target)
            higher = torch.maximum(peak, logits.amax(1))
            shrink = torch.exp(peak - higher)
            weights = torch.sub(logits, higher[:, None]).exp_()
            total = total * shrink + weights.sum(1)
            if entropy:
                moment = moment * shrink + weights.mul_(logits).sum(1)
            peak = higher
        # total ≥ 1 holds the peak's own exp(0), so logp ≤ 0 in floating point too.
        logp[rows] = (target - peak) - total.log()
        lse[rows] = peak + total.log()
        if mean_logit is not None:
            mean_logit[rows] = moment / total
    return logp, lse, None if mean_logit is None else lse - mean_logit


def linear_logprob_bwd(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    scale: Tensor | float,
    softcap: float | None,
    lse: Tensor,
    entropy: Tensor | None,
    dlogp: Tensor,
    dentropy: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by hidden, weight and bias where `needs` asks, from rows with upstream gradient."""
    dtype = lse.dtype
    active = (dlogp != 0) if dentropy is None else (dlogp != 0) | (dentropy != 0)
    index = active.nonzero()[:, 0]
    states, labels, lse, dlogp = (
        hidden[index].to(dtype),
        tokens[index],
        lse[index, None],
        dlogp[index, None],
    )
    if dentropy is not None and entropy is not None:
        entropy, dentropy = entropy[index, None], dentropy[index, None]
    if isinstance(scale, Tensor):
        scale = scale[index, None]

    dstates = torch.zeros_like(states) if needs[0] else None
    dweight = torch.zeros_like(weight) if needs[1] else None
    dbias = torch.zeros_like(bias) if needs[2] and bias is not None else None
    for vocab in _tiles(len(weight) if len(index) else 0, VOCAB_TILE):
        tile = weight[vocab].to(dtype)
        dtile, dtile_bias = torch.zeros_like(tile), torch.zeros_like(tile[:, 0])
        for rows in _tiles(len(index), _row_tile(dtype)):
            row_scale = scale[rows] if isinstance(scale, Tensor) else scale
            logits = _logits(states[rows], tile, bias, vocab, row_scale, softcap)
            # dz = −p·g + 1[v=y]·g − p·e·(log p + H), written in place over p.
            log_p = logits - lse[rows]
            dlogits = torch.exp(log_p)
            if dentropy is None or entropy is None:
                dlogits.mul_(-dlogp[rows])
            else:
                dlogits.mul_(log_p.add_(entropy[rows]).mul_(-dentropy[rows]).sub_(dlogp[rows]))
            inside = ((labels[rows] >= vocab.start) & (labels[rows] < vocab.stop)).nonzero()[:, 0]
            dlogits[inside, labels[rows][inside] - vocab.start] += dlogp[rows][inside, 0]
            if softcap is not None:
                # logits hold s·tanh(·)/τ, so tanh is logits·τ/s.
                dlogits.mul_(1 - logits.div_(row_scale).div_(softcap).square_())
            dlogits.mul_(row_scale)
            if dstates is not None:
                dstates[rows].addmm_(dlogits, tile)
            if dweight is not None:
                dtile.addmm_(dlogits.T, states[rows])
            if dbias is not None:
                dtile_bias += dlogits.sum(0)
        if dweight is not None:
            dweight[vocab] = dtile
        if dbias is not None:
            dbias[vocab] = dtile_bias
    dhidden = (
        None
        if dstates is None
        else torch.zeros_like(hidden).index_copy_(0, index, dstates.to(hidden.dtype))
    )
    return dhidden, dweight, dbias


class LinearLogprobFunction(torch.autograd.Function):
    """Saves the inputs and one lse (and entropy) per row; the backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        scale: Tensor | float,
        softcap: float | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `linear_logprob_fwd`."""
        with torch.autocast(hidden.device.type, enabled=False):
            logp, lse, row_entropy = linear_logprob_fwd(
                hidden, weight, tokens, bias, scale, softcap, entropy
            )
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            tokens,
            lse,
            row_entropy,
            scale if isinstance(scale, Tensor) else None,
        )
        ctx.scale, ctx.softcap = scale if isinstance(scale, float) else None, softcap
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return logp, lse, row_entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogp: Tensor | None, _dlse: None, dentropy: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """See `linear_logprob_bwd`."""
        hidden, weight, bias, tokens, lse, entropy, row_scale = ctx.saved_tensors
        if dlogp is None:
            dlogp = torch.zeros_like(lse)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = linear_logprob_bwd(
                hidden,
                weight,
                tokens,
                bias,
                row_scale if ctx.scale is None else ctx.scale,
                ctx.softcap,
                lse,
                entropy,
                dlogp,
                dentropy,
                ctx.needs_input_grad[:3],
            )
        return *gradients, None, None, None, None
