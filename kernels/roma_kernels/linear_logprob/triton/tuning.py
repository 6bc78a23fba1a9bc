"""How each kernel is launched on each chip: data with a reason or a measurement, in tuning.json.

    tiles    chip → role → blocks and schedule; a role may hold changes for "dlogits" alone
    chunks   chip → the chunk of logits that a vendor's product leaves for a row kernel
    plans    chip → "forward" or "dlogits" → from how many rows on which plan; else "triton"

A plan is how logits are formed: "triton", one fused kernel; "vendor", the vendor's product into a
chunk of logits that stays in L2, and a row kernel; "gluon", the warp-specialised kernel of sm_90.
Where a plan cannot serve a call (`gluon` with a softcap, say) the fused kernel does; fp32 on a GPU
is always the vendor's, whose exact products are faster than any that Triton makes of it.

Entries can be changed without editing the file, for a process by the environment,

    ROMA_TUNING="many.group=8 dlogits.many.num_stages=3 plan=vendor"      or the name of a JSON file
                                                                          with entries of this form

and inside a program by `override`, which takes the same text. `python -m bench.gpu` measures
candidates and writes such a file.
"""

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roma_kernels.errors import fail

FEW_ROWS = 64
KERNELS = ("forward", "dlogits")
PLANS = ("triton", "vendor", "gluon")
CHIPS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter")
_FILE = Path(__file__).with_name("tuning.json")
_OVERRIDES: list[str] = []


@dataclass(frozen=True)
class Tile:
    """Blocks of a product [BLOCK_R, BLOCK_D] × [BLOCK_V, BLOCK_D]ᵀ and how it is scheduled."""

    block_r: int
    block_v: int
    block_d: int
    group: int
    """Row tiles that walk the vocabulary together, their hidden states resident in L2."""
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """Loads by the tensor memory accelerator, where strides allow it."""
    persistent: bool = False
    """One program per multiprocessor computes many tiles and loads the next one during the
    reductions of the last; else one program per tile."""
    why: str = ""


@dataclass(frozen=True)
class Chunk:
    """Logits [rows, columns] that the vendor's product writes and a row kernel reads at once."""

    rows: int
    columns: int
    why: str = ""


@contextmanager
def override(text: str) -> Iterator[None]:
    """Changes entries inside the block, in every thread: a backward of CUDA runs in its own.

    Args:
        text: assignments as in ROMA_TUNING, separated by white space.

    Example:
        >>> with override("many.group=4 plan=vendor"):
        ...     tile_of("sm_90", "forward", "many").group, plan_of("sm_90", "forward", 4096)
        (4, 'vendor')
    """
    _Changes.parsed(text)
    _OVERRIDES.append(text)
    try:
        yield
    finally:
        _OVERRIDES.remove(text)


def chip(device: torch.device) -> str:
    """The chip whose entries a device takes; consumer chips (8.6, 8.9, 12.0) share sm_120's.

    `chip=sm_90` among the changes stands in for a device that is not there.
    """
    forced = _changes().chip
    if forced:
        return forced
    return "interpreter" if device.type != "cuda" else _chip_of(device)


@functools.cache
def _chip_of(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90"
    if major == 10:
        return "sm_100"
    return "sm_80" if (major, minor) == (8, 0) else "sm_120"


def role_of(dtype: torch.dtype, rows: int, *, options: bool) -> str:
    """The role of a product in `dtype` over `rows` rows.

    "few", at most FEW_ROWS rows; "many", more of them; "options", these with a softcap, an entropy,
    a bias or a temperature by row, which need registers; "fp32", few rows of fp32, which only the
    interpreter multiplies.
    """
    if rows <= FEW_ROWS:
        return "fp32" if dtype == torch.float32 else "few"
    return "options" if options else "many"


def tile_for(kernel: str, states: Tensor, weight: Tensor, rows: int, *, options: bool) -> Tile:
    """The tile of a kernel ("forward" or "dlogits") that multiplies states [R, D] by weight [V, D].

    Args:
        kernel: "forward" or "dlogits".
        states: [R, D].
        weight: [V, D].
        rows: of the whole call, active or not: so that it does not depend on the data.
        options: whether there is a softcap, an entropy, a bias or a temperature by row.
    """
    here = chip(states.device)
    role = role_of(torch.promote_types(states.dtype, weight.dtype), rows, options=options)
    tile = tile_of(here, kernel, role)
    if (copyable if tile.descriptors else vectorised)(states, weight):
        return tile
    # Each element has an address of its own, and a tile has registers for fewer.
    return replace(tile_of(here, kernel, "unaligned", role), descriptors=False)


def copyable(*matrices: Tensor) -> bool:
    """Whether the copy engine reads them: addresses and row strides in 16 bytes, whole rows."""
    return all(
        x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
        for x in matrices
    )


def vectorised(*matrices: Tensor) -> bool:
    """Whether Triton loads 16 bytes at a time through pointers: all sizes in 16 elements."""
    return copyable(*matrices) and all(
        x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 for x in matrices
    )


def tile_of(chip: str, kernel: str, *roles: str) -> Tile:
    """The tile of the first of the roles that a chip has."""
    return _tile(chip, kernel, roles, _changes())


def chunk_for(device: torch.device) -> Chunk:
    """The chunk of logits of plan "vendor"."""
    return _chunk(chip(device), _changes())


def plan_for(device: torch.device, kernel: str, dtype: torch.dtype, rows: int) -> str:
    """The plan of a kernel in `dtype` over `rows` rows: "triton", "vendor" or "gluon"."""
    here = chip(device)
    if dtype == torch.float32 and here != "interpreter":
        return "vendor"
    return plan_of(here, kernel, rows)


def plan_of(chip: str, kernel: str, rows: int) -> str:
    """As `plan_for` for 16-bit matrices, of a chip by its name."""
    changes = _changes()
    chosen = changes.get(kernel, "plan")
    if chosen is None:
        steps = _table(changes.file)["plans"].get(chip, {}).get(kernel, [])
        reached = [step for step in steps if rows >= step["rows"]]
        chosen = max(reached, key=lambda step: step["rows"])["plan"] if reached else "triton"
    return str(chosen)


def table(chip: str) -> dict[str, Any]:
    """A chip's entries as they stand, environment and overrides included.

    Example:
        >>> sorted(table("sm_90"))
        ['chunk', 'plans', 'tiles']
    """
    changes = _changes()
    roles = _table(changes.file)["tiles"][chip]
    return {
        "tiles": {role: {k: tile_of(chip, k, role) for k in KERNELS} for role in roles},
        "chunk": _chunk(chip, changes),
        "plans": _table(changes.file)["plans"].get(chip, {}),
    }


@dataclass(frozen=True)
class _Changes:
    """What the environment and the overrides say."""

    file: str = ""
    chip: str = ""
    values: tuple[tuple[str, str, int | str], ...] = ()
    """(kernel or "", entry, value): the last one counts."""

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parsed(cls, text: str) -> "_Changes":
        """Of assignments, or the name of a file."""
        file, chip, values = "", "", []
        for word in text.split():
            entry, sign, value = word.partition("=")
            if not sign:
                _read(word)  # complains now, not at the first launch
                file = word
            elif entry == "chip":
                chip = _one_of(word, value, CHIPS)
            else:
                values.append(_assignment(word, entry, value))
        return cls(file, chip, tuple(values))

    def get(self, kernel: str, entry: str) -> int | str | None:
        """The value of an entry, if it was changed."""
        found = [v for k, e, v in self.values if e == entry and k in ("", kernel)]
        return found[-1] if found else None


def _changes() -> _Changes:
    text = os.environ.get("ROMA_TUNING", "")
    return _Changes.parsed(" ".join([text, *_OVERRIDES]) if _OVERRIDES else text)


_NUMBERS = tuple(f.name for f in fields(Tile) if f.name != "why")
_ROLES = (*("many", "options", "few", "unaligned", "gluon", "fp32"),)


def _assignment(word: str, entry: str, value: str) -> tuple[str, str, int | str]:
    kernel = ""
    if entry.split(".")[0] in KERNELS:
        kernel, _, entry = entry.partition(".")
    if entry == "plan":
        return kernel, entry, _one_of(word, value, PLANS)
    role, _, field = entry.partition(".")
    number = int(value) if value.isdigit() else -1
    _check(word, role, field, number)
    return kernel, entry, number


def _check(word: str, role: str, field: str, number: int) -> None:
    """Raises ValueError unless a kernel of this role can be launched with a number."""
    known: tuple[str, ...] = _NUMBERS if role in _ROLES else ()
    if role == "gluon":
        known = ("group", "num_stages")  # its blocks and warps are the kernel's own
    elif role == "chunk":
        known = ("rows", "columns")
    if field not in known or number < 0:
        expected = "plan=…, chip=…, chunk.rows=…, or ROLE.FIELD=a whole number, as many.group=8"
        remedy = f"roles: {', '.join(_ROLES)}; fields: {', '.join(_NUMBERS)}"
        fail("ROMA_TUNING", expected, repr(word), remedy)
    switch = field in ("descriptors", "persistent")
    least, most = (2, 4) if (role, field) == ("gluon", "num_stages") else (1 - switch, 2**20)
    if not least <= number <= (1 if switch else most):
        fail("ROMA_TUNING", f"{least} to {1 if switch else most}", repr(word), "see tuning.json")
    if field.startswith("block") and (number < 16 or number & (number - 1)):
        fail("ROMA_TUNING", "a power of two, 16 at least", repr(word), "Triton's blocks are those")
    if field == "columns" and number % 64:
        fail("ROMA_TUNING", "a multiple of 64", repr(word), "rows of logits are whole vectors")


def _check_file(file: str, found: dict[str, Any]) -> None:
    """The same of every number of a file; entries of "gluon" that cannot change may be repeated."""
    own = {} if file == str(_FILE) else _read(str(_FILE))["tiles"]
    for chip, roles in found.get("tiles", {}).items():
        for role, entry in roles.items():
            fixed = own.get(chip, {}).get(role, {}) if role == "gluon" else {}
            numbers = {**entry, **entry.get("forward", {}), **entry.get("dlogits", {})}
            for field in set(numbers) - {"why", *KERNELS}:
                if role == "gluon" and numbers[field] == fixed.get(field, numbers[field]):
                    continue
                where = f"{file}: {chip} {role}.{field}={numbers[field]}"
                _check(where, role, field, int(numbers[field]))
    for chip, entry in found.get("chunks", {}).items():
        for field in ("rows", "columns"):
            if field in entry:
                _check(f"{file}: {chip} chunk.{field}={entry[field]}", "chunk", field, entry[field])
    for chip, kernels in found.get("plans", {}).items():
        for step in (step for steps in kernels.values() for step in steps):
            _one_of(f"{file}: {chip} {step}", step["plan"], PLANS)


def _one_of(word: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        fail("ROMA_TUNING", f"one of {', '.join(known)}", repr(word), "see tuning.py")
    return value


@functools.cache
def _read(file: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(file).read_text())
    except (OSError, ValueError) as wrong:
        remedy = "give assignments, or the name of a file that `python -m bench.gpu` wrote"
        fail("ROMA_TUNING", "a JSON file", f"{file!r} ({wrong})", remedy)
    if not isinstance(found, dict) or not set(found) <= {"tiles", "chunks", "plans"}:
        fail("ROMA_TUNING", "tiles, chunks, plans", f"{file!r}", "see tuning.json")
    _check_file(file, found)
    return found


@functools.cache
def _table(file: str) -> dict[str, dict[str, Any]]:
    """tuning.json, with the entries of another file in place of its own."""
    whole = _read(str(_FILE))
    if not file:
        return whole
    other = _read(file)
    names = ("tiles", "chunks", "plans")
    merged: dict[str, dict[str, Any]] = {name: dict(whole[name]) for name in names}
    for name in names:
        for chip, entries in other.get(name, {}).items():
            merged[name][chip] = {**whole[name].get(chip, {}), **entries}
    return merged


@functools.cache
def _tile(chip: str, kernel: str, roles: tuple[str, ...], changes: _Changes) -> Tile:
    entries = _table(changes.file)["tiles"][chip]
    role = next(role for role in roles if role in entries)
    entry = dict(entries[role])
    for other in KERNELS:
        own = entry.pop(other, {})
        if other == kernel:
            entry |= own
    changed = {n: v for n in _NUMBERS if (v := changes.get(kernel, f"{role}.{n}")) is not None}
    tile = Tile(**entry | changed)
    return replace(tile, descriptors=bool(tile.descriptors), persistent=bool(tile.persistent))


@functools.cache
def _chunk(chip: str, changes: _Changes) -> Chunk:
    chunks = _table(changes.file)["chunks"]
    entry = dict(chunks.get(chip, chunks["other"]))
    for name in ("rows", "columns"):
        value = changes.get("", f"chunk.{name}")
        entry[name] = entry[name] if value is None else value
    return Chunk(**entry)
