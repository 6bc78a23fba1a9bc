"""Asking a model of lmms-eval the tiny suite, and seeing what its processor is given."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_stack.suite import TASKS
from PIL import Image

from roma.views import degrade, seed_for

TOKENS = 2
IMAGE_COLUMNS = {"mathvista_testmini_cot_reasoning": "decoded_image"}
IMAGE_COLUMNS |= {"wemath_testmini_reasoning": "image_path"}


def make(name: str, suite: Path, **options: Any) -> Any:
    """A model by its name in lmms-eval, on the CPU."""
    device = {} if options.get("engine") == "vllm" else {"device": "cpu", "device_map": "cpu"}
    return get_model(name)(pretrained=str(suite / "model"), **device, **options)


def load_tasks(suite: Path) -> dict[str, Any]:
    """The seven, each with short answers."""
    manager = TaskManager(include_path=str(suite / "tasks"), include_defaults=False)
    tasks = manager.load_task_or_group(list(TASKS), task_type="chat")
    for task in tasks.values():
        task.set_config(key="generation_kwargs", value={"max_new_tokens": TOKENS}, update=True)
    return {name: tasks[name] for name in TASKS}


def requests_of(
    tasks: dict[str, Any], *, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> list[Any]:
    """Every task's requests."""
    every = []
    for task in tasks.values():
        task.build_all_requests(limit=limit, rank=rank, world_size=world_size)
        every += task.instances
    return every


def ask(model: Any, tasks: dict[str, Any], requests: list[Any]) -> dict[tuple[str, int], str]:
    """(task, document) → answer."""
    for name, task in tasks.items():
        model.task_dict[name] = task.dataset
    made = model.generate_until(requests)
    return {
        (request.task_name, request.doc_id): getattr(answer, "text", answer)
        for request, answer in zip(requests, made, strict=True)
    }


class Spy:
    """In place of a model's processor: keeps the images and prompts that it is given."""

    def __init__(self, model: Any) -> None:
        self.inner, self.images, self.texts = model.processor, [], []
        model.processor = self

    def __call__(self, *, text: list[str], images: list[Any], **options: Any) -> Any:
        self.images += [np.asarray(image) for image in images]
        self.texts += text
        # What lmms-eval's generic class hands over empty, transformers takes for a video.
        given = {key: value for key, value in options.items() if key in ("videos", "audios")}
        options = {key: value for key, value in options.items() if key not in given or value}
        return self.inner(text=text, images=images, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def bytes_of(images: list[Any]) -> list[bytes]:
    """Of images in any order, to be compared."""
    return sorted(np.asarray(image).tobytes() for image in images)


def clean_pixels(suite: Path, task: str) -> list[np.ndarray]:
    """The images of a task as its file has them, made RGB by hand."""
    (file,) = (suite / "tasks" / task).glob("*.parquet")
    column = pq.read_table(file)[IMAGE_COLUMNS.get(task, "image")].to_pylist()
    made = []
    for row in column:
        image = Image.open(io.BytesIO(row["bytes"]))
        if image.mode == "RGBA":
            values = np.asarray(image).astype(np.float64)
            alpha = values[..., 3:] / 255
            blended = alpha * values[..., :3] + (1 - alpha) * 255
            made.append(np.rint(blended).astype(np.uint8))
        else:
            made.append(np.asarray(image.convert("RGB")))
    return made


def degraded_pixels(
    suite: Path, task: str, corruption: str, level: int, *, seed: int = 0
) -> list[np.ndarray]:
    """The images of a task at a cell, by roma.views alone."""
    return [
        degrade(
            image,
            corruption,
            level=level,
            seed=seed_for(seed, task, document, 0, corruption, level),
        )
        for document, image in enumerate(clean_pixels(suite, task))
    ]
