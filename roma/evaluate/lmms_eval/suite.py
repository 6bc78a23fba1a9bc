"""The benchmarks of `roma bench-vlm`: tasks of lmms-eval, each with the metric that says "right".

Tasks word their own prompts and bring their own data. How long an answer may be, and that decoding
is greedy, is the same for all: as written, a task may allow 16 tokens or 49,152, and sample.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from roma.evaluate.lmms_eval.benchmark import PAPER, Benchmark
from roma.evaluate.lmms_eval.images import require_images
from roma.evaluate.lmms_eval.scoring import as_share, metrics_of
from roma_kernels.errors import fail

SUITES = {"paper": tuple(PAPER)}
INSTALL = "pip install '.[train,views,math,lmms]' in a clone"
_PROBES = 32


def require_lmms_eval() -> str:
    """Its version; its log says warnings alone, unless LOGURU_LEVEL is set.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        remedy = f"in an environment of its own: {INSTALL}"
        fail("roma bench-vlm", "lmms-eval", "that it is not installed", remedy, error=ImportError)
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # read at its first import; else DEBUG
    return importlib.metadata.version("lmms_eval")


def load_benchmarks(
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    metrics: Mapping[str, str] | None = None,
    max_tokens: int = 4096,
    limit: int | None = None,
    own_rules: bool = True,
) -> list[Benchmark]:
    """Loads tasks with their data, and checks that they can be measured.

    Args:
        names: of tasks; a group or a tag stands for its tasks.
        include_path: a folder of task files, which go before lmms-eval's own of the same name.
        metrics: task → metric, where not the paper's or the task's first.
        max_tokens: budget of every answer, tokens.
        limit: only the first questions of each; None: all.
        own_rules: the tasks' rules say what is right; False: they are not run.

    Raises:
        ValueError: an unknown task or metric; rules that call a server; a task without images, with
            video or sound, or whose answers are not generated; data that cannot be had.
    """
    found: dict[str, Any] = {}
    managers = _Managers(include_path)
    for name in dict.fromkeys(names):
        found |= _load(name, managers)
    chosen = dict(metrics or {})
    for name in chosen:
        if name not in found:
            fail("--metric", "a task that is measured", repr(name), f"one of {', '.join(found)}")
    made = [_benchmark(name, task, max_tokens, limit) for name, task in found.items()]
    for benchmark in made if own_rules else ():
        _choose_metric(benchmark, chosen.get(benchmark.name))
    return made


class _Managers:
    """Whom to ask for a task: the user's folder, then lmms-eval, whose index takes seconds."""

    def __init__(self, include_path: str | Path | None) -> None:
        if include_path is not None and not Path(include_path).is_dir():
            fail("--include-path", "a folder of task files", str(include_path), "check the path")
        self._path = include_path

    def of(self, name: str) -> Any:
        """The one that knows the task.

        Raises:
            ValueError: none does; the nearest name is suggested.
        """
        if self._own is not None and name in self._own.all_tasks:
            return self._own
        if name in self._theirs.all_tasks:
            return self._theirs
        known = [*self._theirs.all_tasks, *(self._own.all_tasks if self._own else ())]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        expected = "tasks of lmms-eval or of --include-path"
        fail("--tasks", expected, repr(name), f"did you mean {near!r}?")

    @cached_property
    def _own(self) -> Any:
        from lmms_eval.tasks import TaskManager

        if self._path is None:
            return None
        path = str(self._path)
        return TaskManager(include_path=path, include_defaults=False, model_name="roma")

    @cached_property
    def _theirs(self) -> Any:
        from lmms_eval.tasks import TaskManager

        return TaskManager(model_name="roma")


def _load(name: str, managers: _Managers) -> dict[str, Any]:
    from lmms_eval.tasks import get_task_dict
    from tenacity import RetryError

    manager = managers.of(name)
    try:
        with _quiet(), _with_a_key():
            return dict(_leaves(get_task_dict([name], manager, "chat")))
    except RetryError as error:
        cause = error.last_attempt.exception()
        got = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        fail(f"data of task {name}", "to be had", got, "download it first, or log in to its hub")


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The tasks in a tree of groups."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield str(name), task


def _benchmark(name: str, task: Any, max_tokens: int, limit: int | None) -> Benchmark:
    made = Benchmark(name, task, min(len(task.eval_docs_no_media), limit or 2**62))
    if task.OUTPUT_TYPE != "generate_until":
        remedy = "roma bench-vlm reads written answers"
        fail(f"task {name}", "output_type generate_until", repr(task.OUTPUT_TYPE), remedy)
    require_images(name, (task.doc_to_messages(doc) or [] for doc in made.whole_docs()))
    made.notes += _override(task, max_tokens)
    with _quiet():
        task.build_all_requests(limit=made.size)
    return made


def _override(task: Any, max_tokens: int) -> list[str]:
    """Greedy decoding, one answer, and the budget; returns what the task had asked for."""
    asked = dict(task.config.generation_kwargs or {})
    notes = []
    budget = asked.get("max_new_tokens")
    if budget != max_tokens:
        notes.append(f"answers of up to {max_tokens} tokens; the task asks for {budget}")
    if asked.get("do_sample") or float(asked.get("temperature") or 0) > 0:
        notes.append("greedy decoding; the task samples")
    if task.config.repeats > 1:
        notes.append(f"one answer to a question; the task asks for {task.config.repeats}")
    kept = {"max_new_tokens": max_tokens, "do_sample": False, "temperature": 0.0, "num_beams": 1}
    # No strings that end an answer: by default an empty line would.
    task.set_config("generation_kwargs", kept | {"until": []})
    task.set_config("repeats", 1)
    return notes


def _choose_metric(benchmark: Benchmark, asked: str | None) -> None:
    """Sets the metric: the one asked for, the paper's, or the first that is better when higher.

    It has to be a number in 0..1 for an empty answer to each of some questions, first to last: of
    some tasks a metric is there for a part of the questions alone.
    """
    most = max(benchmark.size - 1, 1)
    probes = sorted({turn * most // _PROBES for turn in range(_PROBES)} | {benchmark.size - 1})
    found = [each for each in metrics_of(benchmark, probes, [""] * len(probes)) if each is not None]
    higher = benchmark.task.higher_is_better()
    first = [str(name) for name, better in higher.items() if better]
    own = asked or PAPER.get(benchmark.name)
    for name in [own] if own else first:
        if all(as_share(metrics.get(name)) is not None for metrics in found):
            benchmark.metric = name
            break
    else:
        got = ", ".join(
            dict.fromkeys([*map(str, higher), *(key for each in found for key in each)])
        )
        remedy = "name one with --metric TASK=NAME, or take --judge rules"
        expected = f"a number in 0..1 for every question as {own or 'a metric, more being better'}"
        fail(f"task {benchmark.name}", expected, f"none among {got}", remedy)
    if not own:
        said = f"right is what its metric {benchmark.metric} says, the first in 0..1"
        benchmark.notes.append(said)
    if len(benchmark.task._filters) > 1:
        benchmark.notes.append(f"scored by its first filter, {benchmark.task._filters[0].name}")


@contextlib.contextmanager
def _with_a_key() -> Iterator[None]:
    """MathVista's file makes a client of a judge when it is imported, which wants a key; any."""
    name = "OPENAI_API_KEY"
    if os.environ.get(name):
        yield
        return
    os.environ[name] = "none"
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Bars and words of loading are dropped."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
