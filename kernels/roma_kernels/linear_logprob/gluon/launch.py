"""When the warp-specialised kernels can run, and their launches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from roma_kernels.linear_logprob.rows import Active, Head, Rows

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# 128 × 256 × 64: the fewest bytes a product that two consumers' registers hold. An accumulator of
# 64 × 256 takes 128 of a thread's registers; a block of 64 fills the 128 bytes that wgmma swizzles.
BLOCK_R, BLOCK_V, BLOCK_D = 128, 256, 64
# Slots of 48 KiB. The more there are, the further a consumer gets ahead; five do not fit.
STAGES = 4
# The row tiles that walk the vocabulary together, as the fused kernel's.
GROUP = 16
# A thread's registers in a consumer. Three warpgroups have 3·168, and the producer keeps 24.
REGISTERS = 240
# Compiled with these. Gluon is experimental: another one may compile to something else.
_TRITONS = ("3.6", "3.7", "3.8", "3.9")
_LOG2E = 1.4426950408889634


def supports(chip: str, states: Tensor, weight: Tensor, *, bias: bool, softcap: bool) -> str:
    """Why the kernels cannot take these rows and this head; empty if they can.

    Args:
        chip: "sm_90", or another one.
        states: [R, D].
        weight: [V, D].
        bias: whether the head has one.
        softcap: whether the logits are capped.
    """
    if chip != "sm_90":
        return f"plan gluon is for sm_90, this is {chip}"
    if not triton.__version__.startswith(tuple(f"{version}." for version in _TRITONS)):
        return f"plan gluon is for Triton {', '.join(_TRITONS)}, this is {triton.__version__}"
    if states.dtype != weight.dtype or states.dtype not in (torch.bfloat16, torch.float16):
        return f"plan gluon is for bf16 or fp16 alone, these are {states.dtype} and {weight.dtype}"
    if bias or softcap:
        # They take more registers or instructions than the other consumer's products can hide.
        return f"plan gluon takes no {'bias' if bias else 'softcap'}"
    if not all(
        x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        for x in (states, weight)
    ):
        return "plan gluon needs contiguous rows at 16-byte addresses, for the copy engine"
    return ""


def sweep_tiles(
    sums: tuple[Tensor, Tensor, Tensor | None, Tensor],
    states: Tensor,
    rows: Rows,
    head: Head,
    *,
    first: int,
    multiprocessors: int,
    stages: int = STAGES,
    group: int = GROUP,
) -> None:
    """Fills peaks, totals, moments [⌈V/BLOCK_V⌉, R] and the targets [R] of R of the rows.

    Args:
        sums: peaks, totals, moments or None without an entropy, targets (zeros).
        states: [R, D], of rows first, first + 1, …
        rows: the tokens, temperatures and number of tokens of all rows.
        head: without bias and softcap.
        first: the first row's number.
        multiprocessors: of the GPU; one program runs on each.
        stages: slots of the ring.
        group: row tiles that walk the vocabulary together.
    """
    from roma_kernels.linear_logprob.gluon.forward import _gluon_fwd_kernel

    _gluon_fwd_kernel[(_programs(states, head, multiprocessors),)](
        *sums, *_described(states, head.weight),
        rows.tokens, rows.row_scale, rows.num_tokens,
        first, rows.per_token, head.start, len(states), *head.weight.shape, head.scale,
        BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, STAGES=stages, GROUP=group, REGISTERS=REGISTERS,
        num_warps=4,
    )  # fmt: skip


def dlogits(
    dz: Tensor,
    active: Active,
    head: Head,
    *,
    multiprocessors: int,
    stages: int = STAGES,
    group: int = GROUP,
) -> None:
    """Writes the gradient dz [A, V], and zeros up to a multiple of 64 columns.

    Args:
        dz: [A, V], its row stride a multiple of 64, its address of 16 bytes.
        active: the rows.
        head: without bias and softcap.
        multiprocessors: of the GPU; one program runs on each.
        stages: slots of the ring.
        group: row tiles that walk the vocabulary together.
    """
    from roma_kernels.linear_logprob.gluon.dlogits import _gluon_dlogits_kernel

    scale2, lse, g, slope, slope_z = row_factors(active, head)
    _gluon_dlogits_kernel[(_programs(active.states, head, multiprocessors),)](
        dz, *_described(active.states, head.weight),
        active.tokens, scale2, lse, g, slope, slope_z,
        dz.stride(0) // 64, head.start, len(active.states), *head.weight.shape,
        BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, STAGES=stages, GROUP=group, REGISTERS=REGISTERS,
        num_warps=4,
    )  # fmt: skip


def row_factors(active: Active, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What dz = 2^((z − lse)·scale2)·(slope + slope_z·z) + g·1[v=y] has of each row [A].

    scale2, lse (in units of z), g, slope, slope_z; the last one None without an entropy.
    """
    scale, lse = active.row_scale, active.lse
    if scale is None:
        scale = torch.full_like(lse, head.scale)
    per_logit = scale if active.loss_scale is None else scale * active.loss_scale
    g = active.dlogp * per_logit
    slope, slope_z = -g, None
    if active.dentropy is not None:
        assert active.entropy is not None
        e = active.dentropy * per_logit
        slope, slope_z = slope - e * (active.entropy - lse), -e * scale
    return scale * _LOG2E, lse / scale, g, slope, slope_z


def _programs(states: Tensor, head: Head, multiprocessors: int) -> int:
    vocab = len(head.weight)
    return min(math.ceil(len(states) / BLOCK_R) * math.ceil(vocab / BLOCK_V), multiprocessors)


def _described(states: Tensor, weight: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = gl.bfloat16 if states.dtype == torch.bfloat16 else gl.float16

    def described(matrix: Tensor, block: int) -> TensorDescriptor:
        shape = [block, BLOCK_D]
        layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
        return TensorDescriptor.from_tensor(matrix, shape, layout)

    return described(states, BLOCK_R // 2), described(weight, BLOCK_V)
