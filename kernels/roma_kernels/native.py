"""The compiled library: opened with ctypes, or the exact reason why it cannot be.

The library has a plain C interface (csrc/native.h) and links neither Python nor torch. It is
optional: a machine without a C++ compiler installs roma without it. Setting ROMA_REQUIRE_NATIVE=1
while installing makes that an error and shows what the compiler said.
"""

import ctypes
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FILE = "libroma_native.so"
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Instruction sets that the kernels are compiled for, as csrc/native.h numbers them."""
_NAME = "native library"
_REBUILD = "`ROMA_REQUIRE_NATIVE=1 pip install .` in a checkout builds it or shows why it cannot"


class Native(NamedTuple):
    """The opened library, who compiled it, and the highest of `LEVELS` that this CPU allows."""

    library: ctypes.CDLL
    compiler: str
    cpu_level: str


@functools.cache
def native() -> Native:
    """The compiled library of this installation, opened once.

    Raises:
        ImportError: it was not built, cannot be opened here, or belongs to another version.
    """
    import roma_kernels

    own = os.environ.get("ROMA_NATIVE_FOLDER")  # a build of one's own, as for sanitizers
    # An editable installation has two folders: the sources, and what was compiled from them.
    return open_native(
        [Path(own)] if own else map(Path, roma_kernels.__path__), roma_kernels.__version__
    )


def level() -> int:
    """The place in `LEVELS` of the kernels that run: this CPU's, or ROMA_CPU_LEVEL if it is lower.

    Raises:
        ValueError: ROMA_CPU_LEVEL names no level, or one that this CPU does not have.
    """
    own = LEVELS.index(native().cpu_level)
    wanted = os.environ.get("ROMA_CPU_LEVEL")
    if wanted is None:
        return own
    if wanted not in LEVELS[: own + 1]:
        raise ValueError(
            f"ROMA_CPU_LEVEL: expected one of {', '.join(LEVELS[: own + 1])} on this CPU, got "
            f"{wanted!r}; unset it to take the highest"
        )
    return LEVELS.index(wanted)


def open_native(folders: Iterable[Path], version: str) -> Native:
    """Opens the library in the first of `folders` that has it, if it is of `version`.

    Raises:
        ImportError: no folder has it, it cannot be opened, or it belongs to another version.
    """
    path = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if path is None:
        raise ImportError(
            f"{_NAME}: expected {FILE} in the package, got none (no C++ compiler when roma was "
            f"installed, or a bare checkout); {_REBUILD}"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"{_NAME}: expected one built for this system, got {error}; {_REBUILD}"
        ) from error
    built_from = _text(library, "roma_version")
    if built_from != version:
        raise ImportError(
            f"{_NAME}: expected one of roma {version}, got one of {built_from}; {_REBUILD}"
        )
    return Native(library, _text(library, "roma_compiler"), LEVELS[library.roma_cpu_level()])


def _text(library: ctypes.CDLL, name: str) -> str:
    """What a C function without arguments says."""
    try:
        function = getattr(library, name)
    except AttributeError as error:
        raise ImportError(
            f"{_NAME}: expected the function {name}, got none in {library._name}; {_REBUILD}"
        ) from error
    function.restype = ctypes.c_char_p
    said: bytes = function()
    return said.decode()
