"""A language model as the judge of what a task's own rules call wrong, for `--judge ADDRESS`.

Verdicts are kept as they come, each under a digest of what was asked: nothing is asked twice,
neither after a cut nor where a model answers alike at two conditions.
"""

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NoReturn
from urllib.parse import urlsplit

from roma.evaluate.conditions import Cell
from roma.evaluate.lmms_eval.rules import Answered
from roma.evaluate.record import Record, Row
from roma.rewards.boxed import read_response
from roma.rewards.chat import ChatServer, Unanswered
from roma.rewards.judge import PROMPT, read_template, verdict
from roma_kernels.errors import fail

_KEYS = ("ROMA_JUDGE_API_KEY", "OPENAI_API_KEY")
_ONCE_MORE = '\n\nEnd with one line, "VERDICT: yes" or "VERDICT: no".'
_PLAIN = Answered("What is 2 + 2?", ("4",), "4")
"""Who gives no verdict on this is no judge."""

PROTOCOL = hashlib.sha256((PROMPT + _ONCE_MORE).encode()).hexdigest()[:16]
"""Names the wording of the questions; another wording, other verdicts."""


def judge_server(address: str, model: str | None) -> ChatServer:
    """The judge's server, as `--judge` and `--judge-model` name it; nothing is asked yet.

    The key is the environment's ROMA_JUDGE_API_KEY, else OPENAI_API_KEY; it is written nowhere.

    Raises:
        ValueError: no http(s) address, or no model.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        remedy = "a local vLLM server's address is http://localhost:8000/v1"
        fail("--judge", "none, rules, or an http(s) address", repr(address), remedy)
    if not model:
        remedy = "name it, e.g. --judge-model Qwen2.5-72B-Instruct"
        fail("--judge-model", "a model of the judge's server", repr(model), remedy)
    key_env = next((name for name in _KEYS if os.environ.get(name)), _KEYS[0])
    return ChatServer(address, model, key_env, timeout_s=120.0, retries=4, pause_s=2.0)


def is_there(server: ChatServer, timeout_s: float = 3.0) -> bool:
    """Whether anything listens at the address; nothing is asked."""
    parts = urlsplit(server.url)
    where = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection(where, timeout_s).close()
    except OSError:
        return False
    return True


class ModelJudge:
    """Asks a model if answers are right; keeps each verdict at once.

    A reply without a verdict is asked for again with a reminder, twice at the most; then the answer
    is unjudged, and is asked about again in the next run alone. Before any answer is, a server that
    has not given one verdict in this run is asked a plain question; without a verdict on that, too,
    it is no judge, and nothing that it said is kept. This holds from the first reply to the last,
    so a run that was cut leaves as many unjudged as one that was not.

    Args:
        server: whom to ask.
        verdicts: where they are kept: id a digest of the question, correct (1,) or (0,), or () for
            an answer that was left unjudged; what comes later counts.
        in_flight: questions at a time.
    """

    def __init__(self, server: ChatServer, verdicts: Record, *, in_flight: int = 16) -> None:
        """Reads the verdicts that are there."""
        self._server, self._verdicts, self._in_flight = server, verdicts, in_flight
        self._prompt = read_template(PROMPT)
        self._known = {row.id: bool(row.correct[0]) for row in verdicts.rows() if row.correct}
        self._given_up: set[str] = set()  # in this run
        self._is_judge = False  # has given a verdict in this run

    @property
    def asked(self) -> int:
        """Different questions that were answered or given up, in this run and before."""
        return len(self._verdicts)

    @property
    def unjudged(self) -> int:
        """Those that were given up."""
        return self.asked - len(self._known)

    def right(self, answers: Sequence[Answered], *, scored: int = 0) -> list[bool | None]:
        """Of each answer whether it is right; None: unjudged. One that says nothing is wrong.

        Args:
            answers: to judge; the judge sees what stands behind the reasoning, and no image.
            scored: answers that are scored already, for the message if the judge falls silent.

        Raises:
            ConnectionError: the judge does not answer, after every try. What it said is kept.
        """
        asked = [self._question(answer) for answer in answers]
        missing = {
            _digest(question, self._server.model): question for question in asked if question
        }
        done = self._known.keys() | self._given_up
        missing = {key: question for key, question in missing.items() if key not in done}
        if missing and (failure := self._ask_all(missing)):
            self._stop(failure, scored)
        return [
            self._known.get(_digest(question, self._server.model)) if question else False
            for question in asked
        ]

    def _question(self, answer: Answered) -> str | None:
        rest = read_response({"response": answer.response}).rest
        if not rest:
            return None
        text: str = self._prompt.render(
            problem=answer.problem, ground_truth=" or ".join(answer.truths), response=rest
        )
        return text

    def _ask_all(self, missing: dict[str, str]) -> Unanswered | None:
        """Asks and keeps; returns why it had to stop."""
        stop = threading.Event()
        failure: Unanswered | None = None
        with ThreadPoolExecutor(self._in_flight, "roma-judge") as threads:
            ask = _asker(self._server, stop)
            running = {threads.submit(ask, question): key for key, question in missing.items()}
            for done in as_completed(running):
                reply = done.result()
                if isinstance(reply, Unanswered):
                    failure = failure or reply
                elif reply is not None and (verdict(reply) is not None or self._is_judge):
                    self._keep(running[done], reply)
                elif reply is not None and not failure:
                    failure = self._doubt(reply)
                    if failure:
                        stop.set()
                    else:
                        self._keep(running[done], reply)
        return failure

    def _doubt(self, reply: str) -> Unanswered | None:
        """Asks the plain question, since there was no verdict yet; returns why this is no judge."""
        question = self._question(_PLAIN)
        assert question is not None
        said = _asker(self._server, threading.Event())(question)
        if isinstance(said, Unanswered):
            return said
        if said is not None and verdict(said) is not None:
            self._is_judge = True
            return None
        end = " ".join(reply.split())[-160:]
        return Unanswered(f"no verdict, nor on whether 4 is 2 + 2: …{end}", code=200)

    def _keep(self, key: str, reply: str) -> None:
        said = verdict(reply)
        if said is None:
            self._given_up.add(key)
        else:
            self._known[key] = said
            self._is_judge = True
        if said is not None or not self._verdicts.has(Cell(), key):
            right = () if said is None else (int(said),)
            self._verdicts.add([Row(key, Cell(), (reply,), right)])

    def _stop(self, failure: Unanswered, scored: int) -> NoReturn:
        kept = f"all texts, {scored} scored answers and {len(self._known)} verdicts"
        safe = f"{kept} are safe in {self._verdicts.folder}"
        remedy = f"{_remedy(failure.code, self._server)}: the same command goes on; {safe}"
        name = f"--judge {_shown(self._server.url)}"
        got = failure.reason
        fail(name, f"verdicts of {self._server.model}", got, remedy, error=ConnectionError)


def _remedy(code: int | None, server: ChatServer) -> str:
    """What helps where a server answers so; None: nobody was reached."""
    if code == 0 or code in (401, 403):
        return f"correct its key, {server.key_env}"
    if code in (404, 405, 501):
        return "correct the address or --judge-model; ADDRESS/models lists the names"
    if code is None or code in (408, 409, 425, 429) or code >= 500:
        return "start the judge, or wait until it is free"
    return "correct the address, or name a model that judges"


def _asker(server: ChatServer, stop: threading.Event) -> Callable[[str], str | Unanswered | None]:
    """Asks one question until there is a verdict; sets `stop` where others would fare no better.

    What was not asked because of it is None.
    """

    def ask(question: str) -> str | Unanswered | None:
        last = ""
        for reminder in ("", _ONCE_MORE, _ONCE_MORE):
            if stop.is_set():
                return None
            reply = server.ask(question + reminder)
            if isinstance(reply, Unanswered):
                if reply.lasting:
                    stop.set()
                    return reply
                last = reply.reason
                continue
            if verdict(reply) is not None:
                return reply
            last = reply
        return last

    return ask


def _digest(question: str, model: str) -> str:
    return hashlib.sha256(f"{model}\0{question}".encode()).hexdigest()[:32]


def _shown(address: str) -> str:
    """An address without a name and password in it."""
    before, at, _ = urlsplit(address).netloc.rpartition("@")
    return address.replace(before + at, "", 1)
