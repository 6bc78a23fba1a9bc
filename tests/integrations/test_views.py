"""`ViewMaker`: a view is a function of the clean images, the step and the seed, of nothing else."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from transformers import Qwen2VLImageProcessorPil, SiglipImageProcessorPil

from roma.integrations import views as module
from roma.integrations.options import RomaOptions
from roma.integrations.views import ViewMaker, draw_aux_view
from roma.views import degrade_batch, seed_for

QWEN = Qwen2VLImageProcessorPil(
    patch_size=8, size={"shortest_edge": 256, "longest_edge": 256 * 256}
)
SIGLIP = SiglipImageProcessorPil(size={"height": 32, "width": 32})
SIZES = [(32, 48), (48, 32), (64, 64), (20, 70)]
# Rows of a dataset: one image, text alone, two of other sizes, the first row's again, one more.
ROWS = [[0], [], [1, 3], [0], [2]]
SETTINGS = RomaOptions(num_views=3, view_pool="unseen", view_seed=5)


def picture(number):
    draw = np.random.default_rng(number)
    return Image.fromarray(draw.integers(0, 256, (*SIZES[number], 3), dtype=np.uint8))


def batch(rows, processor=QWEN):
    """pixel_values, grid and counts of some rows of the dataset, as a trainer has them."""
    counts = [len(ROWS[row]) for row in rows]
    pictures = [picture(number) for row in rows for number in ROWS[row]]
    if not pictures:
        return None, None, counts
    made = processor(images=pictures, return_tensors="pt")
    return made["pixel_values"], made.get("image_grid_thw"), counts


def pixels(maker, rows, pairs, *, step=4, processor=QWEN):
    """The pixel_values of each pair, apart."""
    values, grid, counts = batch(rows, processor)
    read = maker.read(values, grid, counts, step=step)
    made = maker.pixels(read, pairs)
    sizes = []
    for _, row in pairs:
        first = sum(counts[:row])
        own = range(first, first + counts[row])
        sizes.append(sum(1 if grid is None else int(grid[n].prod()) for n in own))
    return read, made.split(sizes)


def test_a_view_is_the_degraded_image_through_the_processor():
    maker = ViewMaker(SETTINGS, QWEN)
    pairs = [(k, row) for k in range(3) for row in (0, 2)]
    read, made = pixels(maker, range(5), pairs)
    for (view, row), got in zip(pairs, made, strict=True):
        spec = SETTINGS.draw(4, read.keys[row])[view]
        assert read.corruption((view, row)) == spec.corruption
        for image, number in zip(read.images[row], ROWS[row], strict=True):
            if SIZES[number][1] % 16 == 0:  # no resize: the file's own pixels
                assert np.array_equal(image.numpy(), np.asarray(picture(number)))
        seeds = [seed_for(5, 4, read.keys[row], view, n) for n in range(len(ROWS[row]))]
        bad = degrade_batch(read.images[row], [spec] * len(seeds), seeds)
        want = QWEN(images=[b.numpy() for b in bad], do_resize=False, return_tensors="pt")
        assert torch.equal(got, want["pixel_values"])
    assert read.keys[0] == read.keys[3] and len(set(read.keys)) == 4 and read.keys[1] == ""
    assert read.has_views.tolist() == [True, False, True, True, True]
    assert read.specs[1] == [] and read.images[1] == []


@given(order=st.permutations(range(5)), cut=st.sampled_from([1, 2, 4]), processor=st.booleans())
@settings(max_examples=25)
def test_views_do_not_depend_on_the_batch_nor_on_the_order(order, cut, processor):
    """Nor on the rank: a rank is another batch of the same rows."""
    processor = SIGLIP if processor else QWEN
    maker = ViewMaker(SETTINGS, processor)
    every = [(k, row) for k in range(3) for row in range(5) if ROWS[row]]
    _, alone = pixels(maker, range(5), every, processor=processor)
    want = dict(zip(every, alone, strict=True))
    for part in (order[:cut], order[cut:]):
        places = [(k, at) for k in (2, 0) for at, row in enumerate(part) if ROWS[row]]
        _, made = pixels(ViewMaker(SETTINGS, processor), part, places, processor=processor)
        for (view, at), got in zip(places, made, strict=True):
            assert torch.equal(got, want[view, part[at]])


@pytest.mark.parametrize("changed", [{"step": 5}, {"view_seed": 6}])
def test_another_step_or_seed_is_another_view(changed):
    step = changed.pop("step", 4)
    other = RomaOptions(num_views=3, view_pool="unseen", **{"view_seed": 5, **changed})
    pairs = [(k, 0) for k in range(3)]
    _, one = pixels(ViewMaker(SETTINGS, QWEN), [0], pairs)
    _, two = pixels(ViewMaker(other, QWEN), [0], pairs, step=step)
    assert not any(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("processor", [QWEN, SIGLIP])
def test_a_view_that_does_nothing_is_the_clean_pixel_values(dtype, processor):
    """At this level every corruption of the pool rounds to the image."""
    nothing = RomaOptions(num_views=5, view_pool="unseen", view_max_level=1e-6)
    maker = ViewMaker(nothing, processor)
    values, grid, counts = batch(range(5), processor)
    values = values.to(dtype)
    read = maker.read(values, grid, counts, step=0)
    for view in range(5):
        made = maker.pixels(read, [(view, row) for row in range(5)])
        assert made.dtype == dtype and torch.equal(made, values)


def test_rollouts_of_a_prompt_share_one_view(monkeypatch):
    sizes = []

    def counting(images, *args, **kwargs):
        sizes.append(len(images))
        return degrade_batch(images, *args, **kwargs)

    monkeypatch.setattr(module, "degrade_batch", counting)
    maker = ViewMaker(SETTINGS, QWEN)
    rows = [0, 3, 0, 2]  # three times one image, then two images
    _, made = pixels(maker, rows, [(0, b) for b in range(4)] + [(1, 0)])
    assert sizes == [1 + 2 + 1]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[4])


def test_text_alone():
    maker = ViewMaker(SETTINGS, QWEN)
    read = maker.read(None, None, [0, 0], step=1)
    assert read.has_views.tolist() == [False, False] and read.specs == [[], []]
    assert maker.pixels(read, []).numel() == 0
    assert (
        maker.aux_view(read, [[1], [2]]).tolist()
        == draw_aux_view(SETTINGS, ["", ""], [[1], [2]], step=1).tolist()
    )


def test_the_sampled_view_is_of_the_row_alone_and_even():
    keys, completions = ["a"] * 600, [[n, n + 1] for n in range(600)]
    drawn = draw_aux_view(SETTINGS, keys, completions, step=1)
    assert drawn.dtype == torch.int64
    again = draw_aux_view(SETTINGS, keys[:7], completions[593:], step=1)
    assert torch.equal(drawn[593:], again)
    for other in (
        draw_aux_view(SETTINGS, ["b"] * 600, completions, step=1),
        draw_aux_view(SETTINGS, keys, completions, step=2),
        draw_aux_view(RomaOptions(num_views=3), keys, completions, step=1),
    ):
        assert 0.55 < (other != drawn).double().mean() < 0.78  # 2/3 ± 6 deviations of 0.019
    # 200 each, deviation 11.5: six of them.
    assert all(abs(int((drawn == view).sum()) - 200) < 70 for view in range(3))
    # Longer ids are not another row's: [1, 23] and [12, 3] differ.
    pair = [draw_aux_view(SETTINGS, ["a"] * 60, [[1, n]] * 60, step=1) for n in range(60)]
    assert all(len(set(own.tolist())) == 1 for own in pair)
    assert len({int(own[0]) for own in pair}) == 3


def test_no_global_generator_is_touched():
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    pixels(ViewMaker(SETTINGS, QWEN), range(5), [(0, 0), (1, 2)])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (repr(np.random.get_state()), random.getstate())


def test_counts_that_do_not_fit_are_refused():
    values, grid, counts = batch([0, 2])
    with pytest.raises(ValueError, match="pixel_values: expected 4 images, the sum of counts"):
        ViewMaker(SETTINGS, QWEN).read(values, grid, [counts[0], 3], step=0)


def test_a_view_of_another_size_is_refused(monkeypatch):
    def smaller(images, *args, **kwargs):
        return [image[:-16] for image in images]

    monkeypatch.setattr(module, "degrade_batch", smaller)
    with pytest.raises(ValueError, match=r"view: expected the clean image's size \[32, 48, 3\]"):
        pixels(ViewMaker(SETTINGS, QWEN), [0], [(0, 0)])
