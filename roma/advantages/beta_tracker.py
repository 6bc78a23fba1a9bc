"""The baseline of MSSR: a memory of how often each prompt was answered right."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from roma_kernels.arguments import check_dtype, check_positive, check_tensor
from roma_kernels.errors import fail

PromptId = str | int
Forgetting = Literal["monotone", "published"]

_FASTEST, _SLOWEST = 0.875, 0.96  # η, of a memory of 1/(1 − η): 8 and 25 rollouts
_START = 8.0  # α + β of a prompt at its start: the shortest memory
_WINDOW = 20  # steps whose KL counts
_VERSION = 1


class BetaTracker:
    """How often each prompt is answered right, as a Beta distribution (arXiv 2512.18215).

        v = α/(α + β)
        α ← η·α + Σ r      β ← η·β + Σ (1 − r)      over the rollouts of the prompt in the batch
        η = 0.96 − 0.085·min(KL/target, 1)           "monotone": the more the policy moves, the
                                                     faster it forgets
        "published": the same where KL > target; else η = 0.875 + 0.085·KL/target, which forgets
                     fastest at KL = 0, as the official code does

    KL is the mean of the last 20 given to `observe_kl`; before the first one η is the middle,
    0.9175. A prompt never seen has v = 0.5 (α = β = 4), unless `start` gave it another. A prompt
    that is several times in a batch gets every A from the v before the batch, and is then updated
    once: one η, all its rewards. (The official code updates it rollout by rollout, with rewards
    rounded to 0 or 1.)

    The state is a few floats a prompt and lives on the host. Give every rank the ids and rewards
    of all ranks: the trackers then stay equal, and nothing has to be merged. Where each rank keeps
    a tracker of its own prompts, `merge` joins them.

    Args:
        target_kl: nats a token, > 0.
        forgetting: "monotone" or "published".
        dataset: a name or digest of the data, to refuse the state of a tracker of other data.

    Raises:
        ValueError: target_kl is not a finite number > 0, or another `forgetting`.

    Example:
        >>> tracker = BetaTracker()
        >>> tracker.advantage(["a", "b"], torch.tensor([1.0, 0.0]))
        tensor([ 0.5000, -0.5000])
        >>> tracker.value(["a", "c"])
        tensor([0.5600, 0.5000], dtype=torch.float64)
    """

    def __init__(
        self, target_kl: float = 0.01, forgetting: Forgetting = "monotone", *, dataset: str = ""
    ) -> None:
        check_positive("target_kl", target_kl, "0.01 is the published one")
        if forgetting not in get_args(Forgetting):
            fail("forgetting", '"monotone" or "published"', repr(forgetting), "choose one of them")
        self.target_kl, self.forgetting, self.dataset = float(target_kl), forgetting, dataset
        self._counts: dict[PromptId, tuple[float, float]] = {}
        self._kl: deque[float] = deque(maxlen=_WINDOW)

    def __len__(self) -> int:
        """The number of prompts seen or started."""
        return len(self._counts)

    def __contains__(self, prompt_id: object) -> bool:
        """Whether a prompt was seen or started."""
        return prompt_id in self._counts

    @property
    def eta(self) -> float:
        """η in [0.875, 0.96], the share of α and β that the next update keeps."""
        if not self._kl:
            return (_FASTEST + _SLOWEST) / 2
        # An estimate of a KL may be below 0 by chance.
        ratio = max(math.fsum(self._kl) / len(self._kl), 0.0) / self.target_kl
        if self.forgetting == "published" and ratio <= 1:
            return _FASTEST + ratio * (_SLOWEST - _FASTEST)
        return _SLOWEST - min(ratio, 1.0) * (_SLOWEST - _FASTEST)

    def observe_kl(self, kl: float) -> None:
        """Takes the mean KL of a step's update, nats a token, old policy to new.

        Raises:
            ValueError: not a finite number.
        """
        if not math.isfinite(kl):
            fail("kl", "a finite number", str(kl), "skip the step that did not give one")
        self._kl.append(float(kl))

    def start(self, prompt_id: PromptId, v0: float) -> None:
        """Starts a prompt at v0, the mean reward of rollouts made for it: α = 8·v0, β = 8·(1 − v0).

        Raises:
            TypeError: the id is neither a string nor an integer.
            ValueError: v0 is outside of [0, 1], or the prompt was seen or started before.
        """
        (own,) = _ids([prompt_id])
        if not 0 <= v0 <= 1:  # a NaN too
            fail("v0", "a number in 0..1", str(v0), "give the mean of the prompt's rewards")
        if own in self._counts:
            fail("prompt_id", "a prompt not seen yet", repr(own), "start prompts before training")
        self._counts[own] = (_START * v0, _START * (1 - v0))

    def value(self, prompt_ids: Sequence[PromptId]) -> Tensor:
        """The v of prompts [B], float64 on the CPU, 0.5 for a prompt never seen.

        Raises:
            TypeError: an id is neither a string nor an integer.
        """
        return torch.tensor([self._value(own) for own in _ids(prompt_ids)], dtype=torch.float64)

    def sampling_weight(self, prompt_ids: Sequence[PromptId], *, epsilon: float = 0.05) -> Tensor:
        """How often to draw a prompt: √(v(1 − v)) + ε, most where the answer is a coin toss.

        SPO's prioritised sampling (arXiv 2509.13232, with ε = 0.05 in its official recipe).

        Args:
            prompt_ids: B of them.
            epsilon: ε > 0, so that a prompt always or never answered is drawn now and then.

        Returns:
            [B] float64 on the CPU, > 0, not normalised: as torch.multinomial takes it.

        Raises:
            TypeError: an id is neither a string nor an integer.
            ValueError: epsilon is not a finite number > 0.
        """
        check_positive("epsilon", epsilon, "0.05 is SPO's")
        value = self.value(prompt_ids)
        return (value * (1 - value)).sqrt() + epsilon

    def advantage(self, prompt_ids: Sequence[PromptId], rewards: Tensor) -> Tensor:
        """A = r − v with the v before this batch; then updates the prompts of the batch.

        Args:
            prompt_ids: B strings or integers, such as `Example.id`; the same one may come often.
            rewards: [B] fp32 or fp64, in 0..1. Read on the host, which waits for the device.

        Returns:
            [B], dtype and device of `rewards`, not differentiable, not whitened.

        Raises:
            TypeError: `rewards` is no tensor, an id is neither a string nor an integer.
            ValueError: another shape or dtype, or a reward outside of 0..1. Nothing is updated.
        """
        check_tensor("rewards", rewards)
        check_dtype("rewards", rewards, (torch.float32, torch.float64))
        ids = _ids(prompt_ids)
        if rewards.shape != (len(ids),):
            expected = f"[B] = [{len(ids)}], as prompt_ids"
            fail("rewards", expected, str(list(rewards.shape)), "give one for each rollout")
        values: list[float] = rewards.detach().double().tolist()
        for index, reward in enumerate(values):
            if not 0 <= reward <= 1:  # a NaN too
                remedy = "scale rewards to 0..1, or take the estimator grpo or rloo"
                fail("rewards", "numbers in 0..1", f"{reward} at index {index}", remedy)
        found = [reward - self._value(own) for own, reward in zip(ids, values, strict=True)]
        self._update(ids, values)
        return torch.tensor(found, dtype=rewards.dtype, device=rewards.device)

    def state_dict(self) -> dict[str, Any]:
        """The state as lists of strings and numbers, for torch.save or JSON: both keep every bit.

        Equal trackers give equal states, in whichever order they saw their prompts.
        """
        order = sorted(self._counts, key=lambda own: (isinstance(own, str), own))
        return {
            "version": _VERSION,
            "dataset": self.dataset,
            "prompts": order,
            "alpha": [self._counts[own][0] for own in order],
            "beta": [self._counts[own][1] for own in order],
            "kl": list(self._kl),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of `state_dict` in the place of its own.

        Raises:
            ValueError: it is no such state, or that of a tracker of another dataset. The tracker
                is then as before.
        """
        self._counts, self._kl = self._read(state)

    def merge(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Joins the trackers of ranks that all started from this one's state.

        On each rank, around a step whose prompts are spread over the ranks:

            before = tracker.state_dict()
            raw = tracker.advantage(own_ids, own_rewards)
            states = …                       # tracker.state_dict() of every rank
            tracker.load_state_dict(before)
            tracker.merge(states)

        A prompt takes the α and β of the rank that changed them. The order of `states` is of no
        meaning.

        Args:
            states: the `state_dict` of each rank, at least one.

        Raises:
            ValueError: two ranks changed a prompt to different values, the ranks saw different
                KLs, a state lacks a prompt of this tracker, or `load_state_dict` would refuse it.
        """
        every = [self._read(state) for state in states]
        if not every:
            fail("states", "at least one", "none", "give the state of every rank")
        if any(kl != every[0][1] for _, kl in every):
            remedy = "give observe_kl the mean over all ranks"
            fail("states", "the same KLs on all ranks", "different ones", remedy)
        joined = dict(self._counts)
        for counts, _ in every:
            lost = next((own for own in self._counts if own not in counts), None)
            if lost is not None:
                remedy = "merge into the state that every rank started from"
                fail("states", "every prompt of this tracker", f"none of {lost!r}", remedy)
            for own, pair in counts.items():
                if pair == self._counts.get(own):
                    continue  # this rank did not touch it
                if joined.get(own) not in (self._counts.get(own), pair):
                    remedy = "give every rank the rewards of all ranks, or each prompt to one rank"
                    fail("states", f"one update of prompt {own!r}", "two that differ", remedy)
                joined[own] = pair
        self._counts, self._kl = joined, every[0][1]

    def _value(self, prompt_id: PromptId) -> float:
        alpha, beta = self._counts.get(prompt_id, (_START / 2, _START / 2))
        return alpha / (alpha + beta)

    def _update(self, ids: list[PromptId], rewards: list[float]) -> None:
        eta, by_prompt = self.eta, dict[PromptId, list[float]]()
        for own, reward in zip(ids, rewards, strict=True):
            by_prompt.setdefault(own, []).append(reward)
        for own, given in by_prompt.items():
            alpha, beta = self._counts.get(own, (_START / 2, _START / 2))
            # fsum is exact, so that the order of the rollouts changes no bit.
            right, wrong = math.fsum(given), math.fsum(1 - reward for reward in given)
            self._counts[own] = (eta * alpha + right, eta * beta + wrong)

    def _read(
        self, state: Mapping[str, Any]
    ) -> tuple[dict[PromptId, tuple[float, float]], deque[float]]:
        keys = {"version", "dataset", "prompts", "alpha", "beta", "kl"}
        if not isinstance(state, Mapping) or not keys <= state.keys():
            fail("state", "that of BetaTracker.state_dict", "another", "start without its tracker")
        if state["version"] != _VERSION:
            fail(
                "state", f"version {_VERSION}", repr(state["version"]), "start without its tracker"
            )
        if state["dataset"] != self.dataset:
            remedy = "resume on the data of that run, or start without its tracker"
            fail("state", f"a tracker of {self.dataset!r}", f"one of {state['dataset']!r}", remedy)
        ids, alpha, beta = _ids(state["prompts"]), state["alpha"], state["beta"]
        sound = len(alpha) == len(beta) == len(ids) == len(set(ids)) and all(
            0 <= a < math.inf and 0 <= b < math.inf and a + b > 0
            for a, b in zip(alpha, beta, strict=True)
        )
        if not sound or not all(map(math.isfinite, state["kl"])):
            expected = "a finite α and β ≥ 0 for each prompt, and finite KLs"
            fail("state", expected, "others", "the file is damaged: take an earlier checkpoint")
        pairs = zip(alpha, beta, strict=True)
        return dict(zip(ids, pairs, strict=True)), deque(state["kl"], maxlen=_WINDOW)


def _ids(prompt_ids: Sequence[PromptId]) -> list[PromptId]:
    """The ids as strings and Python integers, of whichever integer type they came."""
    if isinstance(prompt_ids, str):
        fail("prompt_ids", "a list of ids", "one text", "give one for each reward", error=TypeError)
    found: list[PromptId] = []
    for own in prompt_ids:
        if isinstance(own, str):
            found.append(own)
        elif isinstance(own, Integral) and not isinstance(own, bool):
            found.append(int(own))
        else:
            remedy = "give the rows' ids, of a tensor its .tolist()"
            fail("prompt_ids", "strings or integers", type(own).__name__, remedy, error=TypeError)
    return found
