"""Row kernels over logits in a workspace: their sums, and dz of the active rows.

    target, peak, total of z
    dz = g·(1[v=y] − p), through softcap and 1/τ          p = e^(z − lse)

Reads 4 bytes per logit each time; writes 2 (bf16) per logit of an active row. One program a row,
fp32, no atomics: two runs are bitwise equal.
"""

import triton
import triton.language as tl

from roma_kernels.linear_logprob.triton.tile import _LOWEST, _dz, _logits


@triton.jit(do_not_specialize=["first"])
def _row_sums_kernel(
    logp_ptr,  # [R]
    lse_ptr,  # [R]
    logits_ptr,  # [R, V] fp32, W h
    bias_ptr,  # [V] or None
    tokens_ptr,  # int64, one per token
    first,  # the first row's number among all rows
    per_token,
    V,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + (first + row) // per_token)
    peak = tl.full((1,), _LOWEST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    target = tl.zeros((1,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        product = tl.load(logits_ptr + row * V + cols, cols < V, other=0.0)[None, :]
        z = _logits(product, bias_ptr, cols, V, scale, softcap, SOFTCAP)
        higher = tl.maximum(peak, tl.max(z, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        target += tl.sum(tl.where(cols[None, :] == token, z, 0.0), 1)
        peak = higher
    one = row + tl.arange(0, 1)
    tl.store(logp_ptr + one, (target - peak) - tl.log(total))
    tl.store(lse_ptr + one, peak + tl.log(total))


@triton.jit(do_not_specialize=["first"])
def _row_dlogits_kernel(
    dz_ptr,  # [A, V]
    logits_ptr,  # [R, V] fp32
    bias_ptr,  # [V] or None
    active_ptr,  # [A] int64: rows among the R
    tokens_ptr,  # int64, one per token
    lse_ptr,  # [R]
    dlogp_ptr,  # [R]
    first,
    per_token,
    V,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(active_ptr + i)
    token = tl.load(tokens_ptr + (first + row) // per_token)
    lse = tl.load(lse_ptr + row)
    g = tl.load(dlogp_ptr + row)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        product = tl.load(logits_ptr + row * V + cols, cols < V, other=0.0)[None, :]
        z = _logits(product, bias_ptr, cols, V, scale, softcap, SOFTCAP)
        dz = _dz(z, tl.exp(z - lse), g, cols, token, g, scale, softcap, SOFTCAP)
        places = dz_ptr + i * V + cols[None, :]
        tl.store(places, dz.to(dz_ptr.dtype.element_ty), (cols < V)[None, :])
