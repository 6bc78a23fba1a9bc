"""Commands about a model that stands: `roma eval`."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from roma.cli.lists import listed

_EVAL = """\
examples:
  roma eval models/Qwen3-VL-4B-Instruct data/charts@test
  roma eval runs/x/global_step_300/actor data/digits@test --pools clean,seen,unseen --levels 1,2,3
  roma eval model data.parquet --limit 200 --out runs/eval/first-200
  roma eval model data@test --pools adversarial --levels 3 --attack-steps 10
  roma eval --compare runs/eval/a-charts-test runs/eval/b-charts-test
  roma eval model data@test --answers 8 --temperature 1 --engine vllm

MODEL is a folder in Hugging Face form; DATA a parquet or jsonl file, a saved dataset or
FOLDER@SPLIT. Decoding is greedy unless several answers or a temperature are asked for. Prints
accuracy per corruption and level and the macro average per pool, with 95 % intervals over images,
and keeps answers, JSON, Markdown and a plot in --out. The same command goes on where it was cut.
"""
_REWARD = "builtin, exact, math or file.py:function: what is right (builtin)"
_POOLS = "of clean, seen, unseen, extra, masking, adversarial (clean,seen,unseen)"

Command = Callable[[str, Callable[[argparse.Namespace], None], str, str], Any]
"""Adds a command: its name, what runs it, a summary, an epilog; returns its parser."""


def add_commands(command: Command) -> None:
    """Adds every command of this module."""
    _add_eval(command)


def _add_eval(command: Command) -> None:
    evaluate = command("eval", _eval, "measure a model on clean and degraded images", _EVAL)
    model = evaluate.add_argument("model", metavar="MODEL", help="folder in Hugging Face form")
    data = evaluate.add_argument("data", metavar="DATA", help="dataset, or FOLDER@SPLIT")
    evaluate.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), action=_Instead, of=(model, data),
        help="two folders of results: paired differences; --out takes a .json file",
    )  # fmt: skip
    words, numbers = listed(str), listed(int)
    evaluate.add_argument("--pools", type=words, default=["clean", "seen", "unseen"], help=_POOLS)
    evaluate.add_argument("--levels", type=numbers, default=[1, 2, 3], help="severities (1,2,3)")
    evaluate.add_argument("--out", help="folder for answers and tables (runs/eval/MODEL-DATA)")
    evaluate.add_argument("--overwrite", action="store_true", help="begin anew in --out")
    evaluate.add_argument("--limit", type=int, help="only the first LIMIT rows")
    evaluate.add_argument("--level-table", help="YAML with other levels, for small images")
    evaluate.add_argument("--batch-size", type=int, help="questions at a time (16; vllm: 256)")
    evaluate.add_argument("--answers", type=int, default=1, help="answers to a question (1)")
    evaluate.add_argument("--temperature", type=float, help="of sampled answers (1 for several)")
    evaluate.add_argument(
        "--engine", choices=("hf", "vllm"), default="hf",
        help="hf: transformers; vllm: vLLM (hf)",
    )  # fmt: skip
    evaluate.add_argument("--format-prompt", metavar="FILE", help="as data.format_prompt")
    evaluate.add_argument(
        "--skip-broken", action="store_true", help="read all images first, leave bad rows out"
    )
    evaluate.add_argument("--attack-steps", type=int, help="gradient steps of pool adversarial (3)")
    evaluate.add_argument("--max-tokens", type=int, default=1024, help="answer budget (1024)")
    evaluate.add_argument("--reward", default="builtin", help=_REWARD)
    evaluate.add_argument("--device", help="cpu or cuda; by default a GPU if torch sees one")
    evaluate.add_argument("--seed", type=int, default=0, help="of noise and sampling (0)")
    evaluate.set_defaults(usual=evaluate.get_default, goes_on=True)


def _eval(options: argparse.Namespace) -> None:
    if options.compare:
        _compare(options)
        return
    from roma.evaluate.run import run_eval

    run_eval(
        options.model,
        options.data,
        pools=options.pools,
        levels=options.levels,
        out=options.out,
        overwrite=options.overwrite,
        limit=options.limit,
        level_table=options.level_table,
        batch_size=options.batch_size,
        max_new_tokens=options.max_tokens,
        answers=options.answers,
        temperature=options.temperature,
        score=options.reward,
        seed=options.seed,
        device=options.device,
        engine=options.engine,
        format_prompt=options.format_prompt,
        skip_broken=options.skip_broken,
        attack_steps=options.attack_steps,
    )


def _compare(options: argparse.Namespace) -> None:
    """`roma eval --compare`, which measures nothing: whatever says how to measure is refused."""
    from roma.evaluate.compare import run_compare
    from roma_kernels.errors import fail

    named = {"model": "MODEL", "data": "DATA"}
    given = [
        named.get(name, "--" + name.replace("_", "-"))
        for name, value in vars(options).items()
        if name not in ("compare", "out", "usual", "goes_on") and value != options.usual(name)
    ]
    if given:
        fail("--compare", "no more than --out beside it", ", ".join(given), "leave them out")
    run_compare(*options.compare, out=options.out)


class _Instead(argparse.Action):
    """An option with which positional arguments, `of`, are not needed."""

    def __init__(self, *args: Any, of: Sequence[argparse.Action], **options: Any) -> None:
        super().__init__(*args, **options)
        self._of = of

    def __call__(
        self, parser: argparse.ArgumentParser, found: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        setattr(found, self.dest, values)
        for action in self._of:
            action.required = False
