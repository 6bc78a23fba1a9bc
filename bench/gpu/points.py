"""The points that the sweep tries: changes of the present tile, one at a time, then together.

A point has the whole entry of tuning.json, so that it means the same whatever the table says.
"""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

Entry = dict[str, int | bool]
BLOCKS = ((64, 256, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (64, 128, 4),
          (256, 64, 8), (128, 64, 4), (64, 256, 8), (256, 256, 16))  # fmt: skip
GROUPS, STAGES, DEPTHS = (1, 2, 4, 8, 16, 32, 64), (2, 3, 4, 5, 6), (32, 64, 128)
CHUNK_ROWS, CHUNK_COLUMNS = (512, 1024, 2048, 4096, 8192), (2048, 4096, 8192, 16_384)
CHUNK_BYTES = (8 * 2**20, 128 * 2**20)
ACCUMULATORS = 160
"""fp32 sums a thread may hold: of 255 registers the rest is for addresses and the epilogue."""
_FIELDS = ("block_r", "block_v", "block_d", "group", "num_warps", "num_stages", "descriptors",
           "persistent")  # fmt: skip


class Point(NamedTuple):
    """One entry for a role, for one kernel; role "chunk": the chunk of plan "vendor"."""

    kernel: str
    role: str
    entry: Entry
    what: str
    """Which kind of change it is: "present", "group", "stages", "blocks", …"""

    @property
    def name(self) -> str:
        """In the journal and on the page."""
        if self.role == "chunk":
            return f"chunk {self.entry['rows']} × {self.entry['columns']}"
        e = self.entry
        blocks = f"{e['block_r']}×{e['block_v']}×{e['block_d']}"
        words = [f"{self.kernel} {self.role} {blocks}", f"group {e['group']}"]
        words += [f"warps {e['num_warps']}", f"stages {e['num_stages']}"]
        words += [name for name in ("descriptors", "persistent") if e[name]]
        return ", ".join(words)

    @property
    def text(self) -> str:
        """What ROMA_TUNING takes."""
        if self.role == "chunk":
            return " ".join([f"chunk.{k}={v}" for k, v in self.entry.items()] + ["plan=vendor"])
        # The others of plan gluon are what its kernels were written for.
        free = ("group", "num_stages") if self.role == "gluon" else tuple(self.entry)
        changes = [f"{self.kernel}.{self.role}.{k}={int(self.entry[k])}" for k in free]
        return " ".join([*changes, f"plan={'gluon' if self.role == 'gluon' else 'triton'}"])


def points(kernel: str, role: str, present: Entry, shared: int) -> list[Point]:
    """The present entry, then every single change of it that a chip can hold.

    Args:
        kernel: "forward" or "dlogits".
        role: a role of tuning.json, or "chunk".
        present: the entry as it stands.
        shared: bytes of shared memory that a program may have.
    """
    if role == "chunk":
        found = [Point(kernel, role, dict(present), "present")]
        for rows, columns in itertools.product(CHUNK_ROWS, CHUNK_COLUMNS):
            if CHUNK_BYTES[0] <= 4 * rows * columns <= CHUNK_BYTES[1]:
                found.append(Point(kernel, role, {"rows": rows, "columns": columns}, "chunk"))
        return _unique(found)
    base = {name: present[name] for name in _FIELDS}
    found = [Point(kernel, role, base, "present")]

    def add(what: str, **change: int | bool) -> None:
        entry = base | change
        if _fits(entry, shared, role):
            found.append(Point(kernel, role, entry, what))

    for group in GROUPS:
        add("group", group=group)
    for stages in STAGES:
        add("stages", num_stages=stages)
    if role == "gluon":  # its blocks are what its warps were written for
        return _unique(found)
    for block_r, block_v, warps in BLOCKS:
        blocks = {"block_r": block_r, "block_v": block_v, "num_warps": warps}
        most = [
            n for n in STAGES if n <= 5 and _fits(base | blocks | {"num_stages": n}, shared, role)
        ]
        if most:
            add("blocks", **blocks, num_stages=most[-1])
    for depth in DEPTHS:
        stages = max(2, int(base["num_stages"]) * int(base["block_d"]) // depth)
        add("depth", block_d=depth, num_stages=stages)
    add("warps", num_warps=int(base["num_warps"]) * 2)
    add("schedule", persistent=not base["persistent"])
    if base["descriptors"]:
        add("loads", descriptors=False)
    return _unique(found)


def combined(
    present: Point, winners: Iterable[tuple[Point, float]], shared: int, most: int = 6
) -> list[Point]:
    """The best changes of several kinds at once, by the product of their ratios.

    Args:
        present: the entry that the winners change.
        winners: points that were faster than it, and their ratio to it.
        shared: bytes of shared memory that a program may have.
        most: how many points to give.
    """
    best: dict[str, tuple[Point, float]] = {}
    for point, ratio in winners:
        if point.what not in best or ratio < best[point.what][1]:
            best[point.what] = (point, ratio)
    found = []
    for count in range(2, len(best) + 1):
        for chosen in itertools.combinations(best.values(), count):
            entry, ratio = dict(present.entry), 1.0
            for point, share in chosen:
                changed = {k: v for k, v in point.entry.items() if v != present.entry[k]}
                entry |= changed
                ratio *= share
            if _fits(entry, shared, present.role):
                what = " + ".join(point.what for point, _ in chosen)
                found.append((ratio, Point(present.kernel, present.role, entry, what)))
    found.sort(key=lambda pair: pair[0])
    return _unique([point for _, point in found])[:most]


def _fits(entry: dict[str, Any], shared: int, role: str) -> bool:
    """Whether sums fit the registers, and stages the shared memory."""
    sums = entry["block_r"] * entry["block_v"] / (32 * entry["num_warps"])
    stage = 2 * (entry["block_r"] + entry["block_v"]) * entry["block_d"]
    # Two consumers of plan gluon hold the sums, whatever `num_warps` says of one.
    return (sums <= ACCUMULATORS or role == "gluon") and entry["num_stages"] * stage <= shared


def _unique(found: list[Point]) -> list[Point]:
    """Without a point that is there already under another name."""
    first: dict[str, Point] = {}
    for point in found:
        first.setdefault(point.name, point)
    return list(first.values())
