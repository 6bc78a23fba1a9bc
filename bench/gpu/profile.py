"""Run as a program: where the time goes, by kernel, and what the hardware's counters say.

    python -m bench.gpu.profile kernels DEVICE    torch's profiler: one call of the whole loss
    python -m bench.gpu.profile ncu PLAN          Nsight Compute: our forward and dlogits
    python -m bench.gpu.profile case PLAN         what Nsight Compute runs

The card's clocks are left as they are (--clock-control none): counters and times are those of the
card as it is found.
"""

import argparse
import csv
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import roma
from bench import data
from bench.gpu.correct import Case, loss_options, planned, shape_of
from bench.gpu.journal import CANNOT, start, tell
from bench.processes import ROOT, environment, module

LOSS = {
    "cuda": Case("loss", 4, 256, 4, 4096, 151_936),
    "cpu": Case("loss", 2, 8, 2, 64, 1000, torch.float32),
}
ROWS = 4096
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis",
            "MemoryWorkloadAnalysis_Tables", "WarpStateStats", "SchedulerStats", "LaunchStats",
            "Occupancy")  # fmt: skip
OURS = "linear_logprob|dlogits|row_sums|merge"
# Each counter by the end of its name, which has changed less between chips than the whole of it.
COUNTERS = {
    "time ms": r"^gpu__time_duration\.sum",
    "SM clock GHz": r"smsp?__cycles_elapsed\.avg\.per_second",
    "SM throughput %": r"^sm__throughput\.avg\.pct_of_peak_sustained_elapsed",
    "memory throughput %": r"compute_memory_throughput\.avg\.pct_of_peak_sustained_elapsed",
    "tensor pipe %": r"^sm__.*pipe_tensor.*cycles_active.*pct_of_peak_sustained_active",
    "tensor instructions %": r"^sm__inst_executed_pipe_tensor.*pct_of_peak_sustained_active",
    "issue slots busy %": r"^sm__inst_(issued|executed)\.avg\.pct_of_peak_sustained_active",
    "executed IPC": r"^sm__inst_executed\.avg\.per_cycle_active",
    "L2 hit %": r"^lts__t_sector_hit_rate\.pct",
    "L1 hit %": r"^l1tex__t_sector_hit_rate\.pct",
    "DRAM throughput %": r"dram_throughput\.avg\.pct_of_peak_sustained_elapsed",
    "DRAM GB/s": r"^dram__bytes\.sum\.per_second",
    "DRAM read MB": r"^dram__bytes_read\.sum( |$)",
    "registers": r"^launch__registers_per_thread( |$)",
    "shared KB": r"^launch__shared_mem_per_block( |$)",
    "grid": r"^launch__grid_size",
    "warps active": r"^sm__warps_active\.avg\.per_cycle_active",
}
METRICS = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
)
"""Asked for beside the sections; a chip that does not know one refuses them all."""
STALLS = (
    r"^smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio$",
    r"^smsp__average_warp_latency_issue_stalled_(\w+?)\.ratio$",
    r"^smsp__warp_issue_stalled_(\w+?)_per_warp_active\.pct$",
)
"""Why warps wait; the first form that there is."""
_UNITS = {"nsecond": 1e-6, "ns": 1e-6, "usecond": 1e-3, "us": 1e-3, "msecond": 1.0, "ms": 1.0,
          "second": 1e3, "s": 1e3, "Kbyte": 1e-3, "byte": 1e-6, "Mbyte": 1.0, "Gbyte": 1e3,
          "byte/block": 1e-3, "Kbyte/block": 1.0, "byte/s": 1e-9, "byte/second": 1e-9,
          "Ghz": 1.0, "Mhz": 1e-3, "hz": 1e-9, "Gbyte/s": 1.0, "Mbyte/s": 1e-3, "Tbyte/s": 1e3,
          "Gbyte/second": 1.0, "Mbyte/second": 1e-3, "Tbyte/second": 1e3}  # fmt: skip


def kernels(device: str) -> None:
    """Tells the time of every kernel of one call of the whole loss, forward and backward."""
    case = LOSS[device]
    made = data.make(shape_of(case), device)
    batch = (case.sequences, case.length)
    old = torch.full(batch, -1.0, device=device)
    options = loss_options(case, old)

    def call() -> None:
        states = made.states.detach().requires_grad_()
        weight = made.weight.detach().requires_grad_()
        views = states.view(case.views + 1, *batch, -1)
        out = roma.roma_loss(views[0], views[1:], weight, made.tokens.view(batch), **options)
        out.loss.backward()

    call()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + ([activity.CUDA] if device == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    events = timed_once(profile.key_averages(), device)
    total = sum(ms for *_, ms in events)
    for key, count, ms in sorted(events, key=lambda event: -event[2])[:25]:
        tell(f"time: {key[:120]}", calls=count, ms=ms, percent=100 * ms / total)
    tell("time: all", calls=sum(count for _, count, _ in events), ms=total, percent=100.0)


def timed_once(averages: Iterable[Any], device: str) -> list[tuple[str, int, float]]:
    """Name, calls and ms of what took time on a device, each piece of work once.

    On a GPU the profiler gives a kernel's time to the kernel and to the operator that launched it:
    only the device's own events count there.
    """
    kind, name = torch.autograd.DeviceType.CPU, "self_cpu_time_total"
    if device == "cuda":
        kind, name = torch.autograd.DeviceType.CUDA, "self_device_time_total"
    events = [(e.key, e.count, getattr(e, name) / 1e3) for e in averages if e.device_type == kind]
    return [event for event in events if event[2] > 0]


def profiled(plan: str) -> None:
    """Forward and dlogits, once to compile and once inside the profiler's range."""
    made = data.make(data.Shape(ROWS, 0, 4096, 151_936), "cuda")

    def call() -> None:
        rows, weight = (x.detach().requires_grad_() for x in (made.rows, made.weight))
        found = roma.linear_logprob(rows, weight, made.tokens, backend="triton")
        found.logp.sum().backward()

    with planned(plan):
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def ncu(plan: str) -> int:
    """Runs Nsight Compute on `profiled` and tells the counters of each of our kernels."""
    start(f"{plan}: ncu")
    found: list[tuple[str, dict[str, float]]] = []
    for metrics in (METRICS, ()):
        text = _ncu(plan, metrics)
        print(text[:20_000])
        if "ERR_NVGPUCTRPERM" in text:
            print("the driver keeps its counters from this user (ERR_NVGPUCTRPERM)")
            return CANNOT
        found = list(counted(text))
        if found:
            break
    for name, counters in found:
        tell(f"{plan}: {name}", **counters)
    if not found:
        print("ncu counted nothing")
        return 1
    tell(f"{plan}: ncu", launches=len(found))
    return 0


def _ncu(plan: str, metrics: tuple[str, ...]) -> str:
    """What it writes, whatever it is."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--csv", "--page", "raw", "--log-file", str(log), "--clock-control",
                   "none", "--profile-from-start", "off", "--target-processes", "all",
                   "--kernel-name", f"regex:{OURS}", "--launch-count", "4"]  # fmt: skip
        for section in SECTIONS:
            command += ["--section", section]
        if metrics:
            command += ["--metrics", ",".join(metrics)]
        command += module("bench.gpu.profile", "case", plan)
        done = subprocess.run(command, cwd=ROOT, env=environment(), check=False)
        text = log.read_text(errors="replace") if log.exists() else ""
    return text + f"ncu ended with {done.returncode}\n"


def counted(text: str) -> Iterator[tuple[str, dict[str, float]]]:
    """The counters of each launch in Nsight Compute's CSV; nothing of what is no such table."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if len(rows) < 2 or "Kernel Name" not in rows[0]:
        return
    units, seen = rows[0], dict.fromkeys((row["Kernel Name"] for row in rows[1:]), 0)
    for row in rows[1:]:
        kernel = row["Kernel Name"]
        seen[kernel] += 1
        found: dict[str, float] = {}
        for label, pattern in COUNTERS.items():
            for column in row:
                value = None
                if column and re.search(pattern, column):
                    value = _value(row[column], units.get(column) or "")
                if value is not None:
                    found.setdefault(label, value)
        for pattern in STALLS:
            stalls = {}
            for column in row:
                named = re.match(pattern, column or "")
                value = _value(row[column], "") if named else None
                if named and value is not None and not named[1].endswith("not_issued"):
                    stalls[named[1]] = value
            for name in sorted(stalls, key=stalls.__getitem__, reverse=True)[:4]:
                found[f"stalled on {name}"] = stalls[name]
            if stalls:
                break
        yield f"{kernel[:60]} #{seen[kernel]}", found


def _value(text: str | None, unit: str) -> float | None:
    """A number in the unit that the page has: ms, MB, GHz, GB/s."""
    try:
        return float((text or "").replace(",", "")) * _UNITS.get(unit, 1.0)
    except ValueError:
        return None


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kernels", "ncu", "case"])
    parser.add_argument("which")
    options = parser.parse_args()
    if options.what == "ncu":
        return ncu(options.which)
    (kernels if options.what == "kernels" else profiled)(options.which)
    return 0


if __name__ == "__main__":
    sys.exit(main())
