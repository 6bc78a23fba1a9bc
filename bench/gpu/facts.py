"""Run as a program: the machine, its versions, and the two rates that everything is held against.

    python -m bench.gpu.facts cuda

`product`: TFLOP/s of one bf16 product 8192³ by the vendor's library, on random data, the median of
timed calls with cold caches; `copy`: GB/s read and written by a device copy. `load`: clocks and
power, read while products run one after another.
"""

import argparse
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench import nvidia
from bench.gpu.journal import start, tell
from bench.measure import Clock
from bench.processes import commit

PACKAGES = ("triton", "numpy", "transformers", "hypothesis", "pytest", "liger-kernel",
            "cut-cross-entropy", "trl", "verl", "quack-kernels")  # fmt: skip
_ASKED = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "clock_sm_mhz": "clocks.sm",
    "clock_sm_max_mhz": "clocks.max.sm",
    "clock_memory_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "throttled": "clocks_throttle_reasons.active",
    "ecc": "ecc.mode.current",
    "mig": "mig.mode.current",
}


def main(device: str) -> None:
    """Tells every fact."""
    for item, find in {
        "machine": machine,
        "versions": versions,
        "product": product,
        "copy": copy,
    }.items():
        start(item)
        tell(item, **find(device))
    if device == "cuda":
        start("load")
        tell("load", **load())


def machine(device: str) -> dict[str, Any]:
    """The device: name, multiprocessors, L2, memory, and what nvidia-smi says at rest."""
    cpu = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    found: dict[str, Any] = {
        "name": cpu[1] if cpu else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "commit": commit(),
    }
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {
            "name": about.name,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "l2_mib": getattr(about, "L2_cache_size", 0) / 2**20,
            "memory_gib": about.total_memory / 2**30,
        }
        found |= smi()
    return found


def versions(device: str) -> dict[str, Any]:
    """Python, torch, CUDA, the compilers and the peers."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = str(torch.version.cuda or torch.version.hip or "-")
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    return found


def product(device: str) -> dict[str, Any]:
    """The vendor's product in bf16, and the same that keeps its fp32 sums."""
    size, calls = (8192, 30) if device == "cuda" else (1024, 5)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).bfloat16() for _ in range(2)
    )
    forms: dict[str, Callable[[], Any]] = {"tflops": lambda: torch.mm(left, right)}
    if device == "cuda":  # only GPU libraries have a widening product
        forms["tflops_fp32_out"] = lambda: torch.mm(left, right, out_dtype=torch.float32)
    clock, flop, found = Clock(device), 2.0 * size**3, {"size": float(size)}
    for name, run in forms.items():
        times = [clock.time(run) for _ in range(calls)]
        found[name] = flop / statistics.median(times[2:]) / 1e9
        found[f"{name}_best"] = flop / min(times) / 1e9
    return found


def copy(device: str) -> dict[str, Any]:
    """A device copy, counting bytes read and bytes written."""
    size, calls = (2**31, 15) if device == "cuda" else (2**27, 5)
    source = torch.rand(size // 4, device=device)
    target, clock = torch.empty_like(source), Clock(device)

    def copies() -> None:
        target.copy_(source)

    times = [clock.time(copies) for _ in range(calls)]
    return {"mib": size / 2**20, "gb_s": 2 * size / statistics.median(times[2:]) / 1e6}


def load(seconds: float = 2.0) -> dict[str, Any]:
    """The rate, clocks and power of products that run one after another."""
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    seen: list[dict[str, Any]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.3):
            seen.append(smi())

    watcher = threading.Thread(target=look)
    watcher.start()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(20):
            left @ right
        calls += 20
        torch.cuda.synchronize()
    taken = time.perf_counter() - begin
    stop.set()
    watcher.join()
    found = {"tflops": 2.0 * 8192**3 * calls / taken / 1e12}
    return found | (seen[-1] if seen else {})


def smi() -> dict[str, Any]:
    """What nvidia-smi says now; nothing where it is not there."""
    return {name: _number(value) for name, value in nvidia.ask(_ASKED).items()}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", choices=["cpu", "cuda"])
    main(parser.parse_args().device)
