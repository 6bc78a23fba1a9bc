"""Run as a program, without Triton's interpreter: what `bench.compiled` says of spoiled builds.

Prints a JSON object: what was spoiled → the faults that were found, one list a build.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from bench.compiled.build import faults, make
from bench.compiled.cases import ENTROPY, Head
from bench.compiled.chips import CHIPS, Chip
from bench.compiled.launches import Launch, recorded


def spoiled(launch: Launch, change: Callable[[dict[str, Any]], None]) -> Launch:
    """The launch with something changed in what is compiled."""
    parts = json.loads(launch.specialization)
    change(parts)
    parts["key"] += "spoiled"  # under which a kernel keeps what it compiled
    return Launch(launch.module, launch.name, json.dumps(parts))


def few_warps(parts: dict[str, Any]) -> None:
    """Four times the logits a thread."""
    parts["options"]["num_warps"] = 2


def many_stages(parts: dict[str, Any]) -> None:
    """Twelve slots of 48 KiB."""
    parts["options"]["num_stages"] = 12


def odd_block(parts: dict[str, Any]) -> None:
    """A block that is no power of two."""
    place = parts["constant_keys"].index([list(parts["signature"]).index("BLOCK_D")])
    parts["constant_vals"][place] = 24


def main() -> None:
    torch.set_num_threads(1)
    said: dict[str, list[list[str]]] = {}

    def judge(name: str, chip: Chip, launches: list[Launch]) -> None:
        said[name] = [faults(launch, make(launch, chip), chip) for launch in launches]

    old, new = CHIPS["sm_80"], CHIPS["sm_90"]
    many = recorded("sm_80", old.target, iter([Head(options=ENTROPY)]))
    forward = [launch for launch in many if launch.label == "linear_logprob_fwd"]
    described = recorded("sm_90", new.target, iter([Head()]))[:1]
    judge("nothing", old, many)
    judge("registers", old, [spoiled(launch, few_warps) for launch in forward])
    judge("block", old, [spoiled(launch, odd_block) for launch in forward])
    judge("shared memory", new, [spoiled(launch, many_stages) for launch in described])
    judge("matrix", new._replace(matrix="tcgen05.mma"), described)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
