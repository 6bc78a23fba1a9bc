"""One tile of logits, for the forward sweep and for the backward's dlogits alike.

    z = W h + b ; z = s·tanh(z/s)        [BLOCK_R, BLOCK_V], fp32, on chip; logits are z/τ
    e^(z/τ − peak/τ) = 2^((z − peak)·log₂e/τ)        a subtraction, a product and an exp2 an entry

Not as one multiply-add of z: its rounding grows with the peak, without bound in a tile that a bias
of −1e30 masks out.

A (BLOCK_R + BLOCK_V)·BLOCK_D slice of hidden states and weights is read per step, and the product
accumulates in fp32 registers. Tiles are walked in groups of GROUP row tiles: the group's hidden
states stay in the L2 cache while it sweeps the vocabulary, and each tile of W is read from memory
once per group.
"""

import triton
import triton.language as tl

# Lowest finite number, not −∞, to start a maximum from: a bias may mask a whole tile out, and
# −∞ − (−∞) is NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_at(turn, row_tiles, vocab_tiles, GROUP: tl.constexpr):
    """Row tile and vocabulary tile of a turn: GROUP row tiles walk the vocabulary together."""
    group = turn // (GROUP * vocab_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    inside = turn - group * GROUP * vocab_tiles
    return group * GROUP + inside % height, inside // height


@triton.jit
def _load(
    source,  # tensor descriptor, or pointer
    first,
    depth,
    stride,
    stride_depth,
    size,
    depths,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[BLOCK, BLOCK_D] at (first, depth) of a matrix [size, depths]; zeros beyond its edges."""
    if DESCRIPTORS:
        return source.load([first, depth])
    else:
        i = first + tl.arange(0, BLOCK)
        d = depth + tl.arange(0, BLOCK_D)
        places = i.to(tl.int64)[:, None] * stride + d.to(tl.int64)[None, :] * stride_depth
        return tl.load(source + places, (i < size)[:, None] & (d < depths)[None, :], other=0.0)


@triton.jit
def _product(
    hidden,
    weight,
    row,
    col,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    R,
    V,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """hidden[row:][:BLOCK_R] · weight[col:][:BLOCK_V]ᵀ, accumulated in fp32."""
    product = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for depth in range(0, D, BLOCK_D):
        h = _load(hidden, row, depth, stride_hr, stride_hd, R, D, BLOCK_R, BLOCK_D, DESCRIPTORS)
        w = _load(weight, col, depth, stride_wv, stride_wd, V, D, BLOCK_V, BLOCK_D, DESCRIPTORS)
        # "ieee" matters for fp32 inputs alone: the tensor cores' tf32 keeps 10 bits of mantissa.
        product = tl.dot(h.to(DTYPE), w.to(DTYPE).T, product, input_precision="ieee")
    return product


@triton.jit
def _tanh(x):
    """Hyperbolic tangent to 2e-7 relative: tl.math has none, and exp alone cancels near 0."""
    u = x * x
    # x·(1 + u·q(u)), q fitted on |x| ≤ 0.6 to 1e-8 relative.
    q = u * -0.006276387590907217 + 0.021116213957220582
    q = q * u - 0.053875138193125956
    q = q * u + 0.13332924006452487
    q = q * u - 0.3333333043134467
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.6, x + x * u * q, tl.where(x < 0, -far, far))


@triton.jit
def _logits(product, bias_ptr, cols, V, softcap, SOFTCAP: tl.constexpr):
    """z, the product with bias and softcap; −∞ past the vocabulary, where lanes must count 0."""
    z = product
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, cols < V, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return tl.where((cols < V)[None, :], z, -float("inf"))


@triton.jit
def _sums(z, scale, MOMENT: tl.constexpr):
    """peak, total and (or 0) moment [rows] of the logits z·scale; scale is [rows]."""
    highest = tl.maximum(tl.max(z, 1), _LOWEST)
    weights = tl.exp2((z - highest[:, None]) * (scale * _LOG2E)[:, None])
    total = tl.sum(weights, 1)
    moment = tl.zeros_like(total)
    if MOMENT:
        moment = tl.sum(weights * tl.where(weights > 0, z, 0.0), 1) * scale
    return tl.maximum(highest * scale, _LOWEST), total, moment


@triton.jit
def _dlogits(
    z,
    target,  # [rows, cols] bool: v = y
    lse,  # [rows], as are scale, g, e and entropy
    scale,
    g,  # times 1/τ, and fp16's loss scale; so is e
    e,
    entropy,
    softcap,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """A tile of dz: g·1[v=y] − p·(g + e·(log p + H)), through the softcap."""
    p = tl.exp2((z - (lse / scale)[:, None]) * (scale * _LOG2E)[:, None])
    slope = g[:, None]
    if ENTROPY:
        # p = 0 where log p = −∞: a masked entry takes no part in the entropy.
        log_p = tl.where(p > 0, z * scale[:, None] - lse[:, None], 0.0)
        slope += e[:, None] * (log_p + entropy[:, None])
    dz = tl.where(target, g[:, None], 0.0) - p * slope
    if SOFTCAP:
        capped = tl.where(z > -float("inf"), z, 0.0) / softcap
        dz *= 1 - capped * capped
    return dz
