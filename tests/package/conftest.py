"""Fixtures that the tests of `roma.testing` share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings


@pytest.fixture
def unshrunk() -> Iterator[None]:
    """The first failing input is enough where a test asks only that there is one.

    Making it smaller takes a hundred times as long; the test of the example does it.
    """
    shrinks = settings.get_current_profile_name()
    phases = set(Phase) - {Phase.shrink, Phase.explain}
    settings.register_profile("unshrunk", settings.get_profile(shrinks), phases=phases)
    settings.load_profile("unshrunk")
    yield
    settings.load_profile(shrinks)
