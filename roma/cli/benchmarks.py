"""`roma bench-vlm`: a model on benchmarks of lmms-eval, on clean and degraded images."""

import argparse
from collections.abc import Callable
from typing import Any

from roma.cli.lists import listed

_BENCH = """\
examples:
  roma bench-vlm Qwen/Qwen3-VL-4B-Instruct --suite paper --engine vllm
  roma bench-vlm runs/x/global_step_300/actor --suite paper --judge rules --limit 200
  roma bench-vlm model --tasks mmstar_reasoning,mmmu_val --pools clean,seen --levels 3
  roma bench-vlm model --suite paper --judge http://localhost:8000/v1 \\
      --judge-model Qwen/Qwen2.5-72B-Instruct

Needs lmms-eval: pip install '.[train,views,math,lmms]' in a clone. Every question of every
benchmark is answered at every condition: clean, and each corruption of the pools at each level.
The same command goes on where it was cut. Keeps answers, tables and a page in --out:
docs/LMMS_EVAL.md.
"""
_POOLS = "of clean, seen, unseen, extra, masking (clean,seen,unseen)"
_JUDGE = (
    "none: the tasks' own rules; rules: this package's; an http(s) address: the tasks', and a "
    "model there judges what they call wrong (none)"
)
_OPTIONS: dict[str, dict[str, Any]] = {
    "--suite": {"choices": ("paper",), "help": "the paper's seven benchmarks"},
    "--tasks": {"type": listed(str), "default": [], "help": "tasks, groups or tags of lmms-eval"},
    "--include-path": {"metavar": "DIR", "help": "task files of your own, before lmms-eval's"},
    "--metric": {
        "action": "append", "default": [], "metavar": "TASK=NAME",
        "help": "what says that an answer is right (the paper's, or the first in 0..1)",
    },
    "--pools": {"type": listed(str), "default": ["clean", "seen", "unseen"], "help": _POOLS},
    "--levels": {"type": listed(int), "default": [1, 2, 3], "help": "severities (1,2,3)"},
    "--level-table": {"metavar": "FILE", "help": "YAML with other levels, for small images"},
    "--engine": {
        "choices": ("hf", "vllm"), "default": "hf",
        "help": "hf: transformers; vllm: vLLM (hf)",
    },
    "--base": {"metavar": "NAME", "help": "the lmms-eval model to wrap (by the checkpoint)"},
    "--model-args": {
        "type": listed(str), "default": [], "metavar": "A=B,…", "help": "more for that model",
    },
    "--device": {"help": "cpu or cuda, with --engine hf (as the model chooses)"},
    "--judge": {"default": "none", "metavar": "none|rules|ADDRESS", "help": _JUDGE},
    "--judge-model": {"metavar": "NAME", "help": "the judge's name at that address"},
    "--out": {"help": "folder for all results (runs/bench/MODEL)"},
    "--overwrite": {"action": "store_true", "help": "begin anew in --out"},
    "--limit": {"type": int, "metavar": "N", "help": "the first N questions of each benchmark"},
    "--max-tokens": {"type": int, "default": 4096, "help": "budget of every answer (4096)"},
    "--batch-size": {"type": int, "help": "questions at a time (16; vllm: 256)"},
    "--seed": {"type": int, "default": 0, "help": "of the noise (0)"},
}  # fmt: skip


def add_commands(
    command: Callable[[str, Callable[[argparse.Namespace], None], str, str], Any],
) -> None:
    """Adds the command of this module."""
    bench = command("bench-vlm", _bench, "measure a model on public benchmarks, degraded", _BENCH)
    bench.set_defaults(goes_on=True)
    bench.add_argument("model", metavar="MODEL", help="a folder in Hugging Face form, or a name")
    for name, option in _OPTIONS.items():
        bench.add_argument(name, **option)


def _bench(options: argparse.Namespace) -> None:
    from roma.evaluate.lmms_eval.asked import Asked
    from roma.evaluate.lmms_eval.run import run_bench

    given = dict(vars(options))
    kept = {name: given[name] for name in Asked.__dataclass_fields__ if name in given}
    kept |= {
        "model_args": _pairs("--model-args", options.model_args),
        "metrics": _pairs("--metric", options.metric),
    }
    model = kept.pop("model")
    run_bench(Asked(model, **kept), options.out, overwrite=options.overwrite)


def _pairs(flag: str, words: list[str]) -> dict[str, str]:
    """A=B as a mapping."""
    from roma_kernels.errors import fail

    for word in words:
        if not all(word.partition("=")):
            fail(flag, "NAME=VALUE", repr(word), "correct it")
    return {name: value for name, _, value in (word.partition("=") for word in words)}
