"""Compiles what launches and reads what the compiler made of it."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.errors import TritonError

from bench.compiled.chips import CHIPS, Chip
from bench.compiled.launches import Launch


@dataclass(frozen=True)
class Made:
    """What came out of the compiler, or why nothing did."""

    registers: int = 0
    spilled: int = 0
    """Bytes of a thread's stack: what does not fit into its registers."""
    shared: int = 0
    """Bytes of shared memory of a program."""
    matrix: int = 0
    """Matrix instructions in the code."""
    loads: str = ""
    """How the code reads matrices: "TMA", "cp.async" or "registers"."""
    failure: str = ""


def make(launch: Launch, chip: Chip) -> Made:
    """Compiles one launch for one chip."""
    try:
        compiled = launch.compiled(chip.target)
    except (TritonError, RuntimeError) as error:  # a pass that fails raises a RuntimeError
        return Made(failure=_said(error))
    if chip.target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = amd_resources(text)
    else:
        text = compiled.asm["ptx"]
        registers, spilled = nvidia_resources(_dumped("cuobjdump", "-res-usage", compiled))
    shared, matrix = int(compiled.metadata.shared), text.count(chip.matrix)
    return Made(registers, spilled, shared, matrix, loads_of(text))


def _said(error: BaseException) -> str:
    """The last line of what started it: Triton wraps an error in each function that led to it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:200]}"


def machine_code(launch: Launch, chip: Chip) -> str:
    """What `nvdisasm` prints of a launch on one of NVIDIA's chips."""
    return _dumped("nvdisasm", "-c", launch.compiled(chip.target))


def _dumped(program: str, option: str, compiled: object) -> str:
    """What a program in Triton's wheel says of the object that would be loaded.

    Not of a second run of ptxas: which one, and with which options, differs between Tritons.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / program
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])  # type: ignore[attr-defined]
        return subprocess.run(
            [tool, option, path], capture_output=True, text=True, check=True
        ).stdout


def loads_of(assembly: str) -> str:
    """How PTX or AMD's assembly reads matrices."""
    if "cp.async.bulk.tensor" in assembly:
        return "TMA"
    return "cp.async" if "cp.async" in assembly else "registers"


def nvidia_resources(told: str) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from `cuobjdump -res-usage`.

    Raises:
        ValueError: the text has no such line.
    """
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    if len(found) != 1:
        raise ValueError(f"cuobjdump: expected the resources of one kernel, got {told!r}")
    registers, stack, local = map(int, found[0])
    return registers, stack + local


def amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory of a lane, from the metadata of AMD's assembly.

    Scalar registers spill into lanes of vector registers, not into memory.

    Raises:
        ValueError: the assembly has no such metadata.
    """
    numbers = {k: int(v) for k, v in re.findall(r"\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    if not numbers.keys() >= set(names):
        raise ValueError(f"assembly: expected metadata with {', '.join(names)}, got none")
    registers, scratch, spills = (numbers[name] for name in names)
    return registers, max(scratch, 4 * spills)


def faults(launch: Launch, made: Made, chip: Chip) -> list[str]:
    """What is wrong with a build."""
    if made.failure:
        return [f"does not compile: {made.failure}"]
    found = []
    if made.spilled:
        found.append(f"{made.spilled} bytes spilled")
    if made.shared > chip.shared:
        found.append(f"{made.shared} bytes of shared memory, the chip has {chip.shared}")
    if launch.is_product and not made.matrix:
        found.append(f"no {chip.matrix}")
    return found


def make_all(jobs: list[tuple[str, Launch]], processes: int) -> Iterator[Made]:
    """Compiles launches for chips, by name, in several processes; results in the order of jobs."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_make, jobs, chunksize=2)


def _make(job: tuple[str, Launch]) -> Made:
    chip, launch = job
    return make(launch, CHIPS[chip])
