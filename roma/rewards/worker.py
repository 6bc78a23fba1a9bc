"""The process in which a reward function of a user's own runs (`roma.rewards.process` starts it).

Its parent sends rows and reads scores through one socket, a JSON text each way. Whatever the
function prints goes to stderr. It loads nothing but the function, and ends with its parent.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from roma.rewards.loader import check_count, load_function, plain_score

# What a user's code may raise: anything. It becomes the reason of a marked rollout.
_RAISED = (Exception, SystemExit)


def serve(descriptor: int, spec: str, parent: int) -> None:
    """Answers the parent's requests until it closes the socket.

    A request is {"rows": […], "together": bool}. Together, the function is called once, and the
    reply is {"scores": […]}, or {"error": reason} if the call as a whole failed. Otherwise it is
    called row by row, with a reply {"scores": [one]} after each. A score that cannot be had is its
    reason, a string.

    Args:
        descriptor: of the socket.
        spec: of the function, as `load_reward` takes it.
        parent: its process id.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    socket = Connection(descriptor)
    try:
        function = load_function(spec)
    except _RAISED as error:
        kind = "FileNotFoundError" if isinstance(error, FileNotFoundError) else "ValueError"
        known = isinstance(error, ValueError | FileNotFoundError)
        message = str(error) if known else f"{spec}: expected that it loads, got {_what(error)}"
        _send(socket, {"error": message, "kind": kind})
        return
    _send(socket, {"ready": True})
    while True:
        try:
            request = json.loads(socket.recv_bytes())
        except EOFError:
            return
        rows = request["rows"]
        if request["together"]:
            _send(socket, _score(function, spec, rows))
            continue
        for row in rows:
            reply = _score(function, spec, [row])
            _send(socket, {"scores": reply.get("scores") or [reply["error"]]})


def _score(
    function: Callable[[Sequence[Any]], Any], spec: str, rows: Sequence[Any]
) -> dict[str, Any]:
    try:
        scores = function(rows)
        check_count(spec, scores, len(rows))
    except _RAISED as error:
        return {"error": _what(error)}
    return {"scores": [_plain(score) for score in scores]}


def _plain(score: Any) -> dict[str, float] | str:
    try:
        return plain_score("its result", score)
    except _RAISED as error:
        return _what(error)


def _what(error: BaseException) -> str:
    """What was raised, on one line."""
    return " ".join(f"raised {type(error).__name__}: {error}".split())[:300]


def _send(socket: Connection, message: dict[str, Any]) -> None:
    socket.send_bytes(json.dumps(message).encode())


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, which may have been killed while a call hangs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
