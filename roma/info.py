"""What is installed, which devices there are, and which back end runs where, each with its reason.

It needs torch alone, and imports none of the packages it reports on: their versions are read from
what the installer recorded.
"""

import platform
import re
import shutil
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from roma.namesake import conflict
from roma_kernels import DISTRIBUTION, __version__
from roma_kernels.backends import backends, choose
from roma_kernels.native import LEVELS, level, native
from roma_kernels.products import widens


class _Package(NamedTuple):
    """An optional package: the distributions that may bring it, its use, what installs it."""

    name: str
    distributions: tuple[str, ...]
    purpose: str
    remedy: str


def _extra(name: str) -> str:
    return f"pip install '{DISTRIBUTION}[{name}]'"


_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
_TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm")
_OPTIONAL = (
    _Package("triton", _TRITON, "kernels on a GPU", "torch's CUDA wheels bring it"),
    _Package("transformers", ("transformers",), "training, evaluation", _extra("train")),
    _Package("datasets", ("datasets",), "data saved in its own form", _extra("train")),
    _Package("DALI", _DALI, "degraded images", _extra("views")),
    _Package("NumPy", ("numpy",), "views, data", _extra("train,views")),
    _Package("Hypothesis", ("hypothesis",), "roma.testing", _extra("testing")),
)


_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def info() -> dict[str, Any]:
    """Versions, devices, the compiled part and the back ends, as plain values for JSON.

    Returns:
        packages: name, version (None if not installed), purpose, and remedy (None if installed) of
            each.
        devices: type, available, description; and for those available the back end that "auto"
            takes there and the reason.
        native: available; a description (the build, or why there is none); the instruction set
            whose kernels run, or None.
        backends: name, available, reason.
        conflict: what is wrong if the other distribution that imports as `roma` is installed too.

    Example:
        >>> [backend["name"] for backend in info()["backends"]]
        ['triton', 'native', 'torch', 'reference']
    """
    return {
        "packages": _packages(),
        "devices": [_cpu(), *_gpus()],
        "native": _native(),
        "backends": [backend._asdict() for backend in backends()],
        "conflict": conflict(),
    }


def text(facts: dict[str, Any], *, width: int = 80) -> str:
    """The result of `info` as three small tables, in lines of at most `width` characters."""
    names = {package["name"]: package["version"] for package in facts["packages"]}
    fixed = (DISTRIBUTION, "Python", "torch")
    lines = [", ".join(f"{name} {names[name]}" for name in fixed if name in names)]
    if facts["conflict"]:
        lines += ["", *_wrap(f"conflict: {facts['conflict']}", width)]
    devices = [device for device in facts["devices"] if device["available"]]
    rows: list[tuple[str, ...]] = [("back end", "here", "auto on", "why")]
    for row in facts["backends"]:
        taken = dict.fromkeys(_DEVICES[d["type"]] for d in devices if d["backend"] == row["name"])
        rows.append((row["name"], _yes(row), ", ".join(taken), row["reason"]))
    lines += ["", *_table(rows, width)]
    rows = [("machine", "here", "what")]
    rows += [(_DEVICES[row["type"]], _yes(row), row["description"]) for row in facts["devices"]]
    if facts["native"]["available"]:  # otherwise the reason stands with the back end `native`
        rows.append(("compiled", "yes", facts["native"]["description"]))
    lines += ["", *_table(rows, width)]
    rows = [("package", "version", "for")]
    for package in facts["packages"]:
        if package["name"] not in fixed:
            remedy = f": {package['remedy']}" if package["remedy"] else ""
            rows.append((package["name"], package["version"] or "-", package["purpose"] + remedy))
    lines += ["", *_table(rows, width)]
    return "\n".join(lines)


def print_info() -> None:
    """Prints what `info` says, as wide as the terminal, within what reads well."""
    columns = shutil.get_terminal_size().columns
    print(text(info(), width=min(max(columns, 60), 100)))


def _yes(row: dict[str, Any]) -> str:
    return "yes" if row["available"] else "no"


def _table(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lines of a table whose last column wraps; the first row is its head."""
    columns = list(zip(*rows, strict=True))[:-1]
    widths = [max(map(len, column)) + 2 for column in columns]
    indent = " " * sum(widths)
    lines = []
    for row in rows:
        start = "".join(f"{cell:{wide}}" for cell, wide in zip(row[:-1], widths, strict=True))
        lines += _wrap(row[-1], width, start, indent)
    head = lines[0].upper()
    return [head, *lines[1:]]


def _wrap(said: str, width: int, first: str = "", indent: str = "") -> list[str]:
    """Lines of at most `width` characters; a command to copy stays on one line."""
    whole = re.sub(r"pip [^;]+", lambda found: found[0].replace(" ", "\xa0"), said)
    lines = textwrap.wrap(
        whole,
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [line.replace("\xa0", " ") for line in lines]


def _packages() -> list[dict[str, str | None]]:
    rows: list[dict[str, str | None]] = [
        {"name": name, "version": found, "purpose": "", "remedy": None}
        for name, found in (
            (DISTRIBUTION, __version__),
            ("Python", platform.python_version()),
            ("torch", torch.__version__),
        )
    ]
    for name, distributions, purpose, remedy in _OPTIONAL:
        found = next(filter(None, map(_version, distributions)), None)
        missing = None if found else remedy
        rows.append({"name": name, "version": found, "purpose": purpose, "remedy": missing})
    return rows


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    capability = torch.backends.cpu.get_cpu_capability()
    said = f"{platform.machine()}; torch uses {torch.get_num_threads()} threads and {capability}"
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
    device = torch.device("cuda", index)
    wide = [name for name in ("mm", "addmm") if widens(name, device, torch.bfloat16)]
    products = f"bf16 into fp32 by {' and '.join(wide)}" if wide else "bf16 products are upcast"
    return f"{index}: {found.name}, sm_{found.major}{found.minor}, {gibibytes:.0f} GiB; {products}"


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
        return {"available": False, "description": str(error), "instruction_set": None}
    runs = LEVELS[level()]
    said = f"instruction set {runs}"
    if runs != found.cpu_level:
        said += f" (ROMA_CPU_LEVEL; this CPU allows {found.cpu_level})"
    said += f", built by {found.compiler}"
    return {"available": True, "description": said, "instruction_set": runs}
