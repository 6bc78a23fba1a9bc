"""A patched model on two ranks: its gradients are those of the stock model on the whole batch.

The second rank has more rows, of which one has no label; in the last case all of its rows have
none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import heads
from support.ranks import RANKS, Ranks, join
from torch import Tensor, nn

from roma.integrations.lm_head import patch_lm_head
from roma.testing import tolerance

ZERO = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: make test-deepspeed",
)
# A tied head is in the embedding's unit, never in one of its own.
WRAPS = [
    ("ddp", False),
    ("ddp", True),
    ("fsdp2", False),
    ("fsdp2", True),
    ("fsdp2 own unit", False),
    pytest.param("zero3", False, marks=ZERO),
    pytest.param("zero3", True, marks=ZERO),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    running = Ranks()
    running.run(join, tmp_path_factory.mktemp("ranks") / "store", 60.0)
    yield running
    running.stop()


def _whole(tied: bool, few: bool) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The stock model, the batch of both ranks, and the gradients of its mean loss."""
    model, inputs = heads.model("qwen3", tie_word_embeddings=tied), heads.batch()
    if few:
        inputs["labels"][1:] = -100
    model(**inputs).loss.backward()
    want = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return model, inputs, want


def _wrapped(kind: str, model: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    own = [model.lm_head] if kind == "fsdp2 own unit" else []
    for unit in (*model.model.layers, *own, model):
        fully_shard(unit)
    return model


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {n.removeprefix("module."): w.grad for n, w in model.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def _zero3(model: Any, inputs: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    patch_lm_head(engine.module)  # its weights are elsewhere by now
    assert not model.lm_head.weight.numel()
    engine.backward(RANKS * _loss(engine, inputs, count))
    return {n: safe_get_full_grad(w) for n, w in model.named_parameters()}


def _loss(model: Any, inputs: dict[str, Tensor], count: int) -> Tensor:
    """Of this rank; ranks average their gradients, so that it is multiplied by their number."""
    return model(**inputs, num_items_in_batch=count, fused_lm_head=True).loss


def _rank(rank: int, kind: str, tied: bool, few: bool) -> None:
    model, inputs, want = _whole(tied, few)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    part = slice(0, 1) if rank == 0 else slice(1, 3)
    mine = {name: value[part] for name, value in inputs.items()}
    if kind == "zero3":
        got = _zero3(model, mine, count)
    else:
        wrapped = _wrapped(kind, patch_lm_head(model))
        got = _gradients(wrapped, RANKS * _loss(wrapped, mine, count))
    for name, right in want.items():
        bound = tolerance.few(float(right.abs().max()))
        torch.testing.assert_close(got[name], right, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(("kind", "tied"), WRAPS)
def test_gradients_are_those_of_the_whole_batch(kind, tied, few, ranks):
    ranks.run(_rank, kind, tied, few)
