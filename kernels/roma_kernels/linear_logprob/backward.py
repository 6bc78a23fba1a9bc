"""The backward of every back end: dlogits of the active rows, tile by tile, and two products.

    dh = dz W ;  dW = dzᵀ h ;  db = Σ_rows dz       dz: MATH section 1, formed by `Kernels.dlogits`

Rows whose upstream gradients are all zero are left out. The vocabulary is walked outside and the
rows inside, so a tile of dW is complete when its sweep ends, is summed in fp32 and rounded once; dh
is summed over the vocabulary in fp32. Per active row and vocabulary entry: the logit once more, and
a multiply-add per element of h for each of dh and dW: 6·D FLOP, less 2·D for what is frozen.

Memory: a workspace (one tile of dz, one of dW) whose size is an argument, the active rows' hidden
states, and their dh in fp32.

The number of active rows is read from the device once. Inside a CUDA graph's capture nothing can be
read; there every row counts as active, the inactive ones as zeros.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from roma_kernels.linear_logprob.rows import (
    Active,
    Head,
    Kernels,
    Rows,
    Upstream,
    packed_index,
)
from roma_kernels.products import capturing, report


def linear_logprob_bwd(
    kernels: Kernels,
    rows: Rows,
    head: Head,
    upstream: Upstream,
    *,
    needs: tuple[bool, bool, bool],
    workspace: int,
    group: "dist.ProcessGroup | None",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by hidden, view_hidden, weight and bias, each None where `needs` is False.

    With `group` the head is a slice of the vocabulary and dh is summed over the ranks.
    """
    dtype = kernels.dtype(rows.hidden, head.weight)
    active = _active_rows(kernels, rows, head, upstream, dtype)
    need_states, need_weight, need_bias = needs
    count, depth = active.states.shape
    dstates = upstream.lse.new_zeros(count if need_states else 0, depth)

    def blank(x: Tensor) -> Tensor:
        # Contiguous, as the operator's fake form says, also for a transposed weight.
        return x.new_empty(x.shape) if count else x.new_zeros(x.shape)

    dweight = blank(head.weight) if need_weight else None
    dbias = blank(head.bias) if need_bias and head.bias is not None else None
    for vocab, blocks in _walk(kernels, workspace, count, head.weight, dtype):
        part = head.part(vocab, dtype)
        width = len(part.weight)
        # A tile of dW that has one block is summed and rounded where it belongs.
        in_place = len(blocks) == 1 and active.loss_scale is None
        dtile = None
        if dweight is not None:
            dtile = dweight[vocab] if in_place else upstream.lse.new_empty(width, depth)
        dtile_bias = upstream.lse.new_zeros(0 if dbias is None else width)
        for block in blocks:
            piece = active.part(block)
            dz = kernels.dlogits(piece, part)
            if need_states:
                kernels.addmm_(dstates[block], dz, part.weight)
                report("dhidden", len(dz), width, depth)
            if dtile is not None:
                # The first block writes, the others add.
                if block.start:
                    kernels.addmm_(dtile, dz.T, piece.states)
                else:
                    kernels.mm_out(dtile, dz.T, piece.states)
                report("dweight", len(dz), width, depth)
            if dbias is not None:
                dtile_bias += dz.sum(0, dtype=upstream.lse.dtype)
        if active.loss_scale is not None:
            dtile = None if dtile is None else dtile.div_(active.loss_scale)
            dtile_bias /= active.loss_scale
        if dweight is not None and dtile is not None and not in_place:
            dweight[vocab] = dtile
        if dbias is not None:
            dbias[vocab] = dtile_bias
    if not need_states:
        return None, None, dweight, dbias
    if group is not None:
        dist.all_reduce(dstates, group=group)
    if active.loss_scale is not None:
        dstates /= active.loss_scale
    dhidden, dviews = kernels.scatter(rows, active.rows, active.num_active, dstates)
    return dhidden, dviews, dweight, dbias


def _active_rows(
    kernels: Kernels, rows: Rows, head: Head, upstream: Upstream, dtype: torch.dtype
) -> Active:
    """Packs the rows with an upstream gradient."""
    dlogp, dentropy = upstream.dlogp, upstream.dentropy
    mask = (dlogp != 0) if dentropy is None else (dlogp != 0) | (dentropy != 0)
    # Also where nobody needs it: a kernel that has it is another kernel, and those that a CUDA
    # graph's capture needs must have been loaded before, in a call outside of it.
    num_active = mask.sum()
    captured = capturing(mask)
    chosen = packed_index(mask) if captured else mask.nonzero()[:, 0]
    token_of = chosen // rows.per_token
    row_scale = None if rows.row_scale is None else rows.row_scale[token_of]
    g, e = dlogp[chosen], None if dentropy is None else dentropy[chosen]
    if captured:
        beyond = torch.arange(len(chosen), device=chosen.device) >= num_active
        g = g.masked_fill(beyond, 0)
        e = None if e is None else e.masked_fill(beyond, 0)
    loss_scale = None
    if dtype == torch.float16 and len(chosen):
        loss_scale = loss_scale_for(g, e, head.scale if row_scale is None else row_scale)
    return Active(
        rows=chosen,
        out_of=len(mask),
        num_active=num_active,
        states=kernels.gather(rows, chosen, num_active).to(dtype),
        tokens=rows.tokens[token_of],
        row_scale=row_scale,
        lse=upstream.lse[chosen],
        entropy=None if upstream.entropy is None else upstream.entropy[chosen],
        dlogp=g,
        dentropy=e,
        loss_scale=loss_scale,
    )


def loss_scale_for(dlogp: Tensor, dentropy: Tensor | None, scale: Tensor | float) -> Tensor:
    """A power of two that brings the largest upstream gradient near 2⁸.

    fp16 ends at 6e-8, and a token's share of a mean over 10⁵ tokens times p = 1e-4 is 1e-9. Above,
    2⁸ leaves room for the entropy's p·|log p + H| and for the mass of equal tokens.
    """
    largest = (dlogp * scale).abs().amax()
    if dentropy is not None:
        largest = torch.maximum(largest, (dentropy * scale).abs().amax())
    exponent = 8 - torch.frexp(largest.clamp(min=1e-30)).exponent
    return torch.ldexp(torch.ones_like(largest), exponent)


def _walk(
    kernels: Kernels, workspace: int, rows: int, weight: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, list[slice]]]:
    """Tiles of the vocabulary, each with its blocks of rows, so that a tile fits the workspace.

    Below `least_columns` columns or 1024 rows a tile would not pay for its launches: a workspace
    too small for those is exceeded.
    """
    if not rows:
        return
    vocab, depth = weight.shape
    by_column = rows * dtype.itemsize + 4 * depth
    width = min(max(workspace // by_column, kernels.least_columns), vocab)
    # A multiple of every block, so that no kernel computes a ragged tile but the last.
    width = width if width == vocab else max(width // 256, 1) * 256
    height = max((workspace - 4 * depth * width) // (width * dtype.itemsize) // 256 * 256, 1024)
    blocks = [slice(start, min(start + height, rows)) for start in range(0, rows, height)]
    for start in range(0, vocab, width):
        yield slice(start, min(start + width, vocab)), blocks
