"""The packages: one version, a light import, wheel and sdist, the compiled part, `roma info`."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import roma
from roma.info import info, text
from roma_kernels import DISTRIBUTION
from roma_kernels.backends import NAMES
from roma_kernels.native import FILE, native, open_native

ROOT = Path(__file__).resolve().parents[2]
# What a foreign trainer that imports the loss need not have, and should not wait for.
HEAVY = ("transformers", "nvidia.dali", "deepspeed", "vllm", "matplotlib", "triton", "PIL")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def python(*arguments: str, without_site: tuple[Path, ...] = ()) -> str:
    """What a fresh interpreter prints, in a folder that has nothing to do with the repository.

    without_site: folders to import the two packages from. `-S` then keeps the installed ones out,
    whose import hook (editable) would come first; the folder of torch is added as a plain path.
    """
    packages = Path(sys.modules["torch"].__path__[0]).parent
    path = os.pathsep.join(map(str, (*without_site, packages)))
    done = subprocess.run(
        [sys.executable, *(["-S"] if without_site else []), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(statement: str) -> set[str]:
    """The modules in memory after a statement, in a fresh interpreter."""
    code = f"import json, sys; {statement}; print(json.dumps(list(sys.modules)))"
    return set(json.loads(python("-c", code)))


def build(kind: str, out: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Calls the build back end as an installer does; `kind` is "wheel" or "sdist"."""
    code = f"from scikit_build_core.build import build_{kind}; build_{kind}({str(out)!r})"
    inherited = {name: value for name, value in os.environ.items() if name != "ROMA_REQUIRE_NATIVE"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built here, the compiled part included if there is a compiler."""
    out = tmp_path_factory.mktemp("wheel")
    required = {"ROMA_REQUIRE_NATIVE": "1"} if shutil.which("c++") else {}
    done = build("wheel", out, required)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def sources() -> set[str]:
    """Every Python file of the two packages under the name that it has when installed."""
    roots = {ROOT: ROOT / "roma", ROOT / "kernels": ROOT / "kernels" / "roma_kernels"}
    return {
        file.relative_to(root).as_posix()
        for root, package in roots.items()
        for file in package.glob("**/*.py")
    }


def test_one_version() -> None:
    written = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written == [version("roma-vlm")] == [roma.__version__]
    assert DISTRIBUTION == "roma-vlm"
    assert f'name = "{DISTRIBUTION}"' in (ROOT / "pyproject.toml").read_text()


def test_import_roma_loads_no_torch() -> None:
    """The command line answers at once, and a trainer pays when it uses a name."""
    modules = loaded("import roma")
    assert "roma" in modules and "torch" not in modules and "roma_kernels" not in modules


def test_the_loss_loads_torch_and_nothing_heavy() -> None:
    for statement in ("import roma; roma.roma_loss", "import roma_kernels.roma_loss.api"):
        modules = loaded(statement)
        assert {"torch", "roma_kernels.linear_logprob.op"} <= modules
        assert [name for name in HEAVY if name in modules] == []
    assert "roma" not in loaded("import roma_kernels.roma_loss.api")  # no import upwards


def test_two_real_packages() -> None:
    """A link is a one-line file in a zip and on a web page."""
    for name in ("roma", "kernels"):
        assert not [path for path in (ROOT / name).glob("**/*") if path.is_symlink()]
    assert (ROOT / "kernels" / "roma_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()  # `kernels` is Hugging Face's package


def test_the_wheel_holds_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "roma=roma.cli:main" in archive.read(entry_points).decode().replace(" ", "")
    assert sources() | {"roma/py.typed", "roma_kernels/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {"roma", "roma_kernels"}
    assert (f"roma_kernels/{FILE}" in names) == (shutil.which("c++") is not None)
    assert {name for name in names if not name.endswith((".py", ".so", "py.typed"))} == {
        "roma_kernels/linear_logprob/triton/tuning.json",
        *(f"roma/configs/{path.name}" for path in (ROOT / "configs").glob("[!d]*.yaml")),
    }


def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        compiled = f"roma_kernels/{FILE}" in archive.namelist()
    code = "import json; from roma.info import info; print(json.dumps(info()))"
    found = json.loads(python("-c", code, without_site=(tmp_path,)))
    assert found["packages"][0] == {
        "name": "roma-vlm",
        "version": roma.__version__,
        "purpose": "",
        "remedy": None,
    }
    assert found["native"]["available"] == compiled
    assert found["conflict"] is None
    configs = python("-m", "roma", "train", "--list-configs", without_site=(tmp_path,)).split()
    names = sorted(path.name for path in (ROOT / "configs").glob("[!d]*.yaml"))
    assert configs == [str(tmp_path / "roma/configs" / name) for name in names]
    needed = ["data.train_files=a", "worker.actor.model_path=b", "--print-config"]
    said = python("-m", "roma", "train", configs[-1], *needed, without_site=(tmp_path,))
    assert "view_mode: roma" in said


def test_the_sdist_holds_the_sources_and_no_leftovers(tmp_path: Path) -> None:
    done = build("sdist", tmp_path, {})
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {re.sub("^roma_kernels/", "kernels/roma_kernels/", name) for name in sources()} <= names
    assert {"CMakeLists.txt", "csrc/level.cpp", "csrc/native.h", "LICENSE"} <= names
    assert {f"configs/{path.name}" for path in (ROOT / "configs").iterdir()} <= names
    assert not [name for name in names if re.search(r"\.so$|\.pyc$|^runs/|^\.venv", name)]


def test_without_a_compiler_the_wheel_is_python_alone(tmp_path: Path) -> None:
    done = build("wheel", tmp_path, NO_COMPILER)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert sources() | {"roma/configs/qwen3vl_4b.yaml"} <= set(archive.namelist())
        assert f"roma_kernels/{FILE}" not in archive.namelist()


def test_a_required_compiler_that_is_missing_is_an_error(tmp_path: Path) -> None:
    done = build("wheel", tmp_path, {**NO_COMPILER, "ROMA_REQUIRE_NATIVE": "1"})
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


def test_a_bare_checkout_runs_examples_and_bench() -> None:
    """Nothing is installed but torch: PYTHONPATH=.:kernels."""
    checkout = (ROOT, ROOT / "kernels")
    said = python(str(ROOT / "examples" / "minimal.py"), without_site=checkout)
    assert re.search(r"^step 9: loss -?\d", said, re.MULTILINE)
    assert "usage: " in python("-m", "bench", "--help", without_site=checkout)
    said = python("-m", "roma", "--version", without_site=checkout)
    assert said == f"roma-vlm {roma.__version__}\n"


def test_the_native_library_loads_or_says_why() -> None:
    try:
        found = native()
    except ImportError as error:
        assert os.environ.get("ROMA_REQUIRE_NATIVE") != "1"
        assert "ROMA_REQUIRE_NATIVE=1" in str(error)
    else:
        assert found.cpu_level == expected_cpu_level()


def expected_cpu_level() -> str:
    """The dispatch level by the kernel's own list of what the processor can do."""
    if platform.machine() != "x86_64":
        return "portable"
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().partition("flags")[2]))
    if not {"avx2", "fma"} <= flags:
        return "portable"
    if not {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "avx2"
    return "avx512_bf16" if "avx512_bf16" in flags else "avx512"


def test_no_native_library(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=rf"expected {FILE} .*got none .*ROMA_REQUIRE_NATIVE=1"):
        open_native([tmp_path], roma.__version__)


def test_a_native_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("not a library")
    with pytest.raises(ImportError, match=r"expected one built for this system, got .*; "):
        open_native([tmp_path], roma.__version__)


@pytest.mark.skipif(shutil.which("c++") is None, reason="builds a library with the C++ compiler")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", r"expected the function roma_version, got none"),
        (
            'extern "C" const char* roma_version() { return "0.0.1"; }',
            rf"expected one of roma {re.escape(roma.__version__)}, got one of 0\.0\.1",
        ),
    ],
)
def test_a_native_library_of_something_else(source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "other.cpp").write_text(source)
    command = ["c++", "-shared", "-fPIC", "other.cpp", "-o", FILE]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(ImportError, match=said):
        open_native([tmp_path], roma.__version__)


def test_info_names_every_back_end_and_why() -> None:
    found = json.loads(json.dumps(info()))  # plain values alone
    assert [row["name"] for row in found["backends"]] == [name for name in NAMES if name != "auto"]
    assert all(row["reason"] for row in found["backends"])
    cpu = found["devices"][0]
    available = {row["name"] for row in found["backends"] if row["available"]}
    assert cpu["type"] == "cpu" and cpu["backend"] in available - {"reference"}
    lines = text(found).splitlines()
    assert lines[0] == ", ".join(f"{row['name']} {row['version']}" for row in found["packages"][:3])
    for row in (*found["packages"][3:], *found["backends"]):
        shown = [line.split()[1] for line in lines if line.startswith(f"{row['name']} ")]
        assert (row["version"] or "-" if "version" in row else "yes no") and shown
    (taken,) = (line.split()[0] for line in lines if re.match(r"\w+ +yes +(CPU|CPU, GPU) ", line))
    assert taken == cpu["backend"]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_info_fits_the_terminal(width: int) -> None:
    found = info()
    found["native"] = {"available": False, "description": "x", "instruction_set": None}
    found["conflict"] = "the distribution roma 1.8.0 (3D rotations) is installed too " * 3
    for row in found["packages"][3:]:
        row |= {"version": None, "remedy": f"pip install '{DISTRIBUTION}[views]'"}
    for row in found["backends"]:
        row["reason"] = "native library: expected libroma_native.so in the package, got none " * 3
    said = text(found, width=width)
    assert max(map(len, said.splitlines())) <= width
    assert said.count("pip install 'roma-vlm[views]'") == len(found["packages"]) - 3  # to copy


def test_info_says_what_to_install() -> None:
    found = info()
    for row in found["packages"]:
        assert (row["version"] is None) == (row["remedy"] is not None)
    remedy = "pip install 'roma-vlm[views]'"
    found["packages"][3:] = [
        {"name": "DALI", "version": None, "purpose": "degraded images", "remedy": remedy}
    ]
    said = text(found).splitlines()[-1].split(maxsplit=2)
    assert said == ["DALI", "-", f"degraded images: {remedy}"]


def test_info_names_extras_that_exist() -> None:
    """A remedy that installs nothing is worse than none."""
    extras = metadata(DISTRIBUTION).get_all("Provides-Extra", [])
    named = re.findall(r"roma-vlm\[([a-z,]+)\]", (ROOT / "roma" / "info.py").read_text())
    named += re.findall(r'_extra\("([a-z,]+)"\)', (ROOT / "roma" / "info.py").read_text())
    for file in (*(ROOT / "roma").glob("**/*.py"), *(ROOT / "kernels").glob("**/*.py")):
        named += re.findall(r"roma-vlm\[([a-z,]+)\]", file.read_text())
        assert "'roma[" not in file.read_text()
    assert named and {extra for names in named for extra in names.split(",")} <= set(extras)
