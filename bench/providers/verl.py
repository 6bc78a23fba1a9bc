"""verl's two heads, without verl's dependencies.

`import verl` needs ray, tensordict, a tokenizer and more. The files of the heads need torch and
Triton. So they are imported from the installed distribution as modules of a package of another
name, whose `__init__` is empty. What they import from `verl.…` by its full name is found there too,
for as long as it takes: `verl` and `verl.utils` are then packages without their `__init__`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

from torch import Tensor

from bench.providers.base import BROKEN, Score, Unavailable, on_gpu, reason

ALIAS = "_verl_heads"
FOLDERS = ("utils/kernel", "utils/experimental")


def head_module(name: str) -> ModuleType:
    """`linear_cross_entropy` or `torch_functional` of the installed verl.

    Raises:
        Unavailable: verl is not installed, or its files are not what they were in 0.9.1.
    """
    try:
        if ALIAS not in sys.modules:
            root = _root()
            sys.modules[ALIAS] = _bare(ALIAS, [root / folder for folder in FOLDERS])
        with _without_init(_root()):
            if name == "linear_cross_entropy":
                import_module(f"{ALIAS}.kernels")  # it would import that at its first call
            return import_module(f"{ALIAS}.{name}")
    except BROKEN as why:
        raise Unavailable(reason("verl", why)) from why


def _root() -> Path:
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'verl'")
    return Path(spec.submodule_search_locations[0])


def _bare(name: str, folders: list[Path]) -> ModuleType:
    """A package of these folders whose `__init__` is empty."""
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder) for folder in folders]
    return module_from_spec(spec)


@contextmanager
def _without_init(root: Path) -> Iterator[None]:
    """Inside, `verl` and `verl.utils` are bare packages; afterwards all is as it was."""
    before = _modules()
    for name in before:
        del sys.modules[name]
    sys.modules["verl"] = _bare("verl", [root])
    sys.modules["verl.utils"] = _bare("verl.utils", [root / "utils"])
    try:
        yield
    finally:
        for name in _modules():
            del sys.modules[name]
        sys.modules.update(before)


def _modules() -> dict[str, ModuleType]:
    return {n: m for n, m in sys.modules.items() if n == "verl" or n.startswith("verl.")}


def _triton(device: str) -> Score:
    module = head_module("linear_cross_entropy")

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        if states.shape[1] % 128:
            raise Unavailable(f"hidden sizes divisible by 128 only, got {states.shape[1]}")
        found: Tensor = module.linear_cross_entropy(
            states.contiguous(), weight.contiguous(), tokens.contiguous(), 1.0, "none"
        )[0]
        return found

    return score


def chunked(device: str) -> Score:
    """FusedLinearForPPO: plain PyTorch on 512 rows at a time."""
    fused = head_module("torch_functional").FusedLinearForPPO()

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        found: Tensor = fused(states, weight, tokens)[0]
        return found

    return score


triton = on_gpu(_triton)
