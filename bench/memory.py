"""Memory: what is free, and what one call of a candidate takes beside its inputs.

On a GPU torch's statistics say it, in the process that times (`peak`). On a CPU it is the peak of
resident memory (Linux), in a process of its own, which this file is as a program:

    python -m bench.memory '{"op": "roma_loss", …}' '["naive fp32"]' cpu '[]'

The call is made once to warm up (libraries, compilers, autotuning), and what it left is freed. The
second call is measured. Inputs do not count, gradients do.
"""

import ctypes
import gc
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.processes import die_with_parent, environment

# Large blocks go back to the system when they are freed, so that the second call's are seen.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def extra_mib(
    line: str, name: str, device: str, *, add: Sequence[str] = (), limit: float | None = None
) -> float:
    """Extra memory of one call, measured in a new process.

    Args:
        line: the variant (`Variant.line`).
        name: the candidate.
        device: "cpu" or "cuda".
        add: modules that add providers.
        limit: seconds that the process may take.

    Raises:
        RuntimeError: the process failed or took too long; the message has its last line.
    """
    return extras_mib(line, [name], device, add=add, limit=limit)[name]


def extras_mib(
    line: str,
    names: Sequence[str],
    device: str,
    *,
    add: Sequence[str] = (),
    limit: float | None = None,
) -> dict[str, float]:
    """The same of several candidates, one after the other in one process."""
    command = [sys.executable, "-m", "bench.memory", line, json.dumps(list(names)), device]
    try:
        done = subprocess.run(
            [*command, json.dumps(list(add))],
            capture_output=True,
            text=True,
            env=environment() | _ENVIRONMENT,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"its process took more than {limit:g} s") from late
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2] or "nothing"
        raise RuntimeError(f"its process ended with {done.returncode} and said {last}")
    return dict(zip(names, map(float, done.stdout.split()[-len(names) :]), strict=True))


def free(device: str) -> float:
    """Bytes that a call may take: of a GPU what no process has; of a CPU what /proc/meminfo says.

    Infinite where nobody says.
    """
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text() if meminfo.exists() else "")
    return int(found[1]) * 1024.0 if found else float("inf")


def peak(call: Callable[[], object]) -> float:
    """Bytes of a GPU that a warm call takes at its peak beside what was there."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def _resident(field: str) -> float:
    """VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024.0 if found else float("nan")


def _resident_peak(call: Callable[[], object]) -> float:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    base = _resident("VmRSS")
    call()
    return _resident("VmHWM") - base


def main(line: str, names: str, device: str, add: str = "[]") -> None:
    """Prints a number for each name."""
    from bench.ops import bench_of
    from bench.variants import Variant

    die_with_parent()
    for module in json.loads(add):
        importlib.import_module(module)
    bench = bench_of(Variant(**json.loads(line)), device, hold=False)
    for name in json.loads(names):
        run = bench.run(name)
        run()
        gc.collect()
        print((peak if device == "cuda" else _resident_peak)(run) / 2**20)


if __name__ == "__main__":
    main(*sys.argv[1:])
