"""What a provider is, and how one that cannot run here says so."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
Load = Callable[[str], Score]

# Seen when peers were imported where they did not fit: a missing module, a shared library of
# another system, another Triton's names, and QuACK's TypeError where CUTLASS lies in a folder
# that is not named site-packages.
BROKEN = (ImportError, OSError, AttributeError, TypeError, RuntimeError)


class Unavailable(Exception):
    """Why a provider cannot run here."""


@dataclass(frozen=True)
class Provider:
    """One implementation of the log-probs of the sampled tokens."""

    name: str
    package: str
    what: str
    load: Load
    """The function on a device type; raises Unavailable."""
    logits: str = "fp32"
    """The dtype in which logits reach the softmax."""
    passes: str = ""
    """Products of all rows with the head, forward + backward; the rows with a gradient count in
    the backward."""
    cuda: bool = False
    """Whether it needs a GPU."""


def version_of(package: str) -> str:
    """An installed package's version; "-" where it is not installed, as ours in a bare checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def taken(package: str, module: str, *names: str) -> list[Any]:
    """Objects of a peer's module; raises Unavailable with the reason in one line."""
    try:
        found = import_module(module)
        return [getattr(found, name) for name in names]
    except BROKEN as why:
        raise Unavailable(reason(package, why)) from why


def reason(package: str, why: BaseException) -> str:
    """One line: how to get a package, or why an installed one does not work here."""
    first = str(why).partition("\n")[0]
    installed = version_of(package)
    if installed == "-":
        return f"pip install {package} ({first})"
    return f"{package} {installed} does not import: {first}"


def on_gpu(load: Load, *, hopper: bool = False) -> Load:
    """A provider for GPUs alone, or for Hopper's alone (sm_90)."""

    def checked(device: str) -> Score:
        if device != "cuda" or not torch.cuda.is_available():
            raise Unavailable("needs a GPU" if not hopper else "needs a GPU of sm_90 (H100, H200)")
        major, minor = torch.cuda.get_device_capability()
        if hopper and (major, minor) != (9, 0):
            raise Unavailable(f"a kernel of sm_90 (H100, H200); this is sm_{major}{minor}")
        return load(device)

    return checked


def of_dtypes(score: Score, *dtypes: torch.dtype) -> Score:
    """A provider that takes some dtypes only."""
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def checked(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        if states.dtype not in dtypes:
            raise Unavailable(f"takes {names} only")
        return score(states, weight, tokens)

    return checked
