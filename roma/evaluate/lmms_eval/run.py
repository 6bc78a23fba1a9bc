"""`roma bench-vlm`: one model on benchmarks of lmms-eval, on clean and degraded images.

    tasks ─► texts.jsonl: answers as generated, a batch at a time; one load of the model for all
          ─► answers.jsonl: scored, by the task's rules, ours, or a judge for what they call wrong
          ─► bench.json, bench.md, bench.html, figures

Both halves go on where they were cut. A run that was killed writes the same bench.json as one that
was not: batches are the same, and no file holds a time.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from roma.evaluate.conditions import Cell
from roma.evaluate.folders import load_results, model_name
from roma.evaluate.lmms_eval.asked import Asked
from roma.evaluate.lmms_eval.benchmark import Benchmark
from roma.evaluate.lmms_eval.judge import ModelJudge, is_there
from roma.evaluate.lmms_eval.rules import Rules
from roma.evaluate.lmms_eval.scoring import scores
from roma.evaluate.lmms_eval.suite import load_benchmarks, require_lmms_eval
from roma.evaluate.record import ANSWERS, SETTINGS, Record, Row
from roma.evaluate.summary import summarise_suite
from roma.evaluate.tables import suite_table

TEXTS, VERDICTS, BENCH = "texts.jsonl", "verdicts.jsonl", "bench.json"
_TOGETHER = 256  # answers scored, and recorded, at a time

Score = Callable[[Benchmark, Sequence[int], Sequence[str]], list[float | None]]
"""Of answers to questions of a benchmark: each 0..1, 1 for a right one; None: cannot be told."""


def run_bench(
    asked: Asked,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures, prints a table, and keeps all of it in a folder; the same call again goes on.

    Args:
        asked: what is measured, and how.
        out: the folder; None: runs/bench/MODEL.
        overwrite: begin anew, also where `out` holds the answers to something else.
        console: where to print.

    Returns:
        What bench.json holds: the settings, "notes", "judged" and `summarise_suite`'s keys.

    Raises:
        ValueError: what `load_benchmarks` and `check_model` refuse, or a folder that was begun with
            other settings.
        ConnectionError: the judge does not answer; what is scored is kept.
        ImportError: lmms-eval is not installed.
    """
    require_lmms_eval()
    console = console or Console()
    folder = Path(out) if out else Path("runs", "bench", model_name(asked.model))
    benchmarks = load_benchmarks(
        asked.names,
        include_path=asked.include_path,
        metrics=asked.metrics,
        max_tokens=asked.max_tokens,
        limit=asked.limit,
        own_rules=asked.judge != "rules",
    )
    settings = asked.settings(benchmarks)
    if overwrite or not (folder / SETTINGS).exists():  # before anything is written or removed
        _check_model(asked)
    if overwrite:
        _remove_results(folder, benchmarks)
    verdicts = Record(folder, settings, file=VERDICTS)
    notes = _notes(asked, benchmarks)
    count = f"{len(notes)} note{'s' * (len(notes) != 1)}"
    console.print(f"{count}: {folder / 'bench.md'}", highlight=False, soft_wrap=True)
    if asked.server and not is_there(asked.server):
        said = "note: nobody listens at the judge's address now; answers are generated first"
        console.print(said, highlight=False)
    texts = {each.name: Record(folder / each.name, settings, file=TEXTS) for each in benchmarks}
    _generate(asked, benchmarks, texts, console)
    answers = {each.name: Record(folder / each.name, settings) for each in benchmarks}
    with _scorer(asked, verdicts, answers) as score:
        _score(benchmarks, texts, answers, score, console)
    judged = {"unjudged": sum(len(_unscored(each)) for each in answers.values())}
    if asked.server:
        judged |= {"asked": len(verdicts)}
    return _write(folder, settings, [*notes, *_unjudged(judged)], judged, console)


def _generate(
    asked: Asked, benchmarks: Sequence[Benchmark], texts: dict[str, Record], console: Console
) -> None:
    """Answers what is missing; the model is loaded if anything is."""
    total = sum(each.size for each in benchmarks) * len(asked.cells)
    present = sum(map(len, texts.values()))
    if present:
        console.print(f"{present} of {total} answers were there already", highlight=False)
    if present == total:
        return
    model = _load_model(asked, benchmarks)
    with _bar(console) as bar:
        shown = bar.add_task("answering", total=total, completed=present)
        for benchmark in benchmarks:
            record = texts[benchmark.name]
            for cell in asked.cells:
                for batch in _open_batches(benchmark, cell, record, asked.batch):
                    rows = _answer(model, benchmark, cell, batch, texts[benchmark.name].folder)
                    new = [row for row in rows if not record.has(cell, row.id)]
                    record.add(new)
                    bar.advance(shown, len(new))
    model.clean()  # a judge on the same GPU may want its memory


def _open_batches(benchmark: Benchmark, cell: Cell, record: Record, size: int) -> Iterator[range]:
    """The batches that are missing, or there in part: the same whatever is there."""
    for start in range(0, benchmark.size, size):
        batch = range(start, min(start + size, benchmark.size))
        if not all(record.has(cell, benchmark.id(index)) for index in batch):
            yield batch


def _load_model(asked: Asked, benchmarks: Sequence[Benchmark]) -> Any:
    from roma.evaluate.lmms_eval.model import RomaModel

    model = RomaModel(
        pretrained=str(asked.model),
        engine=asked.engine,
        base=asked.base,
        seed=asked.seed,
        level_table=Path(asked.level_table) if asked.level_table else None,
        **_model_options(asked),
    )
    for benchmark in benchmarks:
        model.task_dict[benchmark.name] = benchmark.task.dataset
    return model


def _model_options(asked: Asked) -> dict[str, Any]:
    """Those of lmms-eval's own model, and how an image is resized."""
    from lmms_eval.utils import handle_arg_string

    options = {name: handle_arg_string(value) for name, value in asked.model_args.items()}
    if asked.device is not None:
        options["device"] = asked.device
    if asked.engine == "vllm":  # lmms-eval takes the larger of this and the request's
        options["max_new_tokens"] = asked.max_tokens
    return options | {"batch_size": asked.batch}


def _check_model(asked: Asked) -> None:
    from roma.evaluate.lmms_eval.model import check_model

    check_model(asked.model, asked.engine, asked.base, _model_options(asked))


def _remove_results(folder: Path, benchmarks: Sequence[Benchmark]) -> None:
    """What an earlier run left: bench.json first, which says that it is finished."""
    written = [folder / f"bench.{kind}" for kind in ("json", "md", "html")]
    written += [*folder.glob("bench-*.png"), folder / VERDICTS]
    written += [folder / b.name / name for b in benchmarks for name in (TEXTS, ANSWERS, SETTINGS)]
    for path in (*written, folder / SETTINGS):
        path.unlink(missing_ok=True)


def _answer(
    model: Any, benchmark: Benchmark, cell: Cell, batch: Sequence[int], folder: Path
) -> list[Row]:
    """A batch at a cell. What lmms-eval prints meanwhile, bars above all, goes to a file."""
    from lmms_eval.api.instance import unwrap_generation_output

    model.cell = cell
    with (folder / "lmms-eval.log").open("a", encoding="utf-8") as log:
        with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            made = model.generate_until([benchmark.instance(index) for index in batch])
    replies = [str(unwrap_generation_output(each)[0]) for each in made]
    return [
        Row(benchmark.id(index), cell, (text,)) for index, text in zip(batch, replies, strict=True)
    ]


def _score(
    benchmarks: Sequence[Benchmark],
    texts: dict[str, Record],
    answers: dict[str, Record],
    score: Score,
    console: Console,
) -> None:
    """Scores what is missing or was left unjudged, in the order in which it was answered."""
    again = {name: _unscored(record) for name, record in answers.items()}
    with _bar(console) as bar:
        total = sum(map(len, texts.values()))
        completed = sum(map(len, answers.values())) - sum(map(len, again.values()))
        shown = bar.add_task("scoring", total=total, completed=completed)
        for benchmark in benchmarks:
            record, open_ones = answers[benchmark.name], again[benchmark.name]
            numbers = {benchmark.id(index): index for index in range(benchmark.size)}
            for rows in _chunks(texts[benchmark.name].rows()):
                new = [
                    row
                    for row in rows
                    if not record.has(row.cell, row.id) or (row.cell, row.id) in open_ones
                ]
                if not new:
                    continue
                found = score(benchmark, [numbers[r.id] for r in new], [r.texts[0] for r in new])
                made = [_scored(row, one) for row, one in zip(new, found, strict=True)]
                # The newest row of an answer counts; one that is unjudged again is there.
                record.add([r for r in made if not r.unscored or (r.cell, r.id) not in open_ones])
                bar.advance(shown, len(new))


def _unscored(record: Record) -> set[tuple[Cell, str]]:
    """The answers that no verdict was found for."""
    found: set[tuple[Cell, str]] = set()
    for row in record.rows() if record.unscored else ():
        (found.add if row.unscored else found.discard)((row.cell, row.id))
    return found


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows of one cell, some at a time."""
    for _, same in groupby(enumerate(rows), lambda pair: (pair[1].cell, pair[0] // _TOGETHER)):
        yield [row for _, row in same]


def _scored(row: Row, right: float | None) -> Row:
    """An answer that could not be judged counts as wrong, and is counted."""
    share = right or 0.0
    whole = int(share) if share in (0.0, 1.0) else share
    return Row(row.id, row.cell, row.texts, (whole,), unscored=int(right is None))


@contextlib.contextmanager
def _scorer(asked: Asked, verdicts: Record, answers: dict[str, Record]) -> Iterator[Score]:
    """What says which answers are right."""
    if asked.judge == "rules":
        rules = Rules()

        def by_rules(
            benchmark: Benchmark, at: Sequence[int], texts: Sequence[str]
        ) -> list[float | None]:
            every = [benchmark.answered(*pair) for pair in zip(at, texts, strict=True)]
            return list(rules.right(every, benchmark.tolerance))

        try:
            yield by_rules
        finally:
            rules.close()
        return
    if asked.server is None:
        yield lambda benchmark, at, texts: list(scores(benchmark, at, texts))
        return
    judge = ModelJudge(asked.server, verdicts)

    def by_model(
        benchmark: Benchmark, at: Sequence[int], texts: Sequence[str]
    ) -> list[float | None]:
        own: list[float | None] = list(scores(benchmark, at, texts))
        wrong = [turn for turn, share in enumerate(own) if (share or 0.0) < 0.5]
        every = [benchmark.answered(at[turn], texts[turn]) for turn in wrong]
        said = judge.right(every, scored=sum(map(len, answers.values())))
        for turn, right in zip(wrong, said, strict=True):
            own[turn] = 1.0 if right else None if right is None else own[turn]
        return own

    yield by_model


def _notes(asked: Asked, benchmarks: Sequence[Benchmark]) -> list[str]:
    """What was overridden, and what to know; the same in every run."""
    shared: dict[str, list[str]] = {}
    for benchmark in benchmarks:
        own = benchmark.notes + (benchmark.of_its_rules if asked.judge != "rules" else [])
        for note in own:
            shared.setdefault(note, []).append(benchmark.name)
    notes = []
    for note, names in shared.items():
        every = len(names) == len(benchmarks) > 1
        notes.append(f"{'every benchmark' if every else ', '.join(names)}: {note}")
    if asked.judge == "rules":
        notes.append("right is what this package's rules say, not the tasks' own")
    else:
        notes.append("an answer that a task would read by a random guess is wrong")
        notes.append("tasks ask no judge of their own")
    if "resize" not in asked.model_args:
        theirs = "images are degraded at the size at which tasks hand them over"
        notes.append(f"{theirs}; --model-args resize=model degrades them at the model's")
    if asked.limit is not None:
        notes.append(f"only the first {asked.limit} questions of each benchmark")
    return notes


def _unjudged(judged: dict[str, int]) -> list[str]:
    count = judged["unjudged"]
    return [f"{count} answers could not be judged and count as wrong"] if count else []


def _write(
    folder: Path,
    settings: dict[str, Any],
    notes: Sequence[str],
    judged: dict[str, int],
    console: Console,
) -> dict[str, Any]:
    """Writes the files, bench.json last: it says that the run is finished."""
    from roma.evaluate.report.write import write_report

    results = load_results(folder, finished=False)
    asked = {name: value for name, value in settings.items() if name != "cells"}
    asked["tasks"] = asked.pop("benchmarks")  # the name is the results'
    found = asked | {"notes": list(notes), "judged": judged}
    found |= summarise_suite(results.benchmarks)
    written = write_report(folder, [results], stem="bench", notes=notes)
    unfinished = folder / f"{BENCH}.new"
    text = json.dumps(found, indent=1, ensure_ascii=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(folder / BENCH)  # all of it or nothing
    console.print(suite_table(found))
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    paths = ", ".join(map(str, [folder / BENCH, *written]))
    console.print(f"wrote {paths}", highlight=False, soft_wrap=True)
    return found


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
