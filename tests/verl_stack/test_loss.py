"""The engine's loss against float64: from the log-probs that it scored, and from the model."""

from __future__ import annotations

import pytest
import torch
from verl_stack import cases, oracle
from verl_stack.captured import watch

from roma.integrations.options import RomaOptions
from roma.testing import tolerance

SPLITS = {
    "one micro-batch": {},
    "three": {"micro_batch_size_per_gpu": 2},
    "dynamic": {"use_dynamic_bsz": True, "max_token_len_per_gpu": 60},
}


def prepared(worker, **split):
    """Rows with their old log-probs, and a batch of them."""
    given = cases.with_old(worker, cases.rows())
    return given, cases.batch(given, **split)


def by_row(seen, given, views):
    """Of each row: clean log-probs and gradient, and those of its views by number."""
    found = [{"clean": None, "views": {}} for _ in given]
    for forward in seen:
        for tokens, pixels, *scores in zip(
            forward.rows, forward.pixels, forward.logp, forward.gradient, strict=True
        ):
            (i,) = [i for i, row in enumerate(given) if torch.equal(row["input_ids"], tokens)]
            if found[i]["clean"] is None:  # it comes first; a weak view may have its very pixels
                clean = given[i]["multi_modal_inputs"].get("pixel_values")
                assert pixels is clean is None or torch.equal(pixels, clean)
                found[i]["clean"] = scores
            else:
                same = [torch.equal(own["pixel_values"], pixels) for own in views[i]]
                assert same.count(True) == 1 and same.index(True) not in found[i]["views"]
                found[i]["views"][same.index(True)] = scores
    return found


def differentiated(case, found, sampled, dtype):
    """The oracle's loss, metrics and gradients from the captured log-probs, in `dtype`."""
    clean = [own["clean"][0].to(dtype).requires_grad_() for own in found]
    views = []
    for i, own in enumerate(found):
        seeing = "pixel_values" in case.rows[i]["multi_modal_inputs"]
        # What the engine left out counts as equal to the clean row, without a gradient.
        views.append(
            [
                own["views"][k][0].to(dtype).requires_grad_()
                if k in own["views"]
                else clean[i].detach()
                for k in range(case.options.num_views if seeing else 0)
            ]
        )
    loss, metrics = oracle.total_loss(case, clean, views, sampled)
    leaves = [(i, None, x) for i, x in enumerate(clean)]
    leaves += [(i, k, x) for i, own in enumerate(views) for k, x in enumerate(own)]
    leaves = [leaf for leaf in leaves if leaf[2].requires_grad]
    # A row that the loss does not look at has the gradient 0.
    made = torch.autograd.grad(loss, [x for _, _, x in leaves], allow_unused=True)
    gradients = {
        (i, k): torch.zeros_like(x) if g is None else g
        for (i, k, x), g in zip(leaves, made, strict=True)
    }
    return float(loss), metrics, gradients


def compare(worker, data, given, case, config=None):
    """One step against the oracle at the log-probs that it scored; returns what was needed."""
    with watch(worker.engine) as seen:
        output, _ = cases.step(worker, data, config)
    for forward in seen:  # the wider batch has every setting of verl's
        for name in ("use_remove_padding", "use_fused_kernels", "calculate_entropy", "temperature"):
            assert forward.settings[name] == data[name]
    views, sampled = oracle.drawn(case)
    found = by_row(seen, given, views)
    loss, metrics, want = differentiated(case, found, sampled, torch.float64)
    eager_loss, _, eager = differentiated(case, found, sampled, torch.float32)
    keys = sorted(want, key=str)
    got = torch.cat(
        [(found[i]["clean"] if k is None else found[i]["views"][k])[1] for i, k in keys]
    )
    flat = [torch.cat([own[key] for key in keys]) for own in (want, eager)]
    tolerance.check("gradient", got, *flat, dtype=torch.float32)
    bad = got + tolerance.PLANTED * tolerance.bound(*flat, torch.float32).largest
    assert tolerance.refuses("gradient", bad, *flat, dtype=torch.float32)
    sizes = [abs(loss), abs(eager_loss), *(abs(x) for x in metrics.values())]
    limit = tolerance.few(max(sizes) + sum(float(w.abs().sum()) for w in want.values()))
    assert abs(sum(output["loss"]) - loss) <= limit
    logged = {name: output["metrics"][name].aggregate() for name in metrics}
    for name, value in metrics.items():
        assert abs(logged[name] - value) <= limit, name
    return found, output, limit


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["plain", "packed", "lora", "checkpointing"])
def test_loss_and_gradient_from_the_log_probs_that_it_scored(worker_of, kind, split):
    worker = worker_of(kind)
    given, data = prepared(worker, **SPLITS[split])
    case = oracle.Case(given, RomaOptions())
    found, _, _ = compare(worker, data, given, case)
    # Lean: all views of right rollouts with an image, the sampled one of the others with a gain.
    assert [len(own["views"]) for own in found] == [2, 1, 0, 2, 2, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_verls_fused_head(monkeypatch, packed):
    """Its form in torch; verl puts it into the class of the model, and here it is taken out."""
    from transformers import Qwen3VLForConditionalGeneration as Model

    monkeypatch.setattr(Model, "forward", Model.forward)
    worker = cases.worker(fused=True, remove_padding=packed)
    given, data = prepared(worker, micro_batch_size_per_gpu=3)
    compare(worker, data, given, oracle.Case(given, RomaOptions()))


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("token-mean", {"worst_over": "token"}),
        ("token-mean", {"worst_over": "mean"}),
        ("seq-mean-token-mean", {"penalty_over": "correct"}),
        ("seq-mean-token-mean", {"penalty_ratio": "clean/view"}),
        ("seq-mean-token-sum", {"lambda_inv": 0.0, "lambda_aux": 2.0}),
        ("seq-mean-token-sum-norm", {"lambda_inv": 3.0, "lambda_aux": 0.0}),
        ("token-sum", {"num_views": 3}),
        ("token-mean", {"accuracy_threshold": 1.5}),  # nobody is right
    ],
)
def test_averages_and_options(worker_of, mode, changes):
    options = RomaOptions(**changes)
    worker = worker_of("plain", options)
    given, data = prepared(worker, micro_batch_size_per_gpu=3)
    scale = 7 if mode == "seq-mean-token-sum-norm" else None
    case = oracle.Case(given, options, mode=mode, scale=scale)
    if options.lambda_inv == 0:
        # Then the penalty is logged from the sampled views alone; its own number is not the case's.
        case = oracle.of_options(case, worst_over="sequence")
    config = cases.actor(loss_agg_mode=mode, loss_scale_factor=scale)
    compare(worker, data, given, case, config)


def test_a_clip_range_of_its_own(worker_of):
    options = RomaOptions(clip_low=0.05, clip_high=0.02, dual_clip=1.1)
    worker = worker_of("plain", options)
    given, data = prepared(worker)
    case = oracle.Case(given, options)
    views, sampled = oracle.drawn(case)
    with watch(worker.engine) as seen:
        output, _ = cases.step(worker, data)
    found = by_row(seen, given, views)
    auxiliary = {}
    for name, clip in {"own": (0.05, 0.02, 1.1), "verl's": (0.2, 0.28, 3.0)}.items():
        own = oracle.Case(given, options, clip=clip)
        _, metrics, _ = differentiated(own, found, sampled, torch.float64)
        auxiliary[name] = metrics["roma/aux_loss"]
    got = output["metrics"]["roma/aux_loss"].aggregate()
    limit = tolerance.few(sum(abs(x) for x in cases.ADVANTAGES))
    assert abs(got - auxiliary["own"]) <= limit < abs(got - auxiliary["verl's"]) / tolerance.PLANTED


def test_the_samplers_weight_multiplies_the_auxiliary_loss(worker_of):
    worker = worker_of("plain")
    given = cases.with_old(worker, cases.rows())
    half = [{**row, "rollout_is_weights": torch.full_like(row["advantages"], 0.5)} for row in given]
    plain, _ = cases.step(worker, cases.batch(given))
    weighed, _ = cases.step(worker, cases.batch(half))
    names = ("roma/aux_loss", "roma/penalty_worst")
    before, after = [[out["metrics"][n].aggregate() for n in names] for out in (plain, weighed)]
    assert after[0] == before[0] / 2  # a power of two: exact
    assert after[1] == before[1]


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_weights_gradient_against_transformers_own_model(worker_of, kind, split):
    """Rows one by one, float64, views made from the images: order, pixels, positions, masks."""
    worker = worker_of(kind)
    given, data = prepared(worker, **SPLITS[split])
    _, got = cases.step(worker, data)
    oracle.check_whole(got, oracle.Case(given, RomaOptions()))
