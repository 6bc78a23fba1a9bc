"""Run as a program: which tile, chunk and plan is fastest here; every candidate held to float64.

    python -m bench.gpu.sweep hold KERNEL ROLE DEVICE       compiles and compares every point
    python -m bench.gpu.sweep time KERNEL ROLE DEVICE       times those that agreed
    python -m bench.gpu.sweep combine KERNEL ROLE DEVICE    the best changes at once
    python -m bench.gpu.sweep plans DEVICE                  plans by the number of rows

A point that does not compile, spills, is wrong or kills its process is a line with its reason.
"hold" compiles in several processes and leaves Triton's cache full for "time", which is one.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError

from bench.gpu import journal, table
from bench.gpu.journal import CANNOT, done, start, tell
from bench.gpu.points import Entry, Point, combined, points
from bench.gpu.steps import PLANS
from bench.gpu.work import Work, size_of
from bench.measure import DRIFT, Clock, Times
from bench.processes import module, watch
from roma_kernels.linear_logprob.gluon import dlogits as gluon_dlogits
from roma_kernels.linear_logprob.gluon import forward as gluon_forward
from roma_kernels.linear_logprob.triton import dlogits as fused_dlogits
from roma_kernels.linear_logprob.triton import forward as fused
from roma_kernels.linear_logprob.triton import tuning

SLOTS = 10
_SECONDS = 90.0  # of one point: compilation and one call
_ROUNDS, _AT_ONCE = 11, 6
_PLAN_ROWS = (64, 256, 1024, 4096, 16_384)
_INTERPRETED_SHARED = 2**20


class Place:
    """A kernel's role on this machine, and its points."""

    def __init__(self, kernel: str, role: str, device: str) -> None:
        """`kernel`: "forward" or "dlogits"; `role`: of tuning.json, or "chunk"."""
        self.kernel, self.role, self.device = kernel, role, device
        self.chip = tuning.chip(torch.device(device))
        self.shared = _INTERPRETED_SHARED
        if device == "cuda":
            about = driver.active.utils.get_device_properties(torch.cuda.current_device())
            self.shared = about["max_shared_mem"]
        tiles = tuning.table(self.chip)["tiles"]
        if role != "chunk" and role not in tiles:
            print(f"{self.chip} has no tile for {role}")
            sys.exit(CANNOT)
        made = points(kernel, role, self._present(), self.shared)
        self.points = made if device == "cuda" else made[:2]

    def _present(self) -> Entry:
        if self.role == "chunk":
            chunk = tuning.chunk_for(torch.device(self.device))
            return {"rows": chunk.rows, "columns": chunk.columns}
        entry = dataclasses.asdict(tuning.tile_of(self.chip, self.kernel, self.role))
        return {name: value for name, value in entry.items() if name != "why"}

    def work(self, *, small: bool = False) -> Work:
        """Its call, as it is timed or small."""
        return Work(
            self.kernel, self.role, self.device, size_of(self.role, self.device, small=small)
        )

    def columns(self, point: Point) -> dict[str, Any]:
        """What a line says of a point, beside its numbers."""
        return {"chip": self.chip, "kernel": self.kernel, "role": self.role,
                "entries": point.entry, "change": point.what}  # fmt: skip


def hold(place: Place) -> None:
    """Compiles and compares every point, several processes side by side."""
    earlier = done()
    left = [i for i, p in enumerate(place.points) if f"hold: {p.name}" not in earlier]
    slots = max(1, min(SLOTS, len(os.sched_getaffinity(0)) - 2, len(left)))
    with ThreadPoolExecutor(slots) as threads:
        list(threads.map(lambda i: _batch(place, left[i::slots]), range(slots)))


def _batch(place: Place, numbers: list[int]) -> None:
    """Some points in a process; in a new one those behind a point that ended it."""
    while numbers:
        at: list[int] = []

        def hear(line: str, at: list[int] = at, numbers: list[int] = numbers) -> None:
            journal.say(line)
            if line.startswith(journal.START):
                at.append(numbers[len(at)])

        words = ("hold", place.kernel, place.role, place.device, ",".join(map(str, numbers)))
        end = watch(
            module("bench.gpu.sweep", *words), hear, seconds=_SECONDS * len(numbers),
            silence=_SECONDS, env=None,
        )  # fmt: skip
        if end.code == 0:
            return
        if at:
            point = place.points[at[-1]]
            tell(f"hold: {point.name}", "crashed", reason=end.reason, **place.columns(point))
        numbers = numbers[max(len(at), 1) :]


def hold_these(place: Place, numbers: Iterable[int]) -> None:
    """In a process of its own: compiles and compares some points."""
    work = place.work(small=True)
    for number in numbers:
        point = place.points[number]
        start(f"hold: {point.name}")
        status, numbers_of = _held(work, place, point)
        tell(f"hold: {point.name}", status, **numbers_of, **place.columns(point))


def _held(work: Work, place: Place, point: Point) -> tuple[str, dict[str, Any]]:
    try:
        with tuning.override(point.text):
            wrong = work.held()
    except (CompilationError, OutOfResources, PTXASError) as why:
        return "refused", {"reason": f"does not compile: {str(why).strip().splitlines()[-1]}"}
    found = resources(place.kernel, place.role)
    if not wrong and found.get("spills"):
        wrong = f"spills {found['spills']} registers"
    return ("refused" if wrong else "ok"), found | {"reason": wrong}


def resources(kernel: str, role: str) -> dict[str, int]:
    """Registers, spills and shared memory of the kernel that was compiled last."""
    if role == "chunk":
        return {}
    function = {
        ("forward", False): fused._linear_logprob_fwd_kernel,
        ("dlogits", False): fused_dlogits._dlogits_kernel,
        ("forward", True): gluon_forward._gluon_fwd_kernel,
        ("dlogits", True): gluon_dlogits._gluon_dlogits_kernel,
    }[kernel, role == "gluon"]
    caches = getattr(function, "device_caches", {})  # none in the interpreter
    compiled = [made for cache in caches.values() for made in cache[0].values()]
    if not compiled:
        return {}
    last = compiled[-1]
    return {"registers": last.n_regs, "spills": last.n_spills, "shared": last.metadata.shared}


def time(place: Place, chosen: list[Point]) -> None:
    """Times points against the present one, a few at a time, interleaved."""
    earlier = done()
    refused = earlier.get(f"hold: {place.points[0].name}", {})
    broken = "" if refused.get("status", "ok") == "ok" else str(refused.get("reason"))
    chosen = [p for p in chosen if f"time: {p.name}" not in earlier]
    if not chosen:
        return
    reference = chosen[0] if broken else place.points[0]
    work, clock = place.work(), Clock(place.device)
    held: list[Point] = []
    for point in chosen:
        start(f"time: {point.name}")
        status, numbers = _held(work, place, point)
        if status == "ok":
            held.append(point)
        else:
            tell(f"time: {point.name}", status, **numbers, **place.columns(point))
        if len(held) == _AT_ONCE or (point is chosen[-1] and held):
            _race(place, work, clock, reference, held, broken)
            held = []


def _race(
    place: Place, work: Work, clock: Clock, reference: Point, held: list[Point], broken: str
) -> None:
    texts = {point.name: point.text for point in [reference, *held]}
    times = interleaved(work, clock, texts)
    for point in held:
        tell(
            f"time: {point.name}",
            **timing(times[point.name], times[reference.name], work),
            **place.columns(point),
            reference=reference.name,
            broken=broken,
        )


def interleaved(work: Work, clock: Clock, texts: dict[str, str]) -> dict[str, Times]:
    """Times of a call under different entries, one round after the other."""
    found: dict[str, list[float]] = {name: [] for name in texts}
    for turn in range(-2, _ROUNDS):
        for name, text in texts.items():
            with tuning.override(text):
                taken = clock.time(lambda: (work.run(), None)[1])
            if turn >= 0:
                found[name].append(taken)
    return {name: Times(tuple(ms), DRIFT[clock.device]) for name, ms in found.items()}


def timing(mine: Times, other: Times, work: Work) -> dict[str, Any]:
    """Milliseconds, the ratio to another with its interval, the rate."""
    ratio, low, high = mine.over(other)
    ms = mine.quantile(0.5)
    return {"ms": ms, "ratio": ratio, "ratio_low": low, "ratio_high": high,
            "tflops": work.flop / ms / 1e9, "size": str(work.size)}  # fmt: skip


def combine(place: Place) -> None:
    """Times the best changes of several kinds at once."""
    winners = []
    rows = done()
    for point in place.points[1:]:
        row = rows.get(f"time: {point.name}", {})
        if row.get("status") == "ok" and row["ratio_high"] < 1:
            winners.append((point, float(row["ratio"])))
    time(place, combined(place.points[0], winners, place.shared))


def plans(device: str) -> None:
    """Times each plan against "triton", by kernel and number of rows."""
    clock, earlier = Clock(device), done()
    _take_winners()
    chip = tuning.chip(torch.device(device))
    for rows in _PLAN_ROWS:
        for kernel in tuning.KERNELS:
            names = {f"plan: {kernel}, {rows} rows, {plan}": plan for plan in PLANS
                     if plan != "gluon" or chip == "sm_90"}  # fmt: skip
            if set(names) <= set(earlier):
                continue
            work = Work(kernel, "many", device, size_of("many", device, rows))
            for name, plan in names.items():
                if name in earlier:
                    continue
                start(name)
                common = {"chip": chip, "plan_of": kernel, "plan": plan, "rows": rows}
                with tuning.override(f"plan={plan}"):
                    wrong = work.held()
                if wrong:
                    tell(name, "refused", reason=wrong, **common)
                    continue
                texts = {"triton": "plan=triton", plan: f"plan={plan}"}
                times = interleaved(work, clock, texts)
                tell(name, **timing(times[plan], times["triton"], work), **common)


def _take_winners() -> None:
    """Plans are compared with the tiles that the sweep has found so far in force."""
    path = Path(os.environ.get("ROMA_GPU_JOURNAL", "")).with_name(table.TUNING)
    if path.exists() and "ROMA_TUNING" not in os.environ and not any(map(str.isspace, str(path))):
        os.environ["ROMA_TUNING"] = str(path)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["hold", "time", "combine", "plans"])
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    if options.stage == "plans":
        plans(*options.words)
        return 0
    kernel, role, device, *numbers = options.words
    place = Place(kernel, role, device)
    if numbers:
        hold_these(place, map(int, numbers[0].split(",")))
        return 0
    if options.stage == "time":
        held = done()
        time(place, [p for p in place.points
                     if held.get(f"hold: {p.name}", {}).get("status") == "ok"])  # fmt: skip
        return 0
    stages: dict[str, Callable[[Place], None]] = {"hold": hold, "combine": combine}
    stages[options.stage](place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
