"""Runs the Python code blocks of Markdown files as printed: those of README.md, or of the named.

The blocks fenced as ```python run in order, in one namespace for each file. A block is left out,
and counted, where the line above its fence is `<!-- not run: REASON -->`. Other fences (```diff,
```bash, none) are not run. Draws from torch's generator are the same each time.
"""

import linecache
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]

_FENCE = re.compile(
    r"^(?P<indent> {0,3})(?P<fence>```+|~~~+)[ \t]*(?P<language>\w*)[^\n]*\n"
    r"(?P<code>.*?)^ {0,3}(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+?) -->[ \t]*\n\Z")


class Block(NamedTuple):
    """Code, the line of the file it starts at (from 1), and why it is not run, if it is not."""

    code: str
    line: int
    not_run: str | None


def blocks(text: str) -> Iterator[Block]:
    r"""The Python blocks of a Markdown file.

    Example:
        >>> [block.not_run for block in blocks("<!-- not run: slow -->\n```python\nf()\n```\n")]
        ['slow']
    """
    for found in _FENCE.finditer(text):
        if found["language"] == "python":
            skipped = _NOT_RUN.search(text, 0, found.start())
            line = text.count("\n", 0, found.start("code")) + 1
            yield Block(found["code"], line, skipped and skipped["reason"])


def run(path: Path) -> tuple[int, int]:
    """Runs the blocks of a file; returns how many ran and how many were left out.

    Raises:
        Exception: what a block raised.
    """
    text = path.read_text("utf-8")
    linecache.cache[str(path)] = (len(text), None, text.splitlines(True), str(path))
    scope = {"__name__": "__main__"}
    torch.manual_seed(0)
    ran = left_out = 0
    for block in blocks(text):
        if block.not_run:
            left_out += 1
            continue
        # Empty lines before it, so that a traceback names the line of the Markdown file.
        code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
        exec(code, scope)
        ran += 1
    return ran, left_out


def main(arguments: Sequence[str]) -> int:
    """Runs each file; 1 if one has no block that runs. A block that fails ends in its traceback."""
    counts = []
    for path in [Path(name).resolve() for name in arguments] or [ROOT / "README.md"]:
        ran, left_out = run(path)
        print(f"{path.name}: {ran} Python blocks ran, {left_out} left out")
        counts.append(ran)
    return 0 if all(counts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
