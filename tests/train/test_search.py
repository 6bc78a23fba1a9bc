"""The level that a divergence asks for: nearest of those tried, and monotone in the target."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_run import config

from roma.train.trainer import Trainer, train
from roma.train.views.search import Found, search_levels
from roma.views import CORRUPTIONS, ViewSpec, degrade_batch, seed_for

NAMES = [["jpeg", "gaussian_noise", "gaussian_blur"], ["gaussian_noise", "downscale", "jpeg"]]


class Curves:
    """Divergence as a function of the level: [K, P] factors and a power, and nothing else."""

    def __init__(self, factors: torch.Tensor, power: float) -> None:
        self.factors, self.power, self.calls = factors, power, 0
        # A prompt by its number is all that a search asks of a batch.
        self.batch = type("Batch", (), {"prompts": type("P", (), {"images": [0, 1, 2]})()})()

    def divergence(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return self.factors * torch.stack(pixels) ** self.power

    def search(self, target: float, steps: int, highest: float = 5.0) -> Found:
        def make(specs: list[list[ViewSpec]]) -> list[torch.Tensor]:
            for own, column in zip(NAMES, specs, strict=True):
                assert [spec.corruption for spec in column] == own
                for spec in column:
                    assert CORRUPTIONS[spec.corruption].parameter(spec.level) == spec.parameter
            return [torch.tensor([s.level for s in own], dtype=torch.float64) for own in specs]

        return search_levels(
            self,  # type: ignore[arg-type]  # what a search asks of a probe
            NAMES,
            make,
            target=target,
            steps=steps,
            highest=highest,
            corruptions=CORRUPTIONS,
        )


def levels(found: Found) -> np.ndarray:
    return np.array([[spec.level for spec in own] for own in found.specs])


@settings(max_examples=30)
@given(
    st.integers(0, 2**16),
    st.sampled_from((0.5, 1.0, 3.0)),
    st.sampled_from((1, 2, 5, 12)),
    st.sampled_from((1e-6, 0.01, 0.3, 2.0, 1e3)),
)
def test_the_level_is_the_targets_within_the_resolution(
    seed: int, power: float, steps: int, target: float
) -> None:
    """(target/factor)^(1/power), cut at the highest, to within highest · 2^(1 − steps)."""
    draw = torch.Generator().manual_seed(seed)
    factors = torch.rand((2, 3), generator=draw, dtype=torch.float64) + 0.01
    curves = Curves(factors, power)
    found = curves.search(target, steps)
    assert curves.calls == steps
    want = ((target / factors) ** (1 / power)).clamp(max=5.0).numpy()
    assert (abs(levels(found) - want) <= 5 * 2.0 ** (1 - steps) + 1e-12).all()
    there = factors.numpy() * levels(found) ** power
    np.testing.assert_allclose(found.divergence.numpy(), there, rtol=1e-12)
    # Of the levels tried, 0 and the highest among them, none is nearer.
    nearest = abs(found.divergence.numpy() - target)
    assert (nearest <= target + 1e-12).all()
    assert (nearest <= abs((factors * 5**power).numpy() - target) + 1e-12).all()


def test_a_larger_target_is_no_lower_level() -> None:
    factors = torch.tensor([[0.1, 0.2, 1.0], [0.03, 2.0, 0.5]], dtype=torch.float64)
    found = [
        levels(Curves(factors, 2.0).search(target, 8)) for target in np.geomspace(1e-4, 100, 25)
    ]
    assert all((a <= b).all() for a, b in pairwise(found))
    assert (found[0] < found[-1]).all() and (found[-1] == 5).sum() >= 5


def test_training_on_a_divergence(tmp_path: Path) -> None:
    """Views are what their logged row says, with the noise that they always have; mean logged.

    No level that was tried, as the probe measures it anew, is nearer than the one that was taken.
    """
    options = ("algorithm.views.target_divergence=3e-7", "algorithm.views.max_level=5")
    trainer = Trainer(config(tmp_path, *options))
    trainer.step = 1
    experience, _ = trainer.collector.collect(trainer.draw(), 1)
    assert not experience.views.result().specs  # none is made before
    late = trainer.late_views
    views = late.of(experience, experience.views.result(), 1)
    probe = late._probe(experience, 2)
    torch.testing.assert_close(
        probe.divergence(views.pixels).double(), views.divergence, rtol=1e-3, atol=1e-9
    )
    for k, images in enumerate(views.images):
        for p, example in enumerate(experience.examples):
            seed = seed_for(0, 1, example.id, k, 0)
            (image,) = degrade_batch(experience.prompts.images[p], [views.specs[k][p]], [seed])
            np.testing.assert_array_equal(images[p][0], image)
    off = (views.divergence - 3e-7).abs()
    ends = late.maker.draw(experience.examples, 1)
    top = [
        [ViewSpec(s.corruption, CORRUPTIONS[s.corruption].parameter(5), 5.0) for s in own]
        for own in ends
    ]
    strongest = late.maker.at(trainer.policy, experience.prompts, experience.examples, top, 1)
    assert (off <= (probe.divergence(strongest.pixels) - 3e-7).abs() + 1e-9).all()
    assert (off <= 3e-7).all()
    assert views.metrics()["views/divergence_mean"] == pytest.approx(float(views.divergence.mean()))


def test_a_resumed_search_goes_on_as_it_began(tmp_path: Path) -> None:
    options = ("algorithm.views.target_divergence=3e-7", "trainer.save_freq=1")
    train(config(tmp_path / "whole", *options))
    train(config(tmp_path / "parts", *options, "trainer.total_steps=1"))
    train(config(tmp_path / "parts", *options))
    rows = [
        [json.loads(line) for line in (tmp_path / name / "views.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1] and len({v["level"] for row in rows[0] for v in row["views"]}) > 2
