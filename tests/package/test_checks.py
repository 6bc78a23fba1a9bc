"""`make check` bites: an import upwards, and a code block of a document that fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("roma", "kernels/roma_kernels", "experiments", "bench")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what import-linter reads."""
    for name in PACKAGES:
        without = shutil.ignore_patterns("__pycache__", "results", "*.so")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(checkout: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports` on a copy; `-S` keeps the editable install's import hook out."""
    packages = Path(sys.modules["pytest"].__path__[0]).parent
    path = os.pathsep.join(map(str, (checkout, checkout / "kernels", packages)))
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=checkout,
        capture_output=True,
        text=True,
    )


# file -> a line that breaks the contract of the name.
UPWARDS = {
    "kernels/roma_kernels/errors.py": ("import roma.info", "roma_kernels below roma"),
    "kernels/roma_kernels/arguments.py": (
        "import roma_kernels.linear_logprob.api",
        "the rooms of roma_kernels",
    ),
    "kernels/roma_kernels/linear_logprob/rows.py": (
        "import roma_kernels.linear_logprob.op",
        "linear_logprob: ",
    ),
    "kernels/roma_kernels/roma_loss/config.py": (
        "import roma_kernels.roma_loss.api",
        "roma_loss: ",
    ),
    "roma/views/shapes.py": ("import roma.train.config", "the rooms of roma, downwards"),
    "roma/rewards/math.py": ("import roma.models.small", "know nothing of one another"),
    "roma/rewards/boxed.py": ("import experiments.digits", "roma_kernels below roma"),
    "roma/train/config/schema.py": ("import roma.train.trainer", "no circle of imports"),
}


def test_imports_run_downwards(checkout: Path) -> None:
    done = lint(checkout)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("file", UPWARDS)
def test_an_import_upwards_is_named(file: str, checkout: Path) -> None:
    statement, contract = UPWARDS[file]
    path = checkout / file
    path.write_text(path.read_text() + f"\n{statement}\n")
    done = lint(checkout)
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    assert any(contract in line for line in broken), done.stdout


def check_readme(path: Path, text: str) -> subprocess.CompletedProcess[str]:
    """The check of a document's code."""
    path.write_text(text)
    command = [sys.executable, str(ROOT / ".ci" / "check_readme.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True)


def test_code_blocks_run_in_order_in_one_namespace(tmp_path: Path) -> None:
    text = (
        "```diff\n-boom\n```\n<!-- not run: needs a model -->\n```python\nboom\n```\n"
        "```python\nx = 20\n```\n\n```\nboom\n```\n```python title='a'\nprint(x + 1)\n```\n"
    )
    done = check_readme(tmp_path / "a.md", text)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "21\na.md: 2 Python blocks ran, 1 left out\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# A\n\n```python\nx = 1\nassert x == 2\n```\n", 'a.md", line 5, in <module>'),
        ("```python\nx =\n```\n", "SyntaxError"),
        ("<!-- not run: -->\n```python\nboom\n```\n", "NameError"),
        ("<!-- not run: far above -->\n\n```python\nboom\n```\n", "NameError"),
    ],
)
def test_a_block_that_fails_is_named(text: str, said: str, tmp_path: Path) -> None:
    done = check_readme(tmp_path / "a.md", text)
    assert done.returncode == 1 and said in done.stderr


def test_a_document_without_code_to_run_is_a_failure(tmp_path: Path) -> None:
    assert check_readme(tmp_path / "a.md", "```diff\nx\n```\n").returncode == 1
