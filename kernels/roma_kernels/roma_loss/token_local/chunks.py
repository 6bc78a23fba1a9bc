"""The pass over chunks of tokens behind `roma::token_local_loss`, in Triton; see op.py."""

import torch
from torch import Tensor

from roma_kernels.linear_logprob.rows import Rows
from roma_kernels.linear_logprob.triton.gather import put_rows, take_rows, zero_gradients
from roma_kernels.products import add_product, product, report
from roma_kernels.roma_loss.config import RomaConfig
from roma_kernels.roma_loss.packed import PackedBatch
from roma_kernels.roma_loss.token_local.kernels import _row_dlogits_kernel, _row_sums_kernel
from roma_kernels.roma_loss.token_local.op import rows_per_chunk
from roma_kernels.roma_loss.triton_backend import view_loss_coefficients, view_loss_totals

_BLOCK_V = 4096

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def token_local_fwd(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    index: Tensor,
    counted: Tensor | None,
    batch: PackedBatch,
    config: RomaConfig,
    workspace: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Loss, worst view, metrics and gradients; fills `batch.logp` and `batch.view_logp`."""
    rows = Rows(hidden, view_hidden, tokens, None, index, counted)
    need_hidden, need_weight, need_bias = needs
    (vocab, depth), views = weight.shape, rows.views
    wanted = len(tokens) if counted is None else int(counted)
    step = max(rows_per_chunk(workspace, weight) // views, 1)
    scale, softcap = 1 / config.temperature, config.softcap
    options = {"SOFTCAP": softcap is not None, "BLOCK_V": _BLOCK_V}

    dlogp, dview_logp = torch.zeros_like(batch.logp), torch.zeros_like(batch.view_logp)
    dhidden, dviews = zero_gradients(rows) if need_hidden else (None, None)
    total = torch.zeros(weight.shape, device=weight.device) if need_weight else None
    dbias = torch.zeros(vocab, device=weight.device) if need_bias else None
    # The worst view of a sequence or the batch, where there is but one or none of them counts.
    only = torch.zeros_like(batch.lengths)

    def chunk(part: slice) -> None:
        first, count = part.start * views, (part.stop - part.start) * views
        states = take_rows(rows, slice(first, first + count))
        logits = product(states, weight.T, torch.float32)
        report("forward", count, vocab, depth)
        logp, lse = (logits.new_empty(count) for _ in range(2))
        settings = (first, views, vocab, scale, softcap or 0.0)
        _row_sums_kernel[(count,)](logp, lse, logits, bias, tokens, *settings, **options)
        by_view = logp.view(-1, views).T
        batch.logp[part], batch.view_logp[:, part] = by_view[0], by_view[1:]
        view_loss_coefficients(batch, config, only, dlogp, dview_logp, part)
        g = torch.cat([dlogp[None, part], dview_logp[:, part]]).T.reshape(-1)
        chosen = g.nonzero()[:, 0]
        if not len(chosen):
            return
        dz = states.new_empty(len(chosen), vocab)
        _row_dlogits_kernel[(len(chosen),)](
            dz, logits, bias, chosen, tokens, lse, g, *settings, **options
        )
        if dhidden is not None:
            dstates = product(dz, weight, torch.float32)
            put_rows(rows, first + chosen, None, dstates, dhidden, dviews)
            report("dhidden", len(chosen), vocab, depth)
        if total is not None:
            add_product(total, dz.T, states[chosen])
            report("dweight", len(chosen), vocab, depth)
        if dbias is not None:
            dbias.add_(dz.sum(0, dtype=torch.float32))

    for start in range(0, wanted, step):
        chunk(slice(start, min(start + step, wanted)))  # its logits are gone before the next ones
    metrics, worst = view_loss_totals(batch, config)
    dweight = None if total is None else total.to(weight.dtype)
    by_bias = None if dbias is None or bias is None else dbias.to(bias.dtype)
    return metrics[0].clone(), worst, metrics, (dhidden, dviews, dweight, by_bias)
