"""The judge, against a stub of an OpenAI-compatible server."""

import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from support.chat_server import Answer, says, server

from roma.rewards import Failed, JudgeReward
from roma.rewards.judge import PROMPT, verdict


def row(response: str = "<think> 3 + 5 </think> eight", **changes: Any) -> dict[str, Any]:
    return {"problem": "<image> sum ?", "response": response, "ground_truth": "8", **changes}


def judge(url: str, **options: Any) -> JudgeReward:
    return JudgeReward(url=url, model="m", **{"pause_s": 0.01, "timeout_s": 10.0, **options})


def test_the_verdict_is_the_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with server(says("The same.\nVERDICT: yes")) as (url, seen):
        for address in (url, f"{url}/v1", f"{url}/v1/", f"{url}/v1/chat/completions"):
            (score,) = judge(address, key_env="JUDGE_KEY")([row()])
            assert score == {"overall": 0.9, "format": 0.0, "accuracy": 1.0}
    assert {path for path, _, _ in seen} == {"/v1/chat/completions"} and len(seen) == 4
    _, body, key = seen[0]
    assert key == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("m", 0)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert "[image] sum ?" in message["content"] and "\neight\n" in message["content"]
    assert "3 + 5" not in message["content"]  # reasoning is not judged


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with server(says("VERDICT: no")) as (url, seen):
        (score,) = judge(url)([row(r"<think> </think> \boxed{7}")])
    assert score == {"overall": 0.1, "format": 1.0, "accuracy": 0.0}
    assert seen[0][2] is None


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("VERDICT: yes", True),
        ("a\n **Verdict: NO.**\n", False),
        ("VERDICT: no\nOn reflection.\nVERDICT: yes", True),
        ('It quotes "VERDICT: yes" in a line.', None),
        ("VERDICT: yes or no", None),
        ("yes", None),
        ("", None),
    ],
)
def test_the_last_whole_line_is_the_verdict(reply: str, expected: bool | None) -> None:
    assert verdict(reply) is expected


def test_a_passing_failure_is_tried_again() -> None:
    yes = says("VERDICT: yes")
    with server(says("", 503), says("", 429), yes) as (url, seen):
        (score,) = judge(url)([row()])
        assert not isinstance(score, Failed) and score["accuracy"] == 1.0 and len(seen) == 3


@pytest.mark.parametrize(
    ("answer", "tries", "reason"),
    [
        (says("", 500), 3, "the judge answered 500 Internal Server Error, 3 times"),
        (says("", 401), 1, "the judge answered 401 Unauthorized"),
        (says("It may be right."), 1, "the judge gave no verdict: …It may be right."),
        (says(None), 1, "the judge's reply has another form (TypeError)"),
    ],
)
def test_a_judge_that_fails_marks(answer: Answer, tries: int, reason: str) -> None:
    with server(answer) as (url, seen):
        assert judge(url)([row()]) == [Failed(reason)]
        assert len(seen) == tries


def test_nobody_there() -> None:
    with server(says("")) as (url, _):
        pass
    (score,) = judge(url, retries=1)([row()])
    assert isinstance(score, Failed) and "was not reached (URLError" in score.reason
    assert score.reason.endswith(", 2 times")


def silence(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    time.sleep(30)


def drip(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    """A byte now and then: no single read ever takes long."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


@pytest.mark.parametrize("answer", [silence, drip])
def test_a_hanging_judge_is_cut(answer: Answer) -> None:
    begin = time.monotonic()
    with server(answer) as (url, _):
        (score,) = judge(url, timeout_s=0.5, retries=1)([row()])
        assert time.monotonic() - begin < 15  # the server takes 30 s
    assert isinstance(score, Failed) and "TimeoutError" in score.reason


def test_equal_questions_are_asked_once_and_others_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=20)  # broken, unless three requests meet

    def wait(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        together.wait()
        says("VERDICT: yes" if "eight" in str(body) else "VERDICT: no")(handler, body)

    with server(wait) as (url, seen):
        rows = [row(), row("nine"), row(), row(ground_truth="9"), row()]
        scores = [score for score in judge(url)(rows) if not isinstance(score, Failed)]
    assert [score["accuracy"] for score in scores] == [1, 0, 1, 1, 1] and len(seen) == 3


def test_what_is_cut_off_or_empty_is_wrong_without_a_question() -> None:
    with server(says("VERDICT: yes")) as (url, seen):
        rows = [row(finished=False), row("<think> so </think>")]
        assert [dict(score)["accuracy"] for score in judge(url)(rows)] == [0.0, 0.0]  # type: ignore[arg-type]
        assert not seen
        (score,) = judge(url, strict_end=False)(rows[:1])
        assert not isinstance(score, Failed) and score["accuracy"] == 1.0


def test_a_prompt_of_ones_own() -> None:
    with server(says("VERDICT: yes")) as (url, seen):
        judge(url, prompt="{{ response }} is {{ ground_truth }}?")([row()])
    assert seen[0][1]["messages"][0]["content"] == "eight is 8?"
    for prompt, message in {
        "{{ response }": "expected a jinja text",
        "{{ response }} {{ answer }}": "'answer' is undefined",
        "{{ response }}": r"expected {{ ground_truth }} in it",
    }.items():
        with pytest.raises(ValueError, match=message):
            judge("http://localhost:1", prompt=prompt)
    assert judge("http://localhost:1", prompt=PROMPT)
