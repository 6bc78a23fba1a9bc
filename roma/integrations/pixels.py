"""`PixelFormat`: from the pixel_values that a model gets back to images, and forth, bit for bit.

A view is made of what the model sees: at its resolution, after every resize, crop and conversion
that an image processor did, on its very grid. Images of any mode and tool images need nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from roma_kernels.errors import fail

_PROBE = 224  # pixels a side where a processor has no patches: what CLIP's towers take


@dataclass(frozen=True)
class PixelFormat:
    """How an image processor lays out an image, found by having it process one.

    Two layouts are known: [n, 3, H, W], an image (or tile) a row; and Qwen-VL's patches
    [Σ gh·gw, 3·f·p·p] with a grid [n, 3], every frame f of a still image the same.

    Attributes:
        table: [3, 256] fp32: what the processor makes of each level of each channel.
        patch: p pixels; 0 in the first layout.
        merge: patches that become one token lie side by side in squares of this many.
        frames: f.
    """

    table: Tensor
    patch: int
    merge: int
    frames: int

    @classmethod
    def of(cls, image_processor: Any) -> "PixelFormat":
        """The format of a transformers image processor.

        Raises:
            ValueError: it is neither of the two layouts.
        """
        sizes = ("patch_size", "merge_size", "temporal_patch_size")
        patch, merge, frames = (_whole(image_processor, name) for name in sizes)
        packed = bool(patch and merge and frames)
        # Two blocks by three, and another noise in each channel: what is moved shows.
        block = patch * merge
        rows, columns = _PROBE, _PROBE
        if packed:
            rows, columns = block * max(2, -(-16 // block)), block * max(3, -(-32 // block))
        noise = torch.Generator().manual_seed(0)
        probe = torch.randint(256, (rows, columns, 3), generator=noise, dtype=torch.uint8)
        probe.view(-1, 3)[:256] = torch.arange(256, dtype=torch.uint8)[:, None]
        named = type(image_processor).__name__
        try:
            made = image_processor(
                images=[probe.numpy()], return_tensors="pt", **_plain(image_processor)
            )
        except (TypeError, ValueError) as error:  # what they raise where an option is missing
            _unknown(named, f"an error on a plain image: {error}")
        if not isinstance(made, Mapping) or not isinstance(made.get("pixel_values"), Tensor):
            _unknown(named, "no pixel_values")
        values = made["pixel_values"].float()
        if packed and "image_grid_thw" in made:
            formed = cls(torch.zeros(3, 256), patch, merge, frames)
            channels = formed._planes(values, rows // patch, columns // patch)
        elif values.shape == (1, 3, rows, columns):
            formed, channels = cls(torch.zeros(3, 256), 0, 0, 1), values[0]
        else:
            _unknown(named, f"pixel_values of shape {list(values.shape)}")
        table = torch.stack([c.flatten()[:256] for c in channels])
        levels = probe.permute(2, 0, 1).long()
        again = torch.stack([table[c][levels[c]] for c in range(3)])
        if not torch.equal(again, channels) or not (table.diff() > 0).all():
            _unknown(named, "pixels that were moved or mixed")
        return cls(table, formed.patch, formed.merge, formed.frames)

    def images(self, pixel_values: Tensor, grid: Tensor | None = None) -> list[Tensor]:
        """The images, each [H, W, 3] uint8, on the device of pixel_values.

        Args:
            pixel_values: of n images, clean ones, as the processor made them, in any float dtype.
            grid: [n, 3] int64 (frames, rows, columns) of patches; None in the first layout.

        Raises:
            ValueError: they do not come from this processor (a video, say, or noise was added).
        """
        if not self.patch:
            planes = list(pixel_values)
        else:
            if grid is None:
                remedy = "hand on image_grid_thw beside pixel_values"
                fail("image_grid_thw", "the grid of each image", "None", remedy)
            sizes = grid.tolist()
            for number, (time, _, _) in enumerate(sizes):
                if time != 1:
                    got, remedy = f"{time} frames", "videos have no views: give them a view_fn"
                    fail(f"pixel_values, image {number}", "one frame", got, remedy)
            parts = pixel_values.split([rows * columns for _, rows, columns in sizes])
            for number, part in enumerate(parts):
                frames = part.view(len(part), 3, self.frames, -1)
                if not torch.equal(frames, frames[:, :, :1].expand_as(frames)):
                    got, remedy = "frames that differ", "videos have no views: give them a view_fn"
                    fail(f"pixel_values, image {number}", "one frame", got, remedy)
            planes = [
                self._planes(part, rows, columns)
                for part, (_, rows, columns) in zip(parts, sizes, strict=True)
            ]
        return [self._levels(p, number) for number, p in enumerate(planes)]

    def pixels(self, images: Sequence[Tensor], like: Tensor) -> Tensor:
        """What the processor makes of images at model resolution.

        Args:
            images: n images [H, W, 3] uint8, of sizes that `images` returned.
            like: pixel_values whose dtype and device are taken.

        Returns:
            In the processor's layout; `pixels(images(x), x)` is x.
        """
        made = []
        for image in images:
            levels = image.to(like.device).permute(2, 0, 1).long()
            table = self.table.to(like.device)
            values = torch.stack([table[c][levels[c]] for c in range(3)]).to(like.dtype)
            made.append(values[None] if not self.patch else self._patches(values))
        return torch.cat(made) if made else like[:0]

    def _levels(self, planes: Tensor, number: int) -> Tensor:
        """[3, H, W] of floats to [H, W, 3] of levels."""
        table = self.table.to(planes.device)
        low, step = table[:, :1, None], (table[:, 255:, None] - table[:, :1, None]) / 255
        levels = ((planes.float() - low) / step).round().nan_to_num(0).clamp(0, 255).long()
        again = torch.stack([table[c][levels[c]] for c in range(3)]).to(planes.dtype)
        # Rounded to 16 bits two levels may have one value: then either does.
        if not torch.equal(again, planes):
            far = float((again.float() - planes.float()).abs().max())
            expected = "clean images as the image processor made them"
            remedy = "give the processor that made them, or a view_fn"
            fail(f"pixel_values, image {number}", expected, f"values {far:.2g} off", remedy)
        return levels.to(torch.uint8).permute(1, 2, 0).contiguous()

    def _planes(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """[gh·gw, 3·f·p·p] to [3, H, W], of the first frame."""
        m, p = self.merge, self.patch
        split = patches.view(rows // m, columns // m, m, m, 3, self.frames, p, p)
        return (
            split[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * p, columns * p)
        )

    def _patches(self, planes: Tensor) -> Tensor:
        """[3, H, W] to [gh·gw, 3·f·p·p]."""
        m, p = self.merge, self.patch
        rows, columns = planes.shape[1] // p, planes.shape[2] // p
        split = planes.view(3, rows // m, m, p, columns // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
        every = split.unsqueeze(5).expand(*split.shape[:5], self.frames, p, p)
        return every.reshape(rows * columns, 3 * self.frames * p * p)


def _whole(image_processor: Any, name: str) -> int:
    """A size in whole pixels or patches; 0 if there is none (Pixtral's patch_size is a mapping)."""
    size = getattr(image_processor, name, None)
    return size if isinstance(size, int) else 0


def _plain(image_processor: Any) -> dict[str, bool]:
    """Options that switch off all that moves pixels, of those that the processor has."""
    moves = ("do_resize", "do_center_crop", "do_pad", "do_image_splitting", "crop_to_patches")
    return {name: False for name in moves if getattr(image_processor, name, None) is not None}


def _unknown(name: str, got: str) -> NoReturn:
    expected = "pixel_values [n, 3, H, W] or Qwen-VL's patches"
    fail(f"image processor {name}", expected, got, "give the trainer a view_fn of your own")
