"""The one door to rewards: from the options of `worker.reward` to a function of responses."""

import difflib
from functools import partial
from typing import Protocol

from roma.rewards.boxed import compute_score
from roma.rewards.graded import MathReward, exact_score
from roma.rewards.judge import JudgeReward, read_prompt
from roma.rewards.marked import MarkedReward, stopping
from roma.rewards.process import ProcessReward
from roma_kernels.errors import fail

NAMES = ("builtin", "math", "exact", "judge")


class JudgeOptions(Protocol):
    """Section `worker.reward.judge`."""

    @property
    def url(self) -> str | None: ...  # noqa: D102 - the trainer's configuration documents them
    @property
    def model(self) -> str | None: ...  # noqa: D102
    @property
    def key_env(self) -> str: ...  # noqa: D102
    @property
    def timeout_s(self) -> float: ...  # noqa: D102
    @property
    def retries(self) -> int: ...  # noqa: D102
    @property
    def prompt(self) -> str | None: ...  # noqa: D102


class RewardOptions(Protocol):
    """Section `worker.reward`."""

    @property
    def function(self) -> str: ...  # noqa: D102
    @property
    def format_weight(self) -> float: ...  # noqa: D102
    @property
    def strict_end(self) -> bool: ...  # noqa: D102
    @property
    def timeout_s(self) -> float: ...  # noqa: D102
    @property
    def on_error(self) -> str: ...  # noqa: D102
    @property
    def judge(self) -> JudgeOptions: ...  # noqa: D102


def make_reward(options: RewardOptions) -> MarkedReward:
    r"""The reward of a run (docs/REWARDS.md).

    "builtin" and "exact" run here and now. "math" and a function of one's own run in a process that
    is killed when it hangs; "judge" asks a server. A response whose reward raises, hangs or returns
    nonsense comes back as `Failed`.

    Args:
        options: section `worker.reward` of the configuration. `function` is "builtin", "math",
            "exact", "judge", or "file.py:function" with EasyR1's signature.

    Returns:
        A function of responses. With on_error "stop" it raises RewardError where it would mark.

    Raises:
        FileNotFoundError: a file of one's own is missing.
        ValueError: an unknown name, or options that do not fit; a function that does not load.

    Example:
        >>> from roma.train.config import load_config
        >>> needed = ["data.train_files=x.parquet", "worker.actor.model_path=m"]
        >>> reward = make_reward(load_config(None, needed).worker.reward)
        >>> reward([{"response": r"\boxed{8}", "ground_truth": "8"}])[0]["accuracy"]
        1.0
    """
    reward = _reward(options)
    return stopping(reward) if options.on_error == "stop" else reward


def _reward(options: RewardOptions) -> MarkedReward:
    name, weight, strict = options.function, options.format_weight, options.strict_end
    if name == "builtin":
        return partial(compute_score, format_weight=weight, strict_end=strict)
    if name == "exact":
        return partial(exact_score, format_weight=weight, strict_end=strict)
    if name == "math":
        return MathReward(format_weight=weight, strict_end=strict, timeout_s=options.timeout_s)
    if name == "judge":
        judge = options.judge
        return JudgeReward(
            url=judge.url,
            model=judge.model,
            key_env=judge.key_env,
            timeout_s=judge.timeout_s,
            retries=judge.retries,
            prompt=read_prompt(judge.prompt),
            format_weight=weight,
            strict_end=strict,
        )
    if ":" not in name:
        near = difflib.get_close_matches(name, NAMES, n=1)
        guess = f"did you mean '{near[0]}'?" if near else "name the file and the function in it"
        expected = ", ".join(NAMES) + " or file.py:function"
        fail("worker.reward.function", expected, repr(name), guess)
    return ProcessReward(name, timeout_s=options.timeout_s)
