"""The views of each mode of training: how many, of what, seen by whom, and from which seeds."""

import numpy as np
import pytest
import torch
from support import small_model

from roma.data import load_dataset_rows
from roma.train.config import load_config
from roma.train.views import ViewMaker
from roma.views import CORRUPTIONS, ViewSpec, degrade_batch, sample, seed_for

NEEDED = ["data.train_files=data", "worker.actor.model_path=model"]
MASK = ViewSpec("patch_mask", 0.6)


def maker_of(*options: str) -> ViewMaker:
    return ViewMaker(load_config(None, [*NEEDED, *options]).algorithm, 5, torch.device("cpu"))


def asked(count: int = 3):
    """A policy, prompts and their examples."""
    policy, rows = small_model.policy(), load_dataset_rows(small_model.folder() / "data@train")
    some = [rows[i] for i in range(count)]
    return (
        policy,
        policy.encode_prompts(
            [example.problem for example in some], [example.load_images() for example in some]
        ),
        some,
    )


@pytest.mark.parametrize(
    "mode, drawn, masked, every, some, loss",
    [
        ("none", 0, 0, False, False, False),
        ("roma", 2, 0, False, False, True),
        ("rollout", 1, 0, True, False, False),
        ("noisy_rollout", 1, 0, False, True, False),
        ("papo", 0, 1, False, False, True),
        ("dvrp", 1, 1, False, False, True),
    ],
)
def test_each_mode(mode: str, drawn: int, masked: int, every: bool, some: bool, loss: bool) -> None:
    """Drawn as `sample` says, masked behind them; the same draw whatever the mode."""
    maker = maker_of(f"algorithm.view_mode={mode}")
    seen = maker.rollouts_see_views, maker.some_rollouts_see_views, maker.loss_sees_views
    assert (maker.count, *seen) == (drawn + masked, every, some, loss)
    policy, prompts, examples = asked()
    views = maker.make(policy, prompts, examples, 7)
    assert len(views.specs) == len(views.pixels) == drawn + masked
    for p, example in enumerate(examples):
        own = [column[p] for column in views.specs]
        wanted = sample("seen", drawn, (5, 7, example.id)) if drawn else []
        assert own == wanted + [MASK] * masked
        for view, spec in enumerate(own):
            seed = seed_for(5, 7, example.id, view, 0)
            (image,) = degrade_batch(prompts.images[p], [spec], [seed])
            np.testing.assert_array_equal(views.images[view][p][0], image)


def test_a_masked_view_beside_those_of_any_mode() -> None:
    """Of its own seeds, and the same whichever mode asks."""
    policy, prompts, examples = asked()
    found = [
        maker_of(f"algorithm.view_mode={mode}").start_masked(policy, prompts, examples, 7).result()
        for mode in ("none", "roma", "papo")
    ]
    for views in found:
        assert views.specs == [[MASK] * 3] and torch.equal(views.pixels[0], found[0].pixels[0])
    seed = seed_for(5, 7, "masked", examples[1].id, 0, 0)
    (image,) = degrade_batch(prompts.images[1], [MASK], [seed])
    np.testing.assert_array_equal(found[0].images[0][1][0], image)
    assert "views/level_mean" not in found[0].metrics()
    assert not torch.equal(found[0].pixels[0], prompts.pixel_values)


def test_a_schedule_that_comes_down_to_the_clean_image() -> None:
    """At a share of 0 a view is its image; in between it is the draw of a lower highest level."""
    policy, prompts, examples = asked()
    maker = maker_of("algorithm.view_mode=noisy_rollout")
    maker.level_share = lambda step: {1: 1.0, 2: 0.25, 3: 0.0}[step]
    assert [maker.max_level(step) for step in (1, 2, 3)] == [2.0, 0.5, 0.0]
    half = maker.make(policy, prompts, examples, 2)
    assert [half.specs[0][0]] == sample("seen", 1, (5, 2, examples[0].id), max_level=0.5)
    clean = maker.make(policy, prompts, examples, 3)
    assert torch.equal(clean.pixels[0], prompts.pixel_values)
    for spec in clean.specs[0]:
        assert spec == ViewSpec(spec.corruption, CORRUPTIONS[spec.corruption].identity, 0.0)


@pytest.mark.parametrize("mode", ["none", "rollout", "papo", "dvrp", "noisy_rollout"])
def test_candidates_are_romas_alone(mode: str) -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.views\.candidates: expected null with .*mo"):
        maker_of(f"algorithm.view_mode={mode}", "algorithm.views.candidates=4")
