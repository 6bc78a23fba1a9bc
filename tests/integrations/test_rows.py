"""A trainer's own loss on `add_rows` against MATH.md section 2 on the clean rows, in float64.

The trainer here is a small stand-in of what slime, SkyRL, NeMo-RL and the like do: one forward, a
clipped objective and a k3 term on its log-probs, a mean. The formula is written out apart from it.
"""

import dataclasses

import pytest
import torch

from roma.integrations.options import RomaOptions
from roma.integrations.rows import AUXILIARY, CLEAN, FILLER, PENALTY, Rows, add_rows, worst_of

B, T, K, D, V = 6, 5, 3, 4, 7
L_MAX, LOW, HIGH, DUAL = 8, 0.2, 0.3, 3.0
EPS = torch.finfo(torch.float64).eps


class Policy:
    """Log-probs of tokens, given a row's image: logits = W(features of position + image)."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight = (0.7 * draw(V, D)).requires_grad_()
        self.old_weight = self.weight.detach() + 0.25 * draw(V, D)
        self.ref_weight = self.weight.detach() + 0.25 * draw(V, D)
        self.positions = draw(B, T, D)
        self.clean = draw(B, D)
        self.views = self.clean + 0.7 * draw(K, B, D)
        self.tokens = torch.randint(V, (B, T), generator=generator)
        lengths = torch.tensor([5, 2, 4, 1, 3, 5])
        self.mask = torch.arange(T) < lengths[:, None]
        self.advantages = torch.tensor([1.3, -0.9, 0.0, 0.7, -1.6, 0.4], dtype=torch.float64)
        self.correct = torch.tensor([True, False, True, True, False, True])
        self.aux_view = torch.randint(K, (B,), generator=generator)

    def logp(self, images, rows=None, weight=None):
        rows = torch.arange(B) if rows is None else rows
        states = torch.tanh(self.positions[rows] + images[:, None])
        logits = states @ (self.weight if weight is None else weight).T
        return logits.log_softmax(-1).gather(-1, self.tokens[rows][..., None])[..., 0]


def trainers_loss(logp, rows, aggregation, kl_coef):
    """What a trainer computes: it knows rows, not ROMA."""
    ratio, gain = (logp - rows.old_logp).exp(), rows.advantages
    policy = torch.maximum(-ratio * gain, -ratio.clamp(1 - LOW, 1 + HIGH) * gain)
    policy = torch.where(gain < 0, policy.minimum(-DUAL * gain), policy)
    loss = rows.weight[:, None] * policy
    if kl_coef:
        gap = rows.ref_logp - logp
        loss = loss + kl_coef * rows.kl_weight[:, None] * (gap.exp() - gap - 1)
    loss = torch.where(rows.mask, loss, 0)
    if aggregation == "grpo":
        return (loss.sum(1) / rows.mask.sum(1)).mean()
    if aggregation == "dapo":
        return loss.sum() / rows.mask.sum()
    return loss.sum() / (len(rows) * L_MAX)


def formula(policy, options, aggregation, kl_coef, old, reference):
    """L_main + λ_aux·L_aux + λ_inv·L_inv of MATH.md, term by term; and the clean log-probs."""
    clean = policy.logp(policy.clean)
    views = torch.stack([policy.logp(v) for v in policy.views])
    lengths = [int(n) for n in policy.mask.sum(1)]

    def aggregate(term):  # term(i, t)
        rows = [[term(i, t) for t in range(n)] for i, n in enumerate(lengths)]
        if aggregation == "grpo":
            return sum(sum(row) / len(row) for row in rows) / B
        total = sum(sum(row) for row in rows)
        return total / (sum(lengths) if aggregation == "dapo" else B * L_MAX)

    def clipped(logp, i, t):
        gain, ratio = policy.advantages[i], (logp[i, t] - old[i, t]).exp()
        objective = torch.minimum(ratio * gain, ratio.clamp(1 - LOW, 1 + HIGH) * gain)
        return -torch.maximum(objective, DUAL * gain) if gain < 0 else -objective

    def main(i, t):
        gap = reference[i, t] - clean[i, t]
        return clipped(clean, i, t) + kl_coef * (torch.expm1(gap) - gap)

    def d(k, i, t):
        gap = views[k, i, t] - clean[i, t].detach()
        gap = gap if options.penalty_ratio == "view/clean" else -gap
        return torch.expm1(gap) - gap

    # [K][B]
    means = [
        [sum(d(k, i, t) for t in range(n)) / n for i, n in enumerate(lengths)] for k in range(K)
    ]
    right = [i for i in range(B) if policy.correct[i]]
    if options.worst_over == "batch":
        penalty = max(sum(means[k][i] for i in right) for k in range(K))
    else:
        penalty = sum(max(means[k][i] for k in range(K)) for i in right)
    penalty = penalty / (B if options.penalty_over == "all" else len(right))
    sampled = views[policy.aux_view, torch.arange(B)]
    auxiliary = aggregate(lambda i, t: clipped(sampled, i, t))
    loss = aggregate(main) + options.lambda_aux * auxiliary + options.lambda_inv * penalty
    return loss, clean, views


def images_of(policy, rows):
    return torch.stack(rows.pick(list(policy.clean), [list(own) for own in policy.views]))


def both(policy, options, aggregation, penalty, kl_coef, off_policy, spoil=None, **more):
    """(value, gradient) of the trainer and of the formula, and the bound of either difference."""
    with torch.no_grad():
        clean = policy.logp(policy.clean)
        views = torch.stack([policy.logp(v) for v in policy.views])
        old = policy.logp(policy.clean, weight=policy.old_weight) if off_policy else clean
        reference = policy.logp(policy.clean, weight=policy.ref_weight)
    rows = add_rows(
        mask=policy.mask,
        advantages=policy.advantages,
        correct=policy.correct,
        logp=clean,
        view_logp=views,
        aux_view=policy.aux_view,
        options=options,
        aggregation=aggregation,
        penalty=penalty,
        old_logp=old,
        ref_logp=reference if kl_coef else None,
        kl_coef=kl_coef,
        max_length=L_MAX,
        **more,
    )
    rows = rows if spoil is None else spoil(rows)
    logp = policy.logp(images_of(policy, rows), rows.source)
    loss = trainers_loss(logp, rows, aggregation, kl_coef)
    (gradient,) = torch.autograd.grad(loss, policy.weight, retain_graph=True)
    wanted, _, _ = formula(policy, options, aggregation, kl_coef, old, reference)
    (wanted_gradient,) = torch.autograd.grad(wanted, policy.weight)
    # A sum of n products is off by at most n·eps·Σ|products|, and a log-prob of size m that enters
    # it by some 2·(D + V)·eps·m, which exp and k3 hand on at most e^gap-fold: below 100 here.
    (upstream,) = torch.autograd.grad(loss, logp, retain_graph=True)
    size = float(upstream.abs().sum() * (1 + logp.detach().abs().max())) + 1
    features = 2 * float(torch.tanh(policy.positions).abs().max()) + 1
    bound = (len(rows) * T + 2 * (D + V) * 100) * EPS * size * features
    return (loss, gradient), (wanted, wanted_gradient), bound


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("penalty_ratio", ["view/clean", "clean/view"])
@pytest.mark.parametrize(
    ("worst_over", "penalty_over"), [("sequence", "all"), ("sequence", "correct"), ("batch", "all")]
)
@pytest.mark.parametrize("folded", [False, True])
def test_gradient(aggregation, kl_coef, penalty_ratio, worst_over, penalty_over, folded):
    options = RomaOptions(
        num_views=K,
        lambda_inv=1.7,
        lambda_aux=0.6,
        penalty_ratio=penalty_ratio,
        worst_over=worst_over,
        penalty_over=penalty_over,
    )
    for seed in range(3):
        got, wanted, bound = both(
            Policy(seed),
            options,
            aggregation,
            "gradient",
            kl_coef,
            off_policy=True,
            spoil=Rows.folded if folded else None,
        )
        assert (got[1] - wanted[1]).abs().max() < bound < 1e-9


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("penalty_over", ["all", "correct"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_value_and_gradient_by_k3(aggregation, penalty_over, off_policy):
    options = RomaOptions(
        num_views=K, lambda_inv=1.7, penalty_ratio="clean/view", penalty_over=penalty_over
    )
    for seed in range(3):
        got, wanted, bound = both(Policy(seed), options, aggregation, "k3", 0.04, off_policy)
        assert abs(got[0] - wanted[0]) < bound < 1e-9
        assert (got[1] - wanted[1]).abs().max() < bound


@pytest.mark.parametrize("penalty", ["gradient", "k3"])
@pytest.mark.parametrize("multiple_of", [4, 7, 32])
def test_rows_that_fill_weigh_nothing(penalty, multiple_of):
    options = RomaOptions(num_views=K, penalty_ratio="clean/view")
    for aggregation in ("grpo", "dapo", "dr_grpo"):
        got, wanted, bound = both(
            Policy(), options, aggregation, penalty, 0.04, True, multiple_of=multiple_of
        )
        assert (got[1] - wanted[1]).abs().max() < bound < 1e-9


def spoiled(**changes):
    """Rows with fields changed by functions of the rows."""
    return lambda rows: dataclasses.replace(
        rows, **{name: change(rows) for name, change in changes.items()}
    )


def off_by_one_view(rows):
    return torch.where(rows.view < 0, rows.view, (rows.view + 1) % K)


def where(kind, of, other):
    return lambda rows: torch.where(rows.kind == kind, of(rows), other(rows))


ERRORS = {
    "the next view": spoiled(view=off_by_one_view),
    "more rows, the same weights": spoiled(
        weight=where(CLEAN, lambda r: torch.ones_like(r.weight), lambda r: r.weight)
    ),
    "an auxiliary row too heavy by 1 %": spoiled(
        weight=where(AUXILIARY, lambda r: 1.01 * r.weight, lambda r: r.weight)
    ),
    "a penalty row too heavy by 1 %": spoiled(
        weight=where(PENALTY, lambda r: 1.01 * r.weight, lambda r: r.weight),
        kl_weight=where(PENALTY, lambda r: 1.01 * r.kl_weight, lambda r: r.kl_weight),
    ),
    "no share of a length": spoiled(
        weight=where(PENALTY, lambda r: r.weight.mean().expand(len(r)), lambda r: r.weight),
        kl_weight=where(
            PENALTY, lambda r: r.kl_weight.mean().expand(len(r)), lambda r: r.kl_weight
        ),
    ),
    "the wrong rollout": spoiled(
        source=lambda r: torch.where(r.kind == PENALTY, (r.source + 1) % B, r.source)
    ),
}


@pytest.mark.parametrize("penalty", ["gradient", "k3"])
@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("error", ERRORS)
def test_the_bound_bites(penalty, aggregation, error):
    options = RomaOptions(num_views=K, penalty_ratio="clean/view")
    got, wanted, bound = both(
        Policy(), options, aggregation, penalty, 0.04, True, spoil=ERRORS[error]
    )
    assert (got[1] - wanted[1]).abs().max() > 10 * bound


def test_k3_holds_after_an_update_and_the_gradient_row_is_of_first_order():
    """MATH.md's clean side is the policy's of the moment; a row's is that of the scoring pass."""
    options = RomaOptions(num_views=1, lambda_aux=0, penalty_ratio="clean/view")
    policy = Policy()
    with torch.no_grad():
        clean = policy.logp(policy.clean)
        view = policy.logp(policy.views[0])
    kept = {
        "mask": policy.mask,
        "advantages": policy.advantages * 0,
        "correct": policy.correct,
        "logp": clean,
        "view_logp": view[None],
        "aux_view": None,
        "options": options,
        "aggregation": "grpo",
    }
    k3 = add_rows(**kept, penalty="k3", kl_coef=0.04)
    slope = add_rows(**kept)
    with torch.no_grad():
        policy.weight += 0.05 * torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    gradients = []
    for rows in (k3, slope):
        logp = policy.logp(images_of(policy, rows), rows.source)
        loss = trainers_loss(logp, rows, "grpo", 0.04 if rows is k3 else 0)
        gradients.append(torch.autograd.grad(loss, policy.weight)[0])
    now = policy.logp(policy.views[0])
    gap = clean - now  # against the clean side that was scored
    d = torch.where(policy.mask, torch.expm1(gap) - gap, 0).sum(1) / policy.mask.sum(1)
    (wanted,) = torch.autograd.grad((d * policy.correct).sum() / B, policy.weight)
    torch.testing.assert_close(gradients[0], wanted, rtol=1e-9, atol=1e-12)
    apart = (gradients[1] - wanted).norm() / wanted.norm()
    assert 1e-3 < apart  # it does go stale, as the documentation says


class TestRows:
    def kept(self, **changes):
        policy = Policy()
        with torch.no_grad():
            clean = policy.logp(policy.clean)
            views = torch.stack([policy.logp(v) for v in policy.views])
        return {
            "mask": policy.mask,
            "advantages": policy.advantages,
            "correct": policy.correct,
            "logp": clean,
            "view_logp": views,
            "aux_view": policy.aux_view,
            "options": RomaOptions(num_views=K),
            "aggregation": "grpo",
            **changes,
        }

    def test_which_there_are(self):
        rows = add_rows(**self.kept(multiple_of=8))
        clean = list(range(B))
        drawn, right = [0, 1, 3, 4, 5], [0, 2, 3, 5]  # advantage not 0; correct
        assert rows.source.tolist() == [*clean, *drawn, *right, 3]  # 3: the shortest
        kinds = [CLEAN] * B + [AUXILIARY] * 5 + [PENALTY] * 4 + [FILLER]
        assert rows.kind.tolist() == kinds
        assert len(rows) == 16
        policy = Policy()
        assert rows.view[:B].eq(-1).all() and rows.view[-1] == -1
        assert rows.view[B : B + 5].tolist() == policy.aux_view[drawn].tolist()
        assert rows.weight[-1] == 0 and rows.kl_weight.eq(0).all()
        assert rows.ref_logp is None

    def test_a_lambda_of_zero_adds_no_row(self):
        for lambdas, kinds in [
            ({"lambda_aux": 0}, {CLEAN, PENALTY}),
            ({"lambda_inv": 0}, {CLEAN, AUXILIARY}),
            ({"lambda_inv": 0, "lambda_aux": 0}, {CLEAN}),
        ]:
            rows = add_rows(**self.kept(options=RomaOptions(num_views=K, **lambdas)))
            assert set(rows.kind.tolist()) == kinds
        assert torch.equal(rows.weight, torch.ones(B, dtype=torch.float64))
        assert torch.equal(rows.advantages, Policy().advantages[:, None].expand(B, T))

    def test_rows_without_images_and_without_tokens(self):
        kept = self.kept()
        kept["mask"] = kept["mask"] & (torch.arange(B) != 5)[:, None]
        has = torch.tensor([False, True, True, True, True, True])
        rows = add_rows(**kept, has_views=has)
        assert 0 not in rows.source[B:]  # text alone
        assert 5 not in rows.source[rows.kind != FILLER][B:]  # nothing counts
        assert rows.advantages.isfinite().all() and rows.weight.isfinite().all()

    def test_views_of_wrong_rollouts_and_masked_tokens_may_hold_anything(self):
        for options in (RomaOptions(num_views=K), RomaOptions(num_views=K, worst_over="batch")):
            kept = self.kept(options=options)
            rows = add_rows(**kept)
            used = kept["mask"] & kept["correct"][:, None]
            kept["view_logp"] = torch.where(used, kept["view_logp"], torch.nan)
            again = add_rows(**kept)
            for name in ("source", "view", "advantages", "old_logp", "weight"):
                assert torch.equal(getattr(rows, name), getattr(again, name)), name

    def test_take_and_pick(self):
        rows = add_rows(**self.kept())
        named = [f"clean {i}" for i in range(B)]
        views = [[f"view {k} of {i}" for i in range(B)] for k in range(K)]
        picked = rows.pick(named, views)
        assert picked[:B] == named
        for name, i, k in zip(picked[B:], rows.source[B:], rows.view[B:], strict=True):
            assert name == f"view {k} of {i}"
        assert torch.equal(rows.take(torch.arange(B) * 10), rows.source * 10)

    def test_the_lowest_index_of_a_tie_wins(self):
        logp, mask = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
        views = torch.tensor([[[0.0], [0.0]], [[-1.0], [0.0]], [[-1.0], [0.0]]])
        right = torch.ones(2, dtype=torch.bool)
        worst = worst_of(logp, views, mask, right, options=RomaOptions(num_views=3))
        assert worst.tolist() == [1, 0]

    def test_the_worst_view_of_a_batch_is_that_of_right_rollouts(self):
        logp, mask = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
        views = torch.tensor([[[-1.0], [0.0]], [[0.0], [-5.0]]])
        options = RomaOptions(num_views=2, worst_over="batch")
        for right, wanted in [([True, False], 0), ([True, True], 1)]:
            worst = worst_of(logp, views, mask, torch.tensor(right), options=options)
            assert worst.tolist() == [wanted, wanted]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"aggregation": "seq"}, "aggregation: expected 'grpo', 'dapo' or 'dr_grpo'"),
            ({"aggregation": "dr_grpo"}, "max_length: expected tokens"),
            ({"penalty": "k3"}, "penalty_ratio: expected 'clean/view'"),
            ({"penalty": "both"}, "penalty: expected"),
            ({"aux_view": None}, "aux_view: expected"),
            (
                {"options": RomaOptions(num_views=2)},
                r"view_logp: expected \[K, B, T\] = \[2, 6, 5\]",
            ),
            ({"options": RomaOptions(num_views=K, clip_low=0.1)}, "clip_low: expected None"),
            ({"options": RomaOptions(num_views=K, worst_over="token")}, "worst_over: expected"),
            ({"options": RomaOptions(num_views=K, worst_over="mean")}, "worst_over: expected"),
            (
                {"options": RomaOptions(num_views=K, penalty_ratio="clean/view"), "penalty": "k3"},
                "kl_coef: expected more than 0",
            ),
        ],
    )
    def test_refuses(self, changes, said):
        with pytest.raises(ValueError, match=said):
            add_rows(**self.kept(**changes))
