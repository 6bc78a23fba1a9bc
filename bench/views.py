"""Images per second: views at model resolution, DALI against loops over OpenCV and Pillow.

One call degrades every image once. "mix" is what training draws: four corruptions in equal numbers,
at level 2. On a GPU our images lie on the GPU, those of the loops in main memory. A provider is
compared with ours by how much it changes the pixels: the mean absolute change of each corruption
must agree within 10 %. At 448×448 it does within 3 %. At 64×64 Pillow's blur, three box filters, is
7.5 % off, OpenCV's motion blur 5.6 % (another angle), impulses up to 5 % (at other pixels).
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gate import Wrong
from bench.measure import Run
from bench.providers import OURS, Unavailable
from bench.variants import Variant

Pixels = NDArray[np.uint8]
MIX = ("gaussian_noise", "gaussian_blur", "jpeg", "downscale")
LEVEL = 2
APART = 0.1


class ViewsBench:
    """Images of one size under one corruption, or the training mix."""

    flop = 0.0
    names = (OURS, "opencv", "pillow")

    def __init__(self, variant: Variant, device: str = "cpu") -> None:
        """`variant`: `tokens` images of `depth` × `depth` pixels; `what`: a corruption or "mix"."""
        self.variant, self.device = variant, device
        self.errors: dict[str, Any] = {}
        y, x = np.indices((variant.depth, variant.depth))
        waves = [
            np.sin(x / (5 + c)) * np.cos(y / 7) + 0.3 * np.sin(1.3 * x + c * y) for c in range(3)
        ]
        smooth = np.rint(127.5 + 95 * np.stack(waves, 2)).clip(0, 255).astype(np.uint8)
        self.images = [np.roll(smooth, 3 * i, axis=1).copy() for i in range(variant.tokens)]
        chosen = MIX if variant.what == "mix" else (variant.what,)
        self.corruptions = [chosen[i % len(chosen)] for i in range(variant.tokens)]

    @property
    def yardstick(self) -> Run:
        """A copy of every image."""
        return lambda: ([image.copy() for image in self.images], None)[1]

    def package(self, name: str) -> str:
        """DALI for ours: its operators are what is timed."""
        return {OURS: "nvidia-dali-cuda130", "opencv": "opencv-python-headless"}.get(name, name)

    def run(self, name: str) -> Run:
        """One call of a provider; raises Unavailable, ImportError or Wrong."""
        make = {OURS: self._dali, "opencv": self._opencv, "pillow": self._pillow}[name]()
        found = make()  # imports DALI before anything is timed
        if name != OURS:
            self._hold(found, [np.asarray(torch.as_tensor(view).cpu()) for view in self._dali()()])
        return lambda: (make(), None)[1]

    def describe(self) -> dict[str, float]:
        """There are no statistics of these images."""
        return {}

    def columns(self, name: str) -> dict[str, str]:
        """Nothing else."""
        return {}

    def _hold(self, got: list[Pixels], ours: list[Pixels]) -> None:
        for corruption in dict.fromkeys(self.corruptions):
            moved = []
            for found in (got, ours):
                pairs = zip(found, self.images, self.corruptions, strict=True)
                moved.append(
                    np.mean([abs(a.astype(int) - b).mean() for a, b, c in pairs if c == corruption])
                )
            if not abs(moved[0] / moved[1] - 1) <= APART:
                raise Wrong(f"{corruption} moves pixels by {moved[0]:.2f}, ours by {moved[1]:.2f}")

    def _parameter(self, corruption: str) -> Any:
        from roma.views import CORRUPTIONS

        return CORRUPTIONS[corruption].parameter(LEVEL)

    def _in_pixels(self, corruption: str) -> Any:
        """The parameter, scaled where it is given for images of a reference size."""
        from roma.views import CORRUPTIONS

        parameter, reference = self._parameter(corruption), CORRUPTIONS[corruption].reference_size
        if reference is None:
            return parameter
        scaled = np.multiply(parameter, self.variant.depth / reference)
        return tuple(scaled) if isinstance(parameter, tuple) else float(scaled)

    def _dali(self) -> Callable[[], list[Pixels]]:
        from roma.views import ViewSpec, degrade_batch, seed_for

        specs = [ViewSpec(name, self._parameter(name)) for name in self.corruptions]
        seeds = [seed_for(0, 0, i, 0) for i in range(len(specs))]
        if self.device == "cpu":
            return lambda: degrade_batch(self.images, specs, seeds)
        there = [torch.from_numpy(image).to(self.device) for image in self.images]
        return lambda: degrade_batch(there, specs, seeds)

    def _opencv(self) -> Callable[[], list[Pixels]]:
        import cv2

        def shrink(image: Pixels, factor: float) -> Pixels:
            size = [max(round(n * factor), 1) for n in image.shape[1::-1]]
            small = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
            return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)

        def encode(image: Pixels, quality: float) -> Pixels:
            _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
            return cv2.imdecode(data, cv2.IMREAD_COLOR)

        def move(image: Pixels, parameter: tuple[float, float]) -> Pixels:
            radius, sigma = parameter
            taps = np.arange(round(2 * radius) + 1)
            kernel = np.zeros((2 * len(taps) + 1,) * 2, np.float32)
            kernel[len(taps), len(taps) + taps] = np.exp(-(taps**2) / (2 * sigma**2))
            turn = cv2.getRotationMatrix2D((len(taps), len(taps)), 45 * (2 * _random() - 1), 1)
            kernel = cv2.warpAffine(kernel, turn, kernel.shape)
            return cv2.filter2D(image, -1, kernel[::-1, ::-1] / kernel.sum())

        def squares(image: Pixels, factor: float) -> Pixels:
            size = [max(round(n * factor), 1) for n in image.shape[1::-1]]
            small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)

        return self._loop(
            {
                **_IN_NUMPY,
                "gaussian_blur": lambda image, sigma: cv2.GaussianBlur(image, (0, 0), sigma),
                "jpeg": encode,
                "downscale": shrink,
                "motion_blur": move,
                "pixelate": squares,
                "posterize": lambda image, bits: image & np.uint8(256 - 2 ** (8 - round(bits))),
            }
        )

    def _pillow(self) -> Callable[[], list[Pixels]]:
        from PIL import Image, ImageFilter, ImageOps

        def blur(image: Pixels, sigma: float) -> Pixels:
            return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))

        def encode(image: Pixels, quality: float) -> Pixels:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=int(quality))
            return np.asarray(Image.open(file).convert("RGB"))

        def shrink(image: Pixels, factor: float) -> Pixels:
            full = Image.fromarray(image)
            size = [max(round(n * factor), 1) for n in full.size]
            small = full.resize(tuple(size), Image.Resampling.BILINEAR)
            return np.asarray(small.resize(full.size, Image.Resampling.BILINEAR))

        def squares(image: Pixels, factor: float) -> Pixels:
            full = Image.fromarray(image)
            size = [max(round(n * factor), 1) for n in full.size]
            small = full.resize(tuple(size), Image.Resampling.BOX)
            return np.asarray(small.resize(full.size, Image.Resampling.NEAREST))

        def fewer(image: Pixels, bits: float) -> Pixels:
            return np.asarray(ImageOps.posterize(Image.fromarray(image), round(bits)))

        return self._loop(
            {
                **_IN_NUMPY,
                "gaussian_blur": blur,
                "jpeg": encode,
                "downscale": shrink,
                "pixelate": squares,
                "posterize": fewer,
            }
        )

    def _loop(
        self, forms: dict[str, Callable[[Pixels, Any], Pixels]]
    ) -> Callable[[], list[Pixels]]:
        missing = set(self.corruptions) - set(forms)
        if missing:
            raise Unavailable(f"no {', '.join(sorted(missing))}")
        parameters = {name: self._in_pixels(name) for name in self.corruptions}

        def run() -> list[Pixels]:
            pairs = zip(self.images, self.corruptions, strict=True)
            return [forms[name](image, parameters[name]) for image, name in pairs]

        return run


_generator = np.random.default_rng(0)
_random = _generator.random


def _noise(image: Pixels, sigma: float) -> Pixels:
    """Gaussian noise; σ for pixels in [0, 1]."""
    drawn = _generator.standard_normal(image.shape, dtype=np.float32)
    return np.rint(image + 255 * sigma * drawn).clip(0, 255).astype(np.uint8)


def _speckle(image: Pixels, sigma: float) -> Pixels:
    drawn = _generator.standard_normal(image.shape, dtype=np.float32)
    return np.rint(image * (1 + sigma * drawn)).clip(0, 255).astype(np.uint8)


def _salt_and_pepper(image: Pixels, share: float) -> Pixels:
    drawn = _random(image.shape[:2], dtype=np.float32)
    image = image.copy()
    image[drawn < share] = 0
    image[drawn < share / 2] = 255
    return image


_IN_NUMPY = {
    "gaussian_noise": _noise,
    "speckle": _speckle,
    "salt_and_pepper": _salt_and_pepper,
}
