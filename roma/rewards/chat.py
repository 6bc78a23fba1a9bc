"""Asks a language model behind an OpenAI-compatible address, again where that may help."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from roma.rewards.marked import Failed

_AGAIN = {408, 409, 425, 429}  # and 5xx: the same request may succeed later
_REFUSED = {400, 413, 422}  # this request, as too long
_NO_POST = 501  # of a server of pages
_TAG = re.compile(r"<[^>]*>")
_SHOWN = 120  # characters of a server's own words


@dataclass(frozen=True)
class Unanswered(Failed):
    """The server gave no reply that can be read.

    Attributes:
        lasting: other questions would fare no better: nobody there, overloaded, no access, no such
            model, no such server; not where this one question was refused, or its reply had no
            text.
        code: the status of HTTP; 0: nothing could be sent; None: nobody was reached.
    """

    lasting: bool = True
    code: int | None = None


@dataclass(frozen=True)
class ChatServer:
    """A model of a server; calls from several threads are independent.

    Attributes:
        url: of the server; ".../v1" or the whole ".../v1/chat/completions".
        model: its name there.
        key_env: environment variable with the key; unset: none is sent.
        timeout_s: of one request, seconds.
        retries: further tries after a connection that failed, a time-out, 429 or 5xx.
        pause_s: before the first retry, seconds; doubled before each further one.
    """

    url: str
    model: str
    key_env: str
    timeout_s: float = 60.0
    retries: int = 2
    pause_s: float = 1.0

    def ask(self, question: str) -> str | Unanswered:
        """The reply to one message at temperature 0; or why there is none."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1))
            try:
                return self._post(question)
            except urllib.error.HTTPError as error:
                reason, code = f"the judge answered {error.code} {error.reason}", error.code
                said = _read_error(error)
                if key := os.environ.get(self.key_env):
                    said = said.replace(key, "…")  # one that repeats it
                reason += _in_brackets(said)
                passes = error.code >= 500 and error.code != _NO_POST
                if not passes and error.code not in _AGAIN:
                    return Unanswered(reason, lasting=error.code not in _REFUSED, code=code)
            except (OSError, http.client.HTTPException) as error:
                reason, code = f"the judge was not reached ({type(error).__name__}: {error})", None
            except _OtherForm as error:
                return Unanswered(str(error), lasting=error.lasting, code=200)
            except ValueError as error:  # its words may show the key
                kind = type(error).__name__
                return Unanswered(f"the judge's address or key cannot be sent ({kind})", code=0)
        return Unanswered(f"{reason}, {self.retries + 1} times", code=code)

    def _post(self, question: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_env):
            headers["Authorization"] = f"Bearer {key}"
        address = _endpoint(self.url)
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout_s
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            parts = []
            while part := response.read1(65536):  # a server may also drip
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole reply within {self.timeout_s:g} s")
        return _content(b"".join(parts))


class _OtherForm(Exception):
    """A reply that is none of a chat; lasting: it is no chat completion at all."""

    def __init__(self, error: Exception, said: str, *, lasting: bool) -> None:
        form = f"the judge's reply has another form ({type(error).__name__})"
        super().__init__(form + _in_brackets(said))
        self.lasting = lasting


def _content(body: bytes) -> str:
    """The text of a chat completion."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise _OtherForm(error, _first_line(body), lasting=True) from None
    if not isinstance(content, str):
        raise _OtherForm(TypeError(), "", lasting=False)
    return content


def _read_error(error: urllib.error.HTTPError) -> str:
    try:
        return _first_line(error.read1(4096))  # what is there: it may drip
    except (OSError, http.client.HTTPException):
        return ""


def _first_line(body: bytes) -> str:
    """What a server says of an error: its message, else its first line, without HTML's tags."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = _TAG.sub(" ", text)
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), "")
    lines = str(found).strip().splitlines()
    words = " ".join(lines[0].split()) if lines else ""
    return "".join(filter(str.isprintable, words))


def _in_brackets(said: str) -> str:
    return f" ({said[:_SHOWN]})" if said else ""


def _endpoint(url: str) -> str:
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return f"{url}/chat/completions" if url.endswith("/v1") else f"{url}/v1/chat/completions"
