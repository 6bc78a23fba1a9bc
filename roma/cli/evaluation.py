"""Commands about a model that stands: `roma eval`."""

import argparse
from collections.abc import Callable
from typing import Any

from roma.cli.lists import listed

_EVAL = """\
examples:
  roma eval models/Qwen3-VL-4B-Instruct data/charts@test
  roma eval runs/x/global_step_300/actor data/digits@test --pools clean,seen,unseen --levels 1,2,3
  roma eval model data.parquet --limit 200 --out runs/eval/first-200
  roma eval model data@test --pools adversarial --levels 3 --attack-steps 10

MODEL is a folder in Hugging Face form; DATA a parquet or jsonl file, a saved dataset or
FOLDER@SPLIT. Decoding is greedy. Prints accuracy per corruption and level and the macro average per
pool, with 95 % intervals over images, and keeps JSON and a plot in --out.
"""
_REWARD = "roma.rewards:compute_score"
_POOLS = "of clean, seen, unseen, extra, masking, adversarial (clean,seen,unseen)"

Command = Callable[[str, Callable[[argparse.Namespace], None], str, str], Any]
"""Adds a command: its name, what runs it, a summary, an epilog; returns its parser."""


def add_commands(command: Command) -> None:
    """Adds every command of this module."""
    _add_eval(command)


def _add_eval(command: Command) -> None:
    evaluate = command("eval", _eval, "measure a model on clean and degraded images", _EVAL)
    evaluate.add_argument("model", metavar="MODEL", help="folder of a model in Hugging Face form")
    evaluate.add_argument("data", metavar="DATA", help="dataset, or FOLDER@SPLIT")
    words, numbers = listed(str), listed(int)
    evaluate.add_argument("--pools", type=words, default=["clean", "seen", "unseen"], help=_POOLS)
    evaluate.add_argument("--levels", type=numbers, default=[1, 2, 3], help="severities (1,2,3)")
    evaluate.add_argument("--out", help="folder for JSON and a plot (runs/eval/MODEL-DATA)")
    evaluate.add_argument("--limit", type=int, help="only the first LIMIT rows")
    evaluate.add_argument("--level-table", help="YAML with other levels, for small images")
    evaluate.add_argument("--batch-size", type=int, default=16, help="questions at a time (16)")
    evaluate.add_argument(
        "--engine", choices=("hf", "vllm"), default="hf",
        help="hf: transformers; vllm: vLLM, with a large --batch-size (hf)",
    )  # fmt: skip
    evaluate.add_argument("--format-prompt", metavar="FILE", help="as data.format_prompt")
    evaluate.add_argument("--attack-steps", type=int, help="gradient steps of pool adversarial (3)")
    evaluate.add_argument("--max-tokens", type=int, default=1024, help="answer budget (1024)")
    evaluate.add_argument(
        "--reward", default=_REWARD, help="file.py:function that says what is right"
    )
    evaluate.add_argument("--device", help="cpu or cuda; by default a GPU if torch sees one")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")


def _eval(options: argparse.Namespace) -> None:
    from roma.evaluate.run import run_eval
    from roma.rewards import load_reward

    run_eval(
        options.model,
        options.data,
        pools=options.pools,
        levels=options.levels,
        out=options.out,
        limit=options.limit,
        level_table=options.level_table,
        batch_size=options.batch_size,
        max_new_tokens=options.max_tokens,
        score=load_reward(options.reward),
        seed=options.seed,
        device=options.device,
        engine=options.engine,
        format_prompt=options.format_prompt,
        attack_steps=options.attack_steps,
    )
