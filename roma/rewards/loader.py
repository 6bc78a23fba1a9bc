"""Reward functions of EasyR1's signature: the built-in one, and a user's own from a file."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from roma.rewards.boxed import RewardInput
from roma_kernels.errors import fail

RewardFunction = Callable[[Sequence[RewardInput]], list[dict[str, float]]]

KEYS = ("overall", "format", "accuracy")


def load_reward(spec: str, **options: Any) -> RewardFunction:
    """Loads a reward function of EasyR1's signature, as `compute_score` has it.

    The returned function checks each call's result, so that a mistake in a reward file shows at the
    first batch. It runs in this process: what hangs there hangs here (`make_reward` cuts it).

    Args:
        spec: "file.py:function", or "package.module:function", like "roma.rewards:compute_score".
        options: keywords to bind, like `format_weight=0.5`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: spec is no such pair, the function is not in the file, or it does not take an
            option. The loaded function raises ValueError for a wrong number of results, a missing
            key or a value that is not finite, and TypeError for results of a wrong type. Further
            keys are allowed.
    """
    bound = load_function(spec, **options)

    @functools.wraps(bound)
    def checked(reward_inputs: Sequence[RewardInput]) -> list[dict[str, float]]:
        scores = bound(reward_inputs)
        check_count(spec, scores, len(reward_inputs))
        for index, score in enumerate(scores):
            for key in KEYS:
                _check_part(f"{spec}, result {index}", score, key)
        return scores

    return checked


def load_function(spec: str, **options: Any) -> Callable[[Sequence[RewardInput]], Any]:
    """The function, its results unchecked; arguments and errors are those of `load_reward`."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        fail("reward", "'file.py:function'", repr(spec), "name the file and the function in it")
    is_file = source.endswith(".py")
    if not is_file and Path(source).is_file():
        fail("reward", "a .py file, or a module by name", source, "rename the file to end in .py")
    module = _load_file(Path(source).expanduser()) if is_file else importlib.import_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        near = difflib.get_close_matches(name, found, n=1)
        guess = f"did you mean '{near[0]}'?" if near else "define it there"
        fail("reward", f"a function '{name}' in {source}", f"the functions {found}", guess)
    try:
        inspect.signature(function).bind([], **options)
    except TypeError as error:
        expected = f"that {spec} takes a list and the options {sorted(options)}"
        fail("reward", expected, str(error), "correct the function or the options")
    return functools.wraps(function)(functools.partial(function, **options))


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        fail("reward", "an existing file", str(path), "check the path", error=FileNotFoundError)
    module_name = f"roma_reward_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None  # holds for every .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a module up by name
    module_spec.loader.exec_module(module)
    return module


def check_count(spec: str, scores: object, count: int) -> None:
    """Checks that a call returned a list of dicts, one per response.

    Raises:
        TypeError: something else.
        ValueError: too few or too many.
    """
    if not isinstance(scores, list) or not all(isinstance(score, dict) for score in scores):
        got = [type(score).__name__ for score in scores] if isinstance(scores, list) else scores
        fail(spec, "a list of dicts", repr(got)[:60], "return one per response", error=TypeError)
    if len(scores) != count:
        fail(spec, f"{count} results", str(len(scores)), "return one per response, in their order")


def plain_score(name: str, score: Mapping[str, Any]) -> dict[str, float]:
    """A checked score as plain numbers, every part of it.

    Raises:
        ValueError: a part is missing, is not a finite number, or is called "failed", which is the
            package's own.
    """
    if "failed" in score:
        fail(name, "no part 'failed', which counts failures", "one", "give it another name")
    for key in (*KEYS, *score):
        _check_part(name, score, key)
    return {str(key): float(value) for key, value in score.items()}


def _check_part(name: str, score: Mapping[str, Any], key: str) -> None:
    if key not in score:
        fail(name, f"the keys {KEYS}", f"{sorted(score)}", f"add '{key}'")
    if not _is_finite(score[key]):
        got = repr(score[key])[:60]
        fail(name, f"a finite number under '{key}'", got, "return a float")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False
