"""The other `roma`: 3D rotations for PyTorch, which `pip install roma` brings under this name.

Both distributions own the file roma/__init__.py. The one installed last has written it, and
uninstalling either removes it. Each sub-package imports this module first: where the file is not
ours, that is one ImportError with a remedy, not an AttributeError somewhere else.
"""

import sys
from importlib.metadata import PackageNotFoundError, version

from roma_kernels import DISTRIBUTION
from roma_kernels.errors import fail

REMEDY = f"pip uninstall roma; pip install --force-reinstall --no-deps {DISTRIBUTION}"
"""Uninstalling the other removes roma/__init__.py, so ours is written again afterwards."""


def conflict() -> str | None:
    """What to say where the other distribution is installed beside this one; None where it is not.

    Example:
        >>> conflict() is None
        True
    """
    try:
        found = version("roma")
    except PackageNotFoundError:
        return None
    return (
        f"the distribution roma {found} (3D rotations) is installed too and shares the import "
        f"name; {REMEDY}"
    )


def refuse_another() -> None:
    """Checks that the package imported as `roma` is this one.

    Raises:
        ImportError: it is another, or its __init__.py is gone.
    """
    package = sys.modules["roma"]
    if "roma_loss" in getattr(package, "__all__", ()):
        return
    where = getattr(package, "__file__", None)
    got = f"another package at {where}" if where else "a folder without __init__.py"
    fail("roma", f"the package of {DISTRIBUTION}", got, REMEDY, error=ImportError)


refuse_another()
