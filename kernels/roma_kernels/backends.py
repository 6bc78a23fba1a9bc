"""The back ends by name: which of them can run here, why or why not, and which one "auto" takes."""

import importlib.util
import os
from typing import NamedTuple

import torch

from roma_kernels.errors import fail
from roma_kernels.native import LEVELS, level, native

LEAST_CAPABILITY = (8, 0)
NAMES = ("auto", "triton", "native", "torch", "reference")


class Backend(NamedTuple):
    """One back end: its name, whether it can run here, and the reason in a sentence."""

    name: str
    available: bool
    reason: str


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", False, "triton is not installed; torch's CUDA wheels bring it")
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_name()
        capability = torch.cuda.get_device_capability()
        if capability < LEAST_CAPABILITY and not torch.version.hip:
            said = f"{chip} has capability {capability[0]}.{capability[1]}"
            return Backend("triton", False, f"{said}; the kernels need 8.0 (Ampere) for bf16")
        return Backend("triton", True, f"fused kernels, compiled when first called, on {chip}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Backend("triton", True, "in Triton's interpreter (TRITON_INTERPRET=1): for tests")
    return Backend("triton", False, "no CUDA or ROCm device; TRITON_INTERPRET=1 runs it for tests")


def _native() -> Backend:
    try:
        found = native()
    except ImportError as error:
        return Backend("native", False, str(error))
    return Backend("native", True, f"compiled CPU kernels for {LEVELS[level()]}, {found.compiler}")


def backends() -> list[Backend]:
    """All back ends, each with whether it can run here and why.

    Example:
        >>> [backend.name for backend in backends() if backend.available][-2:]
        ['torch', 'reference']
    """
    return [
        _triton(),
        _native(),
        Backend(
            "torch",
            True,
            "PyTorch in tiles: bounded workspace, fp32 logits, backward over active rows only",
        ),
        Backend(
            "reference",
            True,
            "plain PyTorch with all logits in memory: for tests, never chosen by auto",
        ),
    ]


def choose(device_type: str) -> tuple[str, str]:
    """The back end that "auto" takes on a device type ("cpu", "cuda"), and the reason."""
    preferred = "triton" if device_type == "cuda" else "native"
    for backend in backends():
        if backend.name in (preferred, "torch") and backend.available:
            return backend.name, backend.reason
    raise RuntimeError("the torch back end is always available")  # guaranteed by the table above


def resolve(backend: str, device_type: str, *, float64: bool = False) -> str:
    """The back end to run for the argument `backend`, on a device type, perhaps in float64.

    While torch.compile traces a call on a CPU, "auto" stays "auto": the operator chooses when it
    runs.

    Raises:
        ValueError: `backend` is no known name, or it cannot run here or on these tensors.
    """
    if torch.compiler.is_compiling():
        # Tracing cannot probe the machine; on CUDA Inductor needs Triton anyway.
        if backend == "auto" and float64:
            return "torch"
        if backend == "auto" and device_type == "cuda":
            return "triton"
        if backend in NAMES:
            return _fit(backend, _unfit(backend, device_type, float64))
    elif backend == "auto":
        return "torch" if float64 else choose(device_type)[0]
    else:
        for known in backends():
            if known.name == backend:
                reason = _unfit(backend, device_type, float64) if known.available else known.reason
                return _fit(backend, reason)
    fail(
        "backend",
        "one of " + ", ".join([repr(name) for name in NAMES]),
        repr(backend),
        "use 'auto'",
    )


def _fit(backend: str, reason: str) -> str:
    """The back end itself, unless there is a reason against it."""
    if reason:
        remedy = "use 'auto' or ask `roma info`"
        fail("backend", "one that can run here", f"{backend!r}, but {reason}", remedy)
    return backend


def _unfit(backend: str, device_type: str, float64: bool) -> str:
    """Why an available back end cannot take such tensors; "" if it can."""
    if backend not in ("triton", "native"):
        return ""
    if backend == "native" and device_type != "cpu":
        return "the tensors are not on the CPU"
    if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU"
    return f"{backend} has no float64 products" if float64 else ""
