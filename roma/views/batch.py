"""`degrade` and `degrade_batch`: checks, jobs of one corruption, and the way back."""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from roma.views.corruptions import (
    ADVERSARIAL,
    CORRUPTIONS,
    NEEDS_POLICY,
    Corruption,
    Parameter,
    find,
)
from roma.views.dali import run
from roma.views.operators import OPERATORS, runs_in_pytorch
from roma.views.sample import ViewSpec
from roma_kernels.errors import fail

Image = TypeVar("Image", NDArray[np.uint8], torch.Tensor)

# Values of one job: two images of 448×448. A job costs 0.3 ms of Python, and its fp32 images should
# stay in a core's cache.
_JOB = 5 * 2**18


def degrade(
    image: Image,
    corruption: str,
    *,
    level: float | None = None,
    parameter: Parameter | None = None,
    seed: int,
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
) -> Image:
    """One image, degraded: same height and width, same type; level 0 is the image itself.

    Args:
        image: [H, W, 3] uint8, RGB, 0..255: a NumPy array, or a torch tensor on the CPU or a GPU.
        corruption: a name in `corruptions`.
        level: 0 to the last level of the table, whole or not; or else
        parameter: the corruption's parameter, in the unit of the table.
        seed: of what is random in it (noise, motion_blur's angle, fog), 0..2⁶⁴-1; see `seed_for`.
        corruptions: the table of levels.

    Raises:
        ValueError: an unknown corruption, a level or parameter outside the table's range, not
            exactly one of the two, or another shape or dtype of the image (NaN is named).
        TypeError: the image is neither an array nor a tensor, or the seed no integer.
        ImportError: DALI is not installed.

    Example:
        >>> image = np.full((32, 64, 3), 128, np.uint8)
        >>> degrade(image, "gaussian_noise", level=1.5, seed=7).shape
        (32, 64, 3)
    """
    found = find(corruption, corruptions, argument="corruption")
    if (level is None) == (parameter is None):
        got = "neither" if level is None else "both"
        fail("level, parameter", "exactly one of the two", got, "give level=2, for example")
    if parameter is None:
        assert level is not None
        parameter = found.parameter(level)
    spec = ViewSpec(corruption, parameter, level)
    return degrade_batch([image], [spec], [seed], corruptions=corruptions)[0]


def degrade_batch(
    images: Sequence[Image],
    specs: Sequence[ViewSpec],
    seeds: Sequence[int],
    *,
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
) -> list[Image]:
    """Image i, degraded as specs[i] says with the noise of seeds[i].

    The result for an image depends on the image, its spec and its seed alone: not on the others,
    their order or number, nor on threads or processes. Images that share a corruption run together,
    and on a CPU torch.get_num_threads() such groups side by side: lists are much faster than single
    images. Gaussian noise and speckle have the same bytes on every CPU and GPU; a GPU's JPEG is
    another program than a CPU's, and its filters sum in another order.

    Args:
        images: n images [H, W, 3] uint8, as in `degrade`, of any sizes.
        specs: n specs, e.g. from `sample`.
        seeds: n seeds, e.g. from `seed_for`.
        corruptions: the table of levels that the specs were made with.

    Returns:
        n new images, each where its original was; none shares memory with it. Views may lie side by
        side in one block of memory, at most 1.3 MB or one image, which lives as long as any of
        them.

    Raises:
        ValueError: lists of different lengths, or as in `degrade`, with the image's index; or a
            spec whose parameter is not that of its level in `corruptions`.
        TypeError: as in `degrade`.
        ImportError: DALI is not installed.

    Example:
        >>> images = [np.zeros((32, 64, 3), np.uint8)] * 2
        >>> specs = [ViewSpec("jpeg", 20.0), ViewSpec("posterize", 3.0)]
        >>> [view.shape for view in degrade_batch(images, specs, seeds=[0, 1])]
        [(32, 64, 3), (32, 64, 3)]
    """
    if not len(images) == len(specs) == len(seeds):
        got = f"{len(images)}, {len(specs)} and {len(seeds)}"
        fail("images, specs, seeds", "lists of one length", got, "give one spec and seed per image")
    pixels = [_pixels(image, f"images[{i}]") for i, image in enumerate(images)]
    keys = [_seed(seed, f"seeds[{i}]") for i, seed in enumerate(seeds)]
    made = list(pixels)
    groups: dict[tuple[torch.device, str], list[int]] = {}
    parameters: list[Parameter] = []
    for i, spec in enumerate(specs):
        corruption = _corruption(spec, corruptions, f"specs[{i}]")
        parameters.append(_in_pixels(corruption, spec.parameter, pixels[i].shape))
        if spec.parameter == corruption.identity:
            made[i] = pixels[i].clone()
        else:
            groups.setdefault((pixels[i].device, spec.corruption), []).append(i)
    for device in dict.fromkeys(device for device, _ in groups):
        parts = [
            (name, part)
            for (where, name), members in groups.items()
            if where == device
            for part in _parts(members, pixels)
        ]
        parts.sort(key=lambda part: runs_in_pytorch(part[0]))
        jobs = [
            partial(
                _degrade,
                name,
                part,
                [pixels[i] for i in part],
                [parameters[i] for i in part],
                [keys[i] for i in part],
            )
            for name, part in parts
        ]
        first = sum(not runs_in_pytorch(name) for name, _ in parts)
        made_here = run(jobs[:first], jobs[first:], device)
        for (_, part), views in zip(parts, made_here, strict=True):
            for i, view in zip(part, views, strict=True):
                made[i] = view
    return [
        view if isinstance(image, torch.Tensor) else view.numpy()
        for image, view in zip(images, made, strict=True)
    ]


def _degrade(name: str, places: Sequence[int], *given: Any) -> list[torch.Tensor]:
    """The views of a job; an error says of which images."""
    try:
        return OPERATORS[name](*given)
    except RuntimeError as error:
        which = ", ".join(f"images[{i}]" for i in places)
        raise RuntimeError(f"{name} of {which}: {error}") from error


def _parts(members: Sequence[int], pixels: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """`members` in parts of at most _JOB values, or of one image."""
    part: list[int] = []
    values = 0
    for i in members:
        values += pixels[i].numel()
        if part and values > _JOB:
            yield part
            part, values = [], pixels[i].numel()
        part.append(i)
    yield part


def _pixels(image: object, name: str) -> torch.Tensor:
    """The pixels of an image, after its checks; without a copy where they are contiguous."""
    if isinstance(image, torch.Tensor):
        if image.device.type not in ("cpu", "cuda"):
            got = f"one on {image.device}"
            fail(name, "a tensor on the CPU or a CUDA device", got, "call .cpu() on it")
        dtype, shape = str(image.dtype).removeprefix("torch."), tuple(image.shape)
    elif isinstance(image, np.ndarray):
        dtype, shape = str(image.dtype), image.shape
    else:
        remedy = "convert it with np.asarray(image.convert('RGB'))"
        fail(name, "a NumPy array or tensor", type(image).__name__, remedy, error=TypeError)
    if dtype != "uint8":
        got, values = dtype, cast(Any, image)
        if "float" in dtype and 0 not in shape:
            low, high = float(values.min()), float(values.max())
            got += " with NaN" if math.isnan(low) else f" from {low:g} to {high:g}"
        fail(name, "dtype uint8", got, "scale it to 0..255 and convert it to uint8")
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        if len(shape) == 3 and shape[0] == 3:
            remedy = "transpose it: channels come last"
        elif len(shape) == 3 and 0 in shape:
            remedy = "an empty image has no view: leave it out"
        else:
            remedy = "convert it to RGB"
        fail(name, "[H, W, 3], H and W at least 1", str(list(shape)), remedy)
    if isinstance(image, torch.Tensor):
        return image.detach().contiguous()
    # PyTorch takes no read-only memory, which Pillow's arrays are, and no negative stride, which
    # NumPy calls contiguous along a side of one pixel.
    good = image.flags.c_contiguous and image.flags.writeable and min(image.strides) > 0
    return torch.from_numpy(image if good else image.copy(order="C"))


def _seed(seed: object, name: str) -> int:
    """A seed as an integer, after its checks."""
    try:
        value = operator.index(seed)  # type: ignore[arg-type]  # that is what is checked
    except TypeError:
        got = type(seed).__name__
        fail(name, "an integer", got, "make one with seed_for(run seed, …)", error=TypeError)
    if not 0 <= value < 2**64:
        fail(name, "0 to 2⁶⁴-1", str(value), "make one with seed_for(run seed, …)")
    return value


def _corruption(spec: ViewSpec, corruptions: Mapping[str, Corruption], name: str) -> Corruption:
    """The corruption of a spec, after the spec's checks."""
    if not isinstance(spec, ViewSpec):
        remedy = "make one with sample() or ViewSpec('jpeg', 20.0)"
        fail(name, "a ViewSpec", type(spec).__name__, remedy, error=TypeError)
    corruption = find(spec.corruption, corruptions, argument=f"{name}.corruption")
    if corruption.pool == ADVERSARIAL:
        got, remedy = f"{corruption.name!r}, which needs a policy", NEEDS_POLICY
        fail(f"{name}.corruption", "one that an image alone is enough for", got, remedy)
    if corruption.name not in OPERATORS:
        fail(f"{name}.corruption", "one that roma has", repr(corruption.name), "see CORRUPTIONS")
    corruption.check(spec.parameter, name=f"{name}.parameter")
    # A spec of one table run with another would be scaled wrongly, and nobody would notice.
    if spec.level is not None and corruption.parameter(spec.level) != spec.parameter:
        expected = f"{corruption.describe(corruption.parameter(spec.level))}, {spec.corruption} at "
        expected += f"level {spec.level:g} in this table"
        remedy = "pass the corruptions= that the spec was made with"
        fail(f"{name}.parameter", expected, corruption.describe(spec.parameter), remedy)
    return corruption


def _in_pixels(corruption: Corruption, parameter: Parameter, shape: tuple[int, ...]) -> Parameter:
    """The parameter in pixels of an image of `shape`, where it is a length."""
    if corruption.reference_size is None:
        return parameter
    scale = min(shape[:2]) / corruption.reference_size
    if isinstance(parameter, tuple):
        return tuple(scale * part for part in parameter)
    return scale * parameter
