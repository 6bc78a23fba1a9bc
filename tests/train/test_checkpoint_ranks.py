"""Two ranks and one checkpoint: written by both, seen alike, and one's failure is the other's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import RANKS, Ranks, join, leave
from support.tiny_run import TinyEngine, TinyRun, names

from roma.train.checkpoint import starting_point
from roma.train.saved import manifest
from roma.train.saved.agree import on_all, on_first
from roma.train.signals import Preemption

LIMIT = 120.0


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests."""
    running = Ranks(LIMIT)
    yield running
    running.stop()


class Sharded(TinyEngine):
    """Each rank has a file of its own; rank 0 has the weights."""

    fails: str | None = None

    def _fail(self, where: str) -> None:
        if self.fails == where:
            raise OSError(errno.ENOSPC, "No space left on device")

    def save(self, folder: Path) -> None:
        """A file in a folder that the first who comes makes."""
        (folder / "shards").mkdir(exist_ok=True)
        (folder / "shards" / f"rank_{dist.get_rank()}").write_text(str(dist.get_rank()) * 1000)
        if dist.get_rank() == 0:
            state = {"optimizer": self.optimizer.state_dict()}
            torch.save(state, folder / "optimizer.pt")
        self._fail("save")

    def export(self, folder: Path) -> None:
        """A gathering, as where weights are sharded; then rank 0 writes."""
        dist.barrier()
        if dist.get_rank() == 0:
            super().export(folder)
        self._fail("export")


def _run() -> TinyRun:
    run = TinyRun()
    run.engine = Sharded(run.policy)
    run.train(1)
    return run


def _save_and_find(rank: int, store: Path, out: Path) -> None:
    join(rank, store, LIMIT / 2)
    run, hashed = _run(), []
    digest = manifest._digest
    manifest._digest = lambda path: (hashed.append(path.name), digest(path))[1]
    for step in (1, 2):
        run.save(out, step, keep=2)
    manifest._digest = digest
    for path in (out / "global_step_1", out / "global_step_2"):
        listed = manifest._read(path)
        assert {"shards/rank_0", "shards/rank_1", "actor/weights.pt", "trainer.pt"} <= set(listed)
        assert len(listed) == 7 and manifest.damage(path) is None
    assert 0 < len(hashed) < 2 * 7  # each a share
    assert sorted(name for part in on_all(lambda: hashed) for name in part) == sorted(
        2 * [Path(name).name for name in listed]
    )
    on_first(lambda: (out / "global_step_2" / "shards" / "rank_1").write_text("0" * 1000))
    assert starting_point(out, "auto") == out / "global_step_1"
    with pytest.raises(ValueError, match="shards/rank_1: other bytes than were written"):
        starting_point(out, str(out / "global_step_2"))
    leave()


def _fail_on_one(rank: int, store: Path, out: Path) -> None:
    join(rank, store, LIMIT / 2)
    run = _run()
    run.save(out, 1)
    for failing in range(RANKS):
        for where in ("save", "export"):
            run.engine.fails = where if rank == failing else None
            with pytest.raises(
                OSError, match=r"no space left for checkpoint global_step_2"
            ) as caught:
                run.save(out, 2)
            assert caught.value.errno == errno.ENOSPC
            assert "global_step_1 is untouched" in str(caught.value)
            if rank != failing:
                assert str(caught.value.__cause__).startswith(f"[Errno 28] rank {failing}: ")
            dist.barrier()
            assert names(out) == ["checkpoint_tracker.json", "global_step_1"]
            dist.barrier()  # both have looked before the next one is begun
    run.engine.fails = None
    with pytest.raises(ValueError, match=r"trainer\.out: expected a folder that every rank sees"):
        run.save(out if rank == 0 else out / "of its own", 2)
    run.save(out, 2)
    assert starting_point(out, "auto") == out / "global_step_2"
    leave()


class Odd(Exception):
    """An error that no other process can read."""

    def __reduce__(self) -> str:
        raise TypeError("not to be sent")


def _any_error(rank: int, store: Path) -> None:
    join(rank, store, LIMIT / 2)

    def fail() -> int:
        if rank == 1:
            raise Odd("out of luck")
        return rank

    expected = (Odd, "out of luck") if rank == 1 else (RuntimeError, "rank 1: Odd: out of luck")
    with pytest.raises(expected[0], match=expected[1]):
        on_all(fail)
    assert on_all(lambda: rank) == [0, 1]
    assert on_first(lambda: f"of {rank}") == "of 0"
    leave()


def _one_is_asked(rank: int, store: Path) -> None:
    join(rank, store, LIMIT / 2)
    preemption = Preemption()
    assert not preemption.requested()
    preemption._own = "SIGUSR1" if rank == 1 else None
    assert preemption.requested() and preemption.name == "SIGUSR1"
    leave()


def test_both_write_and_verify(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(_save_and_find, tmp_path / "store", tmp_path / "out")


def test_a_full_disk_of_one(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(_fail_on_one, tmp_path / "store", tmp_path / "out")


def test_an_error_of_one(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(_any_error, tmp_path / "store")


def test_a_request_to_one_is_heard_by_both(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(_one_is_asked, tmp_path / "store")
