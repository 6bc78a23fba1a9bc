"""From the sweep's findings to a tuning table of the form of tuning.json, each entry with its why.

A candidate wins if its time over the present entry's is below 1 by the whole interval. A plan also
needs every comparison with float64 of the step "correct" behind it. What did not change is left
out: ROMA_TUNING=FILE puts these entries in place of the package's own, and so does whoever copies
them to tuning.json.
"""

import json
from typing import Any

from bench.gpu.journal import Journal
from bench.processes import ROOT

PRESENT = ROOT / "kernels/roma_kernels/linear_logprob/triton/tuning.json"
KERNELS = ("forward", "dlogits")
STEPS = ("sweep", "roles")
_PLAIN = {"descriptors": False, "persistent": False}
Row = dict[str, Any]


def table(journal: Journal) -> tuple[str, list[str]]:
    """The new table as JSON, and its changes in words; "" and none if nothing won."""
    found = [row for step in STEPS for row in journal.rows(step).values() if _whole(row)]
    if not found or not PRESENT.exists():
        return "", []
    present = json.loads(PRESENT.read_text())
    facts, changes = _source(journal), []
    new: dict[str, dict[str, Any]] = {}
    points = [row for row in found if isinstance(row.get("entries"), dict)]
    for (chip, role), rows in _grouped(points, "chip", "role").items():
        if role == "chunk":
            made = _chunk(present, chip, rows, facts, changes)
        else:
            made = _tile(present, chip, role, rows, facts, changes)
        if made:
            kind, key = ("chunks", chip) if role == "chunk" else ("tiles", role)
            place = new.setdefault(kind, {})
            (place if role == "chunk" else place.setdefault(chip, {}))[key] = made
    for (chip, kernel), rows in _grouped(found, "chip", "plan_of").items():
        steps = _plans(journal, kernel, rows, facts)
        if steps != present["plans"].get(chip, {}).get(kernel, []):
            new.setdefault("plans", {}).setdefault(chip, {})[kernel] = steps
            words = ", ".join(f"{s['plan']} from {s['rows']} rows" for s in steps)
            changes.append(f"plans.{chip}.{kernel}: {words or 'triton'}")
    return (json.dumps(new, indent=2) + "\n" if new else ""), changes


def _whole(row: Row) -> bool:
    """Whether it is a timing that counts."""
    numbers = [row.get(n) for n in ("ms", "ratio", "ratio_low", "ratio_high")]
    return row.get("status") == "ok" and all(isinstance(x, int | float) for x in numbers)


def _grouped(rows: list[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of some entries, without those that lack one."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if all(isinstance(row.get(name), str) for name in names):
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _best(rows: list[Row]) -> Row | None:
    """The fastest that beats the present entry; the fastest of all if that one is broken."""
    better = [row for row in rows if row["ratio_high"] < 1 or row.get("broken")]
    return min(better, key=lambda row: row["ratio"]) if better else None


def _why(row: Row, facts: str) -> str:
    if row.get("broken"):
        return f"the fastest at {row.get('size', '?')}; before: {row['broken']}; {facts}"
    interval = f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
    return f"{row['ratio']:.3f} {interval} of the time before at {row.get('size', '?')}; {facts}"


def _source(journal: Journal) -> str:
    """Chip, driver, date and commit."""
    machine = journal.rows("facts").get("machine", {})
    calls = [line for line in journal.lines if line["kind"] == "call"]
    last = calls[-1] if calls else {}  # the facts may be those of an earlier commit
    words = (machine.get("name", "?"), f"driver {machine.get('driver', '?')}",
             str(last.get("time", "?"))[:10],
             f"commit {last.get('commit') or machine.get('commit', '?')}")  # fmt: skip
    return ", ".join(words)


def _chunk(present: Row, chip: str, rows: list[Row], facts: str, changes: list[str]) -> Row | None:
    best = _best(rows)
    if best is None:
        return None
    entry = {**best["entries"], "why": _why(best, facts)}
    before = present["chunks"].get(chip, present["chunks"]["other"])
    changes.append(f"chunks.{chip}: {_differences(before, entry)}: {entry['why']}")
    return entry


def _tile(
    present: Row, chip: str, role: str, rows: list[Row], facts: str, changes: list[str]
) -> Row | None:
    """A role's entry: the forward's tile, and what dlogits has otherwise."""
    entry = present["tiles"].get(chip, {}).get(role)
    if entry is None:
        return None
    shared = {k: v for k, v in entry.items() if k not in KERNELS}
    tiles = {kernel: _PLAIN | shared | entry.get(kernel, {}) for kernel in KERNELS}
    changed = False
    for kernel in KERNELS:
        best = _best([row for row in rows if row.get("kernel") == kernel])
        if best is not None:
            new = tiles[kernel] | best["entries"] | {"why": _why(best, facts)}
            words = _differences(tiles[kernel], new)
            changes.append(f"tiles.{chip}.{role}, {kernel}: {words}: {new['why']}")
            tiles[kernel], changed = new, True
    if not changed:
        return None
    forward, dlogits = (tiles[kernel] for kernel in KERNELS)
    own = {name: value for name, value in dlogits.items() if forward.get(name) != value}
    return {**forward, **({"dlogits": own} if own else {})}


def _differences(before: Row, after: Row) -> str:
    return ", ".join(f"{name} {before.get(name)} → {value}" for name, value in after.items()
                     if name != "why" and before.get(name) != value)  # fmt: skip


def _plans(journal: Journal, kernel: str, rows: list[Row], facts: str) -> list[Row]:
    """From how many rows on which plan; "triton" where no other wins."""
    steps: list[Row] = []
    for count in sorted({row["rows"] for row in rows if isinstance(row.get("rows"), int)}):
        best = _best([row for row in rows if row["rows"] == count
                      and _held(journal, str(row.get("plan")))])  # fmt: skip
        plan = str(best["plan"]) if best else "triton"
        if plan != (steps[-1]["plan"] if steps else "triton"):
            why = _why(best, facts) if best else f"none beats it here; {facts}"
            steps.append({"rows": count, "plan": plan, "why": why})
    return steps


def _held(journal: Journal, plan: str) -> bool:
    """Whether a plan was compared with float64, and agreed everywhere."""
    found = [row.get("status") for item, row in journal.rows("correct").items()
             if item.startswith(f"{plan}, ")]  # fmt: skip
    return "ok" in found and set(found) <= {"ok", "skipped"}
