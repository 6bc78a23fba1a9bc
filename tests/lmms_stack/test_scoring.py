"""Scoring by tasks' own rules: what is overridden, and what is left as it is."""

import random
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lmms_eval.tasks._task_utils import reasoning_utils

from roma.evaluate.lmms_eval.benchmark import PAPER, Benchmark
from roma.evaluate.lmms_eval.scoring import as_share, scores
from roma.evaluate.lmms_eval.suite import load_benchmarks

SAID = (
    "<think> so </think> <answer>B</answer> Answer: B",
    r"\boxed{2}",
    "It is hard to say",
    "",
    "<answer>" + "very long " * 200,
)


@pytest.fixture(scope="module")
def benchmarks(suite: Path) -> dict[str, Benchmark]:
    loaded = load_benchmarks(list(PAPER), include_path=suite / "tasks", max_tokens=8)
    return {each.name: each for each in loaded}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse, raising=False)
    yield


def test_the_seven_ask_nobody_and_say_what_lmms_eval_says(
    benchmarks: dict[str, Benchmark], no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six questions of each, five ways to answer; beside `process_results` called by hand."""
    for name, benchmark in benchmarks.items():
        for text in SAID:
            found = scores(benchmark, range(6), [text] * 6)
            assert set(found) <= {0.0, 1.0}
            if name == "VisualPuzzles_cot":
                continue
            own = [benchmark.task.process_results(benchmark.doc(i), [text]) for i in range(6)]
            assert found == [metrics[PAPER[name]] for metrics in own]
    assert 0 < sum(scores(benchmarks["mmstar_reasoning"], range(6), [SAID[0]] * 6)) < 6


def test_what_cannot_be_read_is_wrong_and_not_guessed(benchmarks: dict[str, Benchmark]) -> None:
    puzzles = benchmarks["VisualPuzzles_cot"]
    own = puzzles.task.process_results
    random.seed(3)
    guesses = [own(puzzles.doc(0), ["Hard to say"])["exact_match"] for _ in range(64)]
    assert 0 < sum(guesses) < 64  # the trap: it guesses, and is right now and then
    state, choice = random.getstate(), random.choice
    assert scores(puzzles, [0] * 64, ["Hard to say"] * 64) == [0.0] * 64
    assert random.getstate() == state and random.choice is choice
    letter = puzzles.answered(0, "").truths[0]
    assert scores(puzzles, [0], [f"So.\nAnswer: {letter}"]) == [1.0]


def test_the_hidden_judge_is_off(
    benchmarks: dict[str, Benchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(reasoning_utils, "USE_LLM_JUDGE", "True")
    monkeypatch.setattr(reasoning_utils, "llm_as_judge_sync", lambda *_: asked.append("judge") or 1)
    star = benchmarks["mmstar_reasoning"]
    assert scores(star, [0], ["Hard to say"]) == [0.0] and not asked
    assert reasoning_utils.USE_LLM_JUDGE == "True"  # as the user had it
    assert star.task.process_results(star.doc(0), ["Hard to say"])["acc_score"] == 1 and asked


def test_nothing_is_printed(
    benchmarks: dict[str, Benchmark], capsys: pytest.CaptureFixture[str]
) -> None:
    puzzles = benchmarks["VisualPuzzles_cot"]
    scores(puzzles, [0], ["Answer: A"])
    assert capsys.readouterr().out == ""
    puzzles.task.process_results(puzzles.doc(0), ["Answer: A"])
    assert "results: " in capsys.readouterr().out  # the trap


def made_up(process_results: Callable[..., Any], own: Benchmark) -> Benchmark:
    """A benchmark with other rules."""
    task = SimpleNamespace(
        config=SimpleNamespace(reasoning_tags=None),
        _filters=own.task._filters,
        task_docs=own.task.task_docs,
        instances=own.task.instances,
        eval_docs_no_media=own.task.eval_docs_no_media,
        process_results=process_results,
    )
    return Benchmark("made_up", task, own.size, "score")


def test_rules_that_call_a_server_are_refused(benchmarks: dict[str, Benchmark]) -> None:
    """Though they swallow every error, as such rules do, and then say 0."""

    def calls(doc: Any, results: Any) -> dict[str, float]:
        try:
            urllib.request.urlopen("http://judge.invalid/v1", timeout=1)
        except Exception:  # as theirs do
            return {"score": 0.0}
        return {"score": 1.0}

    own, before = benchmarks["mmstar_reasoning"], socket.getaddrinfo
    said = r"^task made_up: expected rules that ask no server, got a call to 'judge.invalid'; take"
    with pytest.raises(ValueError, match=said):
        scores(made_up(calls, own), [0], ["A"])
    assert socket.getaddrinfo is before


@pytest.mark.parametrize("value", ["right", None, {"id": 3}, 1.5, -1])
def test_a_metric_that_is_no_share_is_refused(value: Any, benchmarks: dict[str, Benchmark]) -> None:
    rules = made_up(lambda doc, results: {"score": value}, benchmarks["mmstar_reasoning"])
    with pytest.raises(ValueError, match=r"^metric score of made_up: expected a number in 0"):
        scores(rules, [2], ["A"])


def test_a_share_is_kept() -> None:
    assert [as_share(x) for x in (0, 1, True, 0.25, {"score": 0.5})] == [0, 1, 1, 0.25, 0.5]


def test_reasoning_is_dropped_where_the_task_says_so(benchmarks: dict[str, Benchmark]) -> None:
    seen: list[str] = []
    own = benchmarks["mmstar_reasoning"]
    rules = made_up(lambda doc, results: {"score": 1 + bool(seen.append(results[0]))}, own)
    said = "<think> no </think>B"
    scores(rules, [0], [said])
    rules.task.config.reasoning_tags = [["<think>", "</think>"]]
    scores(rules, [0], [said])
    rules.task.config.reasoning_tags = None
    rules.task.config.auto_strip_thinking = True
    scores(rules, [0], [said])
    assert [text.strip() for text in seen] == [said, "B", "B"]


def test_what_the_tasks_own_rules_get_wrong() -> None:
    """The traps that the notes speak of, in this version of lmms-eval."""

    def said(answer: str, truth: str) -> int:
        text = f"<answer>{answer}</answer>"
        return int(reasoning_utils.compute_score("x", text, truth)["acc_score"])

    assert said("Grey", "Green") == said("Boston", "Berlin") == 1
    assert said("Yes", "yes") == said("A", "a") == 0  # RealWorldQA lowers the truth
