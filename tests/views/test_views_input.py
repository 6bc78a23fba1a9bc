"""Wrong input to roma.views, level tables, loading DALI, and the gallery."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.views_reference import picture, smooth

from roma.views import (
    ADVERSARIAL,
    CORRUPTIONS,
    ViewSpec,
    dali,
    degrade,
    degrade_batch,
    load_levels,
    operators,
    sample,
)
from roma.views.gallery import draw_gallery, write_gallery

DEMO_LEVELS = Path(__file__).parents[2] / "configs" / "demo_levels.yaml"
GOOD = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    "image, error, message",
    (
        (np.eye(3)[:, :, None] * np.ones(3), ValueError, "uint8, got float64 from 0 to 1; scale"),
        (torch.arange(-5.0, 67).view(4, 6, 3), ValueError, "got float32 from -5 to 66; scale it"),
        (torch.zeros(0, 6, 3), ValueError, "dtype uint8, got float32; scale it"),
        (np.full((4, 6, 3), np.nan), ValueError, "dtype uint8, got float64 with NaN; scale it"),
        (np.zeros((4, 6, 3), np.uint16), ValueError, "dtype uint8, got uint16; scale it"),
        (Image.new("RGB", (6, 4)), TypeError, "array or tensor, got Image; convert it with np.as"),
        (np.zeros((4, 6), np.uint8), ValueError, r"got \[4, 6\]; convert it to RGB"),
        (np.zeros((4, 6, 4), np.uint8), ValueError, r"got \[4, 6, 4\]; convert it to RGB"),
        (torch.zeros(3, 4, 6, dtype=torch.uint8), ValueError, "transpose it: channels come last"),
        (np.zeros((0, 6, 3), np.uint8), ValueError, r"got \[0, 6, 3\]; an empty image"),
        (torch.zeros(4, 6, 3, dtype=torch.uint8, device="meta"), ValueError, "a CUDA device, got"),
    ),
)
def test_bad_images_are_named_by_index(image: object, error: type, message: str) -> None:
    """What was expected, what came and what to do."""
    with pytest.raises(error, match=rf"^images\[1\]: expected .*{message}"):
        degrade_batch([GOOD, image], [ViewSpec("jpeg", 20.0)] * 2, [0, 1])


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        ({"corruption": "gausian_blur", "level": 1}, ValueError, "did you mean 'gaussian_blur'"),
        ({"level": 6}, ValueError, "^level: expected 0 to 5, the levels of jpeg, got 6; "),
        ({"level": -0.1}, ValueError, "^level: expected 0 to 5"),
        ({"level": math.nan}, ValueError, "^level: expected 0 to 5"),
        ({"level": "2"}, TypeError, "^level: expected a number, got '2'"),
        ({}, ValueError, "exactly one of the two, got neither"),
        ({"level": 1, "parameter": 20.0}, ValueError, "exactly one of the two, got both"),
        ({"parameter": 0.5}, ValueError, "quality: 1 to 100, got 0.5; see"),
        (
            {"corruption": "pgd", "level": 1},
            ValueError,
            r"^specs\[0\].corruption: .* needs a polic",
        ),
        ({"parameter": "20"}, TypeError, "quality: 1 to 100, got '20'; see"),
        ({"corruption": "motion_blur", "parameter": 3.0}, ValueError, r"\(radius, sigma\) in px"),
        ({"corruption": "speckle", "parameter": math.inf}, ValueError, "got inf"),
        ({"level": 1, "seed": 1.5}, TypeError, r"^seeds\[0\]: expected an integer, got float"),
        ({"level": 1, "seed": -1}, ValueError, r"^seeds\[0\]: expected 0 to"),
    ),
)
def test_bad_arguments_of_degrade(arguments: dict, error: type, message: str) -> None:
    """Each is refused before DALI is called."""
    with pytest.raises(error, match=message):
        degrade(GOOD, **({"corruption": "jpeg", "seed": 0} | arguments))


def test_bad_lists() -> None:
    """Lengths that differ, something that is no spec, a spec of another table."""
    with pytest.raises(ValueError, match="lists of one length, got 1, 2 and 1"):
        degrade_batch([GOOD], [ViewSpec("jpeg", 20.0)] * 2, [0])
    with pytest.raises(TypeError, match=r"^specs\[0\]: expected a ViewSpec, got str"):
        degrade_batch([GOOD], ["jpeg"], [0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^specs\[1\].corruption: .*did you mean 'jpeg'"):
        degrade_batch([GOOD] * 2, [ViewSpec("jpeg", 20.0), ViewSpec("jpg", 20.0)], [0, 1])
    demo = load_levels(DEMO_LEVELS)
    spec = ViewSpec("gaussian_noise", demo["gaussian_noise"].parameter(1), 1.0)
    with pytest.raises(ValueError, match=r"^specs\[0\].parameter: .*pass the corruptions="):
        degrade_batch([GOOD], [spec], [0])
    assert degrade_batch([], [], []) == []


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        ({"pool": "sen"}, ValueError, "^pool: expected one of seen, .*, got 'sen'"),
        ({"pool": "adversarial"}, ValueError, "^pool: .* 'adversarial', which needs a policy; tra"),
        ({"k": 5}, ValueError, "^k: expected 1 to 4, .* got 5; .*draw fewer"),
        ({"k": 0}, ValueError, "^k: expected 1 to 4"),
        ({"max_level": 5.5}, ValueError, "^max_level: expected above 0 and at most 5, .* got 5.5"),
        ({"max_level": 0.0}, ValueError, "^max_level: "),
        ({"strength": "weak"}, ValueError, "^strength: expected 'uniform' or 'strong'"),
        ({"key": (0, 1.5)}, TypeError, "^key: expected integers and strings, got float"),
    ),
)
def test_bad_arguments_of_sample(arguments: dict, error: type, message: str) -> None:
    """As everywhere: name, expected, got, remedy."""
    with pytest.raises(error, match=message):
        sample(**({"pool": "seen", "k": 2, "key": (0, 1, 2)} | arguments))


def test_load_levels_replaces_what_it_names(tmp_path: Path) -> None:
    """Levels, and the scaling only where the file speaks of it."""
    path = tmp_path / "levels.yaml"
    path.write_text(
        "gaussian_blur: {levels: [1, 2], reference_size: null}\n"
        "motion_blur: {levels: [[3, 2], [4, 4]]}\n"
    )
    table = load_levels(path)
    assert list(table) == list(CORRUPTIONS)
    assert table["gaussian_blur"].levels == (1, 2) and table["gaussian_blur"].reference_size is None
    assert table["motion_blur"].levels == ((3, 2), (4, 4))
    assert table["motion_blur"].reference_size == 224
    assert table["jpeg"] == CORRUPTIONS["jpeg"]
    assert table["gaussian_blur"].full_unit == "sigma in px"


@pytest.mark.parametrize(
    "text, error, message",
    (
        ("jpeg: [30", ValueError, "expected YAML"),
        ("- jpeg", ValueError, "a mapping from corruption to its levels, got list"),
        ("", ValueError, "a mapping from corruption to its levels, got NoneType"),
        ("jpg: {levels: [30]}", ValueError, "did you mean 'jpeg'"),
        ("jpeg: [30, 20]", ValueError, "jpeg: expected a mapping with levels, got"),
        ("jpeg: {level: [30]}", ValueError, "expected levels and, .* got the keys level"),
        ("jpeg: {levels: 30}", ValueError, "a list from L1 on, got 30"),
        ("jpeg: {levels: []}", ValueError, "at least one level"),
        ("jpeg: {levels: [20, 30]}", ValueError, "L2: expected a level at least as strong"),
        ("jpeg: {levels: [120]}", ValueError, "L1: expected quality: 1 to 100, got 120"),
        ("jpeg: {levels: [good]}", TypeError, "L1: expected quality: 1 to 100, got 'good'"),
        ("motion_blur: {levels: [3]}", ValueError, r"\(radius, sigma\) in px"),
        ("speckle: {levels: [1], reference_size: big}", ValueError, "reference_size: expected a l"),
        ("speckle: {levels: [1], reference_size: 0}", ValueError, "reference_size: expected a l"),
    ),
)
def test_bad_level_tables(tmp_path: Path, text: str, error: type, message: str) -> None:
    """A table that would silently do something else is refused."""
    path = tmp_path / "levels.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message):
        load_levels(path)


def test_dali_is_loaded_by_the_first_image_only() -> None:
    """Tables, sampling and `roma views --list` cost no import of DALI."""
    code = (
        "import sys, roma.views as v; v.sample('seen', 2, (0, 1, 2)); v.seed_for(1)\n"
        "assert not [name for name in sys.modules if name.startswith('nvidia')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_dali_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra's name, not a traceback into nowhere."""
    monkeypatch.setattr(dali, "_loaded", dali._loaded.__wrapped__)
    for name in ("nvidia.dali", "nvidia.dali.experimental.dynamic"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'roma-vlm\[views\]'"):
        degrade(GOOD, "jpeg", level=1, seed=0)


def test_a_failure_inside_names_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever DALI says; and the next call works."""

    def broken(*_: object) -> list:
        raise RuntimeError("no codec")

    with monkeypatch.context() as patch:
        patch.setitem(operators.OPERATORS, "jpeg", broken)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match=r"^jpeg of images\[0\], images\[2\]: no codec"):
            specs = [ViewSpec("jpeg", 20.0), ViewSpec("posterize", 3.0), ViewSpec("jpeg", 20.0)]
            degrade_batch([GOOD] * 3, specs, range(3))
    assert degrade(GOOD, "jpeg", level=1, seed=0).shape == GOOD.shape


def test_a_table_names_what_roma_has() -> None:
    own = replace(CORRUPTIONS["jpeg"], name="mine")
    with pytest.raises(ValueError, match=r"^specs\[0\]\.corruption: expected one that roma has"):
        degrade(GOOD, "mine", level=1, seed=0, corruptions={"mine": own})
    with pytest.raises(ValueError, match=r"corruption: expected one of .* got \['jpeg'\]"):
        degrade(GOOD, ["jpeg"], level=1, seed=0)  # type: ignore[arg-type]


MADE = [name for name, row in CORRUPTIONS.items() if row.pool != ADVERSARIAL]


@pytest.mark.parametrize("name", MADE)
def test_the_strongest_parameter_still_gives_an_image(name: str) -> None:
    image = picture(9, 14)
    view = degrade(image, name, parameter=CORRUPTIONS[name].limit, seed=0)
    assert view.shape == image.shape and view.dtype == np.uint8


@pytest.mark.parametrize("name", [name for name in MADE if name != "jpeg"])
def test_the_faintest_parameter_changes_nothing(name: str) -> None:
    """One rounding away from level 0. (A JPEG of quality 99.99… is one of 100, which is none.)"""
    start, stop = CORRUPTIONS[name].identity, CORRUPTIONS[name].limit
    faint = np.nextafter(start, stop)
    parameter = tuple(faint.tolist()) if isinstance(start, tuple) else float(faint)
    assert parameter != start
    image = picture(9, 14)
    np.testing.assert_array_equal(degrade(image, name, parameter=parameter, seed=0), image)


# The gallery.


def test_gallery_shows_every_level(tmp_path: Path) -> None:
    """Written as PNG, for small and large images."""
    file = tmp_path / "picture.jpg"
    Image.fromarray(smooth(300, 500)).save(file)
    out = write_gallery(file, tmp_path / "sheets" / "views.png")
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 400 and sheet.height > 9 * 256
    small = draw_gallery(smooth(32, 64), corruptions=load_levels(DEMO_LEVELS))
    # four tiles of 64·3 pixels; the first shows the clean image, each pixel three times
    tile = np.asarray(small)[26 : 26 + 96, 8 : 8 + 192]
    np.testing.assert_array_equal(tile[1::3, 1::3], smooth(32, 64))


def test_gallery_refuses_what_is_no_image(tmp_path: Path) -> None:
    """And a name that is no PNG, before any work is done."""
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    with pytest.raises(ValueError, match=r"IMAGE: expected an image .*text\.jpg"):
        write_gallery(text, tmp_path / "views.png")
    with pytest.raises(ValueError, match=r"^out: expected a name .*; call it v\.png"):
        write_gallery(text, tmp_path / "v.jpg")
    Image.fromarray(smooth(30, 40)).save(text)
    text.write_bytes(text.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"text\.jpg \(image file is truncated"):
        write_gallery(text, tmp_path / "views.png")
    with pytest.raises(ValueError, match=r"no file at .*none\.jpg"):
        write_gallery(tmp_path / "none.jpg", tmp_path / "views.png")
    with pytest.raises(ValueError, match="window: expected at least one pixel, got 0"):
        draw_gallery(smooth(30, 40), window=0)
