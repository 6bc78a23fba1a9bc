"""Arithmetic of time: which part may start, and how many calls all of them need."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

START = 8.0
"""Seconds that a call needs before its first part."""
PACK = 2.0
"""Seconds between parts: results packed, tables written."""


@dataclass(frozen=True)
class Part:
    """One process of a step."""

    name: str
    command: tuple[str, ...]
    """With `{seconds}` and `{minutes}` in place of the time that it gets."""
    expect: float
    """Seconds that it should take."""
    limit: float
    """Seconds after which it is killed."""
    least: float | None = None
    """The fewest seconds that are of use, if it can be interrupted and goes on; None: it cannot."""
    silence: float | None = None
    """Seconds without a word after which it is killed."""
    restarts: int = 0
    """How often it is started again after an item killed it."""
    forgiving: bool = False
    """Whether an item that fails is a finding (a tile that does not compile), not a failure."""
    env: tuple[tuple[str, str], ...] = ()
    after: str = ""
    """The part of its step that must be over before it starts."""
    absent: str = ""
    """Why it cannot run on this machine; "" if it can."""


@dataclass(frozen=True)
class Step:
    """Parts that belong together."""

    name: str
    what: str
    parts: tuple[Part, ...]


def time_for(part: Part, spent: float, left: float) -> float | None:
    """Seconds that a part gets of those left, or None if it should not start.

    Args:
        part: the part.
        spent: seconds that it has had in earlier calls.
        left: seconds until the call ends; infinite without a limit.
    """
    left -= PACK
    if part.least is None:
        return min(part.limit, left) if part.expect <= left else None
    if left < part.least:
        return None
    return min(max(part.limit - spent, part.least), left)


def calls(
    steps: Iterable[Step], seconds: float, spent: dict[tuple[str, str], float] | None = None
) -> list[list[tuple[str, str, float]]]:
    """Which parts run in which call of `seconds`, if each takes what is expected.

    Returns:
        For each call its (step, part, expected seconds).
    """
    before = dict(spent or {})
    waiting = [(s.name, part) for s in steps for part in s.parts if not part.absent]
    found: list[list[tuple[str, str, float]]] = []
    while waiting:
        now: list[tuple[str, str, float]] = []
        left, later = seconds - START, []
        for step, part in waiting:
            key = (step, part.name)
            takes = max(part.expect - before.get(key, 0.0), part.least or 0.0)
            given = time_for(part, before.get(key, 0.0), left)
            if given is None or (step, part.after) in [(s, p.name) for s, p in later]:
                later.append((step, part))
                continue
            used = min(takes, given)
            now.append((*key, used))
            left -= used + PACK
            before[key] = before.get(key, 0.0) + used
            if used < takes:
                later.append((step, part))
        if not now:
            raise ValueError(
                f"--call-minutes: the shortest part left needs "
                f"{min(_shortest(part) for _, part in waiting) / 60:.2f}, got {seconds / 60:.2f}"
            )
        found.append(now)
        waiting = later
    return found


def _shortest(part: Part) -> float:
    return START + PACK + (part.expect if part.least is None else part.least)


def chosen(steps: Iterable[Step], only: set[str] | None) -> Iterator[Step]:
    """The steps of these names, or of STEP:PART that part alone, in their order; all of None."""
    for step in steps:
        if only is None or step.name in only:
            yield step
        elif parts := tuple(p for p in step.parts if f"{step.name}:{p.name}" in only):
            yield replace(step, parts=parts)


def fill(part: Part, seconds: float) -> Part:
    """The part with its time written into its command."""
    values = {"{seconds}": f"{seconds:.0f}", "{minutes}": f"{seconds / 60:.2f}"}
    words = []
    for word in part.command:
        for mark, value in values.items():
            word = word.replace(mark, value)
        words.append(word)
    return replace(part, command=tuple(words))
