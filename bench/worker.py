"""The worker: builds the data, holds every candidate to float64, times them, and says all of it.

`supervise.Worker` starts it with a job (job.py) on its standard input. On its standard output it
says, a JSON object a line:

    machine   columns                  once, if asked
    variant   names                    begins; its candidates
    start     what, name, held, limit  something begins that must end within `limit` seconds
    held      name, errors             a candidate agreed with float64
    refused   name, reason, held       a candidate goes no further; held: that comparison says so
    no data   reason                   the variant has no data, so none of its candidates a time
    round     ms                       a round is complete
    rows      rows, taken together     all that were timed
    memory    name, extra_mib          measured in a process of its own, afterwards
    note      text                     for the screen alone
    done                               the variant is done
    end                                the job is done

What else is written to standard output, by a library, goes to standard error.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import estimate, gate, memory, nvidia, results
from bench.job import Job
from bench.measure import Check, Clock, Run, interleave, times_of
from bench.ops import ACTIVE, COMPLETION, Bench, HeadBench, LossBench, bench_of, names_of
from bench.processes import die_with_parent
from bench.providers import OURS, Unavailable
from bench.results import YARDSTICK
from bench.variants import Variant
from roma_kernels.products import listen

T = TypeVar("T")
GIB = 2**30
NO_ROOM = (torch.OutOfMemoryError, MemoryError)
POISONED = 70  # exit code: no call of this process can succeed any more
_MEMORY_GRACE = 30.0  # seconds beyond the limit that a memory process has for itself


class Session:
    """A job, and the one place where a candidate's failure is caught."""

    def __init__(self, job: Job, out: Any) -> None:
        """`out`: where events are written."""
        self.job, self.options = job, job.options
        self.device = job.options.device
        self._out = out
        self._what, self._name = "", ""
        self.clock: Clock | None = None

    def say(self, event: str, **values: Any) -> None:
        """Writes an event."""
        self._out.write(json.dumps({"event": event, **values}) + "\n")
        self._out.flush()

    def start(
        self, what: str, name: str = "", *, held: bool = False, limit: float | None = None
    ) -> None:
        """Says what begins."""
        self._what, self._name = what, name
        self.say("start", what=what, name=name, held=held, limit=limit or self.options.limit)

    def attempt(
        self, name: str, what: str, action: Callable[[], T], *, held: bool = False
    ) -> T | None:
        """The action's result, or None if it failed, which is said with the reason."""
        self.start(what, name, held=held)
        found, reason = self._guarded(action)
        if reason:
            self.say("refused", name=name, reason=reason, held=held)
            self.leave_if_poisoned()
        return found

    def leave_if_poisoned(self) -> None:
        """Frees what a failure left; ends the process if the GPU's context is of no more use."""
        gc.collect()
        if not healthy(self.device):
            self._out.flush()
            os._exit(POISONED)

    def _guarded(self, action: Callable[[], T]) -> tuple[T | None, str]:
        try:
            found = action()
            if self.device == "cuda":
                torch.cuda.synchronize()  # or its errors would be the next candidate's
            return found, ""
        except BaseException as error:  # whatever it is, it is one candidate's, and gets a row
            if not isinstance(error, (Unavailable, ImportError, gate.Wrong, *NO_ROOM)):
                traceback.print_exc()
            return None, self._reason(error)

    def _reason(self, error: BaseException) -> str:
        said = " ".join(str(error).split())[:300]
        if isinstance(error, (Unavailable, ImportError)):
            return f"not here: {said}"
        if isinstance(error, gate.Wrong):
            timed = self._what.startswith(("round", "warm-up"))
            return f"refused: {said}" + (f" in its {self._what}" if timed else "")
        # Torch's allocator for a CPU has no type of its own for it.
        if isinstance(error, NO_ROOM) or "can't allocate memory" in said:
            return f"out of memory in its {self._what}: {said}"
        return f"fails in its {self._what}: {type(error).__name__}: {said}"

    def without_room(self, bytes_: float) -> str:
        """Why a call of so many bytes is not to be tried; "" if it is."""
        gc.collect()
        room = memory.free(self.device)
        if self.options.memory_limit is not None:
            room = min(room, self.options.memory_limit * GIB)
        if bytes_ <= room:
            return ""
        return f"needs {bytes_ / GIB:.3g} GiB, {room / GIB:.3g} are free"

    def machine(self) -> None:
        """Describes the machine."""
        found, reason = self._guarded(lambda: results.machine(self.device))
        if reason:
            self.say("note", text=f"the machine: {reason}")
        self.say("machine", columns=found or {"device": self.device})

    def variant(self, number: int) -> None:
        """Measures one variant."""
        variant, gone = self.job.variants[number], self.job.gone[number]
        wanted = self.options.providers
        names = [n for n in names_of(variant) if wanted is None or n in (*wanted, OURS)]
        self.say("variant", names=names)
        if "torch._dynamo" in sys.modules:
            # Of one function it compiles eight shapes; the ninth would be eager, without a word.
            torch.compiler.reset()
        left = [name for name in names if name not in gone]
        bench = self._bench(variant) if left else None
        if bench is not None:
            first = number == 0
            known = self.job.errors if first else {}
            bench.errors |= {name: gate.Errors(**found) for name, found in known.items()}
            self._measure(bench, left, gone, self.job.rounds if first else [])
            del bench
        self.say("done")

    def _bench(self, variant: Variant) -> Bench | None:
        self.start("data")
        reason = self.without_room(estimate.data(variant))
        if reason:
            self.say("no data", reason=f"its data: {reason}")
            return None

        def build() -> Bench:
            bench = bench_of(variant, self.device, tell=self._tell)
            _active_rows(bench)  # counted now, when a failure is the data's
            return bench

        found, reason = self._guarded(build)
        if reason:
            self.say("no data", reason=f"no data: {reason}")
            self.leave_if_poisoned()
        return found

    def _tell(self, what: str) -> None:
        """What the comparison with float64 that has begun is doing."""
        self.start(what, self._name, held=True)

    def _measure(
        self,
        bench: Bench,
        left: list[str],
        gone: dict[str, str],
        earlier: list[dict[str, float]],
    ) -> None:
        before = nvidia.state() if self.device == "cuda" else {}
        needs: dict[str, float] = {}
        runs = self._held(bench, left, gone, needs)
        if YARDSTICK not in gone and runs:
            yardstick = self.attempt(YARDSTICK, "warm-up", lambda: bench.yardstick)
            runs |= {YARDSTICK: yardstick} if yardstick else {}
        executed: dict[str, float] = {}
        extra: dict[str, float] = {}
        for name in list(runs):
            warm = self.attempt(name, "warm-up", lambda name=name: self._warm(runs[name]))  # type: ignore[misc]
            if warm is None:
                del runs[name]
                continue
            executed[name], extra[name] = warm
        if not set(runs) - {YARDSTICK}:
            return
        rounds = list(earlier)
        assert self.clock is not None
        for found in interleave(
            runs,
            self.clock,
            self.attempt,
            rounds=self.options.rounds,
            seconds=self.options.seconds,
            earlier=earlier,
        ):
            self.say("round", ms=found)
            rounds.append(found)
        self._rows(bench, runs, rounds, needs, executed, extra, before)

    def _held(
        self, bench: Bench, left: list[str], gone: dict[str, str], needs: dict[str, float]
    ) -> dict[str, Run]:
        """The candidates that fit and agree with float64."""
        if isinstance(bench, LossBench):
            self._complete(bench, gone)
        failed: set[str] = set()
        found = {}
        for name in left:
            if name.removesuffix(ACTIVE) in failed:
                continue  # the same function; the parent knows
            self.start("estimate", name)
            needs[name] = estimate.needs(bench.variant, name, self.device, _active_rows(bench))
            reason = self.without_room(needs[name])
            if reason:
                self.say("refused", name=name, reason=reason, held=False)
                continue
            run = self.attempt(name, "preparation", lambda name=name: bench.run(name), held=True)  # type: ignore[misc]
            if run is None:
                failed.add(name)
                continue
            found[name] = run
            if name in bench.errors:
                self.say("held", name=name, errors=asdict(bench.errors[name]))
        return found

    def _complete(self, bench: LossBench, gone: dict[str, str]) -> None:
        """Chooses what completes the peers' log-probs: ours, or if that fails plain PyTorch."""
        ok = None
        if COMPLETION not in gone:
            ok = self.attempt(COMPLETION, "comparison", lambda: (bench.hold_completion(), True)[1])
        if ok is None:
            bench.completion = "torch"

    def _warm(self, run: Run) -> tuple[float, float]:
        """FLOP that our kernels report in one call, and the bytes of another one on a GPU."""
        made: list[Check | None] = []

        def call() -> None:
            made.append(run())

        def check() -> None:
            last = made.pop()
            if last is not None:
                last()

        with listen() as reports:
            call()
        check()
        bytes_ = float("nan")
        if self.device == "cuda":
            bytes_ = memory.peak(call)
        else:
            call()
        check()
        return float(sum(report.flop for report in reports)), bytes_

    def _rows(
        self,
        bench: Bench,
        runs: dict[str, Run],
        rounds: list[dict[str, float]],
        needs: dict[str, float],
        executed: dict[str, float],
        extra: dict[str, float],
        before: dict[str, str],
    ) -> None:
        """Says the rows of what was timed to the end, fastest first; on a CPU their memory too."""
        if not rounds or not set(runs) - {YARDSTICK}:
            return
        self.start("rows")
        times = {name: times_of(name, rounds, self.device) for name in runs}
        described, _ = self._guarded(bench.describe)
        common = {key: f"{value:.3g}" for key, value in (described or {}).items()}
        if isinstance(bench, LossBench):
            common["completion"] = bench.completion
        if before:
            common |= nvidia.columns(before, nvidia.state())
        rows = []
        ordered = sorted(set(runs) - {YARDSTICK}, key=lambda name: times[name].quantile(0.5))
        for name in ordered:
            row = results.measured(
                bench,
                name,
                times,
                executed=executed[name] if name.startswith(OURS) else None,
                extra=extra[name] if self.device == "cuda" else None,
                needs=needs[name],
            )
            rows.append(row | common | bench.columns(name))
        self.say("rows", rows=rows)
        if self.device == "cpu" and self.options.with_memory and bench.variant.memory:
            for name in ordered:
                self._memory(bench.variant, name)

    def _memory(self, variant: Variant, name: str) -> None:
        limit = self.options.limit
        self.start("memory", name, limit=limit + _MEMORY_GRACE)
        try:
            found = memory.extra_mib(
                variant.line, name, self.device, add=self.options.add, limit=limit
            )
        except RuntimeError as why:
            self.say("note", text=f"memory of {name}: {why}")
            return
        self.say("memory", name=name, extra_mib=f"{found:.1f}")


def _active_rows(bench: Bench) -> int:
    return bench.active_rows if isinstance(bench, HeadBench) else 0


def healthy(device: str) -> bool:
    """Whether the device still answers; a CUDA error may poison the whole process."""
    if device == "cpu":
        return True
    try:
        torch.cuda.empty_cache()
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Entry point."""
    job = Job.from_json(sys.stdin.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    die_with_parent()
    # If the system runs out of memory, this process is to be the one that it kills.
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")
    session = Session(job, out)
    session.start("imports")
    for module in job.options.add:
        importlib.import_module(module)
    session.start("clock")
    session.clock = Clock(job.options.device)
    if job.machine:
        session.machine()
    for number in range(len(job.variants)):
        session.variant(number)
    session.say("end")


if __name__ == "__main__":
    main()
