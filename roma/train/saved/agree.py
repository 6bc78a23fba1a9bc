"""What several ranks do together: all hear of one's failure, instead of waiting for it.

With one process nothing is exchanged, and an error is passed on as it came.
"""

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from roma.train.ranks import rank, ranks, told

T = TypeVar("T")


def on_all(action: Callable[[], T]) -> list[T]:
    """What `action` returned on each rank; every rank calls.

    Raises:
        Exception: on the rank where `action` raised it.
        OSError, ValueError, RuntimeError: on the other ranks, with the failed rank's words.
    """
    if ranks() == 1:
        return [action()]
    value, error = None, None
    try:
        value = action()
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    found = told((value, None if error is None else _described(error)))
    if error is not None:
        raise error
    for number, (_, said) in enumerate(found):
        if said is not None:
            kind, code, text = said
            message = f"rank {number}: {text}"
            raise OSError(code, message) if kind == "OSError" else _ERRORS[kind](message)
    return [result for result, _ in found]  # type: ignore[misc]  # None is what failed alone


def on_first(action: Callable[[], T]) -> T:
    """What `action` returned on rank 0, which alone runs it; errors as those of `on_all`."""
    return on_all(lambda: action() if rank() == 0 else None)[0]  # type: ignore[return-value]


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a used-up quota, is behind an error."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # safetensors sets no errno
            return True
        error = error.__cause__ or error.__context__
    return False


_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "RuntimeError": RuntimeError}


def _described(error: Exception) -> tuple[str, int | None, str]:
    """Kind, errno and words: an error itself may hold what another process cannot read."""
    if disk_is_full(error):
        return "OSError", errno.ENOSPC, str(error)
    if isinstance(error, OSError):
        return "OSError", error.errno, str(error)
    if isinstance(error, ValueError):
        return "ValueError", None, str(error)
    return "RuntimeError", None, f"{type(error).__name__}: {error}"
