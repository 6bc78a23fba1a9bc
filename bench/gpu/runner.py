"""Runs the parts of the steps, each in a process of its own, and keeps what they find."""

import json
import re
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import processes
from bench.gpu import budget, journal, table
from bench.gpu.budget import Part, Step
from bench.gpu.journal import Journal

JOURNAL, LOG, ARCHIVE = "gpu.jsonl", "gpu.log", "gpu-results.tar.gz"
_LOG_BYTES = 200_000  # of one part
_LEAST_RESTART = 5.0
_MARKS = f"(?={journal.START})|(?={journal.ROW})"
FAILED = ("failed", "crashed", "timeout")
"""What an item's status may be if something is wrong with it."""


class Runner:
    """The steps of a machine, a folder for what they find, and a moment at which all must end."""

    def __init__(self, out: Path, seconds: float = float("inf")) -> None:
        """`seconds`: from now."""
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(out / JOURNAL)
        self._ends = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the call must have ended."""
        return self._ends - time.monotonic()

    def run(self, steps: Iterable[Step], say: Callable[[str], None] = print) -> None:
        """Runs every part that is not over, if it fits; tables and archive after each."""
        for step in steps:
            for part in step.parts:
                if self.journal.over(step.name, part.name):
                    continue
                if part.absent:
                    self._end(step, part, "skipped", part.absent, 0.0)
                    say(f"  {step.name}, {part.name}: skipped: {part.absent}")
                    continue
                spent = self.journal.spent(step.name, part.name)
                seconds = budget.time_for(part, spent, self.left)
                if part.after and not self.journal.over(step.name, part.after):
                    say(f"  {step.name}, {part.name}: waits for {part.after}")
                    continue
                if seconds is None:
                    say(f"  {step.name}, {part.name}: not in the {self.left:.0f} s left")
                    continue
                say(f"… {step.name}, {part.name} (about {part.expect:.0f} s)")
                status, reason = self.part(step, part, seconds)
                say(f"  {step.name}, {part.name}: {status}" + (f": {reason}" if reason else ""))
                self.pack()
        self.pack()

    def part(self, step: Step, part: Part, seconds: float) -> tuple[str, str]:
        """Runs one part; gives its status and reason."""
        begin = time.monotonic()
        out_of_time = seconds > self.left - budget.PACK - 1
        run = _Run(self, step, budget.fill(part, seconds))
        status, reason = "cut", "the program was stopped"
        try:
            status, reason = run.all(begin + seconds, out_of_time)
        finally:
            self._end(step, part, status, reason, time.monotonic() - begin)
        return status, reason

    def pack(self) -> None:
        """Writes the tables, and everything into one archive."""
        table.write(self.out, self.journal)
        archive = self.out / ARCHIVE
        new = archive.with_suffix(".new")
        with tarfile.open(new, "w:gz") as tar:
            for path in sorted(self.out.iterdir()):
                if path.is_file() and path not in (archive, new):
                    tar.add(path, path.name)
        new.replace(archive)

    def _end(self, step: Step, part: Part, status: str, reason: str, seconds: float) -> None:
        self.journal.append(
            "end", step=step.name, part=part.name, status=status, reason=reason,
            seconds=round(seconds, 1),
        )  # fmt: skip


class _Run:
    """One part, and what it says."""

    def __init__(self, runner: Runner, step: Step, part: Part) -> None:
        self._journal, self._step, self._part = runner.journal, step, part
        self._log = runner.out / LOG
        self._room = _LOG_BYTES
        self._open: list[str] = []
        self._wrong: list[str] = []

    def all(self, deadline: float, out_of_time: bool) -> tuple[str, str]:
        """Runs it, again if an item ended its process and others are left."""
        self._write(f"\n== {self._step.name}, {self._part.name}: {' '.join(self._part.command)}\n")
        for again in range(self._part.restarts + 1):
            left = deadline - time.monotonic()
            if again and left < _LEAST_RESTART:
                return "cut", "out of time"
            self._open.clear()
            end = processes.watch(
                self._part.command,
                self._hear,
                seconds=left,
                silence=self._part.silence,
                env={
                    **dict(self._part.env),
                    **journal.environment(self._journal.path, self._step.name),
                },
            )
            self._write(f"== {end.reason or 'ended well'}, {end.seconds:.1f} s\n")
            if end.code == 0:
                return self._verdict()
            if end.code == journal.CANNOT:
                return "skipped", end.last
            if end.code == journal.MORE or (end.why == "timeout" and out_of_time):
                return "cut", "out of time"
            if not self._open or end.why == "timeout":  # too slow as a whole: nobody's fault
                break
            what = "timeout" if end.why else "crashed"
            for item in list(self._open):
                self._row({"item": item, "status": what, "reason": end.reason})
        return ("timeout" if end.why else "failed"), end.reason

    def _verdict(self) -> tuple[str, str]:
        if not self._wrong or self._part.forgiving:
            return "ok", ""
        more = f" and {len(self._wrong) - 1} more" if len(self._wrong) > 1 else ""
        return "failed", self._wrong[0] + more

    def _hear(self, line: str) -> None:
        # Whoever shares the pipe may have left an unended line before a mark.
        for piece in re.split(_MARKS, line):
            if piece.startswith(journal.START):
                self._open.append(piece.removeprefix(journal.START))
            elif piece.startswith(journal.ROW):
                row = _row(piece.removeprefix(journal.ROW))
                if row is not None:
                    self._row(row)
        self._write(line + "\n")

    def _row(self, row: dict[str, Any]) -> None:
        if row["item"] in self._open:
            self._open.remove(row["item"])
        if row.get("status") in FAILED:
            self._wrong.append(row["item"])
        self._journal.append(
            "row", **{k: v for k, v in row.items() if k not in ("kind", "step", "part")},
            step=self._step.name, part=self._part.name,
        )  # fmt: skip

    def _write(self, text: str) -> None:
        """To the log, until a part has said too much."""
        if self._room <= 0:
            return
        self._room -= len(text)
        with self._log.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text if self._room > 0 else "== more than the log keeps of one part\n")


def _row(text: str) -> dict[str, Any] | None:
    """What a part said of an item, or None if it is nothing of that kind."""
    try:
        row, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("item"), str) else None


def unpack(archive: Path, out: Path) -> None:
    """Puts an archive's files into a folder that has no results yet.

    Raises:
        ValueError: the folder has some, or the file is no such archive.
    """
    if (out / JOURNAL).exists():
        raise ValueError(f"{out}: expected none, it has results; leave {archive} out or the folder")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            files = {m.name: tar.extractfile(m) for m in tar if m.isfile() and "/" not in m.name}
            if JOURNAL not in files:
                raise ValueError(f"{archive}: expected {JOURNAL} in it, got {sorted(files)}")
            out.mkdir(parents=True, exist_ok=True)
            for name, file in files.items():
                assert file is not None  # of a plain file there is one
                (out / name).write_bytes(file.read())
    except (OSError, EOFError, tarfile.TarError) as wrong:
        raise ValueError(f"{archive}: expected an archive of results ({wrong})") from wrong


def set_aside(out: Path) -> Path | None:
    """Renames a folder with results of an earlier run; gives its new name."""
    if not (out / JOURNAL).exists():
        return None
    number = 1
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    return out.rename(aside)
