"""A micro-batch of swift's with further rows: the same completions on degraded images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from roma_kernels.errors import fail

_ROWS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "text_position_ids")
_IMAGES = ("pixel_values", "image_grid_thw")
_IMAGE_TOKEN = 1  # in mm_token_type_ids; 2 is a video


def images_per_row(inputs: Mapping[str, Any], images: Sequence[int], merge: int) -> list[int]:
    """How many images each row of a micro-batch has: those of its sample, held to its tokens.

    Args:
        inputs: the model's, of B rows.
        images: B numbers of images.
        merge: patches a side that become one token.

    Raises:
        ValueError: the model's images have no grid (it is not of Qwen-VL's kind), there are videos,
            or a row's image tokens are not those of its images.
    """
    remedy = "set num_views=0 in ROMA_OPTIONS for this data"
    if inputs.get("pixel_values_videos") is not None:
        fail("dataset", "images", "a video, which has no views", remedy)
    if inputs.get("pixel_values") is None:
        return [0] * len(images)
    grid, kinds = inputs.get("image_grid_thw"), inputs.get("mm_token_type_ids")
    if grid is None:
        got = f"the inputs {', '.join(inputs)}"
        fail("model", "pixel_values with an image_grid_thw, as Qwen-VL's", got, remedy)
    if len(grid) != sum(images):
        expected = f"{sum(images)} images, those of the samples"
        fail("image_grid_thw", expected, str(len(grid)), remedy)
    if kinds is not None:
        tokens = (grid.prod(1) // merge**2).split(list(images))
        wanted = [int(own.sum()) for own in tokens]
        found = (kinds == _IMAGE_TOKEN).sum(1).tolist()
        if found != wanted:
            fail("image tokens of the rows", str(wanted), str(found), remedy)
    return list(images)


def joined(
    inputs: Mapping[str, Any], rows: Sequence[int], counts: Sequence[int], pixels: Tensor
) -> dict[str, Any]:
    """The inputs of B rows, and behind them those of R further ones on other pixels.

    Args:
        inputs: the model's, of B rows; not changed.
        rows: R rows of 0..B-1 whose tokens are taken again.
        counts: B numbers of images.
        pixels: pixel_values of the R rows, row after row.

    Returns:
        The model's inputs, of B + R rows.

    Raises:
        ValueError: an input that is not known: it cannot be told which axis is that of rows.
    """
    batch = len(inputs["input_ids"])
    pick = torch.tensor([*range(batch), *rows], device=inputs["input_ids"].device)
    grids = inputs["image_grid_thw"].split(list(counts))
    made = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or name in _IMAGES:
            made[name] = value
        elif name in _ROWS or (name == "position_ids" and value.ndim == 2):
            made[name] = value[pick]
        elif name == "position_ids" and value.ndim == 3:  # one more axis: text, time, height, width
            made[name] = value[:, pick]
        else:
            expected, got = ", ".join([*_ROWS, *_IMAGES, "position_ids"]), repr(name)
            fail("model input", expected, got, "set num_views=0 in ROMA_OPTIONS for this model")
    grid = torch.cat([inputs["image_grid_thw"], *[grids[row] for row in rows]])
    size = int(grid.prod(1).sum())
    whole = torch.cat([inputs["pixel_values"], pixels])
    if len(whole) != size:
        expected, got = f"{size} patches, those of the clean images", str(len(whole))
        fail("pixel_values of views", expected, got, "keep each view's height and width")
    return {**made, "pixel_values": whole, "image_grid_thw": grid}
