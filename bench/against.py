"""Compares a run with an earlier one: which times moved by more than their noise.

Times are compared in units of the yardstick (a product of the same rows with the same head, timed
among the candidates), so that another machine, or a busy one, does not look like a code change.
"""

from bench.providers import OURS
from bench.results import Row

KEY = (
    "device",
    "op",
    "phase",
    "tokens",
    "views",
    "depth",
    "vocab",
    "dtype",
    "active",
    "right",
    "what",
    "states",
)


def moved(earlier: list[Row], now: list[Row]) -> list[tuple[Row, float]]:
    """Rows whose interval does not meet the earlier one, with the factor between their times."""
    before = {_key(row): row for row in earlier if row.get("yardsticks")}
    found = []
    for row in now:
        old = before.get(_key(row))
        if old is None or not row.get("yardsticks"):
            continue
        factor = float(row["yardsticks"]) / float(old["yardsticks"])
        apart = float(row["yardsticks_low"]) > float(old["yardsticks_high"]) or float(
            row["yardsticks_high"]
        ) < float(old["yardsticks_low"])
        if apart:
            found.append((row, factor))
    return found


def compare(earlier: list[Row], now: list[Row]) -> int:
    """Prints what moved; 1 if ours became slower somewhere."""
    worse = 0
    for row, factor in moved(earlier, now):
        what = "slower" if factor > 1 else "faster"
        worse |= row["provider"] == OURS and factor > 1
        print(
            f"{what}: {row['provider']} × {factor:.2f} in {row['op']} {row['phase']}, {_size(row)}"
        )
    common = {_key(row) for row in earlier} & {_key(row) for row in now}
    print(f"compared {len(common)} timings; a shift counts where the two intervals do not meet")
    return int(worse)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in (*KEY, "worst_over", "provider"))


def _size(row: Row) -> str:
    return " ".join(
        f"{name}={row[name]}" for name in ("tokens", "views", "depth", "vocab", "active")
    )
