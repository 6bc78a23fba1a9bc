"""The chips that kernels are compiled for: no GPU is needed to compile."""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget


class Chip(NamedTuple):
    """A compiler's target, the shared memory that a program may have, the matrix instruction."""

    target: GPUTarget
    shared: int
    matrix: str


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, "mma.sync"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, "wgmma.mma_async"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, "tcgen05.mma"),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99 * 1024, "mma.sync"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, "v_mfma"),
}
