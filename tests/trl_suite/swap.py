"""A pytest plugin: another trainer under TRL's names, and a record of what each test gave.

Variables of the environment steer it: TRL_SUITE_TRAINER names the trainer (a key of TRAINERS),
TRL_SUITE_HOME the folder of the stand-ins, TRL_SUITE_RECORD the JSON file that a run writes:
{test: {outcome, seconds, why, logged}}.
The names are set in the test module alone: TRL stays as it is for whoever else looks there.
"""

import importlib.util
import inspect
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
import trl
from trl import import_utils
from trl_suite import processors

TRAINER, RECORD, HOME = "TRL_SUITE_TRAINER", "TRL_SUITE_RECORD", "TRL_SUITE_HOME"
# Ids from <|endoftext|> on; and tests that rely on no end of a completion being sampled by chance.
WHOLE = re.compile(r"\b(15|24)\d{4}\b|mask_truncated")
CLOCK = re.compile("time|per_second|_flos")  # what two equal runs need not agree on


def stock() -> tuple[type, type]:
    """TRL's own."""
    return trl.GRPOTrainer, trl.GRPOConfig


def on() -> tuple[type, type]:
    """Ours, with the defaults that a user gets."""
    from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer

    return RomaGRPOTrainer, RomaGRPOConfig


def off() -> tuple[type, type]:
    """Ours, with no views: everything that a test sees has to be TRL's."""
    from trl_suite.quiet import QuietConfig, QuietTrainer

    return QuietTrainer, QuietConfig


def hair() -> tuple[type, type]:
    """A defect that no test sees, but the numbers: the loss is a thousandth too large."""

    class Hair(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * 1.001

    return Hair, trl.GRPOConfig


def broken() -> tuple[type, type]:
    """A defect that many tests see: no gradient."""

    class Broken(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * 0.0

    return Broken, trl.GRPOConfig


TRAINERS = {"stock": stock, "off": off, "on": on, "hair": hair, "broken": broken}


def tell_availability() -> None:
    """Answer `is_X_available` for an X that the installed TRL no longer asks about.

    The tests' own helpers import such names; a checkout need not be of the installed version.
    """

    def missing(name: str):
        match = re.fullmatch("is_(.+)_available", name)
        if match is None:
            raise AttributeError(name)
        return lambda *_, **__: importlib.util.find_spec(match[1]) is not None

    import_utils.__getattr__ = missing


class Log:
    """The numbers that trainers log while a test runs; the clock's left out."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float | str]] = []
        whole = transformers.Trainer.log

        def log(trainer, logs, *args, **kwargs):
            result = whole(trainer, logs, *args, **kwargs)
            self.lines.append({k: self.exact(v) for k, v in logs.items() if not CLOCK.search(k)})
            return result

        transformers.Trainer.log = log

    @staticmethod
    def exact(value: object) -> float | str:
        """A number as JSON keeps it bit for bit; what is none, or not finite, as text."""
        if isinstance(value, int | float) and math.isfinite(value):
            return value
        return str(value)


class Recorder:
    """Collects reports; with xdist those of the workers arrive here too."""

    def __init__(self, path: Path):
        self.path, self.tests = path, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of a test's call, or of the set-up that kept it from being called."""
        if report.when == "teardown" and report.passed:
            return
        if report.when == "setup" and report.passed:
            return
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        why = ""
        if report.failed:
            why = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
            why = (why or str(report.longrepr)).strip().splitlines()[0][:200]
        elif isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        name = report.nodeid.split("::", 1)[-1]
        self.tests[name] = {
            "outcome": outcome,
            "seconds": round(report.duration, 2),
            "why": why,
            "logged": dict(report.user_properties).get("logged", []),
        }

    def pytest_sessionfinish(self) -> None:
        """Write the record."""
        self.path.write_text(json.dumps(self.tests))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the trainer and its config under TRL's names in the modules of the tests."""
    trainer, settings = TRAINERS[os.environ[TRAINER]]()
    for module in {item.module for item in items}:
        assert (module.GRPOTrainer, module.GRPOConfig) == stock()
        module.GRPOTrainer, module.GRPOConfig = trainer, settings


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test runs where the stand-ins are: the whole vocabulary where that matters."""
    source = inspect.getsource(item.function)
    os.chdir(Path(os.environ[HOME]) / ("whole" if WHOLE.search(source) else "small"))


def pytest_configure(config: pytest.Config) -> None:
    """Make ready what the test module imports, and listen."""
    processors.register()
    tell_availability()
    config.pluginmanager.register(Listener(Log()), "trl_suite_log")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(os.environ[RECORD])), "trl_suite_record")


class Listener:
    """Hands each test the numbers that were logged while it ran."""

    def __init__(self, log: Log):
        self.log = log

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Collect for the time of the call."""
        self.log.lines = []
        try:
            return (yield)
        finally:
            item.user_properties.append(("logged", self.log.lines))
