"""The model "roma" beside lmms-eval's own: clean it is that one, degraded its pixels are ours."""

import numpy as np
import pytest
from lmms_stack.asking import (
    Spy,
    ask,
    bytes_of,
    clean_pixels,
    degraded_pixels,
    load_tasks,
    make,
    requests_of,
)
from lmms_stack.suite import TASKS
from PIL import Image
from qwen_vl_utils import fetch_image

from roma.evaluate.conditions import Cell
from roma.evaluate.lmms_eval.resize import Resizer

NOISE = Cell("seen", "gaussian_noise", 3)
BLUR = Cell("seen", "gaussian_blur", 2)
ODD = "realworldqa_reasoning"  # every second image is 201 × 300
STORED = "VisualPuzzles_cot"  # images in the modes in which they are stored
EVEN = [name for name in TASKS if name not in (ODD, STORED)]


@pytest.fixture(scope="module")
def tasks(suite):
    return load_tasks(suite)


@pytest.fixture(scope="module")
def roma(suite):
    return make("roma", suite)


@pytest.fixture(autouse=True)
def _clean_again(roma):
    yield
    roma.cell = Cell()


@pytest.fixture
def spy(roma):
    inside = roma._model
    processor = inside.processor
    yield Spy(inside)
    inside.processor = processor


def scores(suite, name, **options):
    """All that lmms-eval finds: every answer, every metric."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        model=name,
        model_args=",".join(f"{key}={value}" for key, value in options.items()),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(suite / "tasks"), include_defaults=False),
        batch_size=1,
        gen_kwargs="max_new_tokens=2",
        bootstrap_iters=0,
    )
    answers = {
        task: [(s["doc_id"], s["resps"], s["filtered_resps"]) for s in samples]
        for task, samples in found["samples"].items()
    }
    return answers, {task: repr(row) for task, row in found["results"].items()}


def test_clean_it_is_lmms_evals_own_model_on_all_seven_tasks(suite):
    pretrained = str(suite / "model")
    own = scores(suite, "qwen3_vl", pretrained=pretrained, device="cpu", device_map="cpu")
    ours = scores(suite, "roma", pretrained=pretrained)
    assert set(own[0]) == set(TASKS) and all(len(rows) == 6 for rows in own[0].values())
    assert ours == own
    right = sum("_score,none': 1.0" in row or "match,none': 1.0" in row for row in own[1].values())
    assert right >= 2, "the tiny model knows too little for the comparison to mean anything"
    degraded = scores(suite, "roma", pretrained=pretrained, corruption="gaussian_noise", level=3)
    assert degraded != own


@pytest.mark.parametrize("name", [*EVEN, STORED])
def test_the_pixels_before_the_processor_are_those_of_roma_views(suite, tasks, roma, spy, name):
    roma.cell = NOISE
    ask(roma, tasks, requests_of({name: tasks[name]}))
    assert bytes_of(spy.images) == bytes_of(degraded_pixels(suite, name, "gaussian_noise", 3))


def test_an_image_of_any_size_is_degraded_first_and_resized_by_the_model(suite, tasks, roma, spy):
    roma.cell = NOISE
    ask(roma, tasks, requests_of({ODD: tasks[ODD]}))
    ours = degraded_pixels(suite, ODD, "gaussian_noise", 3)
    assert {image.shape[:2] for image in ours} == {(224, 320), (201, 300)}
    seen = [fetch_image({"image": Image.fromarray(image)}, image_patch_size=16) for image in ours]
    assert bytes_of(spy.images) == bytes_of(seen)


def test_clean_pixels_are_lmms_evals_own(suite, tasks, roma, spy):
    ask(roma, tasks, requests_of({EVEN[0]: tasks[EVEN[0]]}))
    assert bytes_of(spy.images) == bytes_of(clean_pixels(suite, EVEN[0]))


def test_cells_and_seeds_differ_and_the_cell_may_change_between_calls(suite, tasks, roma, spy):
    requests = requests_of({EVEN[0]: tasks[EVEN[0]]})
    seen = {}
    for cell in (Cell(), NOISE, BLUR, Cell("seen", "gaussian_noise", 2), Cell()):
        roma.cell, spy.images = cell, []
        ask(roma, tasks, requests)
        assert seen.setdefault(cell, bytes_of(spy.images)) == bytes_of(spy.images)
    assert len({tuple(images) for images in seen.values()}) == 4
    other = degraded_pixels(suite, EVEN[0], "gaussian_noise", 3, seed=1)
    assert seen[NOISE] != bytes_of(other)


@pytest.mark.parametrize("base", ["qwen3_vl", "huggingface"])
def test_neither_order_nor_batch_size_changes_a_pixel_or_a_prompt(suite, tasks, base, monkeypatch):
    # The generic class hands every document of a batch to the first request's function; and it
    # takes AutoModel where it means the class that generates.
    import lmms_eval.models.chat.huggingface as generic

    monkeypatch.setattr(generic, "AutoModel", generic.AutoModelForImageTextToText)
    requests = requests_of(tasks)
    seen = []
    for batch_size in (1, 4):
        model = make("roma", suite, base=base, batch_size=batch_size, corruption="fog", level=2)
        spied = Spy(model._model)
        for order in (requests, requests[::-1]):
            spied.images, spied.texts = [], []
            ask(model, tasks, order)
            seen.append((bytes_of(spied.images), sorted(spied.texts)))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    ours = [image for name in EVEN for image in degraded_pixels(suite, name, "fog", 2)]
    assert set(bytes_of(ours)) <= set(seen[0][0])


def test_two_ranks_make_the_pixels_of_one(suite, tasks, roma, spy):
    roma.cell = NOISE
    made = {}
    for rank in (0, 1):
        made |= ask(roma, tasks, requests_of(tasks, rank=rank, world_size=2))
    both = bytes_of(spy.images)
    spy.images = []
    assert ask(roma, tasks, requests_of(tasks)) == made
    assert bytes_of(spy.images) == both


def test_at_the_models_size_what_is_degraded_is_what_is_seen(suite, tasks):
    model = make("roma", suite, corruption="gaussian_noise", level=3, resize="model")
    spied = Spy(model._model)
    ask(model, tasks, requests_of({ODD: tasks[ODD]}))
    small = [
        np.asarray(fetch_image({"image": Image.fromarray(image)}, image_patch_size=16))
        for image in clean_pixels(suite, ODD)
    ]
    from roma.views import degrade, seed_for

    seeds = [seed_for(0, ODD, i, 0, "gaussian_noise", 3) for i in range(len(small))]
    ours = [
        degrade(image, "gaussian_noise", level=3, seed=seed)
        for image, seed in zip(small, seeds, strict=True)
    ]
    assert bytes_of(spied.images) == bytes_of(ours)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "vllm"])
@pytest.mark.parametrize("size", [(31, 640), (201, 300), (1500, 2000)])
def test_a_resized_image_is_not_resized_again(name, size):
    from transformers import Qwen2VLImageProcessor

    pixels = {"shortest_edge": 56 * 56, "longest_edge": 600 * 600}
    patch = 14 if name == "qwen2_5_vl" else 16
    processor = Qwen2VLImageProcessor(patch_size=patch, merge_size=2, size=pixels)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(Resizer(name, processor)(noise))
    assert image.size != size[::-1]
    fetched = image if name == "vllm" else fetch_image({"image": image}, image_patch_size=patch)
    np.testing.assert_array_equal(np.asarray(fetched), np.asarray(image))
    if name == "qwen3_vl":  # lmms-eval calls its processor with do_resize=False
        return
    seen = processor(images=[fetched], return_tensors="pt")
    as_it_is = processor(images=[fetched], return_tensors="pt", do_resize=False)
    assert seen.pixel_values.equal(as_it_is.pixel_values)
    # And the clean image comes out at this very size.
    clean = Image.fromarray(noise)
    if name != "vllm":
        clean = fetch_image({"image": clean}, image_patch_size=patch)
    grid = processor(images=[clean], return_tensors="pt").image_grid_thw
    assert grid.equal(seen.image_grid_thw)


def test_a_type_for_which_lmms_eval_has_a_class_that_cannot_generate_is_refused(suite):
    with pytest.raises(ValueError, match="got Qwen3VLModel, which generates nothing; take engine="):
        make("roma", suite, base="huggingface")


def test_what_lmms_eval_asks_of_a_model_is_the_models(roma):
    inside = roma._model
    for name in ("device", "batch_size", "tokenizer", "accelerator", "config", "max_length"):
        assert getattr(roma, name) is getattr(inside, name) or (
            getattr(roma, name) == getattr(inside, name)
        )
    assert (roma.rank, roma.world_size) == (0, 1)
    roma._rank, roma._world_size = 1, 2
    assert (inside.rank, inside.world_size, roma.rank, roma.world_size) == (1, 2, 1, 2)
    roma._rank, roma._world_size = 0, 1
    with pytest.raises(AttributeError):
        _ = roma.chat_template  # its own lacks it too
    with pytest.raises(ValueError, match="cell: expected one of the table of levels"):
        roma.cell = Cell("unseen", "gaussian_noise", 3)
