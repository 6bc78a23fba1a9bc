"""The update on two ranks gives the gradients of one process, whatever each rank has.

A rank has right rollouts and the other none; nothing to learn from; prompts without an image, or
without a token. `tests/train/test_forms.py` holds one process to float64.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import small_model
from support.ranks import RANKS, Ranks, join, leave
from support.update_ranks import CUTS, Gradients, Tried, batch_of, one_process, parts_of

from roma.models.qwen_vl import Policy
from roma.train import states
from roma.train.update import PolicyLoss
from roma_kernels.roma_loss.config import RomaConfig

# ‖found − one process‖ / ‖one process‖ in fp32. One process is 9e-7 from float64; two ranks sum the
# same products in another order: 1.0e-7 to 3.6e-7 were measured, and 0.5 for a planted error.
CLOSE = 1e-6
SAME_LOGP = 5e-6  # nats, ten of eps32 · 4; the same rows were bitwise equal
SCORED = "text_on_one"
LIMIT = 300.0  # seconds, for all cases of an engine; DeepSpeed compiles for a minute, once

FORMS = [(update, share) for update in ("joint", "lean", "two_pass") for share in (False, True)]
SOME = [("joint", False), ("lean", True), ("two_pass", False)]


@dataclass(frozen=True)
class Case:
    """One form of the update, on one cut."""

    cut: str
    update: str
    share: bool
    views: int = 2
    checkpointing: bool = False
    tied: bool = False  # the head to the embedding; and the vision tower is frozen

    @property
    def question(self) -> tuple[str, int, bool, bool]:
        """What one process is asked; there all forms agree."""
        return self.cut, self.views, self.share, self.tied


CASES = [
    *(Case("right_on_one", *form) for form in FORMS),
    Case("right_on_one", "auto", True),
    *(Case("nothing_on_one", *form) for form in FORMS),
    *(Case("text_on_one", *form) for form in FORMS),
    *(Case("text_on_one", *form, tied=True) for form in SOME),
    *(Case("micro_batches", *form, checkpointing=True) for form in FORMS),
    *(Case("micro_batches", *form) for form in SOME),
    *(Case("micro_batches", *form, views=0) for form in SOME),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One pair of processes for all engines."""
    running = Ranks(LIMIT)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The batches, and the gradients of one process, in a file that the ranks read."""
    folder, config = small_model.folder() / "model", RomaConfig()
    policies = {tied: policy_of(folder, tied=tied) for tied in (False, True)}
    batches, expected = {}, {}
    for case in CASES:
        key = case.cut, case.views
        if key not in batches:
            batches[key] = batch_of(policies[False], CUTS[case.cut], case.views)
        if case.question not in expected:
            loss = PolicyLoss(policies[case.tied], config, update="joint", share_prompt=case.share)
            expected[case.question] = one_process(loss, batches[key])
    scored = replace(batches[SCORED, 2], clean_features=None)
    logp = PolicyLoss(policies[False], config).score(scored).logp
    path = tmp_path_factory.mktemp("ranks") / "data.pt"
    torch.save((folder, batches, expected, scored, logp), path)
    return path


def policy_of(folder: Path, *, tied: bool) -> Policy:
    """The small model; as larger ones are, if `tied`: one weight for embedding and head."""
    policy = Policy.load(folder).eval()
    if tied:
        model = policy.model.model
        policy.model.lm_head.weight = model.language_model.embed_tokens.weight
        model.visual.requires_grad_(False)
    return policy


def distance(found: Gradients, expected: Gradients) -> float:
    """‖found − expected‖ / ‖expected‖ of all weights together."""
    assert found.keys() == expected.keys()
    off = [(found[name] - weight).double().norm() for name, weight in expected.items()]
    size = [weight.double().norm() for weight in expected.values()]
    return float(torch.stack(off).norm() / torch.stack(size).norm())


class Rank:
    """One of the ranks, with an engine around a policy of its own.

    Args:
        rank: 0 or 1.
        data: the file.
        engine: the name of one.
        tied: as in a case.
    """

    def __init__(self, rank: int, data: Path, engine: str, *, tied: bool = False) -> None:
        folder, self.batches, self.expected, self.scored, self.logp = torch.load(
            data, weights_only=False
        )
        self.rank = rank
        self.policy = policy_of(folder, tied=tied)
        self.loss = PolicyLoss(self.policy, RomaConfig())
        self.engine = Tried(engine, self.loss)

    def distance(self, case: Case, *, factor: float = 1.0, own_totals: bool = False) -> float:
        """That of a case; data parallelism averages, so the right factor is the number of ranks."""
        if case.checkpointing:
            self.policy.train()  # this model has no dropout
            self.policy.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.policy.eval()
            self.policy.model.activation_checkpointing_disable()
        self.loss.update, self.loss.share_prompt = case.update, case.share
        batch, cut = self.batches[case.cut, case.views], CUTS[case.cut]
        parts = parts_of(batch, cut, self.rank)
        totals = parts[0].totals() if own_totals else batch.totals()
        found = self.engine.gradients(parts, totals, factor=factor)
        return distance(found, self.expected[case.question])

    def check_scores(self) -> None:
        """Log-probs of a rank's own rollouts, outside of an update."""
        self.loss.share_prompt = True
        prompts = parts_of(self.scored, CUTS[SCORED], self.rank)[0]
        rows = [CUTS[SCORED].prompts.index(p) for p in CUTS[SCORED].ranks[self.rank][0]]
        expected = self.logp.view(len(CUTS[SCORED].prompts), -1, self.logp.shape[1])[rows]
        torch.testing.assert_close(
            self.engine.score(prompts), expected.flatten(0, 1), rtol=0, atol=SAME_LOGP
        )


def _all_cases(rank: int, store: Path, data: Path, engine: str) -> None:
    """Every case, and log-probs before the first update and after the last one."""
    join(rank, store, LIMIT / 4)
    far = []
    for tied in (True, False):
        own = Rank(rank, data, engine, tied=tied)
        if not tied:
            own.check_scores()
        for case in CASES:
            if case.tied == tied:
                try:
                    found = own.distance(case)
                except Exception as error:
                    raise RuntimeError(f"rank {rank}: {case}") from error
                if not found <= CLOSE:
                    far.append(f"{case}: {found:.1e}")
    assert not far, "\n".join(far)
    own.check_scores()
    # A thousand times the bound, as wrong as what a trainer gets wrong in silence.
    case = Case("right_on_one", "lean", True)
    assert own.distance(case, factor=1 / RANKS) > 1e3 * CLOSE
    assert own.distance(case, own_totals=True) > 1e3 * CLOSE
    leave()


def _join_for_seconds(rank: int, store: Path) -> None:
    """For what must hang; first both ranks are waited for, who start when they can."""
    join(rank, store.with_suffix(".first"), LIMIT / 4)
    leave()
    join(rank, store, 5.0)


def _one_skips(rank: int, store: Path, data: Path, engine: str) -> None:
    """Rank 1 makes no call: the other does not wait for it for ever."""
    _join_for_seconds(rank, store)
    own = Rank(rank, data, engine)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"Timed out|Connection closed"):
            own.distance(Case("right_on_one", "lean", True))
    dist.destroy_process_group()


def _no_stand_ins(rank: int, store: Path, data: Path, engine: str) -> None:
    """Rank 1 has no image, and leaves its vision tower out."""
    _join_for_seconds(rank, store)
    own = Rank(rank, data, engine)
    if rank == 1:
        states.ranks = lambda: 1
    own.distance(Case("text_on_one", "lean", True))
    raise RuntimeError(f"rank {rank} went through")


NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: make test-deepspeed",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    ["ddp", "fsdp2", *(pytest.param(f"zero{n}", marks=NO_DEEPSPEED) for n in (1, 2, 3))],
)
def test_two_ranks_are_one_process(ranks: Ranks, tmp_path: Path, data: Path, engine: str) -> None:
    if engine.startswith("zero"):  # DeepSpeed keeps the groups of a process
        ranks.stop()
    ranks.run(_all_cases, tmp_path / "store", data, engine)


@pytest.mark.slow
def test_ranks_that_do_not_agree_fail(ranks: Ranks, tmp_path: Path, data: Path) -> None:
    """Without stand-ins gloo ends a process, or says for what it waited; rank 1 may go through."""
    ranks.run(_one_skips, tmp_path / "one_skips", data, "fsdp2")
    found = r"a rank ended without a word|Timed out|Connection closed|rank 1 went through"
    with pytest.raises(AssertionError, match=found):
        ranks.run(_no_stand_ins, tmp_path / "no_stand_ins", data, "fsdp2")


def test_ranks_have_a_time_limit() -> None:
    two = Ranks()
    two.run(time.sleep)  # rank r sleeps r seconds
    two.limit = 0.1
    with pytest.raises(AssertionError, match=r"ranks were not done after 0\.1 s"):
        two.run(time.sleep)
