"""Our own candidates: the chosen back end, its plans by name, and a large workspace.

A plan is a way in which the Triton back end forms logits (triton/tuning.py has the list). "roma"
takes the one that its table has for a chip and a size; the others are what the table is made from.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor

import roma
from bench.providers import OURS, Provider, Score, Unavailable
from roma_kernels import DISTRIBUTION
from roma_kernels.backends import choose


@dataclass(frozen=True)
class Own:
    """The public functions under a plan, or with a workspace of some bytes."""

    name: str
    plan: str = ""
    workspace: int | None = None

    @property
    def provider(self) -> Provider:
        """Its log-probs, as a provider."""
        what = f"plan {self.plan}" if self.plan else f"a workspace of {self.name.split()[1]} GiB"
        return Provider(self.name, DISTRIBUTION, f"ours, {what}", self.load)

    def load(self, device: str) -> Score:
        """Its log-probs on a device type; raises Unavailable."""
        if self.plan and choose(device)[0] != "triton":
            raise Unavailable("the Triton back end has plans, and it cannot run here")
        if self.plan and self.plan not in _tuning().PLANS:
            raise Unavailable(f"plans are {', '.join(_tuning().PLANS)}")

        def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
            if self.plan == "gluon":
                _served_by_gluon(states, weight)
            return roma.linear_logprob(states, weight, tokens, workspace=self.workspace).logp

        return score

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Inside, calls take its plan, backwards too: torch runs those in a thread of its own."""
        inside: AbstractContextManager[None] = nullcontext()
        if self.plan:
            inside = _tuning().override(f"plan={self.plan}")
        with inside:
            yield


def _served_by_gluon(states: Tensor, weight: Tensor) -> None:
    """Raises Unavailable where another plan would be taken, unnoticed."""
    try:
        from roma_kernels.linear_logprob.gluon.launch import supports
    except ImportError as missing:
        raise Unavailable(f"no plan gluon in this checkout ({missing})") from missing
    chip = _tuning().chip(states.device)
    why = supports(chip, states, weight, bias=False, softcap=False)
    if why:
        raise Unavailable(why)


def _tuning():  # type: ignore[no-untyped-def]
    try:
        from roma_kernels.linear_logprob.triton import tuning
    except ImportError as missing:
        raise Unavailable(f"no plans in this checkout ({missing})") from missing
    return tuning


OWN = {
    own.name: own
    for own in (
        Own(OURS),
        Own("roma triton", plan="triton"),
        Own("roma vendor", plan="vendor"),
        Own("roma gluon", plan="gluon"),
        Own("roma 4 GiB", workspace=4 * 2**30),
    )
}
"""By name. "roma" stands among the providers too, the others do not."""
OTHERS = tuple(name for name in OWN if name != OURS)
PLANS = tuple(name for name, own in OWN.items() if own.plan)
