"""Accuracy on clean and degraded images: answers, correctness per image, `roma eval`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from roma.data import load_dataset_rows
from roma.data.example import Example
from roma.evaluate import fingerprint
from roma.evaluate.answers import (
    Answer,
    Answerer,
    correct_answers,
    policy_answerer,
    several_answerer,
)
from roma.evaluate.conditions import Cell, DegradedImages, Image
from roma.evaluate.folders import data_name, model_name, split_of
from roma.evaluate.options import Options, Reward
from roma.evaluate.record import ANSWERS, Record, read_result
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.stream import Unit, answer_all, unit_of
from roma.evaluate.summary import summarise
from roma.evaluate.tables import summary_table
from roma.rewards import MarkedReward, RewardFunction, compute_score
from roma.train.config.views import AttackConfig
from roma_kernels.errors import fail

if TYPE_CHECKING:  # importing it takes seconds, and `roma eval --help` needs none of it
    from roma.models.qwen_vl import Policy
    from roma.rollout.vllm import VllmSampler

__all__ = ["Answer", "Answerer", "evaluate", "policy_answerer", "run_eval"]

_WRITTEN = ("eval.json", "eval.md", "eval.png")


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
    overwrite: bool = False,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 1024,
    answers: int = 1,
    temperature: float | None = None,
    level_table: str | Path | None = None,
    score: str | MarkedReward = "builtin",
    seed: int = 0,
    device: str | None = None,
    engine: Literal["hf", "vllm"] = "hf",
    format_prompt: str | Path | None = None,
    skip_broken: bool = False,
    attack_steps: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """`roma eval`: measures one model, prints a table, and keeps all of it in a folder.

    The folder gets settings.json and answers.jsonl, a batch at a time, and at the end eval.json,
    eval.md and eval.png. The same call again goes on where it was cut; its files are then those of
    a run that was not, byte for byte. Memory does not grow with the number of questions.

    Args:
        model: a Hugging Face folder of a vision-language model.
        data: a dataset in the loader's form, `folder@split` for a split.
        pools: see `cells_of`; "adversarial" is `evaluate_attacked`'s, each ε a level.
        levels: see `cells_of`.
        out: the folder for the files; None: runs/eval/MODEL-DATA.
        overwrite: begin anew, also where `out` holds the answers to something else.
        limit: only the first `limit` examples; None: all.
        batch_size: examples answered at once; None: 16, with vLLM 256.
        max_new_tokens: budget of an answer, tokens.
        answers: k, answers to a question. Accuracy is their mean; more than one also give pass
            (any is right) and majority (the most frequent one is).
        temperature: > 0, of sampled answers; None: greedy for one answer, 1 for several.
        level_table: YAML with other levels, for small images; None: the customary ones.
        score: the reward whose "accuracy" counts: "builtin", "exact", "math", "file.py:function",
            or a function.
        seed: of the noise, and of sampling.
        device: "cpu", "cuda", …; None: the GPU in bf16 if there is one, else the CPU in fp32.
        engine: "hf", transformers' generate, or "vllm", which wants a large `batch_size` and takes
            the device that it was built for.
        format_prompt: file of a Jinja template of the prompt, in which `content` is the question,
            as in training; None: the question alone.
        skip_broken: decode every image before the first answer, and leave broken rows out.
        attack_steps: of pool "adversarial"; None: 3.
        console: where to print.

    Returns:
        What eval.json holds: `summarise`'s keys, and how they came about.

    Raises:
        ValueError: an unknown pool, level, engine or reward, a limit, batch size, budget or number
            of answers or attack steps below 1, a temperature that is not above 0, attack steps
            without an attack, vLLM or several answers with one, a device that is not here or
            beside vLLM, no model's folder, a bad dataset, or a folder with other settings or of
            another run.
        ImportError: vLLM is not installed.
        FileNotFoundError: there is no such level table.
        FileExistsError: `out` is a file.
    """
    options = Options(
        model,
        data,
        pools=pools,
        levels=levels,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        answers=answers,
        temperature=temperature,
        level_table=level_table,
        format_prompt=format_prompt,
        seed=seed,
        device=device,
        engine=engine,
        attack_steps=attack_steps,
    )
    folder = Path(out) if out else Path("runs", "eval", _name(model, data))
    if folder.exists() and not folder.is_dir():
        fail("out", "a folder", f"the file {folder}", "name another", error=FileExistsError)
    reward = Reward.of(score)
    rows = load_dataset_rows(data, format_prompt=format_prompt, skip_broken=skip_broken)
    count = min(len(rows), limit or len(rows))
    examples = fingerprint.of_examples(rows[i] for i in range(count))
    settings = options.settings(questions=count, examples=examples, reward=reward)
    settings |= {"skip_broken": True} if skip_broken else {}  # of use to whoever reads the data
    if overwrite:
        _remove_results(folder)
    record = Record(folder, settings, overwrite=overwrite)
    console = console or Console()
    for _, why in rows.skipped:
        console.print(f"left out: {why}", markup=False, highlight=False, soft_wrap=True)
    total = count * options.recorded
    if len(record):
        console.print(f"{len(record)} of {total} answers were there already", highlight=False)
    if len(record) < total:
        _answer(record, rows, count, options, reward, console)
    if record.unscored:
        said = f"{record.unscored} answers could not be scored; they count as wrong"
        console.print(said, highlight=False)
    found = read_result(record.path)
    result = EvalResult(found.ids, {cell: found.cells[cell] for cell in options.cells})
    asked = {name: value for name, value in settings.items() if name != "cells"}
    summary = asked | {"unscored": record.unscored} | summarise(result)
    wrote = _write_results(folder, summary)
    console.print(summary_table(summary))
    console.print(f"wrote {wrote}", highlight=False, soft_wrap=True)  # paths whole, to be copied
    return summary


def _answer(
    record: Record,
    rows: Sequence[Example],
    count: int,
    options: Options,
    reward: Reward,
    console: Console,
) -> None:
    """Loads the model, and answers what the record lacks."""
    policy = _load_policy(options)
    sampler = _vllm_sampler(policy) if options.engine == "vllm" else None

    def images(asked: Sequence[Example]) -> DegradedImages:
        return DegradedImages(
            asked,
            options.plain,
            resize=policy.processor.resize,
            corruptions=options.corruptions,
            seed=options.seed,
            keep=False,
        )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        total = count * options.recorded
        task = bar.add_task("answering", total=total, completed=len(record))
        try:
            answer_all(
                record,
                rows,
                _units(policy, sampler, options),
                count=count,
                images=images,
                batch_size=options.batch,
                score=reward.score,
                progress=lambda added: bar.advance(task, added),
            )
        finally:
            if sampler:
                sampler.close()


def _units(policy: "Policy", sampler: "VllmSampler | None", options: Options) -> list[Unit]:
    """What is answered together: the clean and the attacked images; else each cell by itself."""
    answer = several_answerer(
        policy,
        max_new_tokens=options.max_new_tokens,
        count=options.answers,
        temperature=options.heat,
        sampler=sampler,
    )
    plain = [unit_of(cell, answer, seed=options.seed) for cell in options.plain]
    return [_attack(policy, options), *plain] if options.attacks else plain


def _attack(policy: "Policy", options: Options) -> Unit:
    from roma.evaluate.attack import Attack

    attack = Attack(
        policy,
        options.attacks,
        max_new_tokens=options.max_new_tokens,
        corruptions=options.corruptions,
        options=AttackConfig(steps=options.steps or AttackConfig.steps),
        seed=options.seed,
    )

    def answered(
        examples: Sequence[Example], images: Sequence[Sequence[Image]]
    ) -> dict[Cell, list[list[Answer]]]:
        told = attack(examples, images)
        return {cell: [[answer] for answer in own] for cell, own in told.items()}

    return Unit(attack.cells, Cell(), answered)


def _name(model: str | Path, data: str | Path) -> str:
    """MODEL-DATA, for a folder."""
    path, split = split_of(data)
    place = path.resolve()
    name = place.name if place.is_dir() else place.stem
    return "-".join([model_name(model), name, *filter(None, [split])])


def _load_policy(options: Options) -> "Policy":
    """The model, in fp32 on a CPU and in bf16 elsewhere.

    vLLM has weights of its own: these lay out its prompts, and take as little room as they can.
    """
    import torch

    from roma.models.qwen_vl import Policy

    wide = options.where.type == "cpu" and options.engine == "hf"
    dtype = torch.float32 if wide else torch.bfloat16
    policy = Policy.load(options.model, dtype=dtype, device=options.where)
    policy.eval()
    return policy


def _vllm_sampler(policy: "Policy") -> "VllmSampler":
    """VLLM with the weights of the policy's folder and most of the GPU."""
    from roma.rollout.vllm import VllmSampler
    from roma.train.config.sections import VllmConfig

    return VllmSampler(policy, weights=None, options=VllmConfig(memory=0.85, sleep=False))


def _remove_results(folder: Path) -> None:
    """What `_write_results` wrote; it would not be of the answers to come."""
    for name in _WRITTEN:
        (folder / name).unlink(missing_ok=True)


def _write_results(folder: Path, summary: Mapping[str, Any]) -> str:
    """Writes the three files and says where; the JSON, which says that all is there, last."""
    from roma.evaluate import figures
    from roma.evaluate.report.markdown import markdown

    suite = {folder.name: {"benchmarks": {data_name(summary["data"]): summary}}}
    json_path, text_path, plot_path = (folder / name for name in _WRITTEN)
    figures.save(figures.one_model(summary), plot_path)
    text_path.write_text(markdown(suite, title=folder.name), encoding="utf-8")
    written = json_path.with_suffix(".new")
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    written.write_text(text + "\n", encoding="utf-8")
    written.replace(json_path)
    return ", ".join(str(folder / name) for name in (*_WRITTEN, ANSWERS))
