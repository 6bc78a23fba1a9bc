"""Reads machine code of NVIDIA's chips: what a tile's epilogue executes after its product."""

import re
from collections import Counter
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_BRANCH = re.compile(r"BRA\S*\s.*?`\((\.L_x_\d+)\)")
_MATRIX = re.compile(r"[A-Z]+MMA\b")
_LEAST = 100  # instructions: shorter spans are not an epilogue


class Code(NamedTuple):
    """Instructions without their predicates, and where each label stands among them."""

    instructions: list[str]
    labels: dict[str, int]


def parsed(text: str) -> Code:
    """The code that `nvdisasm -c` prints of one kernel.

    Raises:
        ValueError: there is none.
    """
    code = Code([], {})
    for line in text.splitlines():
        if label := _LABEL.match(line):
            code.labels[label[1]] = len(code.instructions)
        elif instruction := _INSTRUCTION.match(line):
            code.instructions.append(instruction[1])
    if not code.instructions:
        raise ValueError(f"nvdisasm: expected instructions, got {text[:200]!r}")
    return code


def epilogue(code: Code) -> list[str]:
    """What a warp executes once a tile: the span that the loop over the depth branches over.

    A persistent kernel runs products and epilogues in one loop; after its matrix instructions it
    branches over the epilogue unless the depth is done.

    Raises:
        ValueError: there is no matrix instruction, or no such span behind the last one.
    """
    products = [i for i, line in enumerate(code.instructions) if _MATRIX.match(line)]
    for i in range(products[-1] if products else 0, len(code.instructions)):
        branch = _BRANCH.match(code.instructions[i])
        if products and branch and code.labels[branch[1]] - i > _LEAST:
            return code.instructions[i + 1 : code.labels[branch[1]]]
    raise ValueError("expected a branch over an epilogue behind the last matrix instruction")


def counts(instructions: list[str]) -> Counter[str]:
    """How often each operation stands there, without its modifiers."""
    return Counter(line.split()[0].split(".")[0] for line in instructions)


def stores(instructions: list[str]) -> str:
    """The stores to global memory, as "16 of 128 bits, 3 of 32 bits", widest first."""
    widths = Counter(_width(line) for line in instructions if line.startswith("STG"))
    return ", ".join(f"{n} of {bits} bits" for bits, n in sorted(widths.items(), reverse=True))


def _width(store: str) -> int:
    found = re.search(r"\.[US]?(8|16|64|128)\b", store.split()[0])
    return int(found[1]) if found else 32
