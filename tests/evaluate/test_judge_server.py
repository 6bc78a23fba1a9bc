"""The judge of `roma bench-vlm`, against a stub of its server."""

import json
import time
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from support.chat_server import Answer, says, server

from roma.evaluate.lmms_eval.judge import ModelJudge, is_there, judge_server
from roma.evaluate.lmms_eval.rules import Answered
from roma.evaluate.record import Record
from roma.rewards.chat import ChatServer

SETTINGS = {"judge": {"by": "model", "model": "m"}}


def answered(*responses: str) -> list[Answered]:
    return [Answered("<image> Which city?", ("Rome",), response) for response in responses]


def judge(
    url: str, folder: Path, *, in_flight: int = 16, retries: int = 2, timeout_s: float = 10.0
) -> ModelJudge:
    asked = ChatServer(url, "m", "NO_KEY", timeout_s=timeout_s, retries=retries, pause_s=0.01)
    return ModelJudge(asked, Record(folder, SETTINGS, file="v.jsonl"), in_flight=in_flight)


def by_city(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Right is what names Rome's hills."""
    right = "seven hills" in body["messages"][0]["content"]
    says(f"So.\nVERDICT: {'yes' if right else 'no'}")(handler, body)


def vague_on_cities(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Judges nothing but sums."""
    plain = "city" not in body["messages"][0]["content"]
    says("VERDICT: yes" if plain else "It may be.")(handler, body)


def test_each_answer_is_asked_once_and_kept(tmp_path: Path) -> None:
    every = answered("seven hills", "Oslo", "<think> Rome </think> Oslo", "<think> Rome </think>")
    with server(by_city) as (url, seen):
        first = judge(url, tmp_path)
        assert first.right(every) == [True, False, False, False]
        assert len(seen) == first.asked == 2  # two say "Oslo"; one says nothing
        again = judge(url, tmp_path)
        assert again.right([*every, *answered("Lima")]) == [True, False, False, False, False]
        assert len(seen) == again.asked == 3 and again.unjudged == 0
    text = seen[0][1]["messages"][0]["content"]
    assert "Which city?" in text and "Rome" in text


def test_a_passing_failure_is_tried_again(tmp_path: Path) -> None:
    with server(says("", 500), says("", 429), says("", 503), by_city) as (url, seen):
        assert judge(url, tmp_path, in_flight=1, retries=3).right(answered("seven hills")) == [True]
    assert len(seen) == 4


def test_a_reply_without_a_verdict_is_asked_for_again_then_unjudged(tmp_path: Path) -> None:
    vague = says("It may be.")
    with server(vague, vague, says("VERDICT: yes")) as (url, seen):
        assert judge(url, tmp_path).right(answered("seven hills")) == [True]
    assert "VERDICT" in seen[1][1]["messages"][0]["content"].splitlines()[-1]
    with server(vague_on_cities) as (url, seen):
        found = judge(url, tmp_path)
        assert found.right(answered("Oslo", "Lima")) == [None, None]
        assert (found.asked, found.unjudged, len(seen)) == (3, 2, 7)  # one is the plain question
        assert found.right(answered("Oslo")) == [None] and len(seen) == 7  # once in a run
        lines = (tmp_path / "v.jsonl").read_text()
        assert judge(url, tmp_path).right(answered("Oslo")) == [None]
        assert len(seen) == 11 and (tmp_path / "v.jsonl").read_text() == lines
    with server(by_city) as (url, seen):
        found = judge(url, tmp_path)
        assert found.right(answered("Oslo", "Lima")) == [False, False]
        assert (found.asked, found.unjudged, len(seen)) == (3, 0, 2)
    assert judge(url, tmp_path).unjudged == 0


def page(handler: BaseHTTPRequestHandler, _: dict[str, Any], code: int = 200) -> None:
    """What is no judge's server at all."""
    body = b"<html>\n<p>Welcome</p>"
    handler.send_response(code)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def complains(code: int) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        body = json.dumps({"error": {"message": "model not found\nfor sure"}}).encode()
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (says("It may be."), r"got no verdict, nor on whether 4 is 2 \+ 2: …It may be.; correct"),
        (says(None), r"nor on whether .*another form \(TypeError\); correct the address, or"),
        (complains(400), r"nor on whether .*400 Bad Request \(model not found\); correct"),
        (
            complains(404),
            r"404 Not Found \(model not found\); correct the address or --judge-model",
        ),
        (complains(200), r"another form \(KeyError\) \(model not found\); correct the address"),
        (partial(page, code=501), r"answered 501 .* \(Welcome\); correct the address or --judge-m"),
        (page, r"another form \(JSONDecodeError\) \(Welcome\); correct the address"),
    ],
)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("count", [1, 9])
def test_what_never_gives_a_verdict_is_no_judge(
    answer: Answer, said: str, known: bool, count: int, tmp_path: Path
) -> None:
    """However few are left to ask, and whatever was judged before."""
    if known:
        with server(by_city) as (url, _):
            assert judge(url, tmp_path).right(answered("seven hills")) == [True]
    many = answered(*(f"city {i}" for i in range(count)))
    with server(answer) as (url, _):
        with pytest.raises(ConnectionError, match=said) as error:
            judge(url, tmp_path).right(many)
    assert "\n" not in str(error.value) and "start the judge" not in str(error.value)
    with server(by_city) as (url, seen):
        assert judge(url, tmp_path).right(many) == [False] * count
        assert len(seen) == count  # none was written off


def test_one_that_falls_silent_loses_nothing(tmp_path: Path) -> None:
    """Five questions are answered, then it is dead; the next start asks for the other seven."""
    many = answered(*(f"city {i}" for i in range(12)))
    with server(*[by_city] * 5, says("", 500)) as (url, _):
        with pytest.raises(ConnectionError) as error:
            judge(url, tmp_path, in_flight=1).right(many, scored=40)
    said = str(error.value)
    assert url in said and "the judge answered 500" in said and "3 times" in said
    assert f"all texts, 40 scored answers and 5 verdicts are safe in {tmp_path}" in said
    assert "start the judge" in said
    assert "\n" not in said
    kept = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in kept] == [[0]] * 5
    with server(by_city) as (url, seen):
        assert judge(url, tmp_path).right(many) == [False] * 12
    assert len(seen) == 7


def silence(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    time.sleep(20)


@pytest.mark.parametrize("alive", [True, False])
def test_one_that_is_slow_or_dead_is_named(alive: bool, tmp_path: Path) -> None:
    with server(silence) as (url, seen):
        assert is_there(ChatServer(url, "m", "NO_KEY")) and not seen
        if alive:
            asked = judge(url, tmp_path, retries=1, timeout_s=0.1)
            with pytest.raises(ConnectionError, match=r"was not reached \(TimeoutError.*2 times"):
                asked.right(answered("Oslo"))
    assert not is_there(ChatServer(url, "m", "NO_KEY"))
    with pytest.raises(ConnectionError, match=r"was not reached \(URLError.*refused.*1 times"):
        judge(url, tmp_path, retries=0).right(answered("Oslo"))


def test_a_refused_key_stops_at_once(tmp_path: Path) -> None:
    with server(says("", 401)) as (url, seen):
        with pytest.raises(ConnectionError, match="401 Unauthorized; correct its key, NO_KEY: the"):
            judge(url, tmp_path, in_flight=1).right(answered("Oslo", "Lima"))
    assert len(seen) == 1


def test_a_key_that_cannot_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_KEY", "secret\n")
    with server(by_city) as (url, seen):
        with pytest.raises(
            ConnectionError, match=r"cannot be sent \(ValueError\); correct its"
        ) as e:
            judge(url, tmp_path).right(answered("Oslo"))
    assert not seen and "secret" not in str(e.value)


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    with server(by_city) as (url, seen):
        for key in ("first", ""):
            monkeypatch.setenv("ROMA_JUDGE_API_KEY", key)
            asked = judge_server(url, f"m{key}")
            record = Record(tmp_path, SETTINGS, file="v.jsonl")
            assert ModelJudge(asked, record).right(answered("seven hills")) == [True]
    assert [key for _, _, key in seen] == ["Bearer first", "Bearer second"]
    written = [path.read_text() for path in tmp_path.iterdir() if path.name[0] != "."]
    assert len(written) == 2 and not any("Bearer" in t or "second" in t for t in written)


@pytest.mark.parametrize(
    ("address", "model", "said"),
    [
        ("ruls", None, r"^--judge: expected none, rules, or an http\(s\) address, got 'ruls'"),
        ("localhost:8000", "m", "^--judge: expected none, rules"),
        ("http://", "m", "^--judge: expected none, rules"),
        ("http://localhost:8000/v1", None, "^--judge-model: expected a model of the judge's"),
    ],
)
def test_what_is_no_judge_is_refused(address: str, model: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        judge_server(address, model)
