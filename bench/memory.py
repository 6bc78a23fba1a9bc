"""Run as a program: extra memory of one call of one candidate, in MiB, in a process of its own.

    python -m bench.memory '{"op": "roma_loss", …}' "naive fp32" cpu

The call is made once to warm up (libraries, compilers, autotuning), and what it left is freed. The
second call is measured: by torch's statistics on a GPU, by the peak of resident memory on a CPU
(Linux). Inputs do not count, gradients do.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

# Large blocks go back to the system when they are freed, so that the second call's are seen.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def extra_mib(line: str, name: str, device: str) -> float:
    """Extra memory of one call, measured in a new process.

    Raises:
        RuntimeError: the process failed; the message has the last line that it wrote.
    """
    command = [sys.executable, "-m", "bench.memory", line, name, device]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | _ENVIRONMENT, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2] or "nothing"
        raise RuntimeError(f"its process ended with {done.returncode} and said {last}")
    return float(done.stdout.split()[-1])


def _resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def main(line: str, name: str, device: str) -> None:
    """Prints the number."""
    import torch

    from bench.ops import bench_of
    from bench.variants import Variant

    run = bench_of(Variant(**json.loads(line)), device, hold=False).run(name)
    run()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    base = _resident("VmRSS")
    run()
    print(_resident("VmHWM") - base)


if __name__ == "__main__":
    main(*sys.argv[1:])
