"""What an integration checks before training: the package, its version, its signatures.

An integration overrides methods of a class that others change without notice. So it names the
versions that it was tested with and the parameters that it relies on, and what does not fit is one
line before the first step, not a wrong gradient after it.
"""

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from roma_kernels.errors import fail

_UNSLOTH = ("unsloth", "unsloth_zoo", "unsloth_compiled_cache")
_PATCHED = ("trl.trainer.grpo_trainer", "GRPOTrainer")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def require(module: str, install: str) -> ModuleType:
    """Imports a module, or says what to install.

    Args:
        module: its dotted name: "trl.trainer.grpo_trainer".
        install: what pip is to be given: "roma-vlm[trl]".

    Returns:
        The module.

    Raises:
        ImportError: the module, or one that it imports, is not installed. (Other errors of its
            import are passed on as they are.)
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        got = f"no module {error.name}"
        message = f"{module}: expected it to be installed, got {got}; pip install '{install}'"
        raise ImportError(message, name=error.name) from error


def check_version(package: str, low: str, high: str) -> str:
    """Refuses a package whose version was not tested.

    Args:
        package: the distribution's name: "trl".
        low: the oldest that fits, inclusive; compared in as many parts as it has: "1.16".
        high: the newest, inclusive in the same way: "1.17" takes 1.17.3 and 1.17.0.dev0.

    Returns:
        The installed version.

    Raises:
        ValueError: the package is not installed, or is outside of the range; the message has the
            installed version and what to install.

    Example:
        >>> import torch
        >>> check_version("torch", "2.0", "99") == torch.__version__
        True
    """
    from packaging.version import InvalidVersion, Version

    above = [*Version(high).release[:-1], Version(high).release[-1] + 1]
    remedy = f"pip install '{package}>={low},<{'.'.join(map(str, above))}'"
    expected = low if low == high else f"{low} to {high}"
    try:
        found = importlib.metadata.version(package)
        release = Version(found).release
    except importlib.metadata.PackageNotFoundError:
        fail(package, f"version {expected}", "no such package", remedy)
    except InvalidVersion:
        fail(package, f"version {expected}", f"{found!r}, which is no version", remedy)
    older = _parts(release, low) < Version(low).release
    if older or _parts(release, high) > Version(high).release:
        fail(package, f"version {expected}, which was tested", found, remedy)
    return found


def _parts(release: tuple[int, ...], bound: str) -> tuple[int, ...]:
    """As many parts of a release as the bound has; 2 is 2.0 where two are asked."""
    from packaging.version import Version

    count = len(Version(bound).release)
    return (release + (0,) * count)[:count]


def check_parameters(function: Callable[..., Any], expected: Sequence[str], where: str) -> None:
    """Refuses a function whose parameters are not those that an override was written for.

    Decorators that keep `__wrapped__` are looked through. A first parameter self or cls is left out
    unless `expected` begins with it. A new parameter with a default is accepted where it moves no
    other: after the expected ones, or by keyword only.

    Args:
        function: what is overridden or called.
        expected: names of its parameters, in order; of *args and **kwargs the bare name.
        where: what the message calls it: "trl.GRPOTrainer._compute_loss".

    Raises:
        ValueError: names are missing, new and required, or stand elsewhere; the message lists them.

    Example:
        >>> check_parameters(lambda self, model, inputs, extra=None: 0, ["model", "inputs"], "loss")
    """
    found = list(inspect.signature(inspect.unwrap(function)).parameters.values())
    if found and found[0].name in ("self", "cls") and found[0].name not in expected[:1]:
        found = found[1:]
    names = [parameter.name for parameter in found]
    missing = [name for name in expected if name not in names]
    new = [
        parameter.name
        for parameter in found
        if parameter.name not in expected
        and parameter.default is inspect.Parameter.empty
        and parameter.kind not in _VARIADIC
    ]
    # Only a place among the positional ones matters to a caller.
    places = [parameter.name for parameter in found if parameter.kind is not parameter.KEYWORD_ONLY]
    ahead = [name for name in expected if name in places or name in missing]
    moved = [
        name
        for index, name in enumerate(ahead)
        if name in places and places.index(name) != index and not missing
    ]
    said = [("missing", missing), ("new and required", new), ("moved", moved)]
    got = "; ".join([f"{what}: {', '.join(which)}" for what, which in said if which])
    if got:
        remedy = "use a version of the package that was tested, or report the new signature"
        fail(where, f"the parameters {', '.join(expected)}", got, remedy)


def refuse_unsloth(*classes: type) -> None:
    """Refuses a process in which Unsloth is loaded.

    Its import rewrites the source of TRL's trainers and of the models' forwards, so that a method
    overridden here may never be called. Call it when a trainer is built: the import may come late.

    Args:
        classes: what the integration is built on; their base classes are looked at too. TRL's
            GRPOTrainer is looked at in any case, if it is loaded.

    Raises:
        ValueError: Unsloth is imported, or has rewritten one of the classes.
    """
    remedy = "run without `import unsloth`: it rewrites the methods that roma overrides"
    for name in _UNSLOTH:
        if name in sys.modules:
            fail("trainer", "the package's own classes", f"the module {name} loaded", remedy)
    module, attribute = _PATCHED
    stock = getattr(sys.modules.get(module), attribute, None)
    for cls in [*classes, *([stock] if isinstance(stock, type) else [])]:
        for base in cls.__mro__:
            if base.__module__.split(".")[0].lower().startswith("unsloth") or (
                base.__name__.startswith("Unsloth")
            ):
                got = f"{base.__module__}.{base.__name__}, which Unsloth wrote"
                fail("trainer", "the package's own classes", got, remedy)
