"""The steps, most valuable first, and what each of them needs.

    facts      the machine, its versions, the rate of a product and of a copy
    correct    ours against float64 on a few shapes, each plan in a process of its own
    decisive   the benchmark's first lines
    tests      pytest -m gpu, a process a test
    benchmark  the rest of preset "card"
    sweep      tiles and plans for this chip
    profile    time by kernel, the hardware's counters
    sanitizer  out-of-bounds accesses and races
    paper      the benchmark's preset "paper"
    roles      the sweep of the roles that are rarer

Without a card each takes its form for a CPU, if it has one.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import processes
from bench.gpu.budget import Part, Step
from bench.processes import module

PLANS = ("triton", "vendor", "gluon")
NO_CARD = "needs a card"
_INTERPRETED = (("TRITON_INTERPRET", "1"), ("OMP_NUM_THREADS", "1"))
_PROBE = """
import importlib.util, json
found = {name: importlib.util.find_spec(name) is not None
         for name in ("torch", "triton", "pytest", "hypothesis", "numpy")}
if found["torch"]:
    import torch
    found["cuda"] = torch.cuda.is_available()
    nvidia = found["cuda"] and not torch.version.hip
    found["chip"] = torch.cuda.get_device_capability() if nvidia else ()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Machine:
    """What decides which parts can run."""

    device: str
    capability: tuple[int, ...] = ()
    modules: frozenset[str] = frozenset()
    tools: frozenset[str] = frozenset()

    def lacks(self, *names: str) -> str:
        """Which of these modules are not installed, in words; "" if all are."""
        missing = [name for name in names if name not in self.modules]
        return f"not installed: {', '.join(missing)}" if missing else ""


def probe(device: str | None = None) -> Machine:
    """This machine, as a new process sees it.

    Raises:
        ValueError: Python has no torch, or the device that was asked for is not there.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"{sys.executable}: expected a Python that imports torch, got {last!r}")
    found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    if not found["torch"]:
        raise ValueError(f"{sys.executable}: expected torch, which is not installed")
    if device == "cuda" and not found["cuda"]:
        raise ValueError("--device cuda: expected a card, torch sees none; leave it out")
    chosen = device or ("cuda" if found["cuda"] else "cpu")
    return Machine(
        chosen,
        tuple(found["chip"]) if chosen == "cuda" else (),
        frozenset(name for name, there in found.items() if there is True),
        frozenset(name for name in ("ncu", "compute-sanitizer") if shutil.which(name)),
    )


def steps(machine: Machine, out: Path) -> list[Step]:
    """All steps of a machine, in order."""
    return _on_card(machine, out) if machine.device == "cuda" else _on_cpu(machine, out)


def _on_card(machine: Machine, out: Path) -> list[Step]:
    no_triton = machine.lacks("triton")
    no_pytest = machine.lacks("pytest", "hypothesis")
    no_gluon = "" if machine.capability[:1] == (9,) else "its kernels are for sm_90"
    fallback = "" if no_pytest else "pytest is here"
    no_ncu = "" if "ncu" in machine.tools else "ncu is not on the PATH"
    no_tool = "" if "compute-sanitizer" in machine.tools else "compute-sanitizer is not on the PATH"

    def correct(level: str, plan: str, **how: Any) -> Part:
        command = module("bench.gpu.correct", level, plan, "cuda")
        absent = no_gluon if plan == "gluon" else no_triton if plan in PLANS else ""
        return Part(plan, tuple(command), expect=45, limit=150, silence=90, restarts=6,
                    absent=absent, **how)  # fmt: skip

    def sweep(name: str, *words: str, expect: float, after: str = "", absent: str = "") -> Part:
        command = tuple(module("bench.gpu.sweep", *words))
        return Part(name, command, expect, 3 * expect, silence=120, restarts=12, forgiving=True,
                    after=after, absent=no_triton or absent)  # fmt: skip

    def points(kernel: str, role: str, *stages: tuple[str, float]) -> Iterator[Part]:
        before = ""
        for stage, expect in stages:
            name = f"{stage} {kernel}.{role}"
            yield sweep(name, stage, kernel, role, "cuda", expect=expect, after=before,
                        absent=no_gluon if role == "gluon" else "")  # fmt: skip
            before = name

    def tool(name: str, plan: str, absent: str) -> Part:
        command = ["compute-sanitizer", "--tool", name, "--error-exitcode", "86"]
        command += module("bench.gpu.correct", "small", plan, "cuda")
        return Part(f"{name}, {plan}", tuple(command), expect=60, limit=180,
                    absent=absent or no_tool,
                    env=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))  # fmt: skip

    return [
        Step("facts", "the machine and its two rates", (
            Part("card", tuple(module("bench.gpu.facts", "cuda")), expect=25, limit=120),
        )),
        Step("correct", "ours against float64", tuple(
            correct("essential", plan) for plan in (*PLANS, "torch")
        )),
        Step("decisive", "the benchmark's first lines", (
            _benchmark("card", "cuda", out, expect=180, first=2),
        )),
        Step("tests", "pytest -m gpu", (
            Part("pytest", tuple(module("bench.gpu.tests", "gpu")), expect=240,
                 limit=900, least=60, silence=600, absent=no_pytest),
        )),
        Step("fallback", "more shapes against float64, where there is no pytest", tuple(
            correct("more", plan) if not fallback else
            Part(plan, (), 1, 1, absent=fallback) for plan in PLANS
        )),
        Step("benchmark", 'the rest of preset "card"', (
            _benchmark("card", "cuda", out, expect=300),
        )),
        Step("sweep", "tiles and plans for this chip", (
            *points("forward", "many", ("hold", 60), ("time", 40), ("combine", 30)),
            *points("dlogits", "many", ("hold", 60), ("time", 40), ("combine", 30)),
            *points("forward", "gluon", ("hold", 25), ("time", 25)),
            *points("dlogits", "gluon", ("hold", 25), ("time", 25)),
            *points("forward", "chunk", ("hold", 25), ("time", 25)),
            sweep("plans", "plans", "cuda", expect=75),
        )),
        Step("profile", "time by kernel, counters", (
            Part("kernels", tuple(module("bench.gpu.profile", "kernels", "cuda")), expect=25,
                 limit=120),
            *(Part(f"ncu {plan}", tuple(module("bench.gpu.profile", "ncu", plan)), expect=60,
                   limit=240, absent=no_ncu or (no_gluon if plan == "gluon" else ""))
              for plan in ("triton", "gluon")),
        )),
        Step("sanitizer", "memory and races, on small cases", (
            tool("memcheck", "triton", no_triton),
            tool("memcheck", "vendor", no_triton),
            tool("memcheck", "gluon", no_gluon),
            tool("racecheck", "gluon", no_gluon),
        )),
        Step("paper", 'the benchmark\'s preset "paper"', (
            _benchmark("paper", "cuda", out, expect=900),
        )),
        Step("roles", "the sweep of the roles that are rarer", tuple(
            part
            for role in ("options", "few", "unaligned")
            for kernel in ("forward", "dlogits")
            for part in points(kernel, role, ("hold", 60), ("time", 40))
        )),
    ]  # fmt: skip


def _on_cpu(machine: Machine, out: Path) -> list[Step]:
    no_triton = machine.lacks("triton")
    no_pytest = machine.lacks("pytest", "hypothesis")

    def part(name: str, *words: str, expect: float, absent: str = "", interpreted: bool = True,
             **how: Any) -> Part:  # fmt: skip
        env = _INTERPRETED if interpreted else _INTERPRETED[1:]
        return Part(name, tuple(module(*words)), expect, 90, env=env, absent=absent, **how)

    def card(name: str) -> Part:
        return Part(name, (), 1, 1, absent=NO_CARD)

    return [
        Step("facts", "the machine and its two rates", (
            part("cpu", "bench.gpu.facts", "cpu", expect=6, interpreted=False),
        )),
        Step("correct", "ours against float64, Triton's kernels interpreted", (
            *(part(plan, "bench.gpu.correct", "interpreted", plan, "cpu", expect=8,
                   absent=no_triton) for plan in ("triton", "vendor")),
            part("torch", "bench.gpu.correct", "interpreted", "torch", "cpu", expect=8),
            card("gluon"),
        )),
        Step("decisive", "the benchmark's first line", (
            _benchmark("smoke", "cpu", out, expect=20, first=1),
        )),
        Step("tests", "the forms for a CPU of the tests of a card", (
            part("pytest", "bench.gpu.tests", "interpreted", expect=25,
                 absent=no_pytest or no_triton, least=10),
        )),
        Step("fallback", "more shapes against float64, where there is no pytest", (
            part("torch", "bench.gpu.correct", "small", "torch", "cpu", expect=8,
                 absent="" if no_pytest else "pytest is here"),
        )),
        Step("benchmark", 'more of preset "smoke"', (
            _benchmark("smoke", "cpu", out, expect=20, first=3),
        )),
        Step("sweep", "a point of each kernel, interpreted", (
            *(part(f"{stage} {kernel}.few", "bench.gpu.sweep", stage, kernel, "few", "cpu",
                   expect=10, absent=no_triton, forgiving=True,
                   after=f"hold {kernel}.few" if stage == "time" else "")
              for kernel in ("forward", "dlogits") for stage in ("hold", "time")),
        )),
        Step("profile", "time by operator", (
            part("kernels", "bench.gpu.profile", "kernels", "cpu", expect=10, interpreted=False),
            card("ncu"),
        )),
        Step("sanitizer", "memory and races", (card("memcheck"),)),
        Step("paper", 'the benchmark\'s preset "paper"', (card("paper"),)),
        Step("roles", "the sweep of the roles that are rarer", (card("roles"),)),
    ]  # fmt: skip


def _benchmark(
    preset: str, device: str, out: Path, *, expect: float, first: int | None = None
) -> Part:
    command = module("bench.gpu.benchmark", preset, device, "{minutes}", str(out / "bench.csv"))
    least = 90.0 if device == "cuda" else 10.0
    return Part(
        preset,
        tuple(command + ([str(first)] if first else [])),
        expect,
        limit=4 * expect,
        least=least,
        silence=400,
    )


def names() -> list[str]:
    """The steps' names, in order."""
    machine = Machine("cpu", modules=frozenset({"torch", "triton", "pytest", "hypothesis"}))
    return [step.name for step in steps(machine, processes.ROOT)]
