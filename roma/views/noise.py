"""Random words, normal noise and impulses: the same bytes for a seed on every CPU and device.

DALI's noise operators draw from one generator per call, so independence from the batch would take a
call per image, and drawing is slow on a CPU: 39 images of 448×448 a second. Here word i of a seed
is Philox 4×32-10 (Salmon et al., SC 2011) of a counter that follows from i, and a normal number is
made of two words (Box and Muller, 1958) in fp32 operations that IEEE 754 defines to the last bit.
csrc/noise.cpp computes it on a CPU where it was built; elsewhere, as on a GPU, the same in PyTorch.
"""

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from roma_kernels.native import level, native

_BLOCK = 64  # values that 16 counters give: word 0 of each, then word 1, 2 and 3
_WORD = 0xFFFFFFFF


def random_words(seed: int, count: int, device: torch.device) -> Tensor:
    """[count] int64 in 0..2³²-1: independent and uniform."""
    if device.type == "cpu" and (library := _library()):
        made = torch.empty(count, dtype=torch.int32)
        library.roma_random_words(level(), seed, made.data_ptr(), count)
        return made.to(torch.int64) & _WORD
    return torch.stack(_blocks(seed, count, device), dim=1).reshape(-1)[:count]


def add_noise(image: Tensor, seed: int, scale: float, *, proportional: bool) -> Tensor:
    """Adds scale·n to an image, or scale·n·image, n standard normal; rounds and clips.

    Args:
        image: uint8, contiguous, of any shape; a draw for each of its values.
        seed: 0..2⁶⁴-1.
        scale: of the noise, in levels (0..255), or as a part of the image.
        proportional: which of the two.
    """
    if image.device.type == "cpu" and (library := _library()):
        made = torch.empty_like(image)
        library.roma_add_noise(
            level(), seed, scale, proportional, image.data_ptr(), made.data_ptr(), image.numel()
        )
        return made
    values = image.reshape(-1).float()
    noise = _normals(seed, values.numel(), image.device) * scale
    moved = values + (noise * values if proportional else noise)
    return moved.clamp(0, 255).round().to(torch.uint8).view(image.shape)


def add_impulses(image: Tensor, seed: int, share: float, *, whole_pixels: bool) -> Tensor:
    """A share of the places, drawn independently, becomes 255 or 0 with equal chance.

    Args:
        image: [H, W, 3] uint8, contiguous.
        seed: 0..2⁶⁴-1.
        share: 0..1.
        whole_pixels: whether a place is a pixel; else it is one of its values.
    """
    places = image.shape[:2] if whole_pixels else image.shape
    salt, hit, count = round(share * 2**31), round(share * 2**32), math.prod(places)
    if image.device.type == "cpu" and (library := _library()):
        made = torch.empty_like(image)
        library.roma_add_impulses(
            level(), seed, salt, hit, whole_pixels, image.data_ptr(), made.data_ptr(), count
        )
        return made
    words = random_words(seed, count, image.device).view(*places)
    words = words[..., None] if whole_pixels else words
    return image.masked_fill(words < hit, 0).masked_fill_(words < salt, 255)


def compiled() -> bool:
    """Whether a CPU's noise is compiled code, which runs on the calling thread alone."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled noise, if it was built."""
    try:
        library = native().library
    except ImportError:
        return None
    number, key, place = ctypes.c_int32, ctypes.c_uint64, ctypes.c_void_p
    library.roma_random_words.argtypes = [number, key, place, ctypes.c_int64]
    library.roma_add_noise.argtypes = [
        number, key, ctypes.c_float, number, place, place, ctypes.c_int64,
    ]  # fmt: skip
    library.roma_add_impulses.argtypes = [
        number, key, key, key, number, place, place, ctypes.c_int64,
    ]  # fmt: skip
    for function in ("roma_random_words", "roma_add_noise", "roma_add_impulses"):
        getattr(library, function).restype = None
    return library


def _blocks(seed: int, count: int, device: torch.device) -> list[Tensor]:
    """The four words of every counter that `count` values need: each [blocks, 16] int64."""
    blocks = -(-count // _BLOCK)
    counter = torch.arange(16 * blocks, device=device).view(blocks, 16)
    none = torch.zeros_like(counter)
    c = [counter & _WORD, counter >> 32, none, none]
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(10):
        # 32 × 32 bits wrap to a signed number, of which the shift and the mask take the right bits.
        one, other = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        high0, high1 = one >> 32 & _WORD, other >> 32 & _WORD
        c = [high1 ^ c[1] ^ k0, other & _WORD, high0 ^ c[3] ^ k1, one & _WORD]
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c


def _normals(seed: int, count: int, device: torch.device) -> Tensor:
    """[count] fp32, standard normal; step for step as in csrc/noise.cpp, which says why."""
    words = _blocks(seed, count, device)
    pairs = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.stack(pairs, dim=1).reshape(-1)[:count]


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers of two words."""
    u = ((word0 >> 8).float() + 1.0) * 5.9604645e-08
    radius = (_logarithm(u) * -2.0).sqrt()
    quarter = word1 >> 30
    rest = (word1 << 2) & _WORD
    x = ((rest - (rest >> 31 << 32)) >> 8).float() * 9.362676e-08
    square = x * x
    s = square * -0.00019610747 + 0.00833286
    s = s * square + -0.16666666
    s = s * square * x + x
    c = square * 2.4801587e-05 + -0.0013888889
    c = c * square + 0.041666668
    c = c * square + -0.5
    c = c * square + 1.0
    odd = (quarter & 1).bool()
    first, second = torch.where(odd, s, c), torch.where(odd, c, s)
    first = torch.where((quarter + 1 & 2).bool(), -first, first)
    second = torch.where((quarter & 2).bool(), -second, second)
    return first * radius, second * radius


def _logarithm(u: Tensor) -> Tensor:
    """The natural logarithm of 0 < u ≤ 1."""
    shifted = u.view(torch.int32) + (0x3F800000 - 0x3F3504F3)
    exponent = ((shifted >> 23) - 127).float()
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    p = f * 0.092721604 + -0.1411842
    for coefficient in (0.1467641, -0.16592857, 0.19985127, -0.2500092, 0.3333341, -0.5):
        p = p * f + coefficient
    return exponent * 0.6931472 + (p * f * f + f)
