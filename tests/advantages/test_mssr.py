"""MSSR against MATH.md section 4, in Python floats: tracker, whitening, shaping by entropy."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roma.advantages.mssr import BetaTracker, sampled_entropy, shape_by_entropy, whiten

FORGETTINGS = ("monotone", "published")
EPS = torch.finfo(torch.float64).eps


def eta_by_hand(kls: list[float], forgetting: str, target: float = 0.01) -> float:
    if not kls:
        return 0.9175
    kl = statistics.fmean(kls[-20:])
    if forgetting == "published" and kl <= target:
        return 0.875 + kl / target * 0.085
    return 0.96 - min(kl / target, 1.0) * 0.085


class ByHand:
    """The tracker of MATH.md: α, β of each prompt, and every KL so far."""

    def __init__(self, forgetting: str) -> None:
        self.forgetting, self.kls = forgetting, list[float]()
        self.alpha, self.beta = dict[object, float](), dict[object, float]()

    def value(self, prompt: object) -> float:
        alpha, beta = self.alpha.get(prompt, 4.0), self.beta.get(prompt, 4.0)
        return alpha / (alpha + beta)

    def step(self, prompts: list[object], rewards: list[float], *, once: bool = True) -> None:
        eta = eta_by_hand(self.kls, self.forgetting)
        met = Counter[object]()
        for prompt, reward in zip(prompts, rewards, strict=True):
            own = eta if not met[prompt] or not once else 1.0
            met[prompt] += 1
            self.alpha[prompt] = own * self.alpha.get(prompt, 4.0) + reward
            self.beta[prompt] = own * self.beta.get(prompt, 4.0) + 1 - reward


def drawn(seed: int, steps: int = 6) -> list[tuple[list[object], Tensor, float]]:
    """Steps of a run: prompts, some of them twice, rewards of many kinds, and the KL after it."""
    generator = torch.Generator().manual_seed(seed)
    pool: list[object] = ["a", "b", "1", 1, 2, -3]  # "1" and 1 are two prompts
    found = []
    for step in range(steps):
        chosen = torch.randint(len(pool), (5,), generator=generator).tolist()
        rewards = torch.rand(5, generator=generator, dtype=torch.float64)
        rewards = rewards if step % 2 else (rewards > 0.5).double()
        kl = float(torch.rand((), generator=generator)) * 0.02
        found.append(([pool[i] for i in chosen], rewards, kl))
    return found


@pytest.mark.parametrize("forgetting", FORGETTINGS)
def test_the_tracker_is_that_of_the_definition(forgetting: str) -> None:
    tracker, expected = BetaTracker(forgetting=forgetting), ByHand(forgetting)  # type: ignore[arg-type]
    rollout_by_rollout = ByHand(forgetting)
    after, apart = 0.0, 0.0
    for prompts, rewards, kl in drawn(0):
        before = [expected.value(prompt) for prompt in prompts]
        found = tracker.advantage(prompts, rewards)  # type: ignore[arg-type]
        # A few roundings of numbers of at most 26.
        bound = 64 * EPS
        for a, v, r in zip(found.tolist(), before, rewards.tolist(), strict=True):
            assert abs(a - (r - v)) <= bound
        expected.step(prompts, rewards.tolist())
        rollout_by_rollout.step(prompts, rewards.tolist(), once=False)
        for value, prompt in zip(tracker.value(prompts).tolist(), prompts, strict=True):  # type: ignore[arg-type]
            assert abs(value - expected.value(prompt)) <= bound
            apart = max(apart, abs(value - rollout_by_rollout.value(prompt)))
        after = max(after, float((rewards - tracker.value(prompts) - found).abs().max()))  # type: ignore[arg-type]
        for any_tracker in (expected, rollout_by_rollout):
            any_tracker.kls.append(kl)
        tracker.observe_kl(kl)
    # The bounds bite: A after the update, and a forgetting for every rollout, are far off.
    assert after > 1e-3 and apart > 1e-3
    assert len(tracker) == len(expected.alpha) and "a" in tracker and "z" not in tracker


@pytest.mark.parametrize("forgetting", FORGETTINGS)
@pytest.mark.parametrize(
    "kls",
    [[], [0.0], [0.004, 0.006], [0.01], [0.02], [1e6], [5.0] * 3 + [0.002] * 20],
    ids=["none", "zero", "below", "target", "above", "lost", "window"],
)
def test_forgetting(kls: list[float], forgetting: str) -> None:
    tracker = BetaTracker(forgetting=forgetting)  # type: ignore[arg-type]
    for kl in kls:
        tracker.observe_kl(kl)
    assert tracker.eta == pytest.approx(eta_by_hand(kls, forgetting), rel=1e-14)
    assert 0.875 <= tracker.eta <= 0.96


def test_published_forgets_fastest_where_nothing_moved() -> None:
    both = [BetaTracker(forgetting=name) for name in FORGETTINGS]  # type: ignore[arg-type]
    for tracker in both:
        tracker.observe_kl(-1e-5)  # an estimate may be below 0
    assert [round(tracker.eta, 4) for tracker in both] == [0.96, 0.875]


def through_torch(state: dict[str, object]) -> dict[str, object]:
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_json(state: dict[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("saved", [through_torch, through_json])
@pytest.mark.parametrize("split", [0, 1, 25])
def test_a_run_goes_on_to_the_bit(saved: Callable[..., dict[str, object]], split: int) -> None:
    whole = resumed = BetaTracker(dataset="digits")
    for step, (prompts, rewards, kl) in enumerate(drawn(1, steps=30)):
        if step == split:
            resumed = BetaTracker(dataset="digits")
            resumed.load_state_dict(saved(whole.state_dict()))
        for tracker in {whole, resumed}:
            tracker.advantage(prompts, rewards)  # type: ignore[arg-type]
            tracker.observe_kl(kl)
        assert resumed.state_dict() == whole.state_dict()
    assert resumed is not whole


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_the_order_of_a_batch_is_of_no_meaning(seed: int) -> None:
    one, other = BetaTracker(), BetaTracker()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    for prompts, rewards, _ in drawn(seed, steps=3):
        found = one.advantage(prompts, rewards)  # type: ignore[arg-type]
        moved = other.advantage([prompts[i] for i in order], rewards[order])  # type: ignore[misc]
        assert torch.equal(found[order], moved)
    assert one.state_dict() == other.state_dict()


def test_rewards_of_one_prompt_add_up_in_any_order() -> None:
    states = []
    for rewards in permutations([0.1, 0.2, 0.3]):  # whose sums differ in the last bit
        tracker = BetaTracker()
        tracker.start("a", 0.0)  # α = 0: it is the sum itself
        tracker.advantage(["a"] * 3, torch.tensor(rewards, dtype=torch.float64))
        states.append(tracker.state_dict())
    assert all(state == states[0] for state in states)


def test_ranks_are_joined() -> None:
    def run(
        tracker: BetaTracker, ids: list[str], rewards: list[float], kl: float = 0.004
    ) -> dict[str, object]:
        tracker.advantage(ids, torch.tensor(rewards))
        tracker.observe_kl(kl)
        return tracker.state_dict()

    def begun() -> BetaTracker:
        tracker = BetaTracker()
        run(tracker, ["a", "b", "c"], [1.0, 0.0, 1.0])
        return tracker

    whole = begun()
    run(whole, ["a", "a", "c", "d"], [1.0, 0.0, 1.0, 0.0])
    own = [run(begun(), ["a", "a"], [1.0, 0.0]), run(begun(), ["c", "d"], [1.0, 0.0])]
    # A third rank had the rewards of the first: what agrees is one update.
    for states in (own, own[::-1], [*own, own[0]], [whole.state_dict()] * 2):
        joined = begun()
        joined.merge(states)
        assert joined.state_dict() == whole.state_dict()
    other = run(begun(), ["a"], [1.0])
    with pytest.raises(ValueError, match=r"one update of prompt 'a', got two that differ; give "):
        begun().merge([own[0], other])
    with pytest.raises(ValueError, match="the same KLs on all ranks"):
        begun().merge([own[0], run(begun(), ["c"], [1.0], kl=1.0)])
    with pytest.raises(ValueError, match="every prompt of this tracker, got none of 'a'"):
        begun().merge([BetaTracker().state_dict()])
    with pytest.raises(ValueError, match="states: expected at least one, got none"):
        begun().merge([])


def test_a_tracker_of_other_data_is_refused() -> None:
    tracker = BetaTracker(dataset="digits")
    tracker.advantage(["a"], torch.ones(1))
    before = tracker.state_dict()
    with pytest.raises(ValueError, match=r"a tracker of 'digits', got one of 'geo3k'; resume on"):
        tracker.load_state_dict(BetaTracker(dataset="geo3k").state_dict())
    for damage in (
        {"alpha": [math.nan]},
        {"alpha": []},
        {"alpha": [0.0], "beta": [0.0]},
        {"kl": [math.inf]},
        {"prompts": ["a", "a"], "alpha": [1.0, 1.0], "beta": [1.0, 1.0]},
    ):
        with pytest.raises(ValueError, match="the file is damaged"):
            tracker.load_state_dict(before | damage)
    with pytest.raises(ValueError, match="state: expected version 1, got 2"):
        tracker.load_state_dict(before | {"version": 2})
    with pytest.raises(ValueError, match=r"that of BetaTracker\.state_dict"):
        tracker.load_state_dict({})
    assert tracker.state_dict() == before


def test_a_start_and_what_is_drawn() -> None:
    tracker = BetaTracker()
    for prompt, v0 in (("never", 0.0), ("always", 1.0), ("often", 0.75)):
        tracker.start(prompt, v0)
    ids = ["never", "always", "often", "unseen"]
    assert tracker.value(ids).tolist() == [0.0, 1.0, 0.75, 0.5]
    expected = [0.05, 0.05, math.sqrt(0.75 * 0.25) + 0.05, 0.55]
    assert tracker.sampling_weight(ids).tolist() == pytest.approx(expected, rel=1e-14)
    assert float(tracker.sampling_weight(["never"], epsilon=0.2)) == pytest.approx(0.2)
    # α + β = 8: a first rollout moves v by (1 − 0.75)/(8·η + 1).
    tracker.advantage(["often"], torch.ones(1))
    assert float(tracker.value(["often"])) == pytest.approx(0.75 + 0.25 / (8 * 0.9175 + 1))
    with pytest.raises(ValueError, match="a prompt not seen yet, got 'often'"):
        tracker.start("often", 0.5)
    with pytest.raises(ValueError, match=r"v0: expected a number in 0\.\.1, got nan"):
        tracker.start("other", math.nan)
    with pytest.raises(ValueError, match="epsilon: expected a finite number > 0"):
        tracker.sampling_weight(ids, epsilon=0.0)


def test_wrong_input_to_the_tracker() -> None:
    tracker, one = BetaTracker(), torch.ones(1)
    for reward in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"in 0\.\.1, got {reward} at index 1; scale"):
            tracker.advantage(["a", "b"], torch.tensor([1.0, reward], dtype=torch.float64))
    assert not len(tracker)
    with pytest.raises(ValueError, match=r"rewards: expected \[B\] = \[2\], as prompt_ids, got"):
        tracker.advantage(["a", "b"], one)
    with pytest.raises(ValueError, match="rewards: expected dtype float32 or float64, got int64"):
        tracker.advantage(["a"], one.long())
    for own in (1.0, True, None):
        with pytest.raises(TypeError, match="prompt_ids: expected strings or integers"):
            tracker.advantage([own], one)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="prompt_ids: expected a list of ids, got one text"):
        tracker.advantage("a", one)
    with pytest.raises(TypeError, match=r"got Tensor; give the rows' ids, of a tensor its \.to"):
        tracker.advantage(torch.tensor([1]), one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kl: expected a finite number, got nan"):
        tracker.observe_kl(math.nan)
    with pytest.raises(ValueError, match="target_kl: expected a finite number > 0"):
        BetaTracker(target_kl=0.0)
    with pytest.raises(ValueError, match='forgetting: expected "monotone" or "published"'):
        BetaTracker(forgetting="slow")  # type: ignore[arg-type]


def whitened_by_hand(values: list[float], *, unbiased: bool = False) -> list[float]:
    variance = statistics.variance(values) if unbiased else statistics.pvariance(values)
    return [(v - statistics.fmean(values)) / math.sqrt(max(variance, 1e-6)) for v in values]


@given(st.integers(2, 40), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-4, 1e4]))
@settings(max_examples=40)
def test_whitening(size: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64) * scale
    found = whiten(values)
    expected = torch.tensor(whitened_by_hand(values.tolist()), dtype=torch.float64)
    # Size summands, each off by eps, in units of the deviation.
    bound = 16 * size * EPS * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound
    if scale >= 1:  # an unbiased variance is seen, unless the floor hides either
        wrong = torch.tensor(whitened_by_hand(values.tolist(), unbiased=True))
        assert float((found - wrong).abs().max()) > 10 * bound
    order = torch.randperm(size, generator=generator)
    torch.testing.assert_close(whiten(values[order]), found[order], rtol=0, atol=bound)
    assert whiten(values.float()).dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e6])
def test_equal_advantages_are_whitened_to_zero(value: float) -> None:
    for size in (0, 1, 3, 7, 29):
        for dtype in (torch.float32, torch.float64):
            zeros = torch.zeros(size, dtype=dtype)
            assert torch.equal(whiten(zeros + value), zeros)


def shaped_by_hand(A: float, H: float, coef: float, divisor: float) -> float:
    return A + min(coef * max(H, 0.0), abs(A) / divisor)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages [B], entropies and a ragged mask [B, T]; what is masked is no number."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    B, T = draw(st.sampled_from([(1, 1), (4, 7), (3, 0)]))
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    entropy = torch.rand(B, T, generator=generator, dtype=torch.float64) * 3
    difficulty = draw(st.sampled_from(["plain", "zero_advantage", "tiny", "rounded", "huge"]))
    if difficulty == "zero_advantage":
        advantages[0] = 0.0
    elif difficulty == "tiny":
        advantages *= 1e-30
    elif difficulty == "rounded":
        entropy = entropy * 0 - 1e-7  # lse − Σ p·z of a peaked token may come out so
    elif difficulty == "huge":
        entropy *= 1e30
    mask = torch.arange(T) < torch.randint(T + 1, (B, 1), generator=generator)
    return advantages, entropy.masked_fill(~mask, math.nan), mask


@given(shapes(), st.sampled_from([(0.4, 2.0), (0.0, 3.0), (10.0, 1.01)]))
@settings(max_examples=60)
def test_shaping(batch: tuple[Tensor, Tensor, Tensor], options: tuple[float, float]) -> None:
    (advantages, entropy, mask), (coef, divisor) = batch, options
    found = shape_by_entropy(advantages, entropy, mask, coef=coef, divisor=divisor)
    assert found.dtype == torch.float64 and bool((found[~mask] == 0).all())
    for i, t in mask.nonzero().tolist():
        expected = shaped_by_hand(float(advantages[i]), float(entropy[i, t]), coef, divisor)
        assert float(found[i, t]) == pytest.approx(expected, rel=4 * EPS / (1 - 1 / divisor))
    assert torch.equal(found.sign(), (advantages.sign()[:, None] * mask).expand_as(found))
    # Appended masked tokens, and advantages given by token, change nothing.
    longer = torch.nn.functional.pad(entropy, (0, 3), value=math.nan)
    wide = torch.nn.functional.pad(mask, (0, 3))
    again = shape_by_entropy(advantages, longer, wide, coef=coef, divisor=divisor)
    assert torch.equal(again[:, : mask.shape[1]], found)
    by_token = advantages[:, None].expand_as(mask)
    options_ = {"coef": coef, "divisor": divisor}
    assert torch.equal(shape_by_entropy(by_token, entropy, mask, **options_), found)


def test_entropy_of_the_sampled_token() -> None:
    logp = torch.tensor([[-1e-12, -0.5, -1.0, -700.0, -math.inf, 1e-9]], dtype=torch.float64)
    # Near p = 1 it is −log p, of which 1 − p in fp64 would keep four digits.
    expected = [1e-12 - 1e-24, 0.5 * math.exp(-0.5), math.exp(-1), 700 * math.exp(-700), 0.0, 0.0]
    assert sampled_entropy(logp)[0].tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    given = logp.clone().requires_grad_()
    assert not sampled_entropy(given).requires_grad
    mask = torch.ones_like(logp, dtype=torch.bool)
    assert not shape_by_entropy(torch.ones(1), given.exp(), mask).requires_grad


def test_wrong_input_to_the_shaping() -> None:
    mask, one = torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    entropy = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"advantages: expected \[B\] = \[2\] or \[B, T\]"):
        shape_by_entropy(torch.ones(3), entropy, mask)
    with pytest.raises(ValueError, match=r"entropy: expected \[B, T\] = \[2, 3\], got \[3, 2\]"):
        shape_by_entropy(one, entropy.T, mask)
    with pytest.raises(ValueError, match=r"entropy: expected finite .*, got nan .* \[1, 2\]"):
        shape_by_entropy(one, torch.tensor([[1.0, 1, 1], [1, 1, math.nan]]), mask)
    with pytest.raises(ValueError, match="advantages: expected finite numbers, got inf"):
        shape_by_entropy(one * math.inf, entropy, mask)
    with pytest.raises(ValueError, match="mask: expected dtype bool, got float32"):
        shape_by_entropy(one, entropy, mask.float())
    with pytest.raises(ValueError, match="coef: expected a finite number ≥ 0, got -1"):
        shape_by_entropy(one, entropy, mask, coef=-1)
    with pytest.raises(ValueError, match="divisor: expected a finite number > 1, got 1"):
        shape_by_entropy(one, entropy, mask, divisor=1)
    with pytest.raises(ValueError, match=r"advantages: expected \[B\], got \[2, 3\]"):
        whiten(entropy)
    with pytest.raises(ValueError, match=r"logp: expected dtype float32 or .* got int64"):
        sampled_entropy(one.long())
