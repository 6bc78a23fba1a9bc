"""Accuracy on clean and degraded images: greedy answers, correctness per image, `roma eval`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from roma.data import load_dataset_rows
from roma.evaluate.answers import Answer, correct_answers
from roma.evaluate.conditions import Cell, DegradedImages, Image, cells_of
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.summary import summarise
from roma.evaluate.tables import summary_table
from roma.models.device import resolve_device
from roma.rewards import RewardFunction, compute_score
from roma.train.config.views import AttackConfig
from roma.views import ADVERSARIAL, CORRUPTIONS, load_levels
from roma_kernels.errors import fail

if TYPE_CHECKING:  # importing it takes seconds, and `roma eval --help` needs none of it
    from roma.models.qwen_vl import Policy
    from roma.rollout.base import Sampler


class Answerer(Protocol):
    """Answers a batch of problems about images, one answer each, in order."""

    def __call__(
        self, problems: Sequence[str], images: Sequence[Sequence[Image]]
    ) -> Sequence[Answer]:
        """One `Answer` per problem."""


def policy_answerer(
    policy: "Policy", *, max_new_tokens: int, sampler: "Sampler | None" = None
) -> Answerer:
    """Greedy answers of a policy, in batches; special tokens are left out of the texts.

    Args:
        policy: the model.
        max_new_tokens: budget of an answer, tokens; an answer cut there is not finished.
        sampler: the engine that runs it; None: transformers, on the policy itself.
    """
    from roma.rollout.hf import HfSampler

    engine = sampler or HfSampler(policy)
    options: dict[str, Any] = {"group_size": 1, "temperature": None, "seed": 0}

    def answer(problems: Sequence[str], images: Sequence[Sequence[Image]]) -> list[Answer]:
        prompts = policy.encode_prompts(problems, images)
        made = engine.sample(prompts, max_new_tokens=max_new_tokens, **options)
        texts = policy.processor.decode(made.tokens, made.mask)
        lengths, finished = made.mask.sum(-1).tolist(), made.finished.tolist()
        return [Answer(*row) for row in zip(texts, lengths, finished, strict=True)]

    return answer


def evaluate(
    answer: Answerer,
    images: DegradedImages,
    *,
    score: RewardFunction = compute_score,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Answers every example at every cell; right means an accuracy of at least ½ in the reward.

    Args:
        answer: the model, e.g. `policy_answerer(policy)`; greedy, so that two runs agree.
        images: the test examples and their cells.
        score: the reward function; only its "accuracy" is read.
        batch_size: examples per call of `answer`, ≥ 1.
        progress: called with the number of images just answered.

    Raises:
        ValueError: `batch_size` < 1, or the number of answers is not the number of problems.
    """
    if batch_size < 1:
        fail("batch_size", "at least 1", str(batch_size), "8 to 256 are customary")
    cells = {}
    for cell in images.cells:
        pictures = images.at(cell)
        answers: list[Answer] = []
        for start in range(0, len(pictures), batch_size):
            some = slice(start, start + batch_size)
            problems = [example.problem for example in images.examples[some]]
            answered = answer(problems, pictures[some])
            if len(answered) != len(problems):
                expected = f"{len(problems)} answers"
                fail("answer", expected, str(len(answered)), "return one per problem, in order")
            answers.extend(answered)
            if progress:
                progress(len(problems))
        correct = correct_answers(answers, images.examples, score)
        cells[cell] = CellResult(correct, [a.text for a in answers])
    return EvalResult([example.id for example in images.examples], cells)


def run_eval(
    model: str | Path,
    data: str | Path,
    *,
    pools: Sequence[str] = ("clean", "seen", "unseen"),
    levels: Sequence[int] = (1, 2, 3),
    out: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 1024,
    level_table: str | Path | None = None,
    score: RewardFunction = compute_score,
    seed: int = 0,
    device: str | None = None,
    engine: Literal["hf", "vllm"] = "hf",
    format_prompt: str | Path | None = None,
    attack_steps: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """`roma eval`: measures one model, prints a table, writes eval.json, answers.json and eval.png.

    Args:
        model: a Hugging Face folder of a vision-language model.
        data: a dataset in the loader's form, `folder@split` for a split.
        pools: see `cells_of`; "adversarial" is `evaluate_attacked`'s, each ε a level.
        levels: see `cells_of`.
        out: the folder for the files; None: runs/eval/MODEL-DATA.
        limit: only the first `limit` examples; None: all.
        batch_size: examples answered at once.
        max_new_tokens: budget of an answer, tokens.
        level_table: YAML with other levels, for small images; None: the customary ones.
        score: the reward function whose "accuracy" counts.
        seed: of the noise.
        device: "cpu", "cuda", …; None: the GPU in bf16 if there is one, else the CPU in fp32.
        engine: "hf", transformers' generate, or "vllm", which wants a large `batch_size` and takes
            the device that it was built for.
        format_prompt: file of a Jinja template of the prompt, in which `content` is the question,
            as in training; None: the question alone.
        attack_steps: of pool "adversarial"; None: 3.
        console: where to print.

    Returns:
        What eval.json holds: `summarise`'s keys, and how they came about.

    Raises:
        ValueError: an unknown pool, level or engine, a limit, batch size, budget or number of
            attack steps below 1, attack steps without an attack, vLLM with one, a device that is
            not here or beside vLLM, no model's folder, or a bad dataset.
        ImportError: vLLM is not installed.
        FileNotFoundError: there is no such level table.
        FileExistsError: `out` is a file.
    """
    if engine not in ("hf", "vllm"):
        fail("engine", '"hf" or "vllm"', repr(engine), "name one of the two")
    if engine == "vllm" and device is not None:
        fail("device", "None with engine=vllm", repr(device), "it takes the one it was built for")
    where = resolve_device("cpu" if engine == "vllm" else device or "auto")
    corruptions = load_levels(level_table) if level_table else CORRUPTIONS
    cells = cells_of(pools, levels, corruptions)
    attacks = [cell for cell in cells if cell.pool == ADVERSARIAL]
    _check_attack(attack_steps, bool(attacks), engine)
    if limit is not None and limit < 1:
        fail("limit", "at least 1, or None", str(limit), "leave it out to measure on every example")
    if max_new_tokens < 1:
        fail("max_new_tokens", "at least 1", str(max_new_tokens), "512 to 4096 are customary")
    if batch_size < 1:
        fail("batch_size", "at least 1", str(batch_size), "8 to 256 are customary")
    folder = Path(out) if out else Path("runs", "eval", _name(model, data))
    if folder.exists() and not folder.is_dir():
        fail("out", "a folder", f"the file {folder}", "name another", error=FileExistsError)
    rows = load_dataset_rows(data, format_prompt=format_prompt)
    examples = [rows[i] for i in range(min(len(rows), limit or len(rows)))]
    policy = _load_policy(model, where, engine)
    sampler = _vllm_sampler(policy) if engine == "vllm" else None
    # An attack starts from the clean answers, so that it has them.
    plain = [cell for cell in cells if cell not in attacks and not (attacks and cell == Cell())]
    images = DegradedImages(
        examples,
        plain,
        resize=policy.processor.resize,
        corruptions=corruptions,
        seed=seed,
        keep=False,
    )
    console = console or Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        every = len(plain) + (1 + len(attacks) if attacks else 0)
        task = bar.add_task("answering", total=every * len(examples))
        answer = policy_answerer(policy, max_new_tokens=max_new_tokens, sampler=sampler)
        result = evaluate(
            answer,
            images,
            score=score,
            batch_size=batch_size,
            progress=lambda count: bar.advance(task, count),
        )
        if attacks:
            from roma.evaluate.attack import evaluate_attacked

            attacked = evaluate_attacked(
                policy,
                examples,
                attacks,
                max_new_tokens=max_new_tokens,
                corruptions=corruptions,
                options=AttackConfig(steps=attack_steps or AttackConfig.steps),
                score=score,
                seed=seed,
                batch_size=batch_size,
                progress=lambda count: bar.advance(task, count),
            )
            both = result.cells | attacked.cells
            result = EvalResult(result.ids, {cell: both[cell] for cell in cells})
    summary = {
        "model": str(model),
        "data": str(data),
        "level_table": str(level_table) if level_table else None,
        "seed": seed,
        "decoding": "greedy",
        "engine": engine,
        "max_new_tokens": max_new_tokens,
        "attack_steps": (attack_steps or AttackConfig.steps) if attacks else None,
    } | summarise(result)
    console.print(summary_table(summary))
    wrote = f"wrote {_write_eval(folder, result, summary)}"
    console.print(wrote, highlight=False, soft_wrap=True)  # paths stay whole, to be copied
    return summary


def _check_attack(steps: int | None, attacked: bool, engine: str) -> None:
    if steps is not None and not attacked:
        remedy = f"name the pool {ADVERSARIAL}, or leave it out"
        fail("attack_steps", f"None without pool {ADVERSARIAL!r}", str(steps), remedy)
    if steps is not None and steps < 1:
        fail("attack_steps", "at least 1", str(steps), "3 to 20 are customary")
    if attacked and engine == "vllm":
        remedy = "an attack needs gradients of the model by its images"
        fail("engine", f"'hf' with pool {ADVERSARIAL!r}", "'vllm'", remedy)


def _name(model: str | Path, data: str | Path) -> str:
    """MODEL-DATA, for a folder; a checkpoint's "actor" folder goes by its run and step."""
    folder = Path(model).resolve()
    parts = folder.parts[-3:-1] if folder.name == "actor" else (folder.name,)
    path, _, split = str(data).partition("@")
    place = Path(path).resolve()
    return "-".join([*parts, place.name if place.is_dir() else place.stem, *filter(None, [split])])


def _load_policy(model: str | Path, device: torch.device, engine: str) -> "Policy":
    """The model, in fp32 on a CPU and in bf16 elsewhere.

    vLLM has weights of its own: these lay out its prompts, and take as little room as they can.
    """
    from roma.models.qwen_vl import Policy

    wide = device.type == "cpu" and engine == "hf"
    dtype = torch.float32 if wide else torch.bfloat16
    policy = Policy.load(model, dtype=dtype, device=device)
    policy.eval()
    return policy


def _vllm_sampler(policy: "Policy") -> "Sampler":
    """VLLM with the weights of the policy's folder and most of the GPU."""
    from roma.rollout.vllm import VllmSampler
    from roma.train.config.sections import VllmConfig

    return VllmSampler(policy, weights=None, options=VllmConfig(memory=0.85, sleep=False))


def _write_eval(folder: Path, result: EvalResult, summary: Mapping[str, Any]) -> str:
    """Writes the three files and says where."""
    from roma.evaluate import figures

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    (folder / "eval.json").write_text(text + "\n", encoding="utf-8")
    result.save(folder / "answers.json")
    figures.save(figures.one_model(summary), folder / "eval.png")
    return ", ".join(str(folder / name) for name in ("eval.json", "answers.json", "eval.png"))
