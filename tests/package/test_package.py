"""The package: one version, a light import, wheel and sdist, the compiled part, `roma info`."""

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
from importlib.metadata import version
from pathlib import Path

import pytest

import roma
from roma.info import info, text
from roma_kernels.backends import NAMES
from roma_kernels.native import FILE, native, open_native

ROOT = Path(__file__).resolve().parents[2]
# What a foreign trainer that imports the loss need not have, and should not wait for.
HEAVY = ("transformers", "nvidia.dali", "deepspeed", "vllm", "matplotlib", "triton", "PIL")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def python(code: str, *, without_site: tuple[Path, ...] = (), **environment: str) -> str:
    """What a fresh interpreter prints, in a folder that has nothing to do with the repository.

    without_site: folders to import roma from. `-S` then keeps the installed roma out, whose
    import hook (editable) would come first; the folder of torch is added as a plain path.
    """
    packages = Path(sys.modules["torch"].__path__[0]).parent
    environment = {**os.environ, **environment}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*without_site, packages)))
    done = subprocess.run(
        [sys.executable, *(["-S"] if without_site else []), "-c", code],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    """Every Python file of the package under the name that it has when installed."""
    files = [*(ROOT / "roma").glob("**/*.py"), *(ROOT / "kernels").glob("**/*.py")]
    within = {str(file.relative_to(ROOT)) for file in files}
    return {re.sub(r"^kernels/", "roma/kernels/", name) for name in within}


def test_one_version() -> None:
    written = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written == [version("roma")] == [roma.__version__]


def test_the_import_is_light() -> None:
    loaded = json.loads(python("import json, sys, roma; print(json.dumps(sorted(sys.modules)))"))
    assert "roma_kernels.linear_logprob.op" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_kernels_is_a_link() -> None:
    link = ROOT / "roma" / "kernels"
    assert os.readlink(link) == "../kernels"
    assert not (link / "__init__.py").exists()  # `import kernels` stays Hugging Face's package


def test_the_wheel_holds_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "roma=roma.cli:main" in archive.read(entry_points).decode().replace(" ", "")
    assert sources() | {"roma/py.typed"} <= names
    assert all(name.startswith("roma/") for name in names)
    assert (f"roma/{FILE}" in names) == (shutil.which("c++") is not None)


def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        compiled = f"roma/{FILE}" in archive.namelist()
    code = "import json; from roma.info import info; print(json.dumps(info()))"
    found = json.loads(python(code, without_site=(tmp_path,)))
    assert found["packages"][0]["version"] == roma.__version__
    assert found["native"]["available"] == compiled


def test_the_sdist_holds_the_sources_and_no_leftovers(tmp_path: Path) -> None:
    done = build("sdist", tmp_path, {})
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources() <= names
    assert {"CMakeLists.txt", "csrc/level.cpp", "csrc/native.h", "LICENSE"} <= names
    assert not [name for name in names if re.search(r"\.so$|\.pyc$|^runs/|^\.venv", name)]


def test_without_a_compiler_the_wheel_is_python_alone(tmp_path: Path) -> None:
    done = build("wheel", tmp_path, NO_COMPILER)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert sources() <= set(archive.namelist())
        assert f"roma/{FILE}" not in archive.namelist()


def test_a_required_compiler_that_is_missing_is_an_error(tmp_path: Path) -> None:
    done = build("wheel", tmp_path, {**NO_COMPILER, "ROMA_REQUIRE_NATIVE": "1"})
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


def test_the_example_runs_from_a_bare_checkout() -> None:
    script = ROOT / "examples" / "minimal.py"
    said = python(f"import runpy; runpy.run_path({str(script)!r})", without_site=(ROOT,))
    assert re.search(r"^step 9: loss -?\d", said, re.MULTILINE)


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
    said = text(found)
    for row in (*found["packages"], *found["backends"]):
        assert re.search(rf"^  {re.escape(row['name'])} ", said, re.MULTILINE)


def test_info_says_what_to_install() -> None:
    found = info()
    for row in found["packages"]:
        assert (row["version"] is None) == (row["remedy"] is not None)
    found["packages"] = [{"name": "DALI", "version": None, "remedy": "pip install 'roma[views]'"}]
    assert "not installed: pip install 'roma[views]'" in text(found)
