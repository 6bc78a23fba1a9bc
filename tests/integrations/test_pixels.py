"""From a processor's pixel_values to images and back, bit by bit; others are refused."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from PIL import Image

from roma.integrations.pixels import PixelFormat

MODES = ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16")
PLANES = (
    "CLIP",
    "Siglip",
    "Llava",
    "Gemma3",
    "DeepseekVL",
    "Janus",
    "Ovis2",
    "GotOcr2",
    "Blip",
    "Chameleon",
    "Pixtral",
)
PATCHES = ("Qwen2VL", "Glm4v", "Ernie4_5_VLMoe", "VideoLlama3", "CohereCompass")
OTHERS = {
    "Idefics3": "pixel_values of shape",
    "LlavaNext": "an error on a plain image",
    "LlavaOnevision": "pixel_values of shape",
    "Mllama": "pixel_values of shape",
    "Gemma4": "pixel_values of shape",
    "Siglip2": "pixel_values of shape",
    "PaddleOCRVL": "pixels that were moved or mixed",
    "HunYuanVL": "pixels that were moved or mixed",  # patches in another order
    "Idefics": "no pixel_values",
    "Kosmos2_5": "no pixel_values",
}


def processor(name, **options):
    return getattr(transformers, f"{name}ImageProcessorPil")(**options)


def picture(seed, height, width, mode="RGB"):
    """Every level of every channel occurs, with sharp and smooth parts."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2] = np.linspace(0, 255, width).astype(np.uint8)[None, :, None]
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    made = Image.fromarray(pixels).convert(mode)
    if mode == "RGBA":
        made.putalpha(Image.fromarray(pixels[..., 1]))
    return made


def there_and_back(made, format, dtype=torch.float32):
    clean = made["pixel_values"].to(dtype)
    images = format.images(clean, made.get("image_grid_thw"))
    for image in images:
        assert image.dtype == torch.uint8 and image.shape[2] == 3 and image.is_contiguous()
    again = format.pixels(images, clean)
    assert again.dtype == dtype and torch.equal(again, clean)
    return images


@given(
    seed=st.integers(0, 2**16),
    patch=st.sampled_from([1, 3, 7, 8, 14]),
    merge=st.sampled_from([1, 2, 3]),
    frames=st.sampled_from([1, 2, 3]),
    sizes=st.lists(
        st.sampled_from([(20, 30), (48, 64), (37, 91), (64, 17)]), min_size=1, max_size=3
    ),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    mean=st.sampled_from([[0.5, 0.5, 0.5], [0.48145466, 0.4578275, 0.40821073]]),
)
@settings(max_examples=60)
def test_patches_of_any_layout(seed, patch, merge, frames, sizes, mode, dtype, mean):
    own = processor(
        "Qwen2VL",
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=frames,
        size={"shortest_edge": 16 * (patch * merge) ** 2, "longest_edge": 128 * 128},
        image_mean=mean,
    )
    pictures = [picture(seed + n, *size, mode) for n, size in enumerate(sizes)]
    format = PixelFormat.of(own)
    assert (format.patch, format.merge, format.frames) == (patch, merge, frames)
    made = own(images=pictures, return_tensors="pt")
    images = there_and_back(made, format, dtype)
    # And the processor itself makes the same of those images: what a view goes through.
    fixed = own(images=[i.numpy() for i in images], do_resize=False, return_tensors="pt")
    if dtype == torch.float32:
        assert torch.equal(fixed["pixel_values"], made["pixel_values"])
    assert torch.equal(fixed["image_grid_thw"], made["image_grid_thw"])


@pytest.mark.parametrize("name", PATCHES)
def test_models_of_patches(name):
    own = processor(name)
    made = own(images=[picture(0, 90, 130), picture(1, 200, 60)], return_tensors="pt")
    images = there_and_back(made, PixelFormat.of(own))
    # Some sizes only: each image stands where it should, not beside or in the other's place.
    fixed = own(images=[i.numpy() for i in images], do_resize=False, return_tensors="pt")
    assert torch.equal(fixed["pixel_values"], made["pixel_values"])


@pytest.mark.parametrize("name", PLANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_planes(name, dtype):
    own = processor(name)
    format = PixelFormat.of(own)
    assert format.patch == 0
    for mode in ("RGB", "L") if own.do_convert_rgb else ("RGB",):
        made = own(images=[picture(0, 120, 120, mode)], return_tensors="pt")
        (image,) = there_and_back({"pixel_values": made["pixel_values"]}, format, dtype)
        assert image.shape[:2] == made["pixel_values"].shape[2:]


@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_is_refused_and_told_of_view_fn(name):
    with pytest.raises(ValueError) as caught:
        PixelFormat.of(processor(name))
    assert str(caught.value).startswith(f"image processor {name}ImageProcessorPil: expected ")
    assert f"got {OTHERS[name]}" in str(caught.value)
    assert str(caught.value).endswith("give the trainer a view_fn of your own")


def qwen(**options):
    return processor(
        "Qwen2VL", patch_size=8, size={"shortest_edge": 256, "longest_edge": 256 * 256}, **options
    )


def test_what_another_processor_made_is_refused():
    made = qwen(image_mean=[0.5] * 3, image_std=[0.5] * 3)(
        images=[picture(0, 32, 48)] * 2, return_tensors="pt"
    )
    format = PixelFormat.of(qwen())  # CLIP's mean
    with pytest.raises(ValueError, match=r"pixel_values, image 0: .*as the image processor made"):
        format.images(made["pixel_values"], made["image_grid_thw"])


@pytest.mark.parametrize("far", [0.004, float("nan")])
def test_one_pixel_that_is_no_level_is_refused(far):
    """A level is 0.0146 or more from the next; a fp32 value is 2e-7 from itself."""
    own = qwen()
    made = own(images=[picture(0, 32, 48), picture(1, 32, 32)], return_tensors="pt")
    pixels = made["pixel_values"].clone()
    pixels[-1, 3] += far
    with pytest.raises(ValueError, match="pixel_values, image 1: "):
        PixelFormat.of(own).images(pixels, made["image_grid_thw"])


def test_a_video_and_a_missing_grid_are_refused():
    own = qwen()
    format = PixelFormat.of(own)
    made = own(images=[picture(0, 32, 48)], return_tensors="pt")
    grid = made["image_grid_thw"]
    twice = torch.cat([made["pixel_values"]] * 2)
    with pytest.raises(ValueError, match=r"image 0: expected one frame, got 2 frames; .* view_fn"):
        format.images(twice, grid * torch.tensor([2, 1, 1]))
    with pytest.raises(ValueError, match="image_grid_thw: expected the grid of each image"):
        format.images(made["pixel_values"], None)


def test_frames_of_a_still_image_that_differ_are_refused():
    """Two frames in one patch: of a video that was cut to two."""
    own = qwen()
    made = own(images=[picture(0, 32, 48)], return_tensors="pt")
    pixels = made["pixel_values"].view(-1, 3, 2, 8, 8).clone()
    pixels[:, :, 1] = pixels[:, :, 1].flip(-1)
    with pytest.raises(ValueError, match="image 0: expected one frame, got frames that differ"):
        PixelFormat.of(own).images(pixels.view(len(pixels), -1), made["image_grid_thw"])


def test_no_images():
    own = qwen()
    made = own(images=[picture(0, 32, 48)], return_tensors="pt")
    format = PixelFormat.of(own)
    empty = made["pixel_values"][:0]
    assert format.images(empty, made["image_grid_thw"][:0]) == []
    assert format.pixels([], empty).shape == empty.shape
