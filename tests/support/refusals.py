"""Good calls with one argument spoilt, and the form of the message that must come."""

from __future__ import annotations

import re
from typing import Any

import pytest

import roma
from roma import RomaConfig
from roma.testing import compare_logp, compare_whole
from roma.testing.strategies import HeadSpec, LossSpec

# b, t, k, d, v all differ, so that a swapped pair of axes cannot pass.
B, T, K, D, V = 3, 5, 2, 8, 33


SPEC = LossSpec(b=B, t=T, k=K, d=D, v=V, bias=True, config=RomaConfig(ref_coef=0.1, aux_old="view"))


def form(name: str, *parts: str) -> str:
    """The pattern of a message about `name` that also mentions each of parts, in any order."""
    mentions = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return rf"(?s)^{mentions}{re.escape(name)}\b.*: expected .+, got .+; \S+"


def refuse(name: str, *parts: str, kind: Any = ValueError) -> Any:
    """Expect an error about `name`, mentioning each of parts."""
    return pytest.raises(kind, match=form(name, *parts))


def head_call(backend: str, **changes: Any) -> Any:
    """linear_logprob on five good rows with some arguments changed."""
    return roma.linear_logprob(**(HeadSpec(d=D, v=V, bias=True).make() | changes), backend=backend)


def whole_call(backend: str, *, spec: LossSpec = SPEC, **changes: Any) -> Any:
    """roma_loss on a good case with some arguments changed."""
    return compare_whole.call(spec.make() | changes, backend)


def logp_call(backend: str, *, spec: LossSpec = SPEC, **changes: Any) -> Any:
    """roma_loss_from_logp on a good case with some arguments changed."""
    return compare_logp.call(spec.make_logp() | changes, backend)


DTYPE_ERRORS = (TypeError, ValueError)
