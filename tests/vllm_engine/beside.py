"""The demo's task for some steps, with transformers' rollouts and with vLLM's beside them.

    python tests/vllm_engine/beside.py --out runs/beside

Both get the same warm-started model, the same prompts and the same views; what they sample differs
by chance. It prints the rewards of each and fails if their paired difference, over steps and seeds,
is not within three of its standard errors. docs/ROLLOUTS.md has the figures.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch  # noqa: E402 - the paths come first
from vllm_engine.model import build  # noqa: E402

from experiments.runner.warm_start import warm_start  # noqa: E402
from roma.data import load_dataset_rows, write_digits  # noqa: E402
from roma.models.qwen_vl import Policy  # noqa: E402
from roma.train.config import load_config  # noqa: E402
from roma.train.trainer import Trainer  # noqa: E402

SHOWN = ("rollout/mismatch_mean", "rollout/mismatch_p99", "timing_s/gen", "timing_s/step")


def prepare(out: Path, steps: int) -> Path:
    """Data and warm-started model, once."""
    base = out / "base"
    if not (out / "data").is_dir():
        write_digits(out / "data", train=4000, val=256, test=4)
    if not base.is_dir():
        model = build(out / "raw")
        policy = Policy.load(model)
        rows = load_dataset_rows(f"{out / 'data'}@train")
        warm_start(policy, [rows[i] for i in range(len(rows))], steps=steps, batch_size=32)
        policy.save_pretrained(base)
    return base


def run(
    out: Path, base: Path, engine: str, seed: int, steps: int, more: Sequence[str] = ()
) -> list[dict[str, float]]:
    """The metrics of each step."""
    config = load_config(
        ROOT / "configs" / "demo.yaml",
        [
            f"data.train_files={out / 'data'}@train",
            f"data.val_files={out / 'data'}@val",
            f"data.seed={seed}",
            f"worker.actor.model_path={base}",
            f"worker.rollout.name={engine}",
            f"algorithm.views.level_table={ROOT / 'configs' / 'demo_levels.yaml'}",
            f"trainer.total_steps={steps}",
            f"trainer.out={out / f'{engine}-{seed}'}",
            f"trainer.seed={seed}",
            "trainer.resume=never",
            "trainer.logger=[file]",
            "trainer.val_freq=0",
            *more,
        ],
    )
    found: list[dict[str, float]] = []
    Trainer(config).fit(lambda step, metrics: found.append(dict(metrics)))
    return found


def main() -> None:
    """Runs both engines, prints the comparison, exits with 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of both runs, such as worker.rollout.n=4")
    parser.add_argument("--out", type=Path, default=Path("runs/beside"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--warm-start", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = prepare(options.out, options.warm_start)
    rewards: dict[str, list[float]] = {}
    for engine in ("hf", "vllm"):
        rows: list[dict[str, float]] = []
        for seed in range(options.seeds):
            start = time.perf_counter()
            rows += run(options.out, base, engine, seed, options.steps, options.overrides)
            print(f"{engine}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        rewards[engine] = [row["reward/accuracy"] for row in rows]
        # The first steps of a process compile.
        medians = {
            name: statistics.median(r[name] for r in rows) for name in SHOWN if name in rows[0]
        }
        curve = [
            statistics.fmean(rewards[engine][i :: options.steps]) for i in range(options.steps)
        ]
        print(engine, "accuracy by step:", " ".join(f"{value:.2f}" for value in curve))
        print(engine, json.dumps(medians))
    difference = [b - a for a, b in zip(rewards["hf"], rewards["vllm"], strict=True)]
    mean = statistics.fmean(difference)
    error = statistics.stdev(difference) / len(difference) ** 0.5
    print(f"vllm - hf: {mean:+.4f}, standard error {error:.4f}, {len(difference)} steps")
    sys.exit(abs(mean) > 3 * error)


if __name__ == "__main__":
    main()
