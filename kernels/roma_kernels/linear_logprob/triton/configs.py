"""Block sizes of the Triton kernels: which configuration is chosen when.

`make kernels` compiles every entry of `TILES` for its chip and writes what the compiler made of it
to docs/KERNELS.md.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tile:
    """Blocks of a product [BLOCK_R, BLOCK_D] × [BLOCK_V, BLOCK_D]ᵀ and how it is scheduled."""

    block_r: int
    block_v: int
    block_d: int
    group: int
    """Row tiles that walk the vocabulary together, their hidden states resident in L2."""
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """Loads by the tensor memory accelerator, where strides allow it."""
    persistent: bool = False
    """One program per multiprocessor computes many tiles and loads the next one during the
    reductions of the last; else one program per tile."""


class Tiles(NamedTuple):
    """The configurations of one chip."""

    many: Tile
    """bf16 and fp16."""
    softcap_or_entropy: Tile
    """The same with a softcap or an entropy, which need more registers than `many` leaves."""
    few: Tile
    """The same for at most FEW_ROWS rows."""
    fp32: Tile
    """fp32, or mixed with it: exact products, no tf32."""


# Persistent, and loading by the tensor memory accelerator.
_Tma = functools.partial(Tile, descriptors=True, persistent=True)
_FP32 = Tile(block_r=64, block_v=64, block_d=32, group=8, num_warps=4, num_stages=3)
TILES = {
    "sm_80": Tiles(
        Tile(block_r=128, block_v=256, block_d=32, group=8, num_warps=8, num_stages=4),
        Tile(block_r=128, block_v=128, block_d=64, group=8, num_warps=8, num_stages=3),
        Tile(block_r=64, block_v=128, block_d=64, group=1, num_warps=4, num_stages=3),
        _FP32,
    ),
    # 99 KiB of shared memory: consumer Ampere, Ada and Blackwell.
    "sm_120": Tiles(
        Tile(block_r=128, block_v=128, block_d=64, group=8, num_warps=8, num_stages=3),
        Tile(block_r=128, block_v=128, block_d=32, group=8, num_warps=8, num_stages=3),
        Tile(block_r=64, block_v=128, block_d=64, group=1, num_warps=4, num_stages=3),
        _FP32,
    ),
    "sm_90": Tiles(
        _Tma(block_r=128, block_v=256, block_d=64, group=16, num_warps=8, num_stages=4),
        _Tma(block_r=128, block_v=128, block_d=64, group=16, num_warps=8, num_stages=4),
        _Tma(block_r=64, block_v=128, block_d=64, group=1, num_warps=4, num_stages=4),
        _FP32,
    ),
    "sm_100": Tiles(
        _Tma(block_r=128, block_v=128, block_d=64, group=16, num_warps=8, num_stages=4),
        _Tma(block_r=128, block_v=128, block_d=64, group=16, num_warps=8, num_stages=4),
        _Tma(block_r=64, block_v=128, block_d=64, group=1, num_warps=4, num_stages=4),
        _FP32,
    ),
    "gfx942": Tiles(
        Tile(block_r=128, block_v=128, block_d=64, group=8, num_warps=8, num_stages=2),
        Tile(block_r=128, block_v=128, block_d=64, group=8, num_warps=8, num_stages=2),
        Tile(block_r=64, block_v=128, block_d=64, group=1, num_warps=4, num_stages=2),
        Tile(block_r=64, block_v=64, block_d=32, group=8, num_warps=4, num_stages=2),
    ),
    # Small for few rows, so that a small test crosses every kind of edge. An interpreted operation
    # costs about the same for any block, so many rows get large ones.
    "interpreter": Tiles(
        _Tma(block_r=128, block_v=1024, block_d=256, group=2, num_warps=4, num_stages=1),
        Tile(
            block_r=128,
            block_v=512,
            block_d=256,
            group=2,
            num_warps=4,
            num_stages=1,
            persistent=True,
        ),
        _Tma(block_r=16, block_v=128, block_d=32, group=2, num_warps=4, num_stages=1),
        Tile(block_r=16, block_v=128, block_d=32, group=2, num_warps=4, num_stages=1),
    ),
}
FEW_ROWS = 64
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_INTERPRETED_PROGRAMS = 3  # of a persistent grid: enough for turns that wrap around


def chip(device: torch.device) -> str:
    """The row of `TILES` for a device; consumer chips (8.6, 8.9, 12.0) share sm_120's: 99 KiB."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    if major == 10:
        return "sm_100"
    return "sm_80" if (major, minor) == (8, 0) else "sm_120"


def tile_for(
    device: torch.device, dtype: torch.dtype, rows: int, *, softcap_or_entropy: bool
) -> Tile:
    """The configuration of a product in `dtype` over `rows` rows."""
    tiles = TILES[chip(device)]
    few = rows <= FEW_ROWS
    if dtype == torch.float32 and (few or device.type == "cuda"):
        return tiles.fp32
    if few:
        return tiles.few
    return tiles.softcap_or_entropy if softcap_or_entropy else tiles.many


def programs(tile: Tile, rows: int, vocab: int, device: torch.device) -> int:
    """Programs to launch for a product of rows × vocab."""
    turns = math.ceil(rows / tile.block_r) * math.ceil(vocab / tile.block_v)
    return min(turns, _multiprocessors(device)) if tile.persistent else turns


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def sources(
    tile: Tile, hidden: Tensor, weight: Tensor
) -> tuple[bool, Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
    """Whether a kernel gets descriptors, and the two matrices as it gets them."""
    if not (tile.descriptors and _describable(hidden) and _describable(weight)):
        return False, hidden, weight
    return (
        True,
        TensorDescriptor.from_tensor(hidden, [tile.block_r, tile.block_d]),
        TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_d]),
    )


def _describable(matrix: Tensor) -> bool:
    """The copy engine needs 16-byte addresses and row strides, and contiguous rows."""
    return (
        matrix.stride(1) == 1
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
    )


def promoted(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that a product of the two is done in."""
    return torch.promote_types(hidden.dtype, weight.dtype)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)
