"""`roma bench-vlm --judge`: rules, and a model behind an address that fails on the way."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.chat_server import Answer, says, server

from roma.evaluate.conditions import Cell
from roma.evaluate.lmms_eval.asked import Asked
from roma.evaluate.lmms_eval.run import run_bench
from roma.evaluate.record import read_rows

TASKS = ["mmstar_reasoning", "chartqa_reasoning", "VisualPuzzles_cot"]


class Says:
    """A model that answers by a table, in place of a real one."""

    def __init__(self, answers: Callable[[str, int, Cell], str]) -> None:
        self.answers, self.task_dict, self.cell, self.asked = answers, {}, Cell(), 0

    def generate_until(self, requests: Any) -> list[str]:
        self.asked += len(requests)
        return [self.answers(each.task_name, each.doc_id, self.cell) for each in requests]

    def clean(self) -> None:
        pass


@pytest.fixture
def asked(suite: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Two questions of three benchmarks, clean and at four corruptions: 30 answers.

    A model that says the truth in a form that the tasks' own rules do not read, and at level 3 of
    JPEG something wrong.
    """
    from roma.evaluate.lmms_eval import model, run

    truths = {}
    loaded = run.load_benchmarks(TASKS, include_path=suite / "tasks", limit=2)
    for benchmark in loaded:
        for index in range(benchmark.size):
            found = benchmark.answered(index, "")
            truths[benchmark.name, index] = found.truths[0]

    def answers(task: str, index: int, cell: Cell) -> str:
        if cell.corruption == "jpeg":
            return "<think> so </think> I see nothing"
        return f"<think> so </think> I pick option {{{truths[task, index]}}} here"

    monkeypatch.setattr(model, "RomaModel", lambda **_: Says(answers))
    return Asked(
        suite / "model",
        tasks=TASKS,
        include_path=suite / "tasks",
        pools=["clean", "seen"],
        levels=[3],
        limit=2,
        batch_size=2,
        max_tokens=8,
    )


def run(asked: Asked, out: Path) -> tuple[dict[str, Any], str]:
    said = io.StringIO()
    return run_bench(asked, out, console=Console(file=said, width=200)), said.getvalue()


def right(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """As the questions are made: what names an option is right."""
    said = "yes" if "I pick option" in body["messages"][0]["content"] else "no"
    says(f"VERDICT: {said}")(handler, body)


def with_judge(asked: Asked, url: str, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Without its pauses."""
    from roma.evaluate.lmms_eval import asked as module
    from roma.rewards.chat import ChatServer

    made = ChatServer(url, "m", "NO_KEY", retries=1, pause_s=0.01)
    monkeypatch.setattr(module, "judge_server", lambda *_: made)
    return replace(asked, judge=url, judge_model="m")


def accuracies(found: dict[str, Any]) -> dict[str, float]:
    return {name: part["pools"]["clean"]["mean"] for name, part in found["benchmarks"].items()}


def test_the_judge_is_asked_where_the_rules_fail(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = run(asked, tmp_path / "none")
    assert accuracies(plain)["chartqa_reasoning"] == 0  # misread
    with server(right) as (url, seen):
        judged, _ = run(with_judge(asked, url, monkeypatch), tmp_path / "model")
    assert accuracies(judged) == dict.fromkeys(TASKS, 100.0)
    assert judged["average"]["pools"]["seen"]["L3"]["mean"] == 75  # of four corruptions, JPEG
    wrong_by_rules = {
        (row.id, row.texts[0])
        for name in TASKS
        for row in read_rows(tmp_path / "none" / name / "answers.jsonl")
        if row.correct == [0]
    }
    assert len(seen) == len(wrong_by_rules) == judged["judged"]["asked"] > 6
    assert judged["judged"]["unjudged"] == 0


def test_a_judge_that_dies_and_moves(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored to the end it is what one that never failed says; nothing is asked twice."""
    with server(right) as (url, every):
        whole, _ = run(with_judge(asked, url, monkeypatch), tmp_path / "whole" / "run")
    out = tmp_path / "cut" / "run"
    dying: list[Answer] = [right] * 5
    with server(*dying, says("", 503)) as (url, _):
        with pytest.raises(ConnectionError, match=r"answered 503 .*5 verdicts are safe in .*run$"):
            run(with_judge(asked, url, monkeypatch), out)
    assert not (out / "bench.json").exists()
    kept = sum(len(list(read_rows(out / name / "answers.jsonl"))) for name in TASKS)
    with server(right) as (url, rest):
        found, said = run(with_judge(asked, url, monkeypatch), out)
    assert "30 of 30 answers were there already" in said
    assert len(rest) == len(every) - 5 and 0 <= kept < 30
    assert found == whole
    for name in ("bench.json", "bench.md", *(f"{task}/answers.jsonl" for task in TASKS)):
        assert (out / name).read_bytes() == (tmp_path / "whole" / "run" / name).read_bytes()


def vague(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Gives no verdict on JPEG at level 3."""
    blind = "I see nothing" in body["messages"][0]["content"]
    (says("Who knows") if blind else right)(handler, body)


@pytest.mark.parametrize("cuts", [(4,), (9, 2, 13)])
def test_cut_with_some_unjudged_it_writes_the_same(
    cuts: tuple[int, ...], asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(vague) as (url, _):
        run(with_judge(asked, url, monkeypatch), tmp_path / "whole" / "run")
    for cut in cuts:
        dying: list[Answer] = [vague] * cut
        with server(*dying, says("", 503)) as (url, _):
            with pytest.raises(ConnectionError, match="answered 503"):
                run(with_judge(asked, url, monkeypatch), tmp_path / "cut" / "run")
    with server(vague) as (url, _):
        found, _ = run(with_judge(asked, url, monkeypatch), tmp_path / "cut" / "run")
    assert found["judged"]["unjudged"] == 6
    for name in ("bench.json", "bench.md", *(f"{task}/answers.jsonl" for task in TASKS)):
        cut_, whole = ((tmp_path / each / "run" / name).read_bytes() for each in ("cut", "whole"))
        assert cut_ == whole, name


def test_what_is_not_judged_is_counted(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(vague) as (url, _):
        found, said = run(with_judge(asked, url, monkeypatch), tmp_path)
    assert found["judged"]["unjudged"] == 6  # JPEG, two questions of three benchmarks
    note = "6 answers could not be judged and count as wrong"
    assert note in found["notes"] and note in said.partition("Accuracy")[2]
    assert accuracies(found) == dict.fromkeys(TASKS, 100.0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with server(vague) as (url, seen):
        run(with_judge(asked, url, monkeypatch), tmp_path)
    assert seen and before == {path: path.read_bytes() for path in before}
    with server(says("Welcome")) as (url, _):
        with pytest.raises(
            ConnectionError, match=r"got no verdict, .*all texts, 30 scored answers"
        ):
            run(with_judge(asked, url, monkeypatch), tmp_path)
    assert before == {path: path.read_bytes() for path in before}
    with server(right) as (url, seen):
        found, said = run(with_judge(asked, url, monkeypatch), tmp_path)
        whole, _ = run(with_judge(asked, url, monkeypatch), tmp_path / "whole" / tmp_path.name)
    assert found == whole and found["judged"]["unjudged"] == 0 and "30/30" in said


def test_begun_anew(asked: Asked, tmp_path: Path) -> None:
    """With other settings, which a folder is refused for otherwise; a neighbour's rows stay."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "answers.jsonl").write_text("a neighbour's\n")
    run(asked, tmp_path)
    other = replace(asked, max_tokens=9)
    with pytest.raises(ValueError, match=r"^out: "):
        run(other, tmp_path)
    found = run_bench(other, tmp_path, overwrite=True, console=Console(file=io.StringIO()))
    assert found["max_tokens"] == 9
    rows = [*read_rows(tmp_path / TASKS[0] / "answers.jsonl")]
    assert len(rows) == 10 and (tmp_path / "other" / "answers.jsonl").exists()


def test_our_rules_ask_nobody(asked: Asked, tmp_path: Path) -> None:
    found, said = run(replace(asked, judge="rules"), tmp_path)
    assert "right is what this package's rules say" in said
    assert found["judge"] == {"by": "rules"} and found["judged"] == {"unjudged": 0}
    texts = json.loads((tmp_path / "settings.json").read_text())
    assert texts["judge"] == {"by": "rules"}
