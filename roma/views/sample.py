"""Which views a prompt gets, and the seed of each: functions of a key alone, without any state.

A key is hashed (BLAKE2b over type, length and content of each part) and the hash drives a
counter-based generator (Philox), so draws depend neither on the order of calls, nor on the process,
nor on a global generator.
"""

import hashlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from roma.views.corruptions import (
    ADVERSARIAL,
    CORRUPTIONS,
    NEEDS_POLICY,
    Corruption,
    Parameter,
    in_pools,
)
from roma_kernels.errors import fail

Key = int | str


@dataclass(frozen=True)
class ViewSpec:
    """What to do to an image: a corruption and its parameter.

    `level` is the level that the parameter was taken from, or None for a parameter of one's own.
    """

    corruption: str
    parameter: Parameter
    level: float | None = None


def seed_for(*key: Key) -> int:
    """A seed in 0..2⁶³-1 from a key, e.g. (run seed, step, prompt id, view).

    Equal keys give equal seeds, on every machine and in every process.

    Raises:
        TypeError: a part is neither an integer nor a string.

    Example:
        >>> seed_for(0, 1, "row 7", 0) == seed_for(0, 1, "row 7", 0) != seed_for(0, 1, "row 7", 1)
        True
    """
    return int.from_bytes(_digest(key)[:8], "little") >> 1


def sample(
    pool: str,
    k: int,
    key: Sequence[Key],
    *,
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
    max_level: float = 2.0,
    strength: Literal["uniform", "strong"] = "uniform",
) -> list[ViewSpec]:
    """Draws k views of distinct corruptions of a pool, each with its own level in (0, max_level].

    With u uniform in (0, 1], the level is max_level·u ("uniform") or max_level·√u ("strong"; its
    median is 0.71·max_level).

    Args:
        pool: "seen", "unseen", "extra" or "masking".
        k: the number of views.
        key: (run seed, step, prompt id); the draw depends on it and the other arguments alone.
        corruptions: the table of levels.
        max_level: the strongest level, at most the last one in the table.
        strength: how levels are spread.

    Raises:
        ValueError: an unknown pool or strength, k outside 1..the pool's size, or max_level
            outside the table. TypeError: a part of the key is neither an integer nor a string.

    Example:
        >>> first, second = sample("seen", 2, (0, 1, "row 7"))
        >>> first.corruption != second.corruption and 0 < first.level <= 2
        True
    """
    members = list(in_pools([pool], corruptions, argument="pool").values())
    if pool == ADVERSARIAL:
        expected = "one of which an image alone is enough for a view"
        fail("pool", expected, f"{pool!r}, which needs a policy", NEEDS_POLICY)
    if not 1 <= k <= len(members):
        expected = f"1 to {len(members)}, the corruptions of {pool!r}"
        fail("k", expected, str(k), "views of one prompt are of distinct corruptions: draw fewer")
    _check_spread(members, max_level, strength)
    rng = _generator(key)
    chosen = rng.choice(len(members), size=k, replace=False).tolist()
    levels = _levels(rng, k, max_level, strength)
    return [_spec(members[i], level) for i, level in zip(chosen, levels, strict=True)]


def sample_attacks(
    k: int,
    key: Sequence[Key],
    *,
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
    max_level: float = 2.0,
    strength: Literal["uniform", "strong"] = "uniform",
) -> list[ViewSpec]:
    """Draws k views of pool "adversarial", each with its own level, spread as in `sample`.

    All are of one corruption, pgd: what tells them apart is level and random start.

    Raises:
        ValueError: as in `sample`; k may be any number from 1 on. TypeError: as in `sample`.

    Example:
        >>> [spec.corruption for spec in sample_attacks(2, (0, 1, "row 7"))]
        ['pgd', 'pgd']
    """
    (attack,) = in_pools([ADVERSARIAL], corruptions, argument="pool").values()
    if k < 1:
        fail("k", "at least 1", str(k), "ask for a view")
    _check_spread([attack], max_level, strength)
    levels = _levels(_generator((*key, ADVERSARIAL)), k, max_level, strength)
    return [_spec(attack, level) for level in levels]


def _check_spread(members: Sequence[Corruption], max_level: float, strength: str) -> None:
    last = min(len(corruption.levels) for corruption in members)
    if not 0 < max_level <= last:
        expected = f"above 0 and at most {last}, the last level in the table"
        fail("max_level", expected, f"{max_level:g}", "lower it, or give a table with more levels")
    if strength not in ("uniform", "strong"):
        fail("strength", "'uniform' or 'strong'", repr(strength), "choose one of them")


def _generator(key: Sequence[Key]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(key)[16:], "little")))


def _levels(rng: np.random.Generator, k: int, max_level: float, strength: str) -> list[float]:
    u = 1 - rng.random(k)
    levels: list[float] = (max_level * (np.sqrt(u) if strength == "strong" else u)).tolist()
    return levels


def _spec(corruption: Corruption, level: float) -> ViewSpec:
    return ViewSpec(corruption.name, corruption.parameter(level), level)


def _digest(key: Sequence[Key]) -> bytes:
    """32 bytes from a key; no two keys share an encoding, since lengths and types are in it."""
    digest = hashlib.blake2b(digest_size=32)
    for part in key:
        if isinstance(part, str):
            kind, content = b"s", part.encode("utf-8", "surrogatepass")
        else:
            try:
                kind, content = b"i", b"%d" % operator.index(part)
            except TypeError:
                expected, remedy = "integers and strings", "write other things as a string"
                fail("key", expected, type(part).__name__, remedy, error=TypeError)
        digest.update(b"%b%d:%b" % (kind, len(content), content))
    return digest.digest()
