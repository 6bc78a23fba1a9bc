"""The tables of docs/KERNELS.md."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import triton

from bench.compiled import sass
from bench.compiled.build import Made, machine_code, make
from bench.compiled.cases import Head
from bench.compiled.chips import CHIPS
from bench.compiled.launches import Launch, recorded
from roma_kernels.errors import fail
from roma_kernels.linear_logprob.triton import tuning

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "KERNELS.md"
Built = list[tuple[Launch, Made]]


def write(**parts: str) -> None:
    """Replaces the named parts of the document, each between its markers.

    Raises:
        ValueError: the document has lost its markers.
    """
    text = DOCUMENT.read_text()
    for name, made in parts.items():
        text = between_markers(text, name, made)
    DOCUMENT.write_text(text)
    print(f"written: {', '.join(parts)} in {DOCUMENT}")


def between_markers(text: str, name: str, made: str) -> str:
    """The text with `made` as its part `name`.

    Raises:
        ValueError: there are no such markers, or several.
    """
    begin = f"<!-- {name}:begin, written by python -m bench.compiled -->"
    end = f"<!-- {name}:end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    count = len(pattern.findall(text))
    if count != 1:
        fail(DOCUMENT.name, f"one {begin} … {end}", str(count), "put the markers back")
    return pattern.sub(lambda _: f"{begin}\n{made}\n{end}", text)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def compiled(built: dict[str, Built]) -> str:
    """One table a chip: products by kernel and tile, the other kernels in one row."""
    lines = [f"Triton {triton.__version__}."]
    for chip, launches in built.items():
        products: dict[tuple[str, ...], list[Made]] = defaultdict(list)
        others, names = [], set()
        for launch, made in launches:
            if launch.is_product:
                products[launch.label, launch.tile, launch.schedule, made.loads].append(made)
            else:
                others.append(made)
                names.add(launch.label)
        roles = _roles(chip)
        rows = [
            [kernel, roles.get((tile, schedule), ""), tile, schedule, loads, *_extremes(mades)]
            for (kernel, tile, schedule, loads), mades in sorted(products.items())
        ]
        rows.append([f"the other {len(names)}", "", "", "", "", *_extremes(others)])
        heads = ["kernel", "roles", "rows × columns × depth", "warps, stages", "reads by",
                 "variants", "registers", "spilled, B", "shared, KiB", f"`{CHIPS[chip].matrix}`",
        ]  # fmt: skip
        lines += ["", f"### {chip}", "", *_table(heads, rows)]
    return "\n".join(lines)


def _roles(chip: str) -> dict[tuple[str, str], str]:
    """The roles of tuning.json that a tile and schedule serve."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for role, tiles in tuning.table(chip)["tiles"].items():
        for tile in dict.fromkeys(tiles.values()):
            blocks = f"{tile.block_r} × {tile.block_v} × {tile.block_d}"
            found[blocks, f"{tile.num_warps}, {tile.num_stages}"].append(role)
    return {key: ", ".join(roles) for key, roles in found.items()}


def _extremes(mades: list[Made]) -> list[str]:
    return [
        str(len(mades)),
        str(max(made.registers for made in mades)),
        str(max(made.spilled for made in mades)),
        f"{max(made.shared for made in mades) / 1024:.0f}",
        str(min(made.matrix for made in mades) or ""),
    ]


def epilogues() -> str:
    """Instructions a warp and tile of the plain bf16 kernels on sm_90."""
    chip = CHIPS["sm_90"]
    heads = ["kernel", "rows × columns × depth", "registers", "instructions", "of the epilogue",
             "most of these", "stores"]  # fmt: skip
    rows = []
    for launch in recorded("sm_90", chip.target, iter([Head()])):
        if launch.is_product:
            code = sass.parsed(machine_code(launch, chip))
            epilogue = sass.epilogue(code)
            most = ", ".join(f"{n} {name}" for name, n in sass.counts(epilogue).most_common(8))
            lengths = (f"{len(code.instructions):,}", f"{len(epilogue):,}")
            registers = str(make(launch, chip).registers)
            stores = sass.stores(epilogue)
            rows.append([launch.label, launch.tile, registers, *lengths, most, stores])
    return "\n".join(_table(heads, rows))


def matrix(summaries: list[dict[str, Any]], today: str) -> str:
    """Chips × Tritons, from what `--json` wrote under each."""
    heads = ["chip", *(f"Triton {summary['triton']}" for summary in summaries)]
    rows = [
        [chip, *(_cell(**summary["chips"][chip]) for summary in summaries)]
        for chip in summaries[0]["chips"]
    ]
    lines = [f"{today}: kernels compiled, and how many of them are not clean.", ""]
    return "\n".join(lines + _table(heads, rows))


def _cell(kernels: int, faults: list[str]) -> str:
    return f"{kernels}, {len(faults)} not" if faults else f"{kernels}, all clean"
