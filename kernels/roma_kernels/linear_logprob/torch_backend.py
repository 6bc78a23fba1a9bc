"""Linear log-probabilities in plain PyTorch: a bounded workspace, fp32 logits.

    peak = max_v z_v ; total = Σ_v e^(z_v − peak) ; moment = Σ_v e^(z_v − peak)·z_v ; target = z_y
    dz = g·(1[v=y] − p) − e·p·(log p + H)

Workspace: two tiles of logits (three backward, four with a softcap) and, where the library has no
product of 16-bit matrices with an fp32 result (no CPU's has one), one tile of W in fp32. The
forward reads W once per block of rows, the backward once (backward.py). Accumulates in fp32
(float64 for float64 inputs) whatever the inputs' dtype, also under autocast. Two runs on a CPU are
bitwise equal.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from roma_kernels.linear_logprob.rows import Active, Head, Kernels, Rows
from roma_kernels.products import addmm_, capturing, mm, mm_out, report, widens

# 1024 rows × 2048 entries, twice, in fp32: within 4 % of the fastest of the sizes tried on a CPU
# (4 to 128 MiB).
WORKSPACE_BYTES = 16 * 2**20
VOCAB_TILE = 2048
_GPU_ROWS, _GPU_COLUMNS = 2048, 4096  # 32 MiB of logits, which an H100's L2 cache holds


def _room(x: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile of logits."""
    if x.is_cuda:
        return _GPU_ROWS, _GPU_COLUMNS
    return max(WORKSPACE_BYTES // (2 * VOCAB_TILE * x.itemsize), 1), VOCAB_TILE


def _tiles(size: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, size)) for start in range(0, size, tile))


def _logits(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """One tile of z, summed and kept in `dtype`; `scale` is 1/τ."""
    logits = mm(states, weight.T, dtype)
    if bias is not None:
        logits += bias.to(logits.dtype)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits.mul_(scale)


def sweep(rows: Rows, head: Head, sums: Tensor) -> None:
    """Fills `sums` [3 or 4, R] with peak, total, target and (if four) moment of each row."""
    rows = rows.trimmed()
    vocab, depth = head.weight.shape
    numbers = torch.arange(rows.num_rows, device=sums.device)
    dtype, (height, width) = product_dtype(rows.hidden, head.weight), _room(sums)
    for block in _tiles(rows.num_rows, height):
        token_of = numbers[block] // rows.per_token
        states = gather(rows, numbers[block], None).to(dtype)
        labels = rows.tokens[token_of] - head.start
        scale = head.scale if rows.row_scale is None else rows.row_scale[token_of, None]
        # The lowest finite number, not −∞: a tile may hold nothing but −∞ (a vocabulary masked by
        # its bias).
        peak = torch.full_like(sums[0, block], torch.finfo(sums.dtype).min)
        total, target, moment = (torch.zeros_like(peak) for _ in range(3))
        for tile in _tiles(vocab, width):
            piece = head.part(tile, dtype)
            logits = _logits(states, piece.weight, piece.bias, scale, head.softcap, sums.dtype)
            inside = (labels >= tile.start) & (labels < tile.stop)
            column = (labels - tile.start).clamp(0, logits.shape[1] - 1)
            target = torch.where(inside, logits.gather(1, column[:, None])[:, 0], target)
            higher = torch.maximum(peak, logits.amax(1))
            shrink = torch.exp(peak - higher)
            weights = torch.sub(logits, higher[:, None]).exp_()
            total = total * shrink + weights.sum(1)
            if len(sums) == 4:
                # 0·(−∞) is a masked entry's share, and it is 0.
                share = weights.mul_(logits).masked_fill_(logits == -torch.inf, 0)
                moment = moment * shrink + share.sum(1)
            peak = higher
        for row, value in zip(sums, (peak, total, target, moment), strict=False):
            row[block] = value
    report("forward", rows.num_rows, vocab, depth)


def gather(rows: Rows, chosen: Tensor, num_active: Tensor | None) -> Tensor:
    """Hidden states [A, D] of the chosen rows."""
    token, image = chosen // rows.per_token, chosen % rows.per_token
    position = token if rows.index is None else rows.index[token]
    states = rows.hidden.index_select(0, position)
    if rows.view_hidden is None:
        return states
    flat = rows.view_hidden.reshape(-1, states.shape[1])
    degraded = flat.index_select(0, position + (image - 1).clamp(min=0) * len(rows.hidden))
    return torch.where((image == 0)[:, None], states, degraded)


def scatter(
    rows: Rows, chosen: Tensor, num_active: Tensor | None, dstates: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients by hidden and view_hidden, zero but on the chosen rows."""
    token, image = chosen // rows.per_token, chosen % rows.per_token
    position = token if rows.index is None else rows.index[token]
    dstates = dstates.to(rows.hidden.dtype)
    shape, like = rows.hidden.shape, dstates
    if num_active is not None and capturing(chosen):
        return _scatter_captured(rows, position, image, num_active, dstates)
    if rows.view_hidden is None:
        return like.new_zeros(shape).index_copy_(0, position, dstates), None
    clean = image == 0
    dhidden = like.new_zeros(shape).index_copy_(0, position[clean], dstates[clean])
    dviews = like.new_zeros(rows.view_hidden.shape)
    positions = (position + (image - 1) * shape[0])[~clean]
    dviews.view(-1, shape[1]).index_copy_(0, positions, dstates[~clean])
    return dhidden, dviews


def _scatter_captured(
    rows: Rows, position: Tensor, image: Tensor, num_active: Tensor, dstates: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`scatter` where nothing can be read: what is not to be written goes to a row behind."""
    count, size = rows.hidden.shape
    active = torch.arange(len(position), device=position.device) < num_active

    def placed(places: Tensor, chosen: Tensor, rows_there: int) -> Tensor:
        there = dstates.new_zeros(rows_there + 1, size)
        return there.index_copy_(0, places.where(chosen, rows_there), dstates)[:rows_there]

    dhidden = placed(position, active & (image == 0), count)
    if rows.view_hidden is None:
        return dhidden, None
    places = position + (image - 1) * count
    dviews = placed(places, active & (image > 0), rows.view_hidden.shape[0] * count)
    return dhidden, dviews.view(rows.view_hidden.shape)


def dlogits(active: Active, head: Head) -> Tensor:
    """The gradient dz [A, V] for a head, or a slice of one, of V entries."""
    (count, depth), vocab = active.states.shape, len(head.weight)
    height, width = _room(active.lse) if active.states.is_cuda else (count, vocab)
    if height >= count and width >= vocab:
        dz = _dlogits(active, head)
    else:
        # In rows of whole 64 columns: the library has slow kernels for odd ones.
        dz = active.states.new_empty(count, -(-vocab // 64) * 64)[:, :vocab]
        for block in _tiles(count, height):
            for tile in _tiles(vocab, width):
                dz[block, tile] = _dlogits(active.part(block), head.part(tile, dz.dtype))
    report("recompute", count, vocab, depth)
    return dz


def _dlogits(active: Active, head: Head) -> Tensor:
    scale = head.scale if active.row_scale is None else active.row_scale[:, None]
    dtype = active.lse.dtype
    logits = _logits(active.states, head.weight, head.bias, scale, head.softcap, dtype)
    # dz = −p·g + 1[v=y]·g − p·e·(log p + H), written over p.
    log_p = logits - active.lse[:, None]
    dz = torch.exp(log_p)
    g = active.dlogp[:, None]
    if active.dentropy is None or active.entropy is None:
        dz.mul_(-g)
    else:
        shift = log_p.masked_fill_(log_p == -torch.inf, 0).add_(active.entropy[:, None])
        dz.mul_(shift.mul_(-active.dentropy[:, None]).sub_(g))
    labels = active.tokens - head.start
    # At every row, 0 where the target is elsewhere: which rows those are, the device knows.
    inside = ((labels >= 0) & (labels < dz.shape[1]))[:, None]
    column = labels.clamp(0, dz.shape[1] - 1)[:, None]
    dz.scatter_(1, column, dz.gather(1, column) + torch.where(inside, g, 0))
    if head.softcap is not None:
        # logits hold s·tanh(·)/τ, so tanh is logits·τ/s.
        dz.mul_(1 - logits.div_(scale).div_(head.softcap).square_())
    dz.mul_(scale)
    if active.loss_scale is not None:
        dz.mul_(active.loss_scale)
    return dz.to(active.states.dtype)


def accumulation(hidden: Tensor) -> torch.dtype:
    """fp32, or float64 for float64 hidden states."""
    return torch.promote_types(hidden.dtype, torch.float32)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that is multiplied: the inputs' own, where the library sums it in fp32."""
    own = torch.promote_types(hidden.dtype, weight.dtype)
    return own if widens("mm", hidden.device, own) else accumulation(hidden)


KERNELS = Kernels(
    sweep=sweep,
    gather=gather,
    scatter=scatter,
    dlogits=dlogits,
    mm_out=mm_out,
    addmm_=addmm_,
    dtype=product_dtype,
    workspace=WORKSPACE_BYTES,
    least_columns=VOCAB_TILE,
)
