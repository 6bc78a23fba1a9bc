"""Two ranks are one process: DDP, ZeRO-2, ZeRO-3 and FSDP2, as accelerate and DeepSpeed do them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import Ranks
from trl_stack import ranks
from trl_stack.ranks import Job

# ‖two ranks − one process‖ / ‖one process‖ over all weights, after three steps of AdamW. Gradients
# are sums of some 10^4 products, which in another order differ by √10^4 · 2^-24 = 6e-6 of their
# size. AdamW moves a weight by lr whatever its gradient's size, so all weights move by 1e-2 of
# their norm: 1e-2 · 6e-6 = 6e-8 if no component cancels. Components smaller than the noise may go
# either way; 1.5e-7 was measured. Planted errors are at 2.7e-3 and 5.6e-3.
CLOSE = 1e-5
METRICS = 1e-4  # of a metric, relative
SEEN = 1e-2  # nats that the worst view is away in some step, so that there is something to compare

NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-trl"
)
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero{n}", marks=NO_DEEPSPEED) for n in (2, 3))]
SHARDED = ["fsdp2", pytest.param("zero3", marks=NO_DEEPSPEED)]
# TRL wants reentrant checkpointing for adapters under ZeRO-3, and the other kind elsewhere.
CHECKPOINTED = {"gradient_checkpointing": True, "beta": 0.1}

Found = dict[str, Any]


@pytest.fixture(scope="module")
def pair() -> Iterator[Callable[[str], Ranks]]:
    """Two processes; new ones for another engine, as each keeps its groups and settings."""
    running, last = Ranks(ranks.LIMIT), ""

    def of(engine: str) -> Ranks:
        nonlocal last
        if engine != last:
            running.stop()
        last = engine
        return running

    yield of
    running.stop()


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], Found]:
    """What one process makes of a job."""
    known: dict[str, Found] = {}

    def of(job: Job) -> Found:
        plain = replace(job, engine="ddp", plant=None)
        if repr(plain) not in known:
            out = tmp_path_factory.mktemp("one")
            known[repr(plain)] = ranks.trained(ranks.build(folder, out, plain), plain)
        return known[repr(plain)]

    return of


def two(pair: Callable[[str], Ranks], folder: Path, out: Path, job: Job) -> Found:
    """What two ranks make of it."""
    pair(job.engine).run(ranks.on_a_rank, out / "store", folder, job)
    found: Found = torch.load(out / "rank.pt", weights_only=False)
    return found


def distance(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """‖found − want‖ / ‖want‖ of all weights together."""
    assert found.keys() == want.keys()
    off = torch.stack([(found[n] - w).double().norm() for n, w in want.items()]).norm()
    return float(off / torch.stack([w.double().norm() for w in want.values()]).norm())


def lines(found: Found) -> list[dict[str, float]]:
    """Metrics of the steps that the ranks must agree on."""
    kept = ("roma/", "loss", "grad_norm", "reward", "kl")
    log = [entry for entry in found["log"] if "loss" in entry]
    return [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in log]


def equal(found: Found, want: Found, steps: int = 3) -> None:
    """Weights and metrics agree, and there was something to agree on."""
    moved = distance(want["weights"], want["begun"])
    assert moved > 50 * CLOSE, f"weights moved by {moved:.1e} alone"
    off = distance(found["weights"], want["weights"])
    print(f"distance {off:.1e}, moved {moved:.1e}")
    assert off <= CLOSE, f"{off:.1e}"
    pairs = list(zip(lines(found), lines(want), strict=True))
    assert len(pairs) == steps
    for got, line in pairs:
        assert got.keys() == line.keys()
        wrong = {k: (v, line[k]) for k, v in got.items() if v != _close(line[k])}
        assert not wrong, wrong


def _close(value: float) -> Any:
    # A clip fraction, a penalty near zero: absolute noise of fp32.
    return pytest.approx(value, rel=METRICS, abs=1e-6)


def seen(found: Found) -> float:
    """The largest penalty of a step, in nats."""
    return max(line["roma/penalty_worst"] for line in lines(found))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, scope="module")
def test_two_ranks_are_one_process(pair, one, folder, tmp_path, engine) -> None:
    job = Job(engine)
    want = one(job)
    assert seen(want) >= SEEN
    equal(two(pair, folder, tmp_path, job), want)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, scope="module")
def test_adapters_with_checkpointing(pair, one, folder, tmp_path, engine) -> None:
    """The reference is the model without its adapters, on clean images."""
    job = Job(engine, lora=True, options={**CHECKPOINTED, "learning_rate": 1e-2})
    want = one(job)
    assert seen(want) >= SEEN and all(line["kl"] > 0 for line in lines(want))
    found = two(pair, folder, tmp_path, job)
    equal(found, want)
    still = [n for n, w in want["weights"].items() if torch.equal(w, want["begun"][n])]
    assert all("lora_" not in name for name in still)
    assert all(torch.equal(found["weights"][name], want["weights"][name]) for name in still)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, scope="module")
def test_a_rank_with_nothing_to_look_at_twice(pair, one, folder, tmp_path, engine) -> None:
    """The first rank has no right rollout and no advantage: none of its views is run."""
    job = Job(engine, right="last_rank", options={"penalty_over": "correct"})
    want = one(job)
    assert seen(want) >= SEEN
    equal(two(pair, folder, tmp_path, job), want)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, scope="module")
def test_shared_prompts(pair, one, folder, tmp_path, engine) -> None:
    options = {"share_prompts": True, "gradient_checkpointing": True}
    want = one(Job())  # of a row for each rollout
    equal(two(pair, folder, tmp_path, Job(engine, options=options)), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2, "loss_type": "grpo", "penalty_over": "correct"},
        {"steps_per_generation": 4, "loss_type": "grpo", "penalty_over": "correct"},
        {"penalty_over": "correct", "loss_type": "dr_grpo", "view_update": "joint"},
    ],
    ids=["num_iterations", "steps_per_generation", "joint"],
)
@pytest.mark.parametrize("engine", ["ddp"], scope="module")
def test_other_options(pair, one, folder, tmp_path, engine, options) -> None:
    job = Job(engine, options=options)
    equal(two(pair, folder, tmp_path, job), one(job))


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["unscaled", "own_views"])
@pytest.mark.parametrize("engine", ["ddp"], scope="module")
def test_an_error_is_found(pair, one, folder, tmp_path, engine, plant) -> None:
    """One that a rank can make: the bound is passed a hundred times over."""
    job = Job(engine, plant=plant)
    found, want = two(pair, folder, tmp_path, job), one(job)
    off = distance(found["weights"], want["weights"])
    print(f"{plant}: {off:.1e}")
    assert off > 100 * CLOSE
    with pytest.raises(AssertionError):
        equal(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["every_other", "first_rank"])
@pytest.mark.parametrize("engine", ["ddp"], scope="module")
def test_text_alone_beside_images(pair, one, folder, tmp_path, engine, text) -> None:
    """Under DDP, a whole rank of text alone too."""
    job = Job(engine, text=text)
    want = one(job)
    assert lines(want)[0]["roma/has_views"] == 0.5
    equal(two(pair, folder, tmp_path, job), want)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[1:], scope="module")
def test_text_alone_is_refused_where_ranks_would_wait(pair, folder, tmp_path, engine) -> None:
    """The first rank has text alone, the second images: TRL hangs, or gloo ends it."""
    job, told = Job(engine, text="first_rank"), r"4 or more on 1 of 2 ranks"
    pair(engine).run(ranks.refused_on_a_rank, tmp_path / "store", folder, job, told)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED, scope="module")
def test_text_alone_everywhere(pair, one, folder, tmp_path, engine) -> None:
    """A generation without images has no views, and nobody waits."""
    job = Job(engine, text="all")
    want = one(job)
    assert seen(want) == 0
    equal(two(pair, folder, tmp_path, job), want)


@pytest.mark.slow
@pytest.mark.parametrize("engine", SHARDED, scope="module")
def test_text_alone_in_each_micro_batch(pair, one, folder, tmp_path, engine) -> None:
    """Fewer than a micro-batch has: each has an image, and is taken."""
    options = {"num_generations": 2}
    job = Job(engine, text="one_in_four", options=options)
    equal(two(pair, folder, tmp_path, job), one(job))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, scope="module")
def test_a_resumed_run_goes_on_as_it_would_have(pair, one, folder, tmp_path, engine) -> None:
    """Two of four steps, and on from the files of both ranks."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    job = Job(engine, options=options)
    through = two(pair, folder, tmp_path, job)
    start = str(tmp_path / "out" / "checkpoint-2")
    again = two(pair, folder, tmp_path, replace(job, resume=start))
    off = distance(again["weights"], through["weights"])
    print(f"resumed {off:.1e}")
    assert off == 0
    equal(through, one(job), 4)
    assert lines(again) == lines(through)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[2:3], scope="module")
def test_text_alone_is_taken_where_nobody_waits(pair, one, folder, tmp_path, engine) -> None:
    """ZeRO-2 shards no weight, and reduces gradients of adapters alone: none is in the tower."""
    job = Job(engine, lora=True, text="first_rank", options={"learning_rate": 1e-2})
    equal(two(pair, folder, tmp_path, job), one(job))
