"""The compile report: it compiles what launches, and says what is wrong with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.compiled import __main__ as program
from bench.compiled import build, document, sass, tritons

ROOT = Path(__file__).parents[2]

# As cuobjdump of Triton's wheel says it, of CUDA 12.8 to 13.
RESOURCES = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function _dlogits_kernel:
  REG:255 STACK:120 SHARED:1024 LOCAL:0 CONSTANT[0]:1384 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
AMD = """
    .name:           _merge_kernel
    .private_segment_fixed_size: {scratch}
    .sgpr_count:     37
    .sgpr_spill_count: 5
    .uses_dynamic_stack: false
    .vgpr_count:     30
    .vgpr_spill_count: {spilled}
    .wavefront_size: 64
"""
# The shape of a persistent kernel: a loop that multiplies, and branches over what ends a tile.
CODE = """
	.section	.text._dlogits_kernel,"ax",@progbits
_dlogits_kernel:
.text._dlogits_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*00a0*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*8b60*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR32], R24 ;
        /*8d60*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR32], R24, gsb0 ;
        /*8d70*/               @P1 BRA `(.L_x_2) ;
        /*8d80*/                   IADD3 R3, R3, 0x1, RZ ;
.L_x_2:
        /*8e70*/               @P0 BRA `(.L_x_4) ;
{epilogue}
.L_x_4:
        /*b000*/               @P0 BRA `(.L_x_1) ;
.L_x_3:
        /*b010*/                   EXIT ;
"""
EPILOGUE = [
    *["FFMA R8, R10.reuse, R9, -R14"] * 90,
    *["@!P2 FSEL R10, R43, RZ, P1", "MUFU.EX2 R8, R8"] * 20,
    *["@P2 STG.E.128 desc[UR6][R2.64], R4", "STG.E desc[UR6][R2.64], R4"],
    *["@!UP0 UIADD3 UR4, UR4, 0x1, URZ", "STG.E.U16 desc[UR6][R2.64], R4"],
]


def code(instructions: list[str]) -> sass.Code:
    lines = (f"        /*{16 * i:04x}*/   {x} ;" for i, x in enumerate(instructions, 0x8E8))
    return sass.parsed(CODE.format(epilogue="\n".join(lines)))


def test_resources_of_a_cubin() -> None:
    assert build.nvidia_resources(RESOURCES) == (255, 120)
    assert build.nvidia_resources(RESOURCES.replace("LOCAL:0", "LOCAL:8")) == (255, 128)
    with pytest.raises(ValueError, match="cuobjdump"):
        build.nvidia_resources("cuobjdump info: no kernel found")
    with pytest.raises(ValueError, match="one kernel"):
        build.nvidia_resources(RESOURCES * 2)


def test_resources_of_amd() -> None:
    assert build.amd_resources(AMD.format(scratch=0, spilled=0)) == (30, 0)
    assert build.amd_resources(AMD.format(scratch=64, spilled=2)) == (30, 64)
    assert build.amd_resources(AMD.format(scratch=0, spilled=2)) == (30, 8)
    with pytest.raises(ValueError, match="vgpr_spill_count"):
        build.amd_resources(AMD.replace(".vgpr_spill_count", ".other"))


def test_loads() -> None:
    assert build.loads_of("cp.async.bulk.tensor.2d.shared::cta.global.tile") == "TMA"
    assert build.loads_of("cp.async.cg.shared.global [%r1], [%rd2], 16;") == "cp.async"
    assert build.loads_of("ld.global.b16 { %rs1 }, [ %rd2 ];") == "registers"


def test_epilogue() -> None:
    found = sass.epilogue(code(EPILOGUE))
    assert len(found) == len(EPILOGUE)
    assert sass.counts(found) == {"FFMA": 90, "FSEL": 20, "MUFU": 20, "STG": 3, "UIADD3": 1}
    assert sass.stores(found) == "1 of 128 bits, 1 of 32 bits, 1 of 16 bits"


def test_no_epilogue() -> None:
    with pytest.raises(ValueError, match="epilogue"):
        sass.epilogue(code(EPILOGUE[:50]))  # as short as an ordinary branch
    with pytest.raises(ValueError, match="epilogue"):
        sass.epilogue(sass.parsed(CODE.format(epilogue="").replace("HGMMA", "FFMA")))
    with pytest.raises(ValueError, match="nvdisasm"):
        sass.parsed("nvdisasm fatal   : the file is empty")


def output(name: str) -> Any:
    """What a program of tests/support prints where kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, f"tests/support/{name}.py"], cwd=ROOT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_drawn_calls_launch_what_is_compiled() -> None:
    assert output("compiled_calls") == {"sm_80": [], "sm_90": [], "gfx942": []}


@pytest.mark.slow
def test_spoiled_builds_are_reported() -> None:
    said = output("compiled_faults")
    assert said["nothing"] and not any(said["nothing"])
    for name, fault in {
        "registers": "bytes spilled",
        "shared memory": "bytes of shared memory, the chip has 232448",
        "matrix": "no tcgen05.mma",
        "block": "does not compile: ValueError: arange's range must be a power of 2",
    }.items():
        assert [len(found) for found in said[name]] == [1], name
        assert fault in said[name][0][0]


def test_part_of_the_document() -> None:
    begin = "<!-- compiled:begin, written by python -m bench.compiled -->"
    text = f"before\n{begin}\nold\n<!-- compiled:end -->\nafter"
    made = document.between_markers(text, "compiled", r"new \1")
    assert made == text.replace("old", r"new \1")
    with pytest.raises(ValueError, match="markers"):
        document.between_markers(text, "tritons", "new")
    with pytest.raises(ValueError, match="markers"):
        document.between_markers(text * 2, "compiled", "new")


def test_every_part_is_written() -> None:
    text = document.DOCUMENT.read_text()
    for name in ("compiled", "epilogues", "tritons"):
        part = text[text.index(f"<!-- {name}:begin") : text.index(f"<!-- {name}:end -->")]
        assert part.count("\n|") > 2, f"{name} has no table"


@pytest.mark.parametrize("faults", [[], ["dlogits: 8 bytes spilled"]])
def test_under_each_triton(
    faults: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def summary(version: str, arguments: list[str]) -> dict[str, Any]:
        asked.append((version, arguments))
        wrong = faults if version == "3.8.0" else []
        return {"triton": version, "chips": {"sm_90": {"kernels": 7, "faults": wrong}}}

    monkeypatch.setattr(tritons, "summary", summary)
    arguments = ["--check", "--chips", "sm_90", "--processes", "2", "--tritons", "3.6.0", "3.8.0"]
    monkeypatch.setattr(sys, "argv", ["bench.compiled", *arguments])
    assert program.main() == bool(faults)
    assert [version for version, _ in asked] == ["3.6.0", "3.8.0"]
    assert all({"--every", "sm_90"} <= set(given) for _, given in asked)
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == f"| sm_90 | 7, all clean | {'7, 1 not' if faults else '7, all clean'} |"


def test_a_triton_is_installed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tritons, "sys", SimpleNamespace(prefix=tmp_path, executable="python"))
    ran: list[list[str]] = []

    def install(command: list[str], check: bool) -> None:
        ran.append([str(word) for word in command])
        folder = Path(command[command.index("--target") + 1])
        folder.mkdir()
        if len(ran) == 1:
            raise subprocess.CalledProcessError(1, command)
        (folder / "triton").touch()

    monkeypatch.setattr(tritons.subprocess, "run", install)
    with pytest.raises(subprocess.CalledProcessError):
        tritons.installed("3.6.0")
    assert not tritons.folder("3.6.0").exists()
    for _ in range(2):  # the second time it is there
        assert tritons.installed("3.6.0") == tmp_path / "tritons" / "3.6.0"
    assert len(ran) == 2 and ran[1][-1] == "triton==3.6.0"
    assert [path.name for path in (tmp_path / "tritons" / "3.6.0").iterdir()] == ["triton"]
    assert tritons.installed(tritons.triton.__version__) is None
