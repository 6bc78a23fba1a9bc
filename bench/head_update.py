"""TRL's GRPO step with TRL's head and with ours: time and peak memory, K = 0 and K = 2.

    OMP_NUM_THREADS=1 python -m bench.head_update              # five minutes on one core
    python -m bench.head_update --width 64 --vocab 1000 --rounds 2    # that it runs

A small Qwen3-VL and a batch as in `bench.update_step`; what is timed is `_compute_loss` and its
backward: GRPOTrainer's for K = 0, RomaGRPOTrainer's for K = 2, which makes the views too. Rounds
are interleaved, memory is the peak of resident memory in a process of its own.

    trl           TRL's head as it is: away from CUDA it scores every position, prompts too
    trl counted   the same, scoring counted positions only, as it does on CUDA
    roma          roma.linear_logprob

Before the clock starts, the gradients of all three are compared.
"""

import argparse
import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench.processes import environment
from bench.update_step import trl_step
from bench.update_step.made import Made, make
from bench.update_step.step import APART
from bench.variants import QUICK, Variant

HEADS = ("trl", "trl counted", "roma")
VIEWS = (0, 2)
NAMES = [(head, views) for views in VIEWS for head in HEADS]
# Large blocks go back to the system when they are freed, so that the second call's are seen.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class HeadStep:
    """A trainer whose model has one of the heads, and a batch as its loss takes it."""

    def __init__(self, made: Made, head: str, views: int) -> None:
        """`views`: K; 0 is TRL's own trainer."""
        from transformers import AutoModelForImageTextToText
        from trl import GRPOConfig, GRPOTrainer

        from roma.integrations.lm_head import fused_head
        from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer

        self.head = head
        layout, ours = made.layout, head == "roma"
        options: dict[str, Any] = {
            "output_dir": str(made.folder / "trl"),
            "per_device_train_batch_size": layout.prompts * layout.rollouts,
            "num_generations": layout.rollouts,
            "max_completion_length": layout.completion,
            "loss_type": "grpo",
            "beta": 0.0,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
        }
        config = RomaGRPOConfig if views else GRPOConfig
        if views:
            options |= {"num_views": views, "roma_lm_head": ours}
        self.trainer: Any = (RomaGRPOTrainer if views else GRPOTrainer)(
            model=AutoModelForImageTextToText.from_pretrained(made.folder),
            reward_funcs=trl_step._no_reward,
            args=config(**options),
            train_dataset=_rows(made),
            processing_class=trl_step._processor(made.policy.processor),
        )
        self.model: Any = self.trainer.model.train()
        if ours and not views:
            asked = {"temperature": 1.0, "outputs": ("log_probs", "entropy")}
            fused_head(self.model, **asked)  # type: ignore[arg-type]
        self.trainer.current_gradient_accumulation_steps = 1
        self.inputs = trl_step._inputs(made.batch, self.model.config.image_token_id)
        if views:
            count, correct = len(made.batch.tokens), made.batch.correct
            self.inputs |= {
                "roma_correct": correct,
                "roma_step": torch.zeros(count, dtype=torch.long),
                "roma_row": torch.arange(count),
                "roma_total_correct": correct.sum(),
            }

    def run(self) -> None:
        """One loss and its backward."""
        self.model.zero_grad()
        for values in self.trainer._metrics["train"].values():
            values.clear()
        with _counted_rows(self.head == "trl counted"):
            self.trainer._compute_loss(self.model, self.inputs).backward()

    def gradients(self) -> list[Tensor]:
        """Of all weights."""
        return [w.grad.double().clone() for w in self.model.parameters() if w.grad is not None]


def _rows(made: Made) -> Any:
    """Prompts with a column of images, which a trainer asks for and does not read here."""
    return trl_step._prompts(made).add_column("images", [[] for _ in made.batch.prompts.images])


@contextmanager
def _counted_rows(on: bool) -> Iterator[None]:
    """TRL's head picks counted rows where its Triton kernels run; here without the kernels."""
    from trl.trainer import utils

    stock = utils._use_triton
    if on:
        utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = stock


def _compare(steps: dict[tuple[str, int], HeadStep]) -> None:
    """Raises ValueError for gradients that are off by more than fp32 sums in another order."""
    for views in VIEWS:
        found = {}
        for head in HEADS:
            steps[head, views].run()
            found[head] = steps[head, views].gradients()
        want = found["trl"]
        whole = sum(float(x.square().sum()) for x in want)
        for head, got in found.items():
            off = sum(float((a - b).square().sum()) for a, b in zip(got, want, strict=True))
            apart = (off / whole) ** 0.5
            print(f"K = {views}, {head}: gradients {apart:.1e} of their norm from TRL's")
            if not apart <= APART:
                raise ValueError(f"{head}, K = {views}: gradients are off by {apart:.1e}")


def _times(steps: dict[tuple[str, int], HeadStep], rounds: int) -> dict[tuple[str, int], list[Any]]:
    """(wall, CPU) seconds of each round; CPU seconds do not count what other programs take."""
    found: dict[tuple[str, int], list[Any]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            wall, busy = time.perf_counter(), time.process_time()
            steps[name].run()
            found[name].append((time.perf_counter() - wall, time.process_time() - busy))
    return found


def _resident(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024.0 if found else float("nan")


def _peak(call: Callable[[], object]) -> float:
    """MiB beside what is there, gradients included."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    base = _resident("VmRSS")
    call()
    return _resident("VmHWM") - base


def _memory(options: argparse.Namespace, head: str, views: int) -> float:
    """Of one candidate, by a process of its own."""
    sizes = ["--width", str(options.width), "--vocab", str(options.vocab)]
    command = [sys.executable, "-m", "bench.head_update", *sizes]
    done = subprocess.run(
        [*command, "--memory", json.dumps([head, views])],
        capture_output=True,
        text=True,
        env=environment() | _ENVIRONMENT,
        check=True,
    )
    return float(done.stdout.split()[-1])


def _made(options: argparse.Namespace, folder: Path) -> Made:
    shape = {"tokens": QUICK.tokens, "depth": options.width, "vocab": options.vocab}
    variant = Variant("update_step", "both", views=0, dtype="fp32", what=str(QUICK), **shape)
    return make(variant, folder, "cpu")


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.head_update")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        made = _made(options, Path(name))
        if options.memory:
            head, views = json.loads(options.memory)
            step = HeadStep(made, head, views)
            step.run()
            step.model.zero_grad()
            gc.collect()
            print(_peak(step.run))
            return
        steps = {(head, views): HeadStep(made, head, views) for head, views in NAMES}
        _compare(steps)
        times = _times(steps, options.rounds)
    print("\n| K | head | wall s | CPU s | CPU, of trl's | extra MiB |\n|---|---|---|---|---|---|")
    for head, views in NAMES:
        own, base = times[head, views], times["trl", views]
        wall, busy = (statistics.median(t[i] for t in own) for i in (0, 1))
        ratio = statistics.median(a[1] / b[1] for a, b in zip(own, base, strict=True))
        extra = _memory(options, head, views)
        print(f"| {views} | {head} | {wall:.2f} | {busy:.2f} | {ratio:.2f} | {extra:.0f} |")


if __name__ == "__main__":
    main()
