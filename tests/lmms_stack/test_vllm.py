"""engine=vllm: lmms-eval's class for vLLM, run on the CPU; its images are those of roma.views."""

import importlib.util

import numpy as np
import pytest
from lmms_stack.asking import (
    TOKENS,
    ask,
    bytes_of,
    clean_pixels,
    degraded_pixels,
    load_tasks,
    make,
    requests_of,
)

from roma.evaluate.conditions import Cell
from roma.evaluate.lmms_eval.images import cell_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-lmms"
)
EVEN = ("mmstar_reasoning", "VisualPuzzles_cot")  # images whose sides are multiples of 32


@pytest.fixture(scope="module")
def model(suite):
    options = {"max_new_tokens": TOKENS, "max_model_len": 1024, "dtype": "float32"}
    made = make("roma", suite, engine="vllm", batch_size=8, enforce_eager=True, **options)
    yield made
    made.client.llm_engine.engine_core.shutdown()


@pytest.fixture
def seen(monkeypatch):
    """What transformers' image processor is given, in the process that lays out vLLM's prompts."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil

    images = []
    for processor in (Qwen2VLImageProcessor, Qwen2VLImageProcessorPil):
        whole = processor.preprocess

        def preprocess(self, given, *args, _whole=whole, **options):
            images.extend(np.asarray(image) for image in given)
            return _whole(self, given, *args, **options)

        monkeypatch.setattr(processor, "preprocess", preprocess)
    return images


def test_what_vllms_processor_sees_is_roma_views_and_clean_it_is_the_files(suite, model, seen):
    tasks = load_tasks(suite)
    requests = requests_of({name: tasks[name] for name in EVEN})
    answers = {}
    for cell in (Cell(), cell_of("gaussian_noise", 3), cell_of("gaussian_blur", 2)):
        seen.clear()
        model.cell = cell
        answers[cell] = ask(model, tasks, requests)
        if cell.corruption:
            made = [degraded_pixels(suite, name, cell.corruption, cell.level) for name in EVEN]
        else:
            made = [clean_pixels(suite, name) for name in EVEN]
        assert set(bytes_of(seen)) == set(bytes_of([image for some in made for image in some]))
    assert len({tuple(found.values()) for found in answers.values()}) == 3
    inside = model._model
    inside.task_dict = {name: tasks[name].dataset for name in EVEN}
    own = [answer.text for answer in inside.generate_until(requests)]
    assert own == list(answers[Cell()].values())


def test_an_option_that_vllm_does_not_take_is_refused_before_it_starts(suite):
    with pytest.raises(ValueError, match="device: expected none with engine=vllm, got 'cpu'"):
        make("roma", suite, engine="vllm", device="cpu")
