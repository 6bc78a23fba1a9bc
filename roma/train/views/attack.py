"""Views against a policy: the image within ε levels on which it diverges most (PGD).

Projected gradient ascent (Madry et al., arXiv 1706.06083) on the mean divergence D of a prompt's
rollouts from the clean image, the target being the clean log-probs:

    x₀ = x + u,  u uniform in ±r;   x ← Π(x + α·sign ∂D/∂x)

with r = ⌊ε⌋ in 8-bit levels, Π the projection on |x − clean| ≤ r and 0..255, and D taken of x
rounded to whole levels, the image that a view would be. Of the images tried each prompt keeps the
one with the largest D. Below ε = 1 no whole level fits in, and a view is the image itself.

Passes over K views: `steps` forward and backward to the pixels, and one forward; one forward on the
clean images. A backward to the pixels alone costs about a forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roma.models.processor import Image
from roma.train.config.views import AttackConfig
from roma.train.views.probe import Probe
from roma.views.noise import random_words

Seeds = Callable[[int, int, int], int]
"""Of (view, prompt, image of the prompt): the seed of a random start."""


@dataclass(frozen=True)
class Attacked:
    """K attacked views of P prompts."""

    images: list[list[list[Image]]]  # [K][P], per prompt its images, uint8
    divergence: Tensor  # [K, P] nats, of these images; 0 without an image


def perturb(
    probe: Probe, eps: Sequence[Sequence[float]], seeds: Seeds, options: AttackConfig
) -> Attacked:
    """K views of each prompt's images, at most ε levels from the clean ones everywhere.

    A view depends on its own prompt, ε and seed alone, up to the rounding of a pass.

    Args:
        probe: of the policy and the prompts, for K views.
        eps: [K][P] levels of 0..255, ≥ 0.
        seeds: of the random starts.
        options: steps, and their size.
    """
    prompts, processor = probe.batch.prompts, probe.policy.processor
    device = prompts.pixel_values.device
    clean = [[torch.from_numpy(image).to(device) for image in own] for own in prompts.images]
    balls = [
        [
            _Ball(image, radius, seeds(view, p, number))
            for p, (own, radius) in enumerate(zip(clean, radii, strict=True))
            for number, image in enumerate(own)
        ]
        for view, radii in enumerate(eps)
    ]
    owner = [p for p, own in enumerate(clean) for _ in own]
    best = torch.full((len(eps), len(clean)), -1.0, device=device)
    for step in range(options.steps + 1):
        now = [[ball.image() for ball in own] for own in balls]
        pixels = [processor.patches(own) if own else prompts.pixel_values for own in now]
        if step < options.steps:
            found, grads = probe.gradient(pixels)
        else:
            found, grads = probe.divergence(pixels), []
        better = (found > best).tolist()
        best = torch.maximum(best, found)
        for view, own in enumerate(balls):
            for ball, image, p in zip(own, now[view], owner, strict=True):
                if better[view][p]:
                    ball.best = image
        for own, grad in zip(balls, grads, strict=False):
            by_image = processor.image_gradients(grad, prompts.grids)
            for ball, gradient in zip(own, by_image, strict=True):
                ball.move(gradient, options)
    images = []
    for own in balls:
        rest = iter(ball.best.numpy(force=True) for ball in own)
        images.append([[next(rest) for _ in mine] for mine in clean])
    return Attacked(images, best.clamp(min=0))


class _Ball:
    """A point within r levels of an image."""

    def __init__(self, clean: Tensor, eps: float, seed: int) -> None:
        """At its random start."""
        self.radius = int(eps + 1e-9)
        self._clean, self.best = clean, clean
        unit = random_words(seed, clean.numel(), clean.device).float() / 2**32
        self._place = self._project(clean + self.radius * (2 * unit.view(clean.shape) - 1))

    def _project(self, place: Tensor) -> Tensor:
        middle = self._clean.float()
        inside = torch.maximum(place, middle - self.radius)
        return torch.minimum(inside, middle + self.radius).clamp(0, 255)

    def image(self) -> Tensor:
        """[H, W, 3] uint8: the point in whole levels, which the ball holds too."""
        return self._place.round().to(torch.uint8)

    def move(self, gradient: Tensor, options: AttackConfig) -> None:
        """A step along the gradient's sign."""
        size = 2.5 * self.radius / options.steps
        if options.step_size is not None:
            size = options.step_size
        self._place = self._project(self._place + size * gradient.sign())
