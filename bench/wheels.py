"""Run as a program: the peers' wheels, for a machine with a GPU and without a network.

    python -m bench.wheels                                # into .wheels/, 60 MiB at most
    python -m bench.wheels --have there.txt               # of its `pip list --format=freeze`
    python -m bench.wheels --peers verl,quack-kernels --limit 120
    python -m bench.wheels --parts                        # all of them, in pieces of 60 MiB

For CPython 3.12 on Linux x86_64, in the versions of constraints.txt. The peers come in the order of
their value, each with the packages that it needs and the machine lacks. One that does not fit is
left out by name. The last lines say how to install them there.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDER = Path(".wheels")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MIB = 2**20

HAVE = (
    *("torch", "triton", "transformers", "numpy", "packaging", "typing-extensions", "einops"),
    *("protobuf", "cuda-bindings", "cuda-pathfinder", "cuda-python"),
)
"""Without --have: what an image with PyTorch for CUDA 13 and transformers holds."""

NEVER = ("nvidia-cutlass-dsl-libs-cu12",)
"""Asked for whatever CUDA there is; the libraries of CUDA 13 are enough, and each is 90 MB."""


@dataclass(frozen=True)
class Peer:
    """A package that is measured."""

    requirement: str
    alone: bool = False
    """What is measured of it needs nothing that it asks for and the machine lacks."""

    @property
    def name(self) -> str:
        """Its name, without extras."""
        return canonicalize_name(Requirement(self.requirement).name)


PEERS = (
    Peer("cut-cross-entropy"),
    Peer("liger-kernel"),
    Peer("trl", alone=True),  # trl.kernels imports torch, triton and transformers
    Peer("verl", alone=True),  # the files of its heads import torch and triton
    Peer("quack-kernels[cu13]"),  # its CUTLASS serves "liger cute" too
)
"""Most valuable first."""


@dataclass(frozen=True)
class Wheel:
    """A file with what it asks for."""

    name: str
    file: Path
    size: int
    requires: tuple[str, ...]

    @classmethod
    def of(cls, file: Path) -> "Wheel":
        """Reads a wheel's metadata."""
        with zipfile.ZipFile(file) as archive:
            (inside,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            fields = HeaderParser().parsestr(archive.read(inside).decode())
        asked = tuple(fields.get_all("Requires-Dist", []))
        return cls(canonicalize_name(fields["Name"]), file, file.stat().st_size, asked)


Fetch = Callable[[Requirement], Wheel]


def resolve(peer: Peer, have: Collection[str], fetch: Fetch, python: str = "3.12") -> list[Wheel]:
    """The wheels of a peer: itself, and what it needs and `have` (canonical names) lacks."""
    waiting = [Requirement(peer.requirement)]
    found: dict[str, Wheel] = {}
    seen: set[str] = set()
    while waiting:
        wanted = waiting.pop(0)
        name = canonicalize_name(wanted.name)
        key = f"{name}[{','.join(sorted(wanted.extras))}]"
        if name in have or name in NEVER or key in seen:
            continue
        seen.add(key)
        wheel = found[name] = found.get(name) or fetch(wanted)
        if not peer.alone:
            asked = (Requirement(line) for line in wheel.requires)
            waiting += [r for r in asked if _applies(r, wanted.extras, python)]
    return list(found.values())


def _applies(asked: Requirement, extras: Iterable[str], python: str) -> bool:
    there = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    marker = asked.marker
    return marker is None or any(marker.evaluate({**there, "extra": e}) for e in ("", *extras))


def select(
    resolved: Iterable[tuple[Peer, list[Wheel]]], limit: float
) -> tuple[list[Wheel], list[tuple[Peer, int]]]:
    """The wheels, each once, of the peers that fit into `limit` bytes; the others, with theirs."""
    chosen: dict[str, Wheel] = {}
    left = []
    for peer, wheels in resolved:
        more = {w.name: w for w in wheels if w.name not in chosen}
        added = sum(w.size for w in more.values())
        if sum(w.size for w in chosen.values()) + added > limit:
            left.append((peer, added))
        else:
            chosen |= more
    return list(chosen.values()), left


def download(wanted: Requirement, folder: Path, python: str) -> Wheel:
    """The newest wheel that constraints.txt allows; raises SystemExit with pip's reason."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        command += ["--constraint", str(ROOT / "constraints.txt"), "--dest", place]
        wish = f"{wanted.name}{wanted.specifier}"
        done = subprocess.run([*command, wish], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [x for x in done.stderr.splitlines() if x.startswith("ERROR")] or ["pip failed"]
            raise SystemExit(f"{wanted}: {lines[-1]}")
        (file,) = Path(place).glob("*.whl")
        return Wheel.of(file.replace(folder / file.name))


def split(wheels: Iterable[Wheel], folder: Path, limit: int) -> list[Path]:
    """Puts the wheels into pieces of at most `limit` bytes of one archive, in place of them."""
    archive, pieces = folder / "peers.tar", []
    with tarfile.open(archive, "w") as tar:
        for wheel in wheels:
            tar.add(wheel.file, wheel.file.name)
            wheel.file.unlink()
    with archive.open("rb") as source:
        while block := source.read(limit):
            piece = folder / f"part{len(pieces) + 1}" / "piece"
            piece.parent.mkdir()
            piece.write_bytes(block)
            pieces.append(piece)
    archive.unlink()
    return pieces


def install_line(wheels: Iterable[Wheel], folder: Path) -> str:
    """The command that installs them, and lets Python find them.

    QuACK takes CUTLASS for another's code only in a folder named site-packages. CUTLASS relies on a
    .pth file, which is not read in a folder of PYTHONPATH.
    """
    there = ".peers/site-packages"
    path = [".", "kernels", there]  # last: wheels bring folders of names such as tests
    if any(wheel.name == "nvidia-cutlass-dsl" for wheel in wheels):
        path.append(f"{there}/nvidia_cutlass_dsl/dsl_packages")
    pip = f"python3 -m pip install -q --no-index --no-deps --no-compile --target {there}"
    return f"{pip} {folder}/*.whl && export PYTHONPATH={':'.join(path)}"


def names_in(file: Path) -> set[str]:
    """Names of packages, one a line, as in `pip list --format=freeze`; # begins a comment."""
    lines = (re.match(r"[A-Za-z0-9._-]+", line.strip()) for line in file.read_text().splitlines())
    return {canonicalize_name(found[0]) for found in lines if found}


def _empty(folder: Path) -> None:
    """Removes what an earlier call left."""
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.whl"), *folder.glob("part*/piece")):
        old.unlink()
    for part in folder.glob("part*"):
        part.rmdir()


def main(words: list[str] | None = None) -> None:
    """Downloads, prints what came and what was left out, and how to install it."""
    parser = argparse.ArgumentParser(prog="python -m bench.wheels", description="The peers' wheels")
    known = ",".join(peer.name for peer in PEERS)
    parser.add_argument("--have", type=Path, help="names of the packages there, one a line")
    parser.add_argument("--limit", type=float, default=60, help="MiB (60)")
    parser.add_argument("--peers", default=known, help=f"some of {known}")
    parser.add_argument("--python", default="3.12", help="its version there (3.12)")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"the folder ({FOLDER})")
    parser.add_argument("--parts", action="store_true", help="all, in pieces of --limit")
    options = parser.parse_args(words)
    asked = options.peers.split(",")
    if unknown := set(asked) - set(known.split(",")):
        parser.error(f"--peers: expected some of {known}, got {', '.join(sorted(unknown))}")
    try:
        have = names_in(options.have) if options.have else {canonicalize_name(n) for n in HAVE}
    except OSError as why:
        parser.error(f"--have: {why}")
    _empty(options.out)
    fetched: dict[str, Wheel] = {}

    def fetch(wanted: Requirement) -> Wheel:
        name = canonicalize_name(wanted.name)
        if name not in fetched:
            fetched[name] = download(wanted, options.out, options.python)
        return fetched[name]

    resolved = [
        (peer, resolve(peer, have, fetch, options.python)) for peer in PEERS if peer.name in asked
    ]
    limit = options.limit * MIB
    wheels, left = select(resolved, float("inf") if options.parts else limit)
    for wheel in fetched.values():
        if wheel in wheels:
            print(f"{wheel.size / MIB:7.1f} MiB  {wheel.file.name}")
        else:
            wheel.file.unlink()
    print(f"{sum(w.size for w in wheels) / MIB:7.1f} MiB  in {options.out}")
    for peer, size in left:
        more = f"it takes {size / MIB:.0f} MiB more, and --limit is {options.limit:g}"
        print(f"left out: {peer.name}; {more}. A larger one, or --parts, takes it")
    if options.parts:
        pieces = split(wheels, options.out, int(limit))
        print(f"in {len(pieces)} pieces, {options.out}/part1 and on; there, with all of them:")
        print(f"cat {options.out}/part*/piece | tar -xC {options.out}")
    print(install_line(wheels, options.out))


if __name__ == "__main__":
    main()
