"""What a run has found so far: one JSON object a line, appended as it is found.

A cut at any moment leaves at most one torn last line, which is not read. Three kinds of lines:

    call   one start of `python -m bench.gpu`: commit, device, time
    row    one finding of a part: an item (a shape, a test, a point of the sweep) with its numbers
    end    how a part ended: ok, failed, timeout, cut (out of time: it goes on), skipped

A part is a process of its own and says what it finds on its standard output, by `start` and `tell`.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

Line = dict[str, Any]
OVER = ("ok", "failed", "timeout")
"""How a part ends for good; one that was cut or skipped is tried again."""
START, ROW = "@start ", "@row "
CANNOT, MORE = 3, 4
"""Exit codes of a part: it cannot run here, says its last line; it stopped in time, more to do."""
_LOCK = threading.Lock()
_PATH, _STEP = "ROMA_GPU_JOURNAL", "ROMA_GPU_STEP"


class Journal:
    """The lines of a run, in memory and in a file."""

    def __init__(self, path: Path) -> None:
        """Reads what the file holds; it need not exist."""
        self.path = path
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        self._torn = bool(text) and not text.endswith("\n")
        self.lines = [line for line in map(parse, text.split("\n")) if line is not None]

    def append(self, kind: str, **values: Any) -> None:
        """Adds a line, on disk when this returns."""
        line = values | {"kind": kind}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(("\n" if self._torn else "") + json.dumps(line) + "\n")
        self._torn = False
        self.lines.append(line)

    def rows(self, step: str) -> dict[str, Line]:
        """The findings of a step by item, the newest of each."""
        return {
            str(line.get("item")): line
            for line in self._valid()
            if line["kind"] == "row" and line.get("step") == step
        }

    def end(self, step: str, part: str) -> Line | None:
        """How a part ended last, or None."""
        found = None
        for line in self._valid():
            if line["kind"] == "end" and (line.get("step"), line.get("part")) == (step, part):
                found = line
        return found

    def over(self, step: str, part: str) -> bool:
        """Whether a part has ended for good."""
        end = self.end(step, part)
        return end is not None and end.get("status") in OVER

    def spent(self, step: str, part: str) -> float:
        """Seconds that a part has had, over all calls."""
        ends = [
            line for line in self.lines
            if line["kind"] == "end" and (line.get("step"), line.get("part")) == (step, part)
        ]  # fmt: skip
        return sum(float(line.get("seconds", 0.0)) for line in ends)

    def _valid(self) -> list[Line]:
        """The lines, without what failed before the last call that asked to try that again."""
        calls = [i for i, line in enumerate(self.lines) if line["kind"] == "call"]
        last = max((i for i in calls if self.lines[i].get("retry")), default=0)
        return [
            line for i, line in enumerate(self.lines)
            if i >= last or line.get("status", "ok") == "ok"
        ]  # fmt: skip


def parse(text: str) -> Line | None:
    """A line of the file, or None if it is torn or something else."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("kind"), str) else None


def environment(path: Path, step: str) -> dict[str, str]:
    """What a part's process is told."""
    return {_PATH: str(path), _STEP: step}


def done() -> dict[str, Line]:
    """In a part's process: what this step has found earlier, by item."""
    if _PATH not in os.environ:
        return {}
    return Journal(Path(os.environ[_PATH])).rows(os.environ[_STEP])


def start(item: str) -> None:
    """In a part's process: an item begins. If the process dies, that item is to blame."""
    say(START + item)


def tell(item: str, status: str = "ok", **numbers: Any) -> None:
    """In a part's process: an item's numbers. `status`: ok, failed, refused or skipped."""
    say(ROW + json.dumps({"item": item, "status": status, **numbers}))


def say(line: str) -> None:
    """In a part's process: a line in one write, which no thread divides; `print` makes two."""
    with _LOCK:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
