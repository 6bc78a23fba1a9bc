"""Wheels for a machine without a network: what is needed, what fits, how it gets there."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from bench import wheels

# Requires-Dist as released on 2026-11-25, shortened.
RECORDED = {
    "cut-cross-entropy": ["torch", 'triton; platform_system == "Linux"', 'pytest; extra == "test"'],
    "liger-kernel": ["torch>=2.1.2", "triton>=2.3.1", 'apache-tvm-ffi; extra == "cutedsl"'],
    "verl": ["ray[default]>=2.41.0", "transformers<5.11,>=5.5.3", "torchdata"],
    "quack-kernels": [
        *("nvidia-cutlass-dsl>=4.7", "torch", "apache-tvm-ffi<0.2,>=0.1.6", "einops"),
        *("torch-c-dlpack-ext", 'nvidia-cutlass-dsl[cu13]>=4.7; extra == "cu13"'),
        'jax; extra == "jax"',
    ],
    "nvidia-cutlass-dsl": [
        *("nvidia-cutlass-dsl-libs-base==4.8.1", "nvidia-cutlass-dsl-libs-cu12==4.8.1"),
        'nvidia-cutlass-dsl-libs-cu13==4.8.1; extra == "cu13"',
    ],
    "nvidia-cutlass-dsl-libs-base": [
        *("typing_extensions>=4.10.0", 'backports.strenum; python_version < "3.11"'),
        "protobuf>=4.21.12",
    ],
    "nvidia-cutlass-dsl-libs-cu13": ["nvidia-cutlass-dsl-libs-base==4.8.1"],
    "apache-tvm-ffi": ["typing-extensions>=4.13"],
    "torch-c-dlpack-ext": ["torch"],
    "backports-strenum": [],
}
MEBIBYTES = {"quack-kernels": 1, "nvidia-cutlass-dsl-libs-cu13": 88, "apache-tvm-ffi": 3}


def recorded(wanted: Requirement) -> wheels.Wheel:
    name = wheels.canonicalize_name(wanted.name)
    size = MEBIBYTES.get(name, 1) * wheels.MIB
    return wheels.Wheel(name, Path(f"{name}.whl"), size, tuple(RECORDED[name]))


def names(found: list[wheels.Wheel]) -> set[str]:
    return {wheel.name for wheel in found}


def test_what_a_peer_needs() -> None:
    """What the machine lacks, for its Python, with extras; never two CUDAs."""
    have = {wheels.canonicalize_name(name) for name in wheels.HAVE}
    quack = wheels.Peer("quack-kernels[cu13]")
    libraries = {"nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-cu13"}
    needed = {"quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi", "torch-c-dlpack-ext"}
    assert names(wheels.resolve(quack, have, recorded)) == needed | libraries
    without = have - {"typing-extensions"} | {"apache-tvm-ffi", "nvidia-cutlass-dsl"}
    assert names(wheels.resolve(quack, without, recorded)) == {
        "quack-kernels",
        "torch-c-dlpack-ext",
    }
    old = wheels.resolve(quack, have, recorded, "3.10")
    assert names(old) == needed | libraries | {"backports-strenum"}
    assert names(wheels.resolve(wheels.Peer("verl", alone=True), have, recorded)) == {"verl"}
    with pytest.raises(KeyError, match="ray"):
        wheels.resolve(wheels.Peer("verl"), have, recorded)
    assert names(wheels.resolve(wheels.Peer("cut-cross-entropy"), have, recorded)) == {
        "cut-cross-entropy"
    }


def test_what_does_not_fit_is_left_out_by_name() -> None:
    have = {wheels.canonicalize_name(name) for name in wheels.HAVE}
    asked = [wheels.Peer(n) for n in ("quack-kernels[cu13]", "liger-kernel[cutedsl]")]
    resolved = [(peer, wheels.resolve(peer, have, recorded)) for peer in asked]
    chosen, left = wheels.select(resolved, 60 * wheels.MIB)
    assert names(chosen) == {"liger-kernel", "apache-tvm-ffi"}
    assert [(p.name, size // wheels.MIB) for p, size in left] == [("quack-kernels", 95)]
    chosen, left = wheels.select(resolved, 96 * wheels.MIB)  # tvm-ffi counts once
    assert not left and len(chosen) == len(names(chosen)) == 7


def built(folder: Path, name: str, *asked: str) -> Path:
    file = folder / f"{name}-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    with zipfile.ZipFile(file, "w") as archive:
        text = "\n".join([*lines, *(f"Requires-Dist: {a}" for a in asked)])
        archive.writestr(f"{name}-1.0.dist-info/METADATA", text + "\n")
    return file


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for pip: it builds the wheel that it is asked for. Its command lines."""
    lines: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        lines.append(command)
        wish = Requirement(command[-1]).name
        if wish not in RECORDED and wish != "trl":
            return subprocess.CompletedProcess(command, 1, "", f"x\nERROR: No match for {wish}\n")
        place = Path(command[command.index("--dest") + 1])
        built(place, wish.replace("-", "_"), *RECORDED.get(wish, []))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    return lines


def test_the_command_without_a_network(
    index: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Versions from constraints.txt, no sources, what is left of an earlier call removed."""
    built(tmp_path, "old_peer")
    wheels.main(["--out", str(tmp_path), "--peers", "verl,quack-kernels"])
    assert {f.name.partition("-")[0] for f in tmp_path.glob("*.whl")} == {
        *("verl", "quack_kernels", "nvidia_cutlass_dsl", "apache_tvm_ffi", "torch_c_dlpack_ext"),
        *("nvidia_cutlass_dsl_libs_base", "nvidia_cutlass_dsl_libs_cu13"),
    }
    assert all("--only-binary=:all:" in c and "--no-deps" in c for c in index)
    pins = Path(index[0][index[0].index("--constraint") + 1]).read_text().splitlines()
    assert {"verl==0.9.1", "quack-kernels==0.6.5", "nvidia-cutlass-dsl==4.8.1"} <= set(pins)
    said = capsys.readouterr().out
    assert f"--target .peers/site-packages {tmp_path}/*.whl" in said
    assert said.rstrip().endswith(".peers/site-packages/nvidia_cutlass_dsl/dsl_packages")


def test_too_much_is_left_out_of_the_folder(
    index: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels.main(["--out", str(tmp_path), "--limit", "0.0005", "--peers", "verl,quack-kernels"])
    assert [f.name for f in tmp_path.iterdir()] == ["verl-1.0-py3-none-any.whl"]
    said = capsys.readouterr().out
    assert "left out: quack-kernels; it takes 0 MiB more, and --limit is 0.0005" in said
    assert "dsl_packages" not in said


def test_pieces_make_the_wheels_again(index: list[list[str]], tmp_path: Path) -> None:
    """Each within the limit; joined as the printed line says, they install."""
    limit = 3000 / wheels.MIB
    wheels.main(["--out", str(tmp_path), "--limit", str(limit), "--peers", "trl,verl", "--parts"])
    pieces = sorted(tmp_path.glob("part*/piece"))
    assert len(pieces) > 1 and all(p.stat().st_size <= 3000 for p in pieces)
    assert not list(tmp_path.glob("*.whl")) and not (tmp_path / "peers.tar").exists()
    join = f"cat {tmp_path}/part*/piece | tar -xC {tmp_path}"
    assert subprocess.call(["bash", "-c", join]) == 0
    assert {wheels.Wheel.of(f).name for f in tmp_path.glob("*.whl")} == {"trl", "verl"}


def test_wrong_words(
    index: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--peers", "trl,nobody"], "expected some of cut-cross-entropy,"),
        (["--have", str(tmp_path / "gone.txt")], "--have: [Errno 2]"),
    ):
        with pytest.raises(SystemExit):
            wheels.main(["--out", str(tmp_path), *words])
        assert said in capsys.readouterr().err
    there = tmp_path / "there.txt"
    there.write_text("# pip list --format=freeze\nTorch==2.11.0\n\ntyping_extensions @ file:x\n")
    assert wheels.names_in(there) == {"torch", "typing-extensions"}
    with pytest.raises(SystemExit, match=r"^einops: ERROR: No match for einops$"):
        wheels.main(["--out", str(tmp_path), "--have", str(there), "--peers", "quack-kernels"])
