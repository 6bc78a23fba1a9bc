"""Compiles every kernel for every chip and reports what came out; needs no GPU. `make kernels`.

    python -m bench.compiled            writes docs/KERNELS.md
    python -m bench.compiled --check    compiles only

Both exit with 1 if a configuration that a launcher may choose spills registers, exceeds its chip's
shared memory, or does not use the matrix instructions of its chip.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from roma_kernels.linear_logprob.triton import configs, dlogits, forward, gather
from roma_kernels.roma_loss import triton_backend
from roma_kernels.roma_loss.token_local import chunks
from roma_kernels.roma_loss.token_local import kernels as token_local
from roma_kernels.roma_loss.token_local.op import LEAST_ROWS
from roma_kernels.roma_loss.triton import kernels as roma_loss

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "KERNELS.md"


class Chip(NamedTuple):
    """A compiler's target, the shared memory that a program may have, the matrix instruction."""

    target: GPUTarget
    shared: int
    matrix: str


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, "mma.sync"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, "wgmma.mma_async"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, "tcgen05.mma"),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99 * 1024, "mma.sync"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, "v_mfma"),
}


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration: the types of its arguments and the launch options."""

    name: str
    variant: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False
    """Whether the code must contain the chip's matrix instruction."""


class Made(NamedTuple):
    """What the compiler reports of a build."""

    registers: int
    spilled: int
    shared: int
    matrix: int
    copies: str


def _sweep_builds(chip: str) -> Iterator[Build]:
    """The two kernels with a product: every configuration, with few and with all options."""
    for role, tile in configs.TILES[chip]._asdict().items():
        full = role == "fp32"
        dtype = "fp32" if full else "bf16"

        def source(rows: int, tile: configs.Tile = tile, dtype: str = dtype) -> str:
            described = tile.descriptors
            return f"tensordesc<{dtype}[{rows},{tile.block_d}]>" if described else f"*{dtype}"

        common: dict[str, str] = {
            "hidden": source(tile.block_r),
            "weight": source(tile.block_v),
            "tokens_ptr": "*i64",
            "num_tokens_ptr": "*i64",
            **dict.fromkeys(("stride_hr", "stride_wv", "stride_dz"), "i64"),
            **dict.fromkeys(("first", "per_token", "vocab_start", "R", "A", "V", "D"), "i32"),
            **dict.fromkeys(("scale", "softcap"), "fp32"),
            **dict.fromkeys(
                ("peak_ptr", "total_ptr", "target_ptr", "lse_ptr", "dlogp_ptr"), "*fp32"
            ),
            "dz_ptr": f"*{dtype}",
        }
        entropy = dict.fromkeys(("moment_ptr", "entropy_ptr", "dentropy_ptr"), "*fp32")
        others = {"scale_ptr": "*fp32", "loss_scale_ptr": "*fp32", "bias_ptr": f"*{dtype}"}
        constants = {
            "stride_hd": 1,
            "stride_wd": 1,
            "DESCRIPTORS": tile.descriptors,
            "DTYPE": tl.float32 if full else tl.bfloat16,
            "BLOCK_R": tile.block_r,
            "BLOCK_V": tile.block_v,
            "BLOCK_D": tile.block_d,
            "GROUP": tile.group,
            "FLATTEN": tile.persistent,
        }
        kernels = {
            "linear_logprob_fwd": forward._linear_logprob_fwd_kernel,
            "dlogits": dlogits._dlogits_kernel,
        }
        for name, kernel in kernels.items():
            for extra in _EXTRAS[role]:
                types = common | (entropy if extra else {}) | (others if extra == "all" else {})
                fixed = {name: None for name in entropy | others if name not in types}
                fixed |= constants | {"SOFTCAP": extra == "all"}
                variant = f"{role}, {extra}" if extra else role
                yield Build(
                    name, variant, kernel, types, fixed, tile.num_warps, tile.num_stages,
                    matrix=not full,
                )  # fmt: skip


# The options with which a role is compiled: none, the entropy, or all (entropy, softcap, bias, a
# temperature by row, fp16's loss scale).
_EXTRAS = {
    "many": ("",),
    "softcap_or_entropy": ("entropy", "all"),
    "few": ("", "entropy", "all"),
    "fp32": ("", "entropy", "all"),
}


def _small_builds() -> Iterator[Build]:
    """The kernels without a product."""
    integers = dict.fromkeys(
        (
            *("first", "per_token", "parts", "R", "D", "stride", "B", "K", "M", "stride_vk"),
            *("first_token", "last_token", "V"),
        ),
        "i32",
    )
    floats = ("low", "high", "dual", "clamp", "ref_coef")
    whole = ("num_tokens", "rows", "active", "index", "num_active", "ends", "lengths", "aux")
    types: dict[str, str] = {
        **integers,
        **dict.fromkeys((*floats, "scale", "softcap"), "fp32"),
        **{f"{name}_ptr": "*i64" for name in (*whole, "worst", "tokens")},
        "correct_ptr": "*i1",
        "stride_k": "i64",
    }
    bf16 = {f"{name}_ptr": "*bf16" for name in ("states", "hidden", "views", "dhidden", "dviews")}
    merge = {"BLOCK_R": forward._MERGE_R, "BLOCK_P": forward._MERGE_P}
    yield Build("merge", "with entropy", forward._merge_kernel, types, merge)
    for name, kernel in {
        "gather_rows": gather._gather_rows_kernel,
        "scatter_rows": gather._scatter_rows_kernel,
    }.items():
        yield Build(name, "bf16, K views", kernel, types | bf16, {"BLOCK_D": gather.BLOCK_D})
    logits = {"SOFTCAP": True, "BLOCK_V": chunks._BLOCK_V}
    for name, kernel in {
        "row_sums": token_local._row_sums_kernel,
        "row_dlogits": token_local._row_dlogits_kernel,
    }.items():
        pointers = {"dz_ptr": "*bf16", "bias_ptr": "*bf16"}
        yield Build(name, "bf16, softcap, bias", kernel, types | pointers, logits)
    block_t = triton_backend._BLOCK_T
    clean = {"stride_n": 1, "BLOCK_T": block_t}
    yield Build("clean_coefficients", "", roma_loss._clean_coefficients_kernel, types, clean)
    for worst_over in ("sequence", "token", "batch", "mean"):
        constants = {
            "stride_n": 1, "stride_vn": 1, "VIEW_OVER_CLEAN": True, "WORST_OVER": worst_over,
            "MAIN": True, "BLOCK_K": 4, "BLOCK_T": block_t // 4,
            "BLOCK_B": triton_backend._BLOCK_B,
        }  # fmt: skip
        for name, kernel in {
            "sums": roma_loss._sums_kernel,
            "total": roma_loss._total_kernel,
            "view_coefficients": roma_loss._view_coefficients_kernel,
        }.items():
            yield Build(name, f"K = 4, {worst_over}", kernel, types, constants)


def builds(chip: str) -> Iterator[Build]:
    """Every kernel in every configuration that a launcher may choose on a chip."""
    yield from _sweep_builds(chip)
    yield from _small_builds()


def make(build: Build, chip: Chip) -> Made:
    """Compiles one kernel for one chip."""
    names = build.kernel.arg_names
    constants = {name: value for name, value in build.constants.items() if name in names}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        return build.types.get(name) or "*fp32"  # the log-probs and sums: most pointers

    signature = {name: type_of(name) for name in names}
    # As the launcher's tensors are: 16-byte addresses, and strides and sizes divisible by 16.
    even = ("stride_hr", "stride_wv", "stride_dz", "stride", "stride_k", "D")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (name in even and name not in constants)
    }
    source = ASTSource(
        build.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=chip.target, options=options)
    assembly = compiled.asm["amdgcn" if chip.target.backend == "hip" else "ptx"]
    shared = int(compiled.metadata.shared)
    copies = "TMA" if "cp.async.bulk.tensor" in assembly else ""
    if chip.target.backend == "hip":
        numbers = {k: int(v) for k, v in re.findall(r"\.(\w+):\s+(\d+)\n", assembly)}
        # Scalar registers spill into lanes of vector registers, not into memory.
        spilled = 4 * numbers["vgpr_spill_count"]
        registers = numbers["vgpr_count"]
    else:
        registers, spilled = _assemble(assembly, chip.target.arch)
    return Made(registers, spilled, shared, assembly.count(chip.matrix), copies)


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as ptxas reports them."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    if not tool.exists():
        tool = folder / "ptxas"
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernel.ptx")
        path.write_text(ptx)
        command = [tool, "-v", "--gpu-name", target[1], path, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", told)[0])
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", told)))


def faults(build: Build, made: Made, chip: Chip) -> list[str]:
    """What is wrong with a build."""
    found = []
    if made.spilled:
        found.append(f"{made.spilled} bytes spilled")
    if made.shared > chip.shared:
        found.append(f"{made.shared} bytes of shared memory, the chip has {chip.shared}")
    if build.matrix and not made.matrix:
        found.append(f"no {chip.matrix}")
    return found


def document(rows: dict[str, list[tuple[Build, Made]]]) -> str:
    """The text of docs/KERNELS.md."""
    lines = [_PREFACE.format(version=triton.__version__, few=configs.FEW_ROWS, least=LEAST_ROWS)]
    for chip, made_of in rows.items():
        lines += [
            f"## {chip}",
            "",
            "| kernel | configuration | tile R × V × D | warps, stages | registers | spilled, B | "
            f"shared, KiB | `{CHIPS[chip].matrix}` | loads |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for build, made in made_of:
            constants = build.constants
            tile = " × ".join(
                str(constants[name])
                for name in ("BLOCK_R", "BLOCK_V", "BLOCK_D")
                if name in constants and build.name in ("linear_logprob_fwd", "dlogits")
            )
            lines.append(
                f"| {build.name} | {build.variant} | {tile} | {build.num_warps}, "
                f"{build.num_stages} | {made.registers} | {made.spilled} | "
                f"{made.shared / 1024:.0f} | {made.matrix or '–'} | {made.copies or 'pointers'} |"
            )
        lines.append("")
    return "\n".join(lines)


_PREFACE = """# The kernels, compiled

Written by `make kernels` with Triton {version}, without a GPU. `make check` fails if a configuration
below spills registers, needs more shared memory than its chip has, or does not use its chip's matrix
instruction.

## Which configuration is chosen when

| inputs | rows | configuration |
|---|---|---|
| bf16, fp16 | more than {few} | many |
| the same with a softcap or an entropy | more than {few} | softcap_or_entropy |
| bf16, fp16 | at most {few} | few |
| fp32, or mixed with fp32 | any | fp32: exact products, no tf32 |

"all" in a configuration means entropy, softcap, bias, a temperature by row and fp16's loss scale at once.

Tensor descriptors (TMA) are used on sm_90 and sm_100 where both matrices have 16-byte addresses,
16-byte row strides and contiguous elements; otherwise the same kernel loads through pointers. A device of compute
capability 8.6, 8.9 or 12.x takes the rows of sm_120, any AMD device those of gfx942.

## What a token costs

For K views, hidden size D, vocabulary V, A active rows a token, two bytes an element:

| step | FLOP a token | bytes a token, to and from memory |
|---|---|---|
| gather_rows (roma_loss only) | – | 4·D·(K+1) |
| linear_logprob_fwd | 2·D·V·(K+1) | 2·D·(K+1), and 2·D·V once per GROUP·BLOCK_R rows; writes 8·(K+1)·V/BLOCK_V |
| merge | 3·(K+1)·V/BLOCK_V | 8·(K+1)·V/BLOCK_V |
| sums, total, coefficients | about 60·(K+1) | 4·(3·(K+5) + K+1) |
| dlogits | 2·D·V·A | 2·V·A written |
| dh and dW, the vendor's products | 4·D·V·A | 4·V·A read; dh 8·D·A per vocabulary tile; dW 10·D·V once |

At D = 4096, V = 151,936, K = 4, A = 2 that is 6.2 GFLOP forward and 7.5 GFLOP backward a token.

The token-local path (worst_over="token", a workspace of {least} rows or of the whole batch) does not
need the dlogits product:

| step | FLOP a token | bytes a token, to and from memory |
|---|---|---|
| logits, the vendor's product | 2·D·V·(K+1) | 4·V·(K+1) written |
| row_sums | 5·V·(K+1) | 4·V·(K+1) read |
| row_dlogits | 6·V·A | 4·V·A read, 2·V·A written |
| dh and dW, the vendor's products | 4·D·V·A | 4·V·A read; dW 8·D·V per chunk |
"""


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compile only, write nothing")
    parser.add_argument("--chips", nargs="*", default=list(CHIPS), choices=list(CHIPS))
    options = parser.parse_args()
    rows: dict[str, list[tuple[Build, Made]]] = {}
    bad = 0
    for name in options.chips:
        chip = CHIPS[name]
        rows[name] = [(build, make(build, chip)) for build in builds(name)]
        for build, made in rows[name]:
            for fault in faults(build, made, chip):
                bad += 1
                print(f"{name} {build.name} ({build.variant}): {fault}", file=sys.stderr)
        print(f"{name}: {len(rows[name])} kernels compiled", flush=True)
    if not options.check:
        DOCUMENT.write_text(document(rows))
        print(f"written: {DOCUMENT}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
