"""Two ranks of FSDP2 over gloo: the gradients and the metrics of one."""

from __future__ import annotations

import os

import pytest
import torch
from support.ranks import Ranks
from verl_stack import cases, oracle, two_ranks

from roma.integrations.options import RomaOptions
from roma.testing import tolerance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair():
    made = Ranks()
    yield made
    made.stop()


@pytest.mark.parametrize(
    ("halves", "options", "changes"),
    [
        ([[0, 1, 2], [3, 4, 5]], "num_views=2", {}),
        # Rank 1 has no view row at all: as many forwards as rank 0, which has six.
        (
            [[0, 3, 4], [1, 2, 5]],
            "num_views=2,lambda_aux=0,penalty_over=correct",
            {"lambda_aux": 0.0, "penalty_over": "correct"},
        ),
        # One right rollout for two ranks: the count is of both.
        (
            [[0, 1, 2], [3, 4, 5]],
            "num_views=2,penalty_over=correct,accuracy_threshold=2",
            {"penalty_over": "correct", "accuracy_threshold": 2.0},
        ),
    ],
)
def test_as_one_rank(worker_of, pair, tmp_path, halves, options, changes):
    given = cases.with_old(worker_of(), cases.rows())
    if "accuracy_threshold" in changes:
        given[3] = {**given[3], "extra_fields": {"reward_extra_info": {"acc": 3.0}}}
    os.environ["ROMA_TEST_MODEL"] = str(cases.folder())
    store = tmp_path / "store"
    torch.save(given, store.with_suffix(".rows"))
    pair.run(two_ranks.half, store, halves, options)
    said = [torch.load(store.with_suffix(f".{rank}"), weights_only=False) for rank in (0, 1)]
    case = oracle.Case(given, RomaOptions(**changes))
    for own in said:
        oracle.check_whole(own["gradients"], case)
    loss, _, metrics = oracle.whole(case, torch.float64)
    eager_loss, _, eager = oracle.whole(case, torch.float32)
    if case.options.lambda_aux == 0:
        del metrics["roma/aux_loss"]  # over the views that the penalty had run
    lost = max(abs(loss - eager_loss), *(abs(x - eager[name]) for name, x in metrics.items()))
    limit = 2 * lost + tolerance.few(abs(loss) + sum(abs(x) for x in metrics.values()))
    # Each rank's loss is times their number, and verl averages them.
    assert abs(sum(sum(own["loss"]) for own in said) / 2 - loss) <= limit
    for name, value in metrics.items():
        (logged,) = said[0]["metrics"][name]
        assert abs(logged - value) <= limit < abs(value) / tolerance.PLANTED, name
        assert said[1]["metrics"][name] == [logged]
    corruptions = [name for name in said[0]["metrics"] if name.startswith("roma/penalty/")]
    assert corruptions
    assert all(said[0]["metrics"][name] == said[1]["metrics"][name] for name in corruptions)
