"""The pass over chunks of tokens behind `roma::token_local_loss`, in Triton; see op.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from roma_kernels.linear_logprob.rows import Active, Head, Rows
from roma_kernels.linear_logprob.triton.gather import (
    gather_rows,
    scatter_rows_into,
    zero_gradients,
)
from roma_kernels.linear_logprob.triton.launch import blank_dlogits
from roma_kernels.linear_logprob.triton.vendor import (
    blank_logits,
    row_dlogits,
    row_sums,
    start_sums,
)
from roma_kernels.products import addmm_, mm, mm_out, report
from roma_kernels.roma_loss.batch import Batch
from roma_kernels.roma_loss.config import RomaConfig
from roma_kernels.roma_loss.triton_backend import coefficients, prepare, totals

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def token_local_fwd(
    leaves: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    places: Sequence[Tensor],
    batch: Batch,
    lse: Tensor,
    dlogp: Tensor,
    *,
    config: RomaConfig,
    chunk_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Loss, worst view, metrics and gradients; fills the log-probs of `batch`.

    Fills `lse` and the coefficients `dlogp`, zeros [K+1, M], too. `leaves`: hidden, view_hidden,
    weight, bias.
    """
    hidden, view_hidden, weight, bias = leaves
    tokens, index, num_tokens = places
    rows = Rows(hidden, view_hidden, tokens, None, index, num_tokens)
    need_hidden, need_weight, need_bias = needs
    (vocab, depth), per_token = weight.shape, rows.per_token
    count = int(num_tokens)
    step = max(chunk_rows // per_token, 1)
    head = Head(weight, bias, 1 / config.temperature, config.softcap, start=0)

    dhidden, dviews = zero_gradients(rows) if need_hidden else (None, None)
    dweight = torch.zeros(weight.shape, device=weight.device) if need_weight else None
    dbias = torch.zeros(vocab, device=weight.device) if need_bias else None
    launch = prepare(batch, config)
    # With "sequence" and "batch" this path has K ≤ 1 or λ_inv = 0: the worst view is view 0.
    view_0 = torch.zeros_like(batch.lengths)

    def chunk(part: slice) -> None:
        first, size = part.start * per_token, (part.stop - part.start) * per_token
        states = gather_rows(rows, slice(first, first + size))
        logits = blank_logits(states, size, vocab)
        mm_out(logits, states, weight.T)
        report("forward", size, vocab, depth)
        sums = logits.new_empty(3, size)
        start_sums(sums)
        row_sums(sums, logits, head, rows, first)
        peak, total, target = sums
        logarithm = total.log()
        row_logp, row_lse = (target - peak) - logarithm, peak + logarithm
        by_image = row_logp.view(-1, per_token).T
        batch.logp[part], batch.view_logp[:, part] = by_image[0], by_image[1:]
        lse[:, part] = row_lse.view(-1, per_token).T
        coefficients(batch, config, launch, view_0, (dlogp[0], dlogp[1:]), part)
        g = dlogp[:, part].T.flatten().contiguous()  # of one token, flatten is a view
        chosen = g.nonzero()[:, 0]
        if not len(chosen):
            return
        active = Active(
            rows=first + chosen, out_of=size, num_active=None, states=states[chosen],
            tokens=tokens[(first + chosen) // per_token], row_scale=None, lse=row_lse[chosen],
            entropy=None, dlogp=g[chosen], dentropy=None, loss_scale=None,
        )  # fmt: skip
        dz = blank_dlogits(states, len(chosen), vocab)
        row_dlogits(dz, logits, head, active, chosen)
        if dhidden is not None:
            dstates = mm(dz, weight, torch.float32)
            scatter_rows_into(dhidden, dviews, rows, active.rows, active.num_active, dstates)
            report("dhidden", len(chosen), vocab, depth)
        if dweight is not None:
            addmm_(dweight, dz.T, active.states)
            report("dweight", len(chosen), vocab, depth)
        if dbias is not None:
            dbias.add_(dz.sum(0, dtype=torch.float32))

    for start in range(0, count, step):
        chunk(slice(start, min(start + step, count)))  # its logits are freed before the next ones
    metrics, worst = totals(batch, config, launch)
    by_weight = None if dweight is None else dweight.to(weight.dtype)
    by_bias = None if dbias is None or bias is None else dbias.to(bias.dtype)
    return metrics[0].clone(), worst, metrics, (dhidden, dviews, by_weight, by_bias)
