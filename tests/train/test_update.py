"""The update: distinct rows, micro-batches and ranks change nothing but the cost."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support import small_model

from roma.models.qwen_vl import Policy
from roma.train import update as update_module
from roma.train.batch import Totals, UpdateBatch
from roma.train.update import PolicyLoss
from roma_kernels.roma_loss.config import RomaConfig

# Gradients up to 0.37, rms 6e-3 to 1e-2, summed in another order: 6e-8 was measured, 1e-6 is twice
# eps32 · 0.37 · √500 tokens and views. One rollout given another's states moves them by 7e-2.
CLOSE = {"rtol": 0, "atol": 2e-6}


def batch_of(policy: Policy) -> UpdateBatch:
    """Three prompts × 4 rollouts, some of them equal, K = 2."""
    prompts = small_model.mixed_prompts(policy)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(9, 20, (12, 5), generator=generator)
    tokens[1], tokens[7] = tokens[0], tokens[6]
    mask = torch.arange(5) < torch.tensor([5, 5, 3, 4, 5, 2, 4, 4, 5, 1, 5, 3])[:, None]
    views = [
        policy.view_pixels(prompts, [[change(image) for image in own] for own in prompts.images])
        for change in (lambda image: image // 2, lambda image: 255 - image)
    ]
    return UpdateBatch(
        prompts=prompts,
        view_pixels=views,
        group=torch.arange(3).repeat_interleave(4),
        tokens=tokens,
        mask=mask,
        advantages=torch.randn(12, generator=generator),
        correct=torch.arange(12) % 3 != 1,
        aux_view=torch.randint(2, (12,), generator=generator),
        old_logp=torch.full((12, 5), -3.7),
    )


TOTALS = Totals(sequences=12, tokens=46, correct=8)


def gradients(policy: Policy, config: RomaConfig, batches: list[UpdateBatch]) -> dict:
    policy.zero_grad()
    for batch in batches:
        PolicyLoss(policy, config)(batch, TOTALS).loss.backward()
    return {name: weight.grad.clone() for name, weight in policy.named_parameters()}


def assert_equal_gradients(one: dict, other: dict) -> None:
    for name in one:
        torch.testing.assert_close(one[name], other[name], **CLOSE, msg=lambda m, n=name: n + m)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return small_model.policy()


CONFIGS = [
    RomaConfig(),
    RomaConfig(aggregation="dapo", penalty_over="correct", worst_over="token", lambda_aux=1.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "dapo"])
def test_distinct_rows_change_nothing(
    policy: Policy, config: RomaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(policy)
    assert len(update_module.distinct_rows(batch.group, batch.tokens, batch.mask)[0]) == 10
    shared = gradients(policy, config, [batch])
    every = torch.arange(12)
    monkeypatch.setattr(update_module, "distinct_rows", lambda *rows: (*rows, every))
    assert_equal_gradients(shared, gradients(policy, config, [batch]))
    for part in ("lm_head.weight", "visual.patch_embed.proj.weight", "deepstack_merger_list.0"):
        reached = [gradient for name, gradient in shared.items() if part in name]
        assert reached and all(gradient.abs().max() > 0 for gradient in reached), part


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "dapo"])
def test_micro_batches_change_nothing(policy: Policy, config: RomaConfig) -> None:
    whole = batch_of(policy)
    assert whole.totals() == TOTALS
    parts = list(whole.split(1))
    assert [len(part.group) for part in parts] == [4, 4, 4]
    assert [part.totals() for part in parts] == [(4, 17, 3), (4, 15, 2), (4, 14, 3)]
    assert_equal_gradients(gradients(policy, config, [whole]), gradients(policy, config, parts))


def test_own_log_probs_are_the_old_ones_of_a_first_update(policy: Policy) -> None:
    batch = batch_of(policy)
    policy_loss = PolicyLoss(policy, RomaConfig())
    scored = policy_loss.score(batch).logp
    without, given = (policy_loss(replace(batch, old_logp=old), TOTALS) for old in (None, scored))
    assert without.metrics["ppo_kl"] == 0
    torch.testing.assert_close(without.loss, given.loss, rtol=0, atol=1e-5)
    assert (scored[~batch.mask] == 0).all()


def test_a_first_update_sweeps_the_head_once(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(*_: object, **__: object) -> None:
        pytest.fail("log-probs were computed a second time")

    monkeypatch.setattr(update_module, "linear_logprob", sweep)
    PolicyLoss(policy, RomaConfig())(replace(batch_of(policy), old_logp=None), TOTALS)


def test_without_views_there_are_no_view_terms(policy: Policy) -> None:
    batch = batch_of(policy).without_views()
    clean = RomaConfig(lambda_inv=0.0, lambda_aux=0.0)
    losses = [PolicyLoss(policy, config)(batch, TOTALS).loss for config in (RomaConfig(), clean)]
    assert torch.equal(*losses)


def test_scores_are_those_of_the_loss(policy: Policy) -> None:
    """Log-probs as the loss has them, and entropies as all logits have them."""
    batch, policy_loss = batch_of(policy), PolicyLoss(policy, RomaConfig(temperature=0.7))
    with torch.no_grad():
        out = policy_loss(batch, TOTALS)
        scored = policy_loss.score(batch, entropy=True)
        logits = scored.hidden @ policy.head_weight.T / 0.7
    torch.testing.assert_close(scored.logp, out.logp, rtol=0, atol=5e-6)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    expected = entropy.where(batch.mask, 0.0)
    torch.testing.assert_close(scored.entropy, expected, rtol=0, atol=5e-6)
    assert policy_loss.score(batch).entropy is None


def _rank(rank: int, store: str, path: str) -> None:
    """One of two ranks: its half of the rollout batch, wrapped; compares with the whole."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    policy = Policy.load(path)
    whole = batch_of(policy)
    config = RomaConfig()
    expected = gradients(policy, config, [whole])
    rows = whole.group % 3 == 0 if rank == 0 else whole.group % 3 != 0  # 4 rollouts and 8
    mine = {
        name: getattr(whole, name)[rows]
        for name in ("group", "tokens", "mask", "advantages", "correct", "aux_view", "old_logp")
    }
    wrapped = torch.nn.parallel.DistributedDataParallel(PolicyLoss(policy, config))
    policy.zero_grad()
    out = wrapped(replace(whole, **mine), TOTALS)  # of both ranks
    (2 * out.loss).backward()  # DDP averages
    found = {name: weight.grad for name, weight in policy.named_parameters()}
    assert_equal_gradients(found, expected)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_add_up_to_one_process(tmp_path: Path) -> None:
    """Data parallel: the loss runs inside the wrapped module, so every gradient is synchronised."""
    path = str(small_model.folder() / "model")
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), path), nprocs=2)
