"""Which answers a task's own rules call right, without what makes two runs differ.

A task's filters and `process_results` run as lmms-eval runs them, but for four things, each of them
only while they run:

* No guessing. Where a task would draw an option at random for an answer that it cannot read
  (VisualPuzzles, MMMU and others, unseeded), the answer is wrong.
* No judge. Tasks that ask a model behind the user's back (USE_LLM_JUDGE) do not.
* No network. A task whose rules call a server is refused by name.
* No printing. What a task prints of each answer is dropped.
"""

import contextlib
import io
import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from roma.evaluate.lmms_eval.benchmark import Benchmark
from roma_kernels.errors import fail


class _Guessed(BaseException):
    """A task drew an answer at random. No `Exception`, which tasks swallow."""


class _Called(BaseException):
    """A task's rules called a server; where."""


def scores(benchmark: Benchmark, at: Sequence[int], texts: Sequence[str]) -> list[float]:
    """Of each answer what the task's own rules say, 0..1: the value of its metric.

    Args:
        benchmark: the task, its metric chosen.
        at: numbers of the questions.
        texts: an answer to each.

    Raises:
        ValueError: the rules call a server, or the metric is no number in 0..1.
    """
    found = []
    for index, metrics in zip(at, metrics_of(benchmark, at, texts), strict=True):
        value = None if metrics is None else as_share(metrics.get(benchmark.metric))
        if metrics is not None and value is None:
            got = f"{metrics.get(benchmark.metric)!r:.60} for question {index}"
            remedy = "choose another with --metric, or take --judge rules"
            fail(f"metric {benchmark.metric} of {benchmark.name}", "a number in 0..1", got, remedy)
        found.append(value or 0.0)
    return found


def metrics_of(
    benchmark: Benchmark, at: Sequence[int], texts: Sequence[str]
) -> list[Mapping[str, Any] | None]:
    """What `process_results` says of each answer; None where it would have guessed."""
    task = benchmark.task
    instances = [benchmark.instance(index) for index in at]
    for instance, text in zip(instances, texts, strict=True):
        instance.resps = [text]
    found: list[Mapping[str, Any] | None] = []
    with _overridden(benchmark.name):
        name = _filter(task, instances)
        for index, instance in zip(at, instances, strict=True):
            filtered = _without_reasoning(task, instance.filtered_resps[name])
            try:
                found.append(task.process_results(benchmark.doc(index), [filtered]))
            except _Guessed:
                found.append(None)
    return found


def as_share(value: Any) -> float | None:
    """A metric's value of one answer, 0..1; of a mapping its "score"; None where it is neither."""
    if isinstance(value, Mapping):
        value = value.get("score")
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    return None


def _filter(task: Any, instances: Sequence[Any]) -> str:
    """Applies the task's first chain of filters, and returns its name."""
    from lmms_eval.filters import FilterEnsemble
    from lmms_eval.filters.transformation import StripThinkingFilter

    own = task._filters[0]
    # As lmms-eval's evaluator does, where a task asks for it and names no tags of its own.
    strips = getattr(task.config, "auto_strip_thinking", False) and not _tags(task)
    chain = FilterEnsemble(own.name, [*([StripThinkingFilter()] if strips else []), *own.filters])
    chain.apply(instances, task.task_docs)
    return str(own.name)


def _tags(task: Any) -> Any:
    """The tags of reasoning that a task names; None: none."""
    from lmms_eval.api.reasoning import parse_reasoning_tags_config

    return parse_reasoning_tags_config(task_value=getattr(task.config, "reasoning_tags", None))


def _without_reasoning(task: Any, text: Any) -> Any:
    """As lmms-eval's evaluator does for a task that names tags of reasoning."""
    from lmms_eval.api.reasoning import strip_reasoning_tags

    tags = _tags(task)
    return strip_reasoning_tags(text, tags) if tags and isinstance(text, str) else text


@contextlib.contextmanager
def _overridden(name: str) -> Iterator[None]:
    """Nothing drawn, asked or printed while it holds; then all is as it was."""
    from lmms_eval.tasks._task_utils import reasoning_utils

    def guessed(*_: Any, **__: Any) -> NoReturn:
        raise _Guessed

    def called(*arguments: Any, **__: Any) -> NoReturn:
        raise _Called(repr(arguments[0])[:60])

    # A hidden server's name is looked up first; tasks would retry for minutes, then say 0.
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(random, "choice", guessed))
        stack.enter_context(_replaced(socket, "getaddrinfo", called))
        stack.enter_context(_replaced(reasoning_utils, "USE_LLM_JUDGE", "False"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            yield
        except _Called as error:
            got = f"a call to {error}"
            fail(f"task {name}", "rules that ask no server", got, "take --judge rules")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
