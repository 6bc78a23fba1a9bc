"""Degraded views: what training and evaluation rely on."""

import hashlib
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.views_checks import LIMIT, UNSCALED, flat
from support.views_reference import picture, smooth

from roma.views import (
    ADVERSARIAL,
    CORRUPTIONS,
    ViewSpec,
    degrade,
    degrade_batch,
    load_levels,
    operators,
    sample,
    seed_for,
)

DEMO_LEVELS = Path(__file__).parents[2] / "configs" / "demo_levels.yaml"
MADE = {name: row for name, row in CORRUPTIONS.items() if row.pool != ADVERSARIAL}
NOISES = ("gaussian_noise", "speckle", "salt_and_pepper", "shot_noise", "impulse_noise")

# One pixel, a line, sides that no block, chroma or shrinking factor divides, and the demo's size.
SIZES = ((1, 1), (1, 5), (7, 1), (2, 3), (3, 70), (17, 31), (32, 64), (70, 90))


SIDES = st.one_of(st.sampled_from((1, 2, 223, 512)), st.integers(1, 512))


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=15)
@given(SIDES, SIDES, st.floats(0.01, 5))
def test_views_keep_size_and_type(name: str, height: int, width: int, level: float) -> None:
    """Arrays and tensors of two sizes side by side; the originals stay as they are."""
    images = [picture(height, width), torch.from_numpy(picture(7, 5, seed=1))]
    kept = [np.asarray(image).copy() for image in images]
    spec = ViewSpec(name, CORRUPTIONS[name].parameter(level), level)
    views = degrade_batch(images, [spec] * 2, [3, 4])
    assert isinstance(views[0], np.ndarray) and views[0].dtype == np.uint8
    assert isinstance(views[1], torch.Tensor) and views[1].dtype == torch.uint8
    assert [tuple(view.shape) for view in views] == [(height, width, 3), (7, 5, 3)]
    for image, before in zip(images, kept, strict=True):
        np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.parametrize("name", MADE)
def test_memory_of_any_form(name: str) -> None:
    """Read-only arrays, every other row backwards, a transposed tensor; results stay what they are
    when DALI's memory is used again."""
    image = picture(34, 40)
    spec = ViewSpec(name, CORRUPTIONS[name].parameter(2))
    plain = degrade_batch([image[::2, ::-1].copy()], [spec], [9])[0]
    locked = image[::2, ::-1].copy()
    locked.flags.writeable = False
    turned = torch.from_numpy(image[::2, ::-1].transpose(1, 0, 2).copy()).transpose(0, 1)
    views = degrade_batch([image[::2, ::-1], locked, turned], [spec] * 3, [9] * 3)
    row, column = image[:1], image[:, :1]  # a side of one pixel, and its stride is negative
    thin = degrade_batch([row[::-1], column[:, ::-1]], [spec] * 2, [9] * 2)
    for found, one in zip(thin, (row, column), strict=True):
        np.testing.assert_array_equal(found, degrade_batch([one.copy()], [spec], [9])[0])
    for _ in range(3):
        degrade_batch([picture(17, 40, seed=i) for i in range(8)], [spec] * 8, range(8))
    for found in views:
        np.testing.assert_array_equal(np.asarray(found), plain)


@settings(max_examples=15)
@given(st.randoms(use_true_random=False), st.integers(0, 2**63 - 1))
def test_a_view_depends_on_its_own_spec_and_seed_alone(order: random.Random, seed: int) -> None:
    """Shuffled, split and repeated batches of mixed sizes give the same pixels as single images."""
    images, specs, seeds = [], [], []
    for i, corruption in enumerate(MADE.values()):
        for level in (1.0, 2.5):
            images.append(picture(*SIZES[(i + 4 * int(level)) % len(SIZES)], seed=i))
            specs.append(ViewSpec(corruption.name, corruption.parameter(level), level))
            seeds.append(seed_for(seed, i % 3))
    alone = [
        degrade(image, spec.corruption, level=spec.level, seed=own)
        for image, spec, own in zip(images, specs, seeds, strict=True)
    ]
    chosen = order.choices(range(len(images)), k=order.choice((1, 5, 40)))
    batch = degrade_batch(
        [images[i] for i in chosen], [specs[i] for i in chosen], [seeds[i] for i in chosen]
    )
    for i, view in zip(chosen, batch, strict=True):
        np.testing.assert_array_equal(view, alone[i])


def mixed_bag() -> tuple[list[np.ndarray], list[ViewSpec], list[int]]:
    """An image per corruption, of three sizes; large enough for PyTorch to use its threads."""
    sizes = ((120, 104), (17, 31), (204, 300))
    images = [picture(*sizes[i % 3], seed=i) for i in range(len(MADE))]
    specs = [ViewSpec(name, c.parameter(1.5)) for name, c in MADE.items()]
    large = [i for i, name in enumerate(MADE) if name in operators.IN_PYTORCH]
    for i in large:
        images[i] = picture(204, 300, seed=i)
    return images, specs, [seed_for(0, i) for i in range(len(images))]


def digests(views: list[np.ndarray]) -> list[str]:
    return [hashlib.sha256(view.tobytes()).hexdigest() for view in views]


@pytest.mark.parametrize("size", (1, 4, 17))
@pytest.mark.parametrize("threads", (1, 2, 3))
def test_the_same_bytes_for_any_batch_size_and_threads(size: int, threads: int) -> None:
    bag = mixed_bag()
    whole = digests(degrade_batch(*bag))
    order = np.random.default_rng(size).permutation(len(whole)).tolist()
    images, specs, seeds = ([own[i] for i in order] for own in bag)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for start in range(0, len(whole), size):
            part = slice(start, start + size)
            found += degrade_batch(images[part], specs[part], seeds[part])
    finally:
        torch.set_num_threads(before)
    assert digests(found) == [whole[i] for i in order]


def test_callers_on_several_threads_do_not_touch_each_other() -> None:
    bag = mixed_bag()
    whole = digests(degrade_batch(*bag))
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: digests(degrade_batch(*bag)), range(6)))
    assert made == [whole] * 6


IN_ANOTHER_PROCESS = """
import multiprocessing, sys
sys.path[:0] = [{folder!r}, {shared!r}]
import torch
from test_views import degrade_batch, digests, mixed_bag

def child(queue):
    queue.put(digests(degrade_batch(*mixed_bag())))

if __name__ == "__main__":
    torch.set_num_threads(2)
    if {method!r} == "fork":
        degrade_batch(*mixed_bag())  # DALI's threads and torch's, which are not in what is forked
    context = multiprocessing.get_context({method!r})
    queue = context.Queue()
    workers = [context.Process(target=child, args=(queue,), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    print(*(" ".join(queue.get(timeout=100)) for _ in workers), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ("spawn", "fork"))
def test_the_same_bytes_in_worker_processes(method: str, tmp_path: Path) -> None:
    """A data loader's workers, also those forked after their parent used DALI."""
    script = tmp_path / "workers.py"
    here = Path(__file__)
    folders = {"folder": str(here.parent), "shared": str(here.parents[1])}
    script.write_text(IN_ANOTHER_PROCESS.format(**folders, method=method))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=150
    )
    whole = " ".join(digests(degrade_batch(*mixed_bag())))
    assert done.stdout.splitlines() == [whole] * 2, done.stderr


FIRST_OF_A_PROCESS = """
import numpy as np, torch
from roma.views import ViewSpec, batch, degrade_batch
batch._JOB = 1
torch.set_num_threads(4)
degrade_batch([np.zeros((8, 8, 3), np.uint8)] * 8, [ViewSpec("jpeg", 20.0)] * 8, range(8))
"""


@pytest.mark.slow
def test_the_first_images_of_a_process_may_be_jpegs() -> None:
    """History: DALI's codecs, set up by two threads at once, failed in every other process."""
    started = [
        subprocess.Popen([sys.executable, "-c", FIRST_OF_A_PROCESS], stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in started:
        said = process.communicate(timeout=100)[1]
        assert process.returncode == 0, said.decode()


def test_hardly_any_blur_changes_nothing() -> None:
    """Levels start arbitrarily near 0, where sigma squared is 0 in fp32."""
    image = picture(17, 31)
    for sigma in (1e-300, 1e-30, 1e-9, 0.01):
        blurred = degrade(image, "gaussian_blur", parameter=sigma, seed=0)
        np.testing.assert_array_equal(blurred, image)
    for parameter in ((1e-300, 1e-300), (5.0, 1e-30), (5.0, 0.0), (0.0, 5.0)):
        moved = degrade(image, "motion_blur", parameter=parameter, seed=0)
        np.testing.assert_array_equal(moved, image)


def test_long_lists_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part an image falls into changes nothing."""
    images = [picture(17, 31, seed=i) for i in range(7)]
    specs = [ViewSpec("gaussian_noise", 0.1)] * 7
    whole = degrade_batch(images, specs, range(7))
    monkeypatch.setattr("roma.views.batch._JOB", 2 * 17 * 31 * 3)
    np.testing.assert_array_equal(whole, degrade_batch(images, specs, range(7)))


@pytest.mark.parametrize("name", NOISES)
def test_another_seed_is_other_noise(name: str) -> None:
    """Neighbouring seeds too: the noise of two is uncorrelated."""
    gray = flat(128, 64, 64)
    pair = degrade_batch([gray, gray], [ViewSpec(name, 0.1)] * 2, [10, 11])
    first, second = (view.astype(float).ravel() - view.mean() for view in pair)
    correlation = first @ second / math.sqrt((first @ first) * (second @ second))
    # salt and pepper hits whole pixels: 64² independent values, not 3·64²
    assert abs(correlation) < LIMIT / 64


@pytest.mark.parametrize("name", MADE)
def test_level_0_is_the_image(name: str) -> None:
    """A copy of it."""
    image = picture(9, 14)
    for view in (
        degrade(image, name, level=0, seed=0),
        degrade(image, name, parameter=CORRUPTIONS[name].identity, seed=0),
    ):
        np.testing.assert_array_equal(view, image)
        assert not np.shares_memory(view, image)


@pytest.mark.parametrize("table", (CORRUPTIONS, load_levels(DEMO_LEVELS)), ids=("own", "demo"))
def test_stronger_levels_change_more(table: dict) -> None:
    """The mean over seeds of the mean absolute change grows from level to level.

    Posterize has the same parameter at L4 and L5. JPEG's quality 1 is its quality 2 here: all
    quantisers are at their bound.
    """
    image = smooth(112, 160) if table is CORRUPTIONS else smooth(32, 64)
    for corruption in table.values():
        if corruption.pool == ADVERSARIAL:
            continue  # a policy makes them
        if table is not CORRUPTIONS and corruption.pool == "extra":
            continue  # levels for images of 224 pixels
        changes = []
        for level in range(1 + len(corruption.levels)):
            spec = ViewSpec(corruption.name, corruption.parameter(level), float(level))
            views = degrade_batch([image] * 8, [spec] * 8, range(8), corruptions=table)
            changes.append(np.abs(np.stack(views) - image.astype(float)).mean())
        assert changes[0] == 0 and (np.diff(changes) >= 0).all(), (corruption.name, changes)
        jpeg = corruption.name == "jpeg"
        apart = {max(level, 2) if jpeg else level for level in corruption.levels}
        assert len(set(changes)) == 1 + len(apart), (corruption.name, changes)


def test_parameter_is_linear_between_levels() -> None:
    """And exact at them."""
    noise, blur = CORRUPTIONS["gaussian_noise"], CORRUPTIONS["motion_blur"]
    assert [noise.parameter(level) for level in range(6)] == [0.0, *noise.levels]
    assert noise.parameter(0.5) == 0.04 and noise.parameter(1.25) == 0.09
    assert CORRUPTIONS["jpeg"].parameter(0.2) == 85.0
    assert blur.parameter(1.5) == (12.5, 4.0) and blur.parameter(5) == blur.levels[4]
    assert noise.training_range == (0.0, 0.12)


# Sampling and seeds.


def test_sample_depends_on_its_key_alone() -> None:
    """Distinct kinds of the pool, levels up to the maximum, the same whenever it is asked."""
    draws = {}
    for prompt in range(300):
        specs = sample("seen", 3, (0, 1, prompt))
        assert len({spec.corruption for spec in specs}) == 3
        for spec in specs:
            corruption = CORRUPTIONS[spec.corruption]
            assert corruption.pool == "seen" and 0 < spec.level <= 2
            assert spec.parameter == corruption.parameter(spec.level)
        draws[prompt] = specs
    assert len({tuple(specs) for specs in draws.values()}) == 300
    for prompt in reversed(draws):
        assert sample("seen", 3, (0, 1, prompt)) == draws[prompt]
    assert sample("seen", 1, (0, 1, "7")) != sample("seen", 1, (0, 1, 7))
    assert sample("seen", 1, [0, 1, np.int64(7)]) == sample("seen", 1, (0, 1, 7))


@pytest.mark.parametrize("strength, power", (("uniform", 1), ("strong", 2)))
def test_sample_spreads_kinds_and_levels(strength: str, power: int) -> None:
    """Kinds are equally frequent; (level/maximum)^power is uniform (Kolmogorov-Smirnov)."""
    n = 4000
    specs = [
        sample("unseen", 1, (3, i), max_level=2.5, strength=strength)[0]  # type: ignore[arg-type]
        for i in range(n)
    ]
    p = 1 / 5
    for name in (c.name for c in CORRUPTIONS.values() if c.pool == "unseen"):
        count = sum(spec.corruption == name for spec in specs)
        assert abs(count - n * p) < LIMIT * math.sqrt(n * p * (1 - p))
    u = np.sort([(spec.level / 2.5) ** power for spec in specs])
    # P(√n·D > 2.7) is 2·exp(-2·2.7²) = 9e-7
    assert np.abs(u - (np.arange(n) + 0.5) / n).max() < 2.7 / math.sqrt(n)


def test_seeds_are_stable_and_distinct() -> None:
    """A golden value holds them to be the same on every machine and in later versions."""
    assert seed_for(0, 12, "row 7", 1) == 9176350762975265617
    keys = [(a, b) for a in range(-3, 20) for b in ("", "1", "a", 1, 12)]
    keys += [("a", "bc"), ("ab", "c"), ("abc",), (1, 23), (12, 3), (123,), ("123",), ()]
    seeds = [seed_for(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)


POOLS = {"seen": 4, "unseen": 5, "extra": 8, "masking": 1}


def test_no_global_generator_is_touched() -> None:
    """Neither read nor advanced: the same views whatever the global seeds are."""
    made = []
    for start in (1, 2):
        random.seed(start)
        np.random.seed(start)
        torch.manual_seed(start)
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        specs = [s for pool, k in POOLS.items() for s in sample(pool, k, (0, 1, "x"))]
        seeds = [seed_for(0, i) for i in range(len(specs))]
        made.append(degrade_batch([picture(16, 16)] * len(specs), specs, seeds))
        after = random.getstate(), np.random.get_state(), torch.get_rng_state()
        assert before[0] == after[0] and torch.equal(before[2], after[2])
        assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    np.testing.assert_array_equal(made[0], made[1])


def test_scaling_by_the_shorter_side() -> None:
    """A blur of 224 pixels' sigma 2 is one of sigma 0.5 at 56 by 80, unless the table says no."""
    image = picture(56, 80)
    scaled = degrade(image, "gaussian_blur", parameter=2.0, seed=0)
    np.testing.assert_array_equal(
        scaled, degrade(image, "gaussian_blur", parameter=0.5, seed=0, corruptions=UNSCALED)
    )
    moved = degrade(image, "motion_blur", parameter=(12.0, 8.0), seed=0)
    np.testing.assert_array_equal(
        moved, degrade(image, "motion_blur", parameter=(3.0, 2.0), seed=0, corruptions=UNSCALED)
    )
