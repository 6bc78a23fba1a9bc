"""The trainer under every engine: two ranks are one process, and go on as others began.

`make test-deepspeed` runs those of DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import small_model
from support.engine_run import run_config, trainer_of, weights
from support.ranks import RANKS, Ranks

from roma.train.config import Config
from roma.train.trainer import Trainer

# ‖two ranks − one process‖ / ‖one process‖ over all weights after five steps; 4e-7 was measured.
CLOSE = 1e-5
LIMIT = 300.0
TIMES = ("timing_s", "perf")

NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: make test-deepspeed",
)
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero{n}", marks=NO_DEEPSPEED) for n in (1, 2, 3))]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One pair of processes for all engines."""
    running = Ranks(LIMIT)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it: one.pt."""
    folder = tmp_path_factory.mktemp("engines")
    trainer, metrics = _run(run_config(folder / "one", "trainer.save_freq=3"))
    torch.save((weights(trainer), metrics, small_model.folder()), folder / "one.pt")
    return folder


def _run(chosen: Config) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = trainer_of(chosen)
    found: list[dict[str, float]] = []
    trainer.fit(lambda _, metrics: found.append(dict(metrics)))
    return trainer, found


def _join(rank: int, store: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=LIMIT / 4),
    )  # fmt: skip


def _leave() -> None:
    dist.barrier()
    dist.destroy_process_group()


def distance(found: dict[str, Any], want: dict[str, Any]) -> float:
    """‖found − want‖ / ‖want‖ of all weights together."""
    assert found.keys() == want.keys()
    off = torch.stack([(found[n] - w).double().norm() for n, w in want.items()]).norm()
    return float(off / torch.stack([w.double().norm() for w in want.values()]).norm())


def _five_steps(rank: int, store: Path, folder: Path, engine: str) -> None:
    _join(rank, store)
    want, lines, root = torch.load(folder / "one.pt", weights_only=False)
    small_model.folder = lambda: root
    out = folder / engine
    trainer, metrics = _run(run_config(out, f"trainer.engine={engine}"))
    off = distance(weights(trainer), want)
    assert off <= CLOSE, f"{engine}: {off:.1e}"
    if rank == 0:
        assert len(metrics) == len(lines) == 5
        for mine, one in zip(metrics, lines, strict=True):
            timeless = [
                {k: v for k, v in x.items() if k.split("/")[0] not in TIMES} for x in (mine, one)
            ]
            assert timeless[0] == pytest.approx(timeless[1], rel=1e-4, abs=1e-6)
    _leave()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_are_one_process(ranks: Ranks, folder: Path, tmp_path: Path, engine: str) -> None:
    if engine.startswith("zero"):  # DeepSpeed keeps the groups of a process
        ranks.stop()
    ranks.run(_five_steps, tmp_path / "store", folder, engine)
