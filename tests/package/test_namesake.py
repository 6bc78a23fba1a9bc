"""The other `roma` in the way: on the package index it is a library of 3D rotations."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As that of the other package: public functions, a version, nothing of ours.
THEIRS = """\
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("roma")
except PackageNotFoundError:
    __version__ = "unknown"


def rotvec_to_rotmat(rotvec):
    return rotvec
"""
# The command line says so itself, in one line: below.
ROOMS = sorted(
    f"roma.{path.parent.name}"
    for path in (ROOT / "roma").glob("*/__init__.py")
    if path.parent.name != "cli"
)
REMEDY = "pip uninstall roma; pip install --force-reinstall --no-deps roma-vlm"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of both packages in a folder of their own, as an installer leaves them."""
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "roma", tmp_path / "roma", ignore=without)
    shutil.copytree(ROOT / "kernels" / "roma_kernels", tmp_path / "roma_kernels", ignore=without)
    return tmp_path


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that imports the copies."""
    packages = Path(sys.modules["torch"].__path__[0]).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (site, packages)))}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def install_theirs(site: Path, version: str) -> None:
    """What the installer records of the other distribution."""
    folder = site / f"roma-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: roma\nVersion: {version}\n")


def refusals(site: Path) -> dict[str, str]:
    """Sub-package -> the error of importing it, in one interpreter."""
    code = f"""
import importlib
for name in {ROOMS}:
    try:
        importlib.import_module(name)
        print(name, "imported")
    except BaseException as error:
        print(name, f"{{type(error).__name__}}: {{error}}")
"""
    done = python(site, "-c", code)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_every_sub_package_refuses_the_other_one(site: Path) -> None:
    theirs = site / "roma" / "__init__.py"
    theirs.write_text(THEIRS)
    said = f"ImportError: roma: expected the package of roma-vlm, got another package at {theirs}; "
    assert refusals(site) == dict.fromkeys(ROOMS, said + REMEDY)


def test_every_sub_package_refuses_a_folder_without_init(site: Path) -> None:
    """What uninstalling the other one leaves."""
    (site / "roma" / "__init__.py").unlink()
    said = "ImportError: roma: expected the package of roma-vlm, got a folder without __init__.py; "
    assert refusals(site) == dict.fromkeys(ROOMS, said + REMEDY)


@pytest.mark.parametrize("module", ["roma", "roma.cli"])
@pytest.mark.parametrize("command", [["info"], ["train", "x.yaml"], ["views", "--list"]])
def test_the_command_line_says_so_in_one_line(site: Path, module: str, command: list[str]) -> None:
    (site / "roma" / "__init__.py").write_text(THEIRS)
    done = python(site, "-m", module, *command)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("roma: expected the package of roma-vlm, got another package at ")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(f"; {REMEDY}\n")


def test_help_and_the_loss_work_in_any_case(site: Path) -> None:
    (site / "roma" / "__init__.py").write_text(THEIRS)
    assert "usage: roma" in python(site, "-m", "roma", "--help").stdout
    assert python(site, "-c", "from roma_kernels.roma_loss.api import roma_loss").returncode == 0


def test_ours_says_that_the_other_one_is_installed_too(site: Path) -> None:
    install_theirs(site, "1.8.0")
    said = "the distribution roma 1.8.0 (3D rotations) is installed too and shares the import name"
    done = python(site, "-m", "roma", "info")
    assert done.returncode == 0
    assert f"conflict: {said}; {REMEDY}" in " ".join(done.stdout.split())
    done = python(site, "-c", "import roma; roma.rotvec_to_rotmat")
    last = done.stderr.splitlines()[-1]
    wanted = "AttributeError: module 'roma' has no attribute 'rotvec_to_rotmat'"
    assert last == f"{wanted}; {said}; {REMEDY}"
    ours = python(site, "-c", "import roma, roma.views; print(roma.RomaConfig().main)")
    assert ours.stdout == "grpo\n", ours.stderr


def test_alone_nothing_is_said(site: Path) -> None:
    assert "conflict" not in python(site, "-m", "roma", "info").stdout
    last = python(site, "-c", "import roma; roma.nosuch").stderr.splitlines()[-1]
    assert last == "AttributeError: module 'roma' has no attribute 'nosuch'"
