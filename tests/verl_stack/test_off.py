"""With ROMA off, and where no view row has anything to give, verl's numbers to the last bit."""

from __future__ import annotations

import pytest
import torch
from verl_stack import cases

from roma.integrations.options import RomaOptions

OFF = {
    "no views": {"num_views": 0},
    "no weight": {"lambda_inv": 0.0, "lambda_aux": 0.0},
    # On, but nobody is right, and there is no auxiliary loss: one forward of the clean rows.
    "no pairs": {"accuracy_threshold": 1.5, "lambda_aux": 0.0},
}


@pytest.fixture(scope="module")
def stock():
    """verl's own engine, its batch, and what one step gives."""
    from verl.workers.engine.fsdp import FSDPEngineWithLMHead

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VERL_ENGINE_VENDOR")
        worker = cases.worker()
    assert type(worker.engine) is FSDPEngineWithLMHead
    given = cases.with_old(worker, cases.rows())
    return given, *cases.step(worker, cases.batch(given, micro_batch_size_per_gpu=3))


@pytest.mark.parametrize("name", OFF)
def test_gradients_and_loss_are_verls(worker_of, stock, name):
    given, output, want = stock
    worker = worker_of("plain", RomaOptions(**OFF[name]))
    ours, got = cases.step(worker, cases.batch(given, micro_batch_size_per_gpu=3))
    assert sorted(got) == sorted(want)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert ours["loss"] == output["loss"]
    if name != "no pairs":
        assert sorted(ours["metrics"]) == sorted(output["metrics"])


def test_on_is_another_gradient(worker_of, stock):
    given, _, want = stock
    _, got = cases.step(worker_of(), cases.batch(given, micro_batch_size_per_gpu=3))
    # A merger that feeds no layer of the small model has the gradient 0 in both.
    assert not any(torch.equal(got[key], want[key]) for key in want if want[key].any())


def test_a_pass_without_a_gradient_is_verls(worker_of, stock):
    given, _, _ = stock
    on = cases.scored(worker_of(), given)
    off = cases.scored(worker_of("plain", RomaOptions(num_views=0)), given)
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))


def test_weights_and_gradient_norms_over_steps_of_verls_own_loop(stock):
    """train_mini_batch: two mini-batches, two epochs, AdamW, the scheduler."""
    given, _, _ = stock
    made = {}
    for vendor, options in (("", ""), ("roma", "num_views=0"), ("roma", "num_views=2")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VERL_ENGINE_VENDOR", vendor)
            patch.setenv("ROMA_OPTIONS", options)
            worker = cases.worker(micro_batch_size_per_gpu=3)
        worker.set_loss_fn(cases.loss_of(cases.actor()))
        data = cases.batch(given, total=3, mini_batch_size=3, epochs=2)
        metrics = worker.train_mini_batch(data)["metrics"]
        weights = worker.engine.module.state_dict()
        made[vendor, options] = metrics["grad_norm"], weights, metrics
    norms, weights, _ = made["", ""]
    off_norms, off, _ = made["roma", "num_views=0"]
    on_norms, on, metrics = made["roma", "num_views=2"]
    assert len(norms) == 4 and off_norms == norms
    assert sorted(off) == sorted(weights)
    assert all(torch.equal(off[k].full_tensor(), weights[k].full_tensor()) for k in weights)
    assert not any(a == b for a, b in zip(on_norms, norms, strict=True))
    head = "lm_head.weight"
    assert not torch.equal(on[head].full_tensor(), weights[head].full_tensor())
    # A value for each mini-batch, as the trainer averages them.
    assert len(metrics["roma/penalty_worst"]) == 4
    assert worker.engine.lr_scheduler.last_epoch == 1  # the step that views are drawn with
