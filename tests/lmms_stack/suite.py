"""A tiny Qwen3-VL and seven local tasks in the shape of the paper's, for lmms-eval.

The tasks are lmms-eval's own YAML files with other data: generated charts in the columns that they
read. The model has random weights but for its head, which is fitted to the right answers, each of
them one token: so most answers are right, and degraded images change some.

    python -m lmms_stack.suite FOLDER    # FOLDER/model, FOLDER/tasks
"""

import io
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager
from PIL import Image
from qwen_vl_utils import process_vision_info

from roma.data.synthetic.charts import chart_questions

LETTERS = "ABCD"
RIDGE = 0.03
SYSTEM = {
    "role": "system",
    "content": [{"type": "text", "text": "You are a helpful assistant."}],
}  # lmms-eval's Qwen classes set it before a task's own
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


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


# ------------------------------------------------------------------------------------------- tasks


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


# ------------------------------------------------------------------------------------------- model


def answers() -> list[str]:
    """Whole answers, each one token; letters in both ways in which the seven tasks read them."""
    letters = [f"<answer>{letter}</answer> Answer: {letter}" for letter in LETTERS]
    return [*letters, *(f"<answer>{number}</answer>" for number in range(4))]


def words() -> list[str]:
    """Words of the prompts; what is not among them is read as unknown."""
    labels = "Rice Corn Wheat Oats Barley Rye Millet Beans Paris Rome Oslo Lima Cairo Delhi Quito"
    labels += " Seoul Mon Tue Wed Thu Fri Sat Sun Pens Lamps Cups Bags Hats Rugs Keys Bells"
    text = "system user assistant You are a helpful assistant. When the user asks a question, your"
    text += " response must include two parts: Which bar is highest? lowest? What value of How much"
    text += " more than are together? many bars higher Options: A: B: C: D: (A) (B) (C) (D)"
    return [*labels.split(), *text.split(), *(str(number) for number in range(100))]


def build_model(folder: Path, tasks: Path, *, seed: int = 0) -> Path:
    """A Qwen3-VL of 0.5 M parameters with transformers' own processor; about 2 MB.

    Patches are of 16 pixels, merged 2 × 2, as in the large models: lmms-eval's Qwen classes count
    on it. Heads are of 32: vLLM's attention on a CPU takes none smaller.

    Args:
        folder: to write.
        tasks: of whose answers its head knows some.
        seed: of the weights.
    """
    from transformers import (
        GenerationConfig,
        Qwen2VLImageProcessorPil,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]
    )
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 512 * 512}
    options = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": pixels}
    even = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**options, **even),
        tokenizer,
        Qwen3VLVideoProcessor(**options, **even),
        chat_template=TEMPLATE,
    )
    _fit_head(model, processor, tasks)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _fit_head(model: Any, processor: Any, tasks: Path) -> None:
    """Ridge regression of the right answers, each a token, on the states after the prompts."""
    states, targets = [], []
    for messages, target in _asked(tasks):
        chat = ChatMessages(messages=[SYSTEM, *messages]).to_hf_messages()
        prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images, _ = process_vision_info([chat], image_patch_size=16)
        inputs = processor(text=[prompt], images=images, do_resize=False, return_tensors="pt")
        states.append(model.model(**inputs).last_hidden_state[0, -1])
        letter = f" Answer: {target}" if target in LETTERS else ""
        targets.append(answers().index(f"<answer>{target}</answer>{letter}"))
    x = torch.stack(states)  # [n, 64]
    wanted = torch.nn.functional.one_hot(torch.tensor(targets), len(answers())).float()
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1])
    rows = torch.linalg.solve(gram, x.T @ wanted).T
    model.lm_head.weight.zero_()
    model.lm_head.weight[processor.tokenizer.convert_tokens_to_ids(answers())] = rows


def _asked(tasks: Path) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """Every question's messages and right answer, a letter or a number."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for task in manager.load_task_or_group(manager.all_subtasks, task_type="chat").values():
        for doc in task.test_docs():
            target = doc["answer"]
            if doc.get("question_type") == "multi_choice":
                target = LETTERS[doc["choices"].index(target)]
            yield task.doc_to_messages(doc), target


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    listed = dict.fromkeys(["<unk>", *SPECIAL, *words(), *answers()])
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[1:2] + SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


if __name__ == "__main__":
    print(write_suite(sys.argv[1]))
