"""Seven local tasks in the shape of the paper's, and a tiny model that knows most answers.

The tasks are lmms-eval's own YAML files with other data: generated charts in the columns that they
read.

    python -m lmms_stack.suite FOLDER    # FOLDER/model, FOLDER/tasks
"""

import io
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lmms_stack.model import LETTERS, build_model
from PIL import Image

from roma.data.synthetic.charts import chart_questions


def write_suite(folder: str | Path, *, questions: int = 6, prefix: str = "") -> Path:
    """Writes FOLDER/model and FOLDER/tasks, a folder for `include_path`.

    lmms-eval prefers its own task to one of an `include_path` that has the same name: load these
    with `TaskManager(include_path=…, include_defaults=False)`, or give a prefix to their names.

    Args:
        folder: made if absent.
        questions: of each task.
        prefix: of every task's name.
    """
    folder = Path(folder)
    for name, (yaml_file, split, rows) in TASKS.items():
        write_task(folder / "tasks", prefix + name, yaml_file, split, rows(questions))
    build_model(folder / "model", folder / "tasks")
    return folder


def write_task(
    folder: Path, name: str, yaml_file: str, split: str, rows: list[dict[str, Any]]
) -> None:
    """A task of lmms-eval with these rows as its only split."""
    import lmms_eval.tasks
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    plain = Dataset.from_list(rows)
    images = {column: ImageFeature() for column, value in rows[0].items() if _is_image_file(value)}
    plain.cast(Features({**plain.features, **images})).to_parquet(str(place / f"{split}.parquet"))
    config = {
        "include": str(Path(lmms_eval.tasks.__file__).parent / yaml_file),
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {split: str((place / f"{split}.parquet").resolve())}},
    }
    if "wemath" in name:  # its two scores of a whole set divide by zero where no problem is solved
        mean = {"aggregation": "mean", "higher_is_better": True}
        config["metric_list"] = [
            {"metric": f"{which}_score", **mean} for which in ("acc", "format")
        ]
        whole = {"aggregation": "bypass", "higher_is_better": True}
        config["metric_list"] += [{"metric": f"wemath_{of}", **whole} for of in ("loose", "strict")]
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _is_image_file(value: object) -> bool:
    return isinstance(value, dict) and set(value) == {"bytes", "path"}


def _png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _charts(task: str, count: int) -> list[tuple[Image.Image, str, str]]:
    """(image, question, answer): how many bars are higher, 0 to 3, of charts of the task's own."""
    every = chart_questions("test", 60 * count, seed=sum(map(ord, task)))
    asked = (q for q in every if q.problem.startswith("<image>How many") and q.answer in "0123")
    return [
        (Image.fromarray(q.image), q.problem.removeprefix("<image>"), q.answer)
        for q in islice(asked, count)
    ]


def _options(answer: str, index: int) -> tuple[list[str], str]:
    """Four options and the letter of the right one."""
    options = [str(other) for other in range(7) if str(other) != answer][:3]
    place = (index * 7 + 1) % 4
    options.insert(place, answer)
    return options, LETTERS[place]


def _lettered(options: list[str]) -> str:
    return ", ".join(f"{letter}: {text}" for letter, text in zip(LETTERS, options, strict=True))


def _mmstar(count: int) -> list[dict[str, Any]]:
    rows = []
    for i, (image, question, answer) in enumerate(_charts("mmstar", count)):
        options, letter = _options(answer, i)
        asked = f"{question}\nOptions: {_lettered(options)}"
        kind = {"category": "math", "l2_category": "statistical reasoning"}
        rows.append({"index": i, "image": _png(image), "question": asked, "answer": letter} | kind)
    return rows


def _chartqa(count: int) -> list[dict[str, Any]]:
    return [
        {
            "type": ("human_test", "augmented_test")[i % 2],
            "question": question,
            "answer": answer,
            "image": _png(image),
        }
        for i, (image, question, answer) in enumerate(_charts("chartqa", count))
    ]


def _mathvista(count: int) -> list[dict[str, Any]]:
    rows = []
    for i, (image, question, answer) in enumerate(_charts("mathvista", count)):
        number = i % 2 == 0
        options, _ = _options(answer, i)
        row = {"pid": str(i + 1), "question": question, "decoded_image": _png(image)}
        row |= {"question_type": "free_form" if number else "multi_choice"}
        row |= {"answer_type": "integer" if number else "text"}
        row |= {"choices": [] if number else options, "answer": answer, "unit": "", "precision": 0}
        rows.append(row | {"query": question, "metadata": {"split": "testmini", "task": "chart"}})
    return rows


def _logicvista(count: int) -> list[dict[str, Any]]:
    rows = []
    for i, (image, question, answer) in enumerate(_charts("logicvista", count)):
        options, letter = _options(answer, i)
        asked = f"{question}\n{_lettered(options)}"
        rows.append({"image": _png(image), "question": asked, "answer": letter})
    return rows


def _realworldqa(count: int) -> list[dict[str, Any]]:
    """Photographs have any size: every second one is no multiple of 32."""
    rows = []
    for i, (image, question, answer) in enumerate(_charts("realworldqa", count)):
        shown = image.resize((300, 201)) if i % 2 else image
        rows.append({"image": _png(shown), "question": question, "answer": answer})
    return rows


def _wemath(count: int) -> list[dict[str, Any]]:
    """Of two and of three steps: each problem's parts, then the problem."""
    keys = [f"{n}steps_{part}" for n in (2, 3) for part in (*range(1, n + 1), "multi")]
    rows = []
    for i, (image, question, answer) in enumerate(_charts("wemath", count)):
        options, letter = _options(answer, i)
        row = {"ID": str(i // len(keys)), "split": "testmini", "key": keys[i % len(keys)]}
        row |= {"knowledge concept": "Bars", "knowledge concept description": "Reading bars."}
        row |= {"question number": i, "question": question, "option": _lettered(options)}
        rows.append(row | {"answer": letter, "image_path": _png(image)})
    return rows


def _visual_puzzles(count: int) -> list[dict[str, Any]]:
    """The one task that hands over images as they are stored: RGB, gray, palette, transparent."""
    rows = []
    for i, (image, question, answer) in enumerate(_charts("VisualPuzzles", count)):
        options, letter = _options(answer, i)
        stored = image.convert(("RGB", "L", "P", "RGBA")[i % 4])
        if stored.mode == "RGBA":
            stored.putalpha(Image.fromarray(np.asarray(image)[..., 0]))
        row = {"question": question, "options": options, "answer": letter}
        rows.append(row | {"image": _png(stored), "id": i})
    return rows


Rows = Callable[[int], list[dict[str, Any]]]
TASKS: dict[str, tuple[str, str, Rows]] = {
    "mathvista_testmini_cot_reasoning": (
        "mathvista/reasoning/mathvista_testmini_cot.yaml",
        "testmini",
        _mathvista,
    ),
    "wemath_testmini_reasoning": (
        "wemath/reasoning/wemath_testmini_thinking.yaml",
        "testmini",
        _wemath,
    ),
    "chartqa_reasoning": ("chartqa/reasoning/chartqa_reasoning.yaml", "test", _chartqa),
    "logicvista_reasoning": ("logicvista/reasoning/logicvista_thinking.yaml", "test", _logicvista),
    "mmstar_reasoning": ("mmstar/reasoning/mmstar_reasoning.yaml", "val", _mmstar),
    "VisualPuzzles_cot": ("VisualPuzzles/VisualPuzzles_cot.yaml", "train", _visual_puzzles),
    "realworldqa_reasoning": (
        "realworldqa/reasoning/realworldqa_reasoning.yaml",
        "test",
        _realworldqa,
    ),
}
"""Name → lmms-eval's YAML file, its split, and the rows of a number of questions."""


if __name__ == "__main__":
    print(write_suite(sys.argv[1]))
