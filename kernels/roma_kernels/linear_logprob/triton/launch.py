"""What every launch of a product needs: matrices as a kernel takes them, number of programs."""

import functools
import math

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from roma_kernels.linear_logprob.gluon import launch as gluon
from roma_kernels.linear_logprob.rows import Head
from roma_kernels.linear_logprob.triton.tuning import Tile, chip

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
COLUMNS = 64  # rows of logits and of dz are whole multiples; kernels take their strides in these
_INTERPRETED_PROGRAMS = 3  # of a persistent grid: enough for turns that wrap around


def programs(tile: Tile, rows: int, vocab: int, device: torch.device) -> int:
    """Programs to launch for a product of rows × vocab."""
    turns = math.ceil(rows / tile.block_r) * math.ceil(vocab / tile.block_v)
    return min(turns, multiprocessors(device)) if tile.persistent else turns


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few where kernels are interpreted."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def compiler_options(tile: Tile, device: torch.device) -> dict[str, int]:
    """Warps, stages and registers."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return options | registers(tile.num_warps, device)


def registers(num_warps: int, device: torch.device) -> dict[str, int]:
    """All registers of a thread, on NVIDIA's chips.

    Else ptxas guesses that several programs are to share a multiprocessor, and spills a few bytes
    for it; the shared memory of the large tiles forbids it anyhow.
    """
    nvidia = chip(device).startswith("sm_")
    return {"maxnreg": min(255, 2**16 // (32 * num_warps))} if nvidia else {}


def sources(
    tile: Tile, hidden: Tensor, weight: Tensor
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
    """The two matrices as a kernel gets them: descriptors or pointers, as the tile says."""
    if not tile.descriptors:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [tile.block_r, tile.block_d]),
        TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_d]),
    )


def gluon_takes(states: Tensor, head: Head) -> bool:
    """Whether the warp-specialised kernels support rows and a head; else the fused ones do it."""
    options = {"bias": head.bias is not None, "softcap": head.softcap is not None}
    return not gluon.supports(chip(states.device), states, head.weight, **options)


def promoted(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that a product of the two is done in."""
    return torch.promote_types(hidden.dtype, weight.dtype)


def padded(vocab: int) -> int:
    """Columns of a row: an odd row would be moved in halfwords, and multiplied by slow kernels."""
    return math.ceil(vocab / COLUMNS) * COLUMNS


def blank_dlogits(like: Tensor, rows: int, vocab: int) -> Tensor:
    """Room for dz [rows, vocab], in rows of whole 64 columns."""
    return like.new_empty(rows, padded(vocab))[:, :vocab]
