"""The update: distinct rows, micro-batches and ranks change nothing but the cost."""

from dataclasses import replace

import pytest
import torch
from support import small_model

from roma.models.prefix import Packed
from roma.models.prompts import ImageFeatures
from roma.models.qwen_vl import Policy
from roma.train import scoring as scoring_module
from roma.train import states as states_module
from roma.train.batch import Totals, UpdateBatch, micro_batches, partition
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
    weights = policy.named_parameters()
    return {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


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
    assert len(states_module.distinct_rows(batch.group, batch.tokens, batch.mask)[0]) == 10
    shared = gradients(policy, config, [batch])
    every = torch.arange(12)
    monkeypatch.setattr(states_module, "distinct_rows", lambda *rows: (*rows, every))
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
    limit = 150
    cut = list(PolicyLoss(policy, config).parts(whole, limit))
    assert len(cut) > 1 and sorted(torch.cat([rows for rows, _ in cut]).tolist()) == [*range(12)]
    parts = [part for _, part in cut]
    assert_equal_gradients(gradients(policy, config, [whole]), gradients(policy, config, parts))


def test_micro_batches_are_few_and_balanced() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 64):
        sizes = torch.randint(1, 400, (count,), generator=generator).tolist()
        parts = micro_batches(sizes, 400)
        assert sorted(i for part in parts for i in part) == list(range(count))
        filled = [sum(sizes[i] for i in part) for part in parts]
        # The largest first fills bins to within a third of the best packing.
        assert max(filled) <= 400 and len(parts) <= 4 / 3 * -(-sum(sizes) // 400) + 1
        ranks = [sum(sizes[i] for i in part) for part in partition(sizes, 4)]
        assert max(ranks) - min(ranks) <= max(sizes)
    assert micro_batches([500, 3, 900], 400) == [[0], [1], [2]]  # a prompt is not cut
    assert partition([1], 3) == [[0], [], []]


def test_what_has_no_part_in_the_loss_is_not_run(policy: Policy) -> None:
    """Prompt 0: all wrong, no advantage. Prompt 1: right, no advantage. Prompt 2: an advantage."""
    batch = batch_of(policy)
    advantages = batch.advantages * (batch.group == 2)
    right = (batch.group == 1) | (torch.arange(12) == 9)
    batch = replace(batch, advantages=advantages, correct=right, old_logp=None)
    lean = PolicyLoss(policy, RomaConfig(), update="lean")
    ((rows, part),) = lean.parts(batch, 10**6)
    assert rows.tolist() == list(range(4, 12)) and len(part.prompts.images) == 2
    plan = lean.plan(part)
    assert plan.clean.all() and not plan.gain[:4].any() and plan.gain[4:].all()
    drawn = part.aux_view[4:].tolist()
    for k in range(2):
        wanted = [True] * 4 + [i == 1 or view == k for i, view in enumerate(drawn)]
        assert plan.views[k].tolist() == wanted
    nothing = replace(batch, advantages=torch.zeros(12), correct=torch.zeros(12, dtype=torch.bool))
    ((rows, part),) = lean.parts(nothing, 10**6)  # a prompt all the same: ranks stay in step
    assert rows.tolist() == [] and len(part.prompts.images) == 1
    out = lean(part, TOTALS)
    assert float(out.loss.detach()) == 0 and out.loss.requires_grad and out.scored == 5


def test_right_rollouts_without_advantage_have_no_clean_graph(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = replace(batch_of(policy), advantages=torch.zeros(12), old_logp=None)
    calls = []
    packed_hidden = Policy.packed_hidden

    def seen(self: Policy, packed: Packed, features: ImageFeatures) -> torch.Tensor:
        variants = sorted({group.variant for group in packed.groups})
        calls.append((torch.is_grad_enabled(), variants))
        return packed_hidden(self, packed, features)

    monkeypatch.setattr(Policy, "packed_hidden", seen)
    PolicyLoss(policy, RomaConfig(), update="lean")(batch, TOTALS)
    assert calls == [(False, [0]), (True, [1, 2])]


@pytest.mark.parametrize(("views", "passes"), [(1, 1), (2, 1), (12, 2)])
def test_auto_takes_the_cheaper_form(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, views: int, passes: int
) -> None:
    batch = batch_of(policy)
    batch = replace(
        batch,
        view_pixels=[batch.prompts.pixel_values / (2 + k) for k in range(views)],
        aux_view=batch.aux_view % views,
        correct=torch.arange(12) % 4 == 0,
    )
    calls = []
    packed_hidden = Policy.packed_hidden

    def seen(self: Policy, packed: Packed, features: ImageFeatures) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return packed_hidden(self, packed, features)

    monkeypatch.setattr(Policy, "packed_hidden", seen)
    PolicyLoss(policy, RomaConfig())(batch, TOTALS)
    assert calls == [False, True][-passes:]
    calls.clear()  # a token's worst view may be any
    PolicyLoss(policy, RomaConfig(worst_over="token"))(batch, TOTALS)
    assert calls == [True]


def test_known_features_are_not_computed_again(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a frozen tower those that sampling computed serve every update."""
    batch, config = batch_of(policy), RomaConfig()
    images = len(batch.prompts.grids)
    known = policy.image_features(batch.prompts.pixel_values, batch.prompts.grids)
    run: list[int] = []
    image_features = Policy.image_features

    def counted(self: Policy, pixels: torch.Tensor, grids: torch.Tensor) -> ImageFeatures:
        run.append(len(grids))
        return image_features(self, pixels, grids)

    monkeypatch.setattr(Policy, "image_features", counted)
    known = ImageFeatures(
        [x.detach() for x in known.embeddings],
        [[x.detach() for x in level] for level in known.deepstack],
    )
    policy.model.model.visual.requires_grad_(False)
    try:
        found = [
            gradients(policy, config, [replace(batch, clean_features=features)])
            for features in (None, known)
        ]
    finally:
        policy.model.model.visual.requires_grad_(True)
    assert run == [3 * images, 2 * images]
    assert_equal_gradients(*found)
    run.clear()  # a tower that is trained needs a graph: nothing is known
    PolicyLoss(policy, config)(replace(batch, clean_features=known), TOTALS)
    assert run == [3 * images]


def test_weights_of_tokens_are_a_factor_of_their_losses(policy: Policy) -> None:
    """Of both; where a loss is homogeneous in A, that is a factor of A (not so: the KL's)."""
    batch, generator = batch_of(policy), torch.Generator().manual_seed(3)
    weight = 2 * torch.rand(12, 5, generator=generator)
    weight[0, 1] = 0
    scaled = replace(batch, advantages=batch.advantages[:, None] * weight)
    given = replace(batch, rollout_weight=weight)
    for config in CONFIGS:
        assert_equal_gradients(
            gradients(policy, config, [given]), gradients(policy, config, [scaled])
        )
    assert [part.rollout_weight.shape for part in given.split(1)] == [(4, 5)] * 3


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

    monkeypatch.setattr(scoring_module, "linear_logprob", sweep)
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
        scored = policy_loss.score(batch, hidden=True, entropy=True)
        logits = scored.hidden @ policy.head_weight.T / 0.7
    torch.testing.assert_close(scored.logp, out.logp, rtol=0, atol=5e-6)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    expected = entropy.where(batch.mask, 0.0)
    torch.testing.assert_close(scored.entropy, expected, rtol=0, atol=5e-6)
    plain = policy_loss.score(batch)
    assert plain.entropy is None and plain.hidden is None
    by_parts = policy_loss.score(batch, limit=60)
    torch.testing.assert_close(by_parts.logp, scored.logp, rtol=0, atol=5e-6)
