"""The trainer under every engine: two ranks are one process, and go on as others began.

`make test-deepspeed` runs those of DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import method_ranks, small_model
from support.engine_run import as_questions, run_config, trainer_of, weights
from support.ranks import RANKS, Ranks, join, leave
from support.small_run import config

from roma.models.qwen_vl import Policy
from roma.train.config import Config
from roma.train.trainer import Trainer

# ‖two ranks − one process‖ / ‖one process‖ over all weights after five steps; 2.6e-8 was
# measured.
CLOSE = 1e-5
LIMIT = 300.0
TIMES = ("timing_s", "perf")
# What one process is asked beside five plain steps.
OTHERS = {
    "minis": (
        "trainer.total_steps=2",
        "worker.actor.mini_batch_size=2",
        "worker.actor.ppo_epochs=2",
        "algorithm.views.candidates=3",
    ),
    "moved": (
        "trainer.total_steps=2",
        "algorithm.control.target=gradient_share",
        "algorithm.control.value=0.9",
        "algorithm.views.gate_quantile=0.7",
    ),
    "contrast": (
        "trainer.total_steps=2",
        "algorithm.view_mode=dvrp",
        "algorithm.dvrp.noised_coef=1",
        "algorithm.dvrp.masked_coef=1",
    ),
    "attacked": (
        "trainer.total_steps=1",
        "algorithm.views.attack.count=1",
        "algorithm.views.max_level=4",
    ),
    "searched": (
        "trainer.total_steps=1",
        "algorithm.views.target_divergence=1e-5",
        "algorithm.views.max_level=5",
    ),
    "half": ("trainer.total_steps=2", "trainer.dtype=bfloat16"),
}
# bfloat16 rounds by 2^-9 a product, and a norm is of many; a rank's own normalisers double it.
HALF = 0.05

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
    others = {
        name: _run(run_config(folder / name, *options))[1] for name, options in OTHERS.items()
    }
    torch.save((weights(trainer), metrics, others, small_model.folder()), folder / "one.pt")
    return folder


def _run(chosen: Config) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = trainer_of(chosen)
    found: list[dict[str, float]] = []
    trainer.fit(lambda _, metrics: found.append(dict(metrics)))
    return trainer, found


def distance(found: dict[str, Any], want: dict[str, Any]) -> float:
    """‖found − want‖ / ‖want‖ of all weights together."""
    assert found.keys() == want.keys()
    off = torch.stack([(found[n] - w).double().norm() for n, w in want.items()]).norm()
    return float(off / torch.stack([w.double().norm() for w in want.values()]).norm())


def _start(rank: int, store: Path, folder: Path) -> tuple[Any, ...]:
    """Joins, and gives what one process made of it: weights, metrics, metrics of the others."""
    join(rank, store, LIMIT / 4)
    *found, root = torch.load(folder / "one.pt", weights_only=False)
    small_model.folder = lambda: root
    return tuple(found)


def _equal(mine: list[dict[str, float]], one: list[dict[str, float]], rel: float) -> None:
    assert len(mine) == len(one) > 0
    for pair in zip(mine, one, strict=True):
        timeless = [{k: v for k, v in x.items() if k.split("/")[0] not in TIMES} for x in pair]
        assert timeless[0].keys() == timeless[1].keys()
        off = {
            name: (value, timeless[1][name])
            for name, value in timeless[0].items()
            if value != pytest.approx(timeless[1][name], rel=rel, abs=1e-6)
        }
        assert not off, off


def _named(folder: Path, engine: str) -> list[str]:
    """The keys of an engine; zero3 shards every weight, however small."""
    if engine != "zero3":
        return [f"trainer.engine={engine}"]
    options = folder / "deepspeed.json"
    zero = {"stage3_param_persistence_threshold": 0}
    options.write_text(json.dumps({"zero_optimization": zero}))
    return ["trainer.engine=zero3", f"trainer.deepspeed_config={options}"]


def _five_steps(rank: int, store: Path, folder: Path, engine: str) -> None:
    want, lines, others = _start(rank, store, folder)
    out, named = folder / engine, _named(folder, engine)
    trainer, metrics = _run(run_config(out, *named, "trainer.save_freq=3"))
    whole = weights(trainer)
    off = distance(whole, want)
    assert off <= CLOSE, f"{engine}: {off:.1e}"
    if rank == 0:
        assert len(metrics) == 5
        _equal(metrics, lines, 1e-4)
    for name, options in OTHERS.items():
        _, found = _run(run_config(folder / f"{engine}-{name}", *named, *options))
        if rank == 0:
            if name != "half":
                _equal(found, others[name], 1e-3)
            norms = [[x["actor/grad_norm"] for x in lines] for lines in (found, others[name])]
            assert norms[0] == pytest.approx(norms[1], rel=HALF), name
    # From its own third step it is the same to the bit; from that of one process it is close.
    for begun, bound in ((engine, 0.0), ("one", CLOSE)):
        start = f"trainer.resume={folder / begun / 'global_step_3'}"
        resumed, _ = _run(run_config(folder / f"{engine}-from-{begun}", *named, start))
        off = distance(weights(resumed), whole)
        assert off <= bound, f"{engine} from {begun}: {off:.1e}"
    leave()


def _sampled(rank: int, store: Path, folder: Path, engine: str) -> None:
    """Two steps of the policy's own rollouts, with adapters, checkpointed, and a validation."""
    _start(rank, store, folder)
    chosen = config(
        folder / f"{engine}-sampled",
        *_named(folder, engine),
        "worker.actor.lora.rank=4",
        "worker.actor.gradient_checkpointing=true",
        "algorithm.roma.ref_coef=0.1",
        "trainer.val_freq=2",
        "trainer.val_batches=1",
    )
    trainer = Trainer(chosen)
    as_questions(trainer)  # the first rank has text alone
    sample, seeds = trainer.collector.sampler.sample, []

    def recorded(*given: Any, **options: Any) -> Any:
        seeds.append(options["seed"])
        return sample(*given, **options)

    trainer.collector.sampler.sample = recorded  # type: ignore[method-assign]
    before = {name: trainer.engine.whole(w).clone() for name, w in trainer.engine.trained.items()}
    found: list[dict[str, float]] = []
    path = trainer.fit(lambda _, metrics: found.append(dict(metrics)))
    moved = [
        name for name, w in trainer.engine.trained.items()
        if not torch.equal(trainer.engine.whole(w), before[name])
    ]  # fmt: skip
    told: list[Any] = [None] * RANKS
    dist.all_gather_object(told, seeds[:2])  # of the two steps; the third is the validation's
    assert not set(told[0]) & set(told[1])
    assert all("lora_" in name for name in before) and len(moved) > 0.9 * len(before)
    if rank == 0:
        assert found[0]["actor/ref_kl"] == 0 < found[1]["actor/ref_kl"]
        assert (path / "actor" / "adapter" / "adapter_config.json").is_file()
        merged = Policy.load(path / "actor")
        assert not merged.has_adapters
    resumed = Trainer(replace(chosen, trainer=replace(chosen.trainer, total_steps=3)))
    as_questions(resumed)
    assert resumed.step == 2 and resumed.engine.version == 2
    for name, weight in trainer.engine.trained.items():
        again = resumed.engine.whole(resumed.engine.trained[name])
        assert torch.equal(again, trainer.engine.whole(weight))
    resumed.fit()
    # Not on another base, such as its own merged export.
    other = replace(chosen.worker.actor, model_path=str(path / "actor"))
    moved = replace(chosen, worker=replace(chosen.worker, actor=other))
    start = replace(chosen.trainer, resume=str(path), total_steps=3)
    with pytest.raises(ValueError, match="adapters"):
        Trainer(replace(moved, trainer=start))
    leave()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_are_one_process(ranks: Ranks, folder: Path, tmp_path: Path, engine: str) -> None:
    if engine.startswith("zero"):  # DeepSpeed keeps the groups of a process
        ranks.stop()
    ranks.run(_five_steps, tmp_path / "store", folder, engine)
    # One process goes on from the files of two ranks.
    start = f"trainer.resume={folder / engine / 'global_step_3'}"
    resumed, _ = _run(run_config(tmp_path / "alone", start))
    want, *_ = torch.load(folder / "one.pt", weights_only=False)
    assert distance(weights(resumed), want) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_train_on_their_own_rollouts(
    ranks: Ranks, folder: Path, tmp_path: Path, engine: str
) -> None:
    if engine.startswith("zero"):
        ranks.stop()
    ranks.run(_sampled, tmp_path / "store", folder, engine)


def _methods(rank: int, store: Path, folder: Path) -> None:
    join(rank, store, LIMIT / 4)
    one, root = torch.load(folder / "methods.pt", weights_only=False)
    small_model.folder = lambda: root
    for name, want in one.items():
        found = method_ranks.run(folder / "fsdp2", name, "trainer.engine=fsdp2")
        method_ranks.check(found, want, rank=rank)
    leave()


@pytest.mark.slow
def test_methods_are_those_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    """Of MSSR, SRPO, VGPO and NoisyRollout: advantages, metrics, and what a checkpoint keeps."""
    one = {name: method_ranks.run(tmp_path / "one", name) for name in method_ranks.METHODS}
    torch.save((one, small_model.folder()), tmp_path / "methods.pt")
    ranks.run(_methods, tmp_path / "store", tmp_path)
