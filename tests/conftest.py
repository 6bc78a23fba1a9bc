"""Fixtures and profiles that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from roma_kernels.backends import backends
from roma_kernels.native import LEVELS, native

# "ci" finds the same things every time; "deep" is for a night: HYPOTHESIS_PROFILE=deep pytest
# tests.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "deep",
    deadline=None,
    max_examples=10_000,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Their asserts explain themselves as those of a test do.
pytest.register_assert_rewrite(
    "roma.testing.compare_head",
    "roma.testing.compare_logp",
    "roma.testing.compare_whole",
    "roma.testing.tolerance",
)

# The back ends held to the oracle. A new one is added here and nowhere else.
KERNELS = ("torch", "native", "triton")
BACKENDS = (*KERNELS, "reference")


def pytest_configure(config: pytest.Config) -> None:
    """Triton's interpreter, unless for `-m gpu`; and make every unwritten element visible."""
    torch.set_num_threads(1)
    if config.option.markexpr != "gpu":
        # Before Triton is imported: it decides then, once for the process.
        os.environ["TRITON_INTERPRET"] = "1"
        from support import interpreter

        interpreter.repair()
    # torch.empty then holds NaN, so that an element no kernel wrote fails a comparison.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU run alone: the others hold the kernels in the interpreter.

    Slow ones first, so that processes which share the tests end together.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.option.markexpr == "gpu" and torch.cuda.is_available():
        return
    reason = "needs a CUDA device and `pytest -m gpu`"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def compiled() -> None:
    """The compiled part; without a C++ compiler there is none, unless it is required, as in CI."""
    (found,) = (found for found in backends() if found.name == "native")
    if not found.available:
        (pytest.fail if os.environ.get("ROMA_REQUIRE_NATIVE") else pytest.skip)(found.reason)


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest, compiled: None) -> Iterator[str]:
    """Each instruction set that this CPU has, asked for as a user would.

    A higher one is skipped: no CPU can run it that does not have it.
    """
    if LEVELS.index(request.param) > LEVELS.index(native().cpu_level):
        pytest.skip(f"this CPU has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROMA_CPU_LEVEL", request.param)
        yield request.param


def _one(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        request.getfixturevalue("compiled")
    return request.param


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each back end under test.

    Session scope, because Hypothesis draws many examples inside one test.
    """
    return _one(request)


@pytest.fixture(scope="session", params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Each back end that must also be frugal.

    The reference computes every row and keeps its logits.
    """
    return _one(request)
