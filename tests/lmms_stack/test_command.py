"""The command `lmms-eval --model roma`, its cache of answers, and its errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_stack.asking import ask, load_tasks, make, requests_of
from lmms_stack.suite import TASKS, write_task

from roma.evaluate.conditions import Cell
from roma.evaluate.lmms_eval.images import digest_of

TASK = "mmstar_reasoning"


def command(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs it elsewhere: that there is a model "roma" it knows by the entry point alone."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start = [sys.executable, *(launcher if ranks > 1 else []), "-m", "lmms_eval"]
    lines = [*start, "--model", "roma", *map(str, arguments)]
    tests = Path(__file__).parents[1]
    places = (tests.parent, tests.parent / "kernels", tests / "vllm_engine/cpu")
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, places))}
    return subprocess.run(
        lines, capture_output=True, text=True, cwd=os.environ["HF_HOME"], env=environment
    )


@pytest.fixture(scope="module")
def alone(suite, tmp_path_factory):
    """A folder with one task, under a name that lmms-eval has no task of."""
    folder = tmp_path_factory.mktemp("alone")
    yaml_file, split, rows = TASKS[TASK]
    write_task(folder, f"small_{TASK}", yaml_file, split, rows(5))
    return folder


def answers_of(suite: Path, alone: Path, out: Path, cell: str, ranks: int = 1) -> dict[int, str]:
    """Document → answer, by the command."""
    run = command(
        *("--tasks", f"small_{TASK}", "--include_path", alone, "--output_path", out),
        *("--model_args", f"pretrained={suite / 'model'}{cell}", "--log_samples"),
        *("--gen_kwargs", "max_new_tokens=2", "--batch_size", "2"),
        ranks=ranks,
    )
    assert "acc_score" in run.stdout
    (samples,) = out.rglob(f"*samples_small_{TASK}.jsonl")
    rows = map(json.loads, samples.read_text(encoding="utf-8").splitlines())
    return {row["doc_id"]: row["filtered_resps"] for row in rows}


def test_the_command_finds_the_plug_in_and_degrades_in_two_processes_too(suite, alone, tmp_path):
    noise = ",corruption=gaussian_noise,level=3"
    clean = answers_of(suite, alone, tmp_path / "clean", "")
    degraded = answers_of(suite, alone, tmp_path / "degraded", noise)
    assert set(clean) == set(degraded) == set(range(5)) and clean != degraded
    # One process has three documents, the other two and a copy to keep in step.
    assert answers_of(suite, alone, tmp_path / "two", noise, ranks=2) == degraded


def test_an_error_is_one_line_and_the_last_that_the_command_says(alone):
    run = command(
        *("--tasks", f"small_{TASK}", "--include_path", alone),
        *("--model_args", "pretrained=nowhere,corruption=gausian_blur,level=3"),
    )
    assert run.returncode == 0  # as for all of its errors
    *_, last = run.stdout.strip().splitlines()
    assert "expected one of gaussian_noise" in last and "did you mean 'gaussian_blur'?" in last


# ------------------------------------------------------------------------------------------- cache


def cached(suite, cache: Path | None, model: object = "roma", **options: object) -> list[str]:
    """The answers to one task, through lmms-eval's cache of answers."""
    given = {"pretrained": str(suite / "model")} | options
    found = simple_evaluate(
        model=model,
        model_args=",".join(f"{key}={value}" for key, value in given.items()),
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(suite / "tasks"), include_defaults=False),
        gen_kwargs="max_new_tokens=2",
        use_cache=str(cache) if cache else None,
        bootstrap_iters=0,
    )
    return [sample["resps"][0] for sample in found["samples"][TASK]]


@pytest.fixture
def generated(monkeypatch):
    """How many answers the model inside made."""
    from lmms_eval.models.chat.qwen3_vl import Qwen3_VL

    counts = []
    whole = Qwen3_VL.generate_until

    def generate_until(self, requests):
        counts.append(len(requests))
        return whole(self, requests)

    monkeypatch.setattr(Qwen3_VL, "generate_until", generate_until)
    return counts


def test_two_conditions_never_share_a_cached_answer(suite, tmp_path, generated):
    cells = [{}, {"corruption": "gaussian_noise", "level": 2}]
    cells += [{"corruption": "gaussian_noise", "level": 3}]
    cells += [{"corruption": "gaussian_noise", "level": 3, "seed": 1}]
    plain = [cached(suite, None, **cell) for cell in cells]
    generated.clear()
    assert [cached(suite, tmp_path, **cell) for cell in cells] == plain
    assert generated == [6] * 4  # each condition asked the model for every answer
    assert [cached(suite, tmp_path, **cell) for cell in cells] == plain
    # And the second time it was used. Not always: lmms-eval opens the database as one that nobody
    # writes, and misses what an earlier connection has not yet moved into it.
    assert len(generated) < 8
    assert len(set(map(tuple, map(tuple, (map(str, answers) for answers in plain))))) > 1


def test_nor_do_two_tables_of_one_name(suite, tmp_path, generated):
    table, cell = tmp_path / "levels.yaml", {"corruption": "gaussian_noise", "level": 1}
    found = []
    for sigma in (0.02, 0.5):
        table.write_text(f"gaussian_noise: {{levels: [{sigma}]}}\n")
        named = f"{table}@{digest_of(table)}"
        found.append(cached(suite, tmp_path / "cache", **cell, level_table=named))
    assert generated == [6, 6] and found[0] != found[1]
    with pytest.raises(ValueError, match=re.escape(f"level_table: expected {named}")):
        cached(suite, tmp_path / "cache", **cell, level_table=table)


def test_nor_do_two_cells_of_one_model_object(suite, tmp_path, generated):
    model = make("roma", suite)
    model.clean = lambda: None  # lmms-eval ends a run with it
    answers = []
    for cell in (Cell(), Cell("seen", "gaussian_noise", 3), Cell()):
        model.cell = cell
        answers.append(cached(suite, tmp_path, model))
    assert generated[:2] == [6, 6]  # the second is not the first's
    assert answers[0] == answers[2] != answers[1]


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"corruption": "fogg", "level": 1}, "did you mean 'fog'?"),
        ({"corruption": "fog"}, "level: expected 1 to 5, a level of fog, got none"),
        ({"level": 1}, "corruption: expected one beside the level, got none"),
        ({"corruption": "fog", "level": 9}, "level: expected 1 to 5, a level of fog, got 9"),
        ({"corruption": "pgd", "level": 1}, "`roma eval --pools adversarial`"),
        ({"engine": "sglang"}, 'engine: expected "hf" or "vllm", got \'sglang\''),
        ({"base": "qwen3vl"}, "base: expected a chat model of lmms-eval, got 'qwen3vl'; did you"),
        ({"base": "roma"}, "base: expected a chat model of lmms-eval, got 'roma'"),
        ({"base": "qwen3_vl", "engine": "vllm"}, "base: expected none beside engine"),
        ({"seed": 0.5}, "seed: expected a whole number, got 0.5"),
        ({"resize": "224"}, "resize: expected \"model\", got '224'"),
        (
            {"base": "internvl_hf", "resize": "model"},
            "resize: expected none with lmms-eval's inter",
        ),
        (
            {"corruptoin": "fog"},
            "model_args: expected arguments of roma or qwen3_vl, got corruptoin",
        ),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_is_loaded(suite, options, said, monkeypatch):
    import transformers

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", loaded)
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        make("roma", suite, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen2_5_vl", "qwen2_5_vl"),
        ("qwen3_vl", "qwen3_vl"),
        ("qwen3_vl_moe", "qwen3_vl"),
        ("idefics3", "huggingface"),  # it has no class of its own
        ("gemma3", "huggingface"),  # lmms-eval's is no chat model
    ],
)
def test_the_model_inside_follows_from_the_checkpoints_type(tmp_path, kind, name):
    from roma.evaluate.lmms_eval.model import base_of

    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert base_of(tmp_path, "hf", None) == name
    assert base_of(tmp_path, "vllm", None) == "vllm"
    assert base_of(tmp_path, "hf", "llava_hf") == "llava_hf"


def test_a_checkpoint_has_to_be_named():
    from roma.evaluate.lmms_eval.model import RomaModel

    with pytest.raises(ValueError, match="pretrained: expected a checkpoint, got none"):
        RomaModel()


def test_a_task_without_images_or_with_a_film_is_refused_before_the_first_answer(suite, generated):
    model = make("roma", suite, corruption="fog", level=1)
    tasks = load_tasks(suite)
    requests = requests_of({TASK: tasks[TASK]})

    def saying(kind):
        part = {"type": kind, "url": "a.mp4", "text": "2 + 2"}

        def messages(doc):
            return [{"role": "user", "content": [part]}]

        for request in requests:
            request.arguments = (request.arguments[0], messages, *request.arguments[2:])
        return requests

    with pytest.raises(ValueError, match=f"{TASK}: expected documents with images, got none"):
        ask(model, tasks, saying("text"))
    with pytest.raises(ValueError, match=f"{TASK}, document 0: expected images and text, got cont"):
        ask(model, tasks, saying("video"))
    assert generated == []
    model.cell = Cell()
    assert len(ask(model, tasks, saying("text"))) == 6  # clean, it is lmms-eval's own model


def test_requests_of_other_kinds_are_refused_at_a_cell(suite):
    model = make("roma", suite, corruption="fog", level=1)
    requests = requests_of({TASK: load_tasks(suite)[TASK]})
    for kind in ("loglikelihood", "generate_visual_cot"):
        with pytest.raises(
            ValueError, match=f"{TASK}: expected a task whose answers are generated"
        ):
            getattr(model, kind)(requests)
    model.cell = Cell()
    with pytest.raises(NotImplementedError):
        model.loglikelihood(requests)
