"""Asks a language model behind an OpenAI-compatible address, again where that may help."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from roma.rewards.marked import Failed

_AGAIN = {408, 409, 425, 429}  # and 5xx: the same request may succeed later
_REFUSED = {400, 413, 422}  # this request, as too long


@dataclass(frozen=True)
class Unanswered(Failed):
    """The server gave no reply that can be read.

    Attributes:
        lasting: other questions would fare no better: nobody there, overloaded, no access, no such
            model; not where this one question was refused, or its reply had another form.
    """

    lasting: bool = True


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
                reason = f"the judge answered {error.code} {error.reason}"
                if error.code < 500 and error.code not in _AGAIN:
                    return Unanswered(reason, lasting=error.code not in _REFUSED)
            except (OSError, http.client.HTTPException) as error:
                reason = f"the judge was not reached ({type(error).__name__}: {error})"
            except (ValueError, LookupError, TypeError) as error:
                form = f"the judge's reply has another form ({type(error).__name__})"
                return Unanswered(form, lasting=False)
        return Unanswered(f"{reason}, {self.retries + 1} times")

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
        text = json.loads(b"".join(parts))["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError(type(text).__name__)
        return text


def _endpoint(url: str) -> str:
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return f"{url}/chat/completions" if url.endswith("/v1") else f"{url}/v1/chat/completions"
