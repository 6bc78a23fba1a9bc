"""A stub of an OpenAI-compatible server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def says(text: Any, code: int = 200) -> Answer:
    """Answers every question alike."""

    def answer(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@contextmanager
def server(*answers: Answer) -> Iterator[tuple[str, list[tuple[str, dict[str, Any], Any]]]]:
    """Its address, and the requests so far: path, body, key. The last answer repeats."""
    seen: list[tuple[str, dict[str, Any], Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                answer = answers[min(len(seen), len(answers) - 1)]
                seen.append((self.path, body, self.headers["Authorization"]))
            answer(self, body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # else the sixth at a time waits for a second

    made = Server(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", seen
    finally:
        made.shutdown()
        made.server_close()
