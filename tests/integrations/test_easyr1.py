"""The view terms inside an update of EasyR1's actor: of a stand-in, and of its own where it is.

Its actor runs on a CPU, but for FSDP, padding-free batches and vLLM: docs/EASYR1.md.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from integrations.recorded import standin
from integrations.recorded.record import record

from roma.integrations.easyr1 import seams
from roma.integrations.easyr1.actor import ViewTerms, maker_for
from roma.integrations.easyr1.launch import _TAKEN
from roma.integrations.options import RomaOptions
from roma.integrations.views import ViewMaker

RECORDED = json.loads((Path(standin.__file__).parent / "easyr1.json").read_text())
_SPEC = importlib.util.find_spec("verl")  # the name of another package too, which has no such file
EASYR1 = (
    bool(_SPEC and _SPEC.origin)
    and Path(_SPEC.origin).with_name("trainer").joinpath("main.py").is_file()
)
OPTIONS = RomaOptions(num_views=2, lambda_inv=1.5, lambda_aux=0.7, view_seed=3)
STEP = 5


def options_with(**changes):
    kept = {"num_views": 2, "lambda_inv": 1.5, "lambda_aux": 0.7, "view_seed": 3}
    return RomaOptions(**{**kept, **changes})


@pytest.fixture(scope="module", params=["stand-in", "EasyR1"])
def stack(request, tmp_path_factory):
    """(actor class, DataProto)."""
    if request.param == "stand-in":
        yield standin.DataParallelPPOActor, standin.DataProto
        return
    if not EASYR1:
        pytest.skip("EasyR1 is not installed: docs/EASYR1.md")
    from verl.protocol import DataProto
    from verl.workers.actor.dp_actor import DataParallelPPOActor

    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield DataParallelPPOActor, DataProto
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model():
    return standin.small_model()


@pytest.fixture(scope="module")
def processor():
    return standin.image_processor()


def config_for(stack, **changes):
    """EasyR1's own configuration, or the stand-in's."""
    if issubclass(stack[0], standin.DataParallelPPOActor):
        return standin.config(**changes)
    from verl.workers.actor import ActorConfig

    made = ActorConfig()
    for name, value in vars(standin.config(**changes)).items():
        assert hasattr(made, name), name
        setattr(made, name, value)
    made.tau_positive, made.tau_negative = 1.0, 1.05
    return made


def actor_for(stack, model, processor, options, **changes):
    config = config_for(stack, **changes)
    config.roma_options = options
    cls = type("RomaActor", (ViewTerms, stack[0]), {})
    actor = cls(config, model, standin.Recorder(model))
    holder = type("Processor", (), {"image_processor": processor})()
    actor.maker = maker_for(config, holder)
    return actor


def data_for(stack, actor, processor, seed=0, **changes):
    tensors, others = standin.batch_for(processor, seed=seed)
    data = stack[1].from_dict({**tensors}, {**others}, meta_info={"temperature": 0.8})
    old = actor.compute_log_prob(data)
    noise = 0.2 * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed))
    tensors = {**tensors, "old_log_probs": old + noise, "ref_log_probs": old, **changes}
    return stack[1].from_dict(
        tensors, {**others}, meta_info={"temperature": 0.8, "roma_step": STEP}
    )


def gradients(actor, data):
    metrics = actor.update_policy(data)
    return actor.actor_optimizer.seen, metrics


def formula(actor, data, options, rows, aggregation):
    """λ_aux·L_aux + λ_inv·L_inv of MATH.md section 2 on some rows of the data: value, gradient."""
    maker = ViewMaker(options, actor.maker_processor)
    batch, own = data.batch, list(data.non_tensor_batch["multi_modal_inputs"])
    counts = [len(row.get("image_grid_thw", [])) for row in own]
    grids = torch.cat([row["image_grid_thw"] for row in own if row])
    pixels = torch.cat([row["pixel_values"] for row in own if row])
    images = maker.read(pixels, grids, counts, step=STEP)
    mask = batch["response_mask"].bool()
    tokens = [
        [t for t, on in zip(*pair, strict=True) if on]
        for pair in zip(batch["responses"].tolist(), mask.tolist(), strict=True)
    ]
    drawn = maker.aux_view(images, tokens)

    def logp(view):
        inputs = []
        for row, clean in enumerate(own):
            made = {**clean}
            if clean and view is not None:
                made["pixel_values"] = maker.pixels(images, [(view, row)])
            inputs.append(made)
        column = np.empty(len(own), dtype=object)
        column[:] = inputs
        named = ("input_ids", "attention_mask", "position_ids", "responses")
        micro = {**{n: batch[n] for n in named}, "multi_modal_inputs": column}
        return super(type(actor), actor)._forward_micro_batch(micro, temperature=0.8)

    clean = logp(None).detach().double()
    views = [logp(k).double() for k in range(options.num_views)]
    right = [bool(batch["roma_correct"][i]) for i in rows]
    total = sum(int(mask[i].sum()) for i in rows)
    auxiliary = penalty = 0.0
    for i in rows:
        if not own[i]:
            continue  # text alone: no view
        on, size = mask[i], int(mask[i].sum())
        means = [(torch.expm1(v[i] - clean[i]) - (v[i] - clean[i]))[on].sum() / size for v in views]
        if batch["roma_correct"][i]:
            penalty = penalty + max(means)
        gain = batch["advantages"][i].double()
        ratio = (views[int(drawn[i])][i] - batch["old_log_probs"][i]).exp()
        low, high = 1 - actor.config.clip_ratio_low, 1 + actor.config.clip_ratio_high
        loss = -torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
        loss = torch.where(gain < 0, loss.minimum(-actor.config.clip_ratio_dual * gain), loss)
        share = total if aggregation == "dapo" else len(rows) * size
        auxiliary = auxiliary + loss[on].sum() / share
    denominator = len(rows) if options.penalty_over == "all" else max(1, sum(right))
    value = options.lambda_aux * auxiliary + options.lambda_inv * penalty / denominator
    grads = torch.autograd.grad(value, actor.actor_optimizer.weights, allow_unused=True)
    blank = zip(grads, actor.actor_optimizer.weights, strict=True)
    return float(value.detach()), torch.cat(
        [(torch.zeros_like(w) if g is None else g).flatten() for g, w in blank]
    )


# Log-probs reach the loss as float32: of some 10 nats, off by 6e-7 at most, 2e-7 rms. The slope of
# a term is then off by twice that, at slopes of some tenths: 1e-6 of the gradient, and less in sum.
BOUND = 3e-6


@pytest.mark.parametrize("size", [8, 2, 1], ids=["whole", "micro 2", "micro 1"])
@pytest.mark.parametrize("mode", ["token", "seq"])
@pytest.mark.parametrize("penalty_over", ["all", "correct"])
def test_the_update_is_theirs_and_the_two_terms(stack, model, processor, size, mode, penalty_over):
    options = options_with(penalty_over=penalty_over)
    changes = {
        "micro_batch_size_per_device_for_update": size,
        "loss_avg_mode": mode,
        "global_batch_size_per_device": 8 if size == 8 else 4,
    }
    on = actor_for(stack, model, processor, options, **changes)
    off = actor_for(stack, model, processor, None, **changes)
    on.maker_processor = processor
    data = data_for(stack, off, processor)
    ours, metrics = gradients(on, data)
    theirs, stock = gradients(off, data)
    minis = [range(8)] if size == 8 else [range(4), range(4, 8)]
    assert len(ours) == len(theirs) == len(minis)
    worst, aggregation = 0.0, {"token": "dapo", "seq": "grpo"}[mode]
    for rows, with_views, without in zip(minis, ours, theirs, strict=True):
        _, wanted = formula(on, data, options, list(rows), aggregation)
        assert wanted.norm() > 1e-2  # the model sees its images
        worst = max(worst, float((with_views - without - wanted).norm() / wanted.norm()))
    assert worst < BOUND
    for name in stock:  # theirs are the same, and there are more
        if "pg_loss" in name:
            np.testing.assert_allclose(metrics[name], stock[name], rtol=1e-6, atol=1e-9)
    assert len(metrics["roma/penalty_worst"]) == len(minis)


def test_the_bound_bites(stack, model, processor):
    on = actor_for(stack, model, processor, OPTIONS)
    on.maker_processor = processor
    off = actor_for(stack, model, processor, None)
    data = data_for(stack, off, processor)
    (ours,), _ = gradients(on, data)
    (theirs,), _ = gradients(off, data)
    for wrong, rows, aggregation in [
        (options_with(lambda_aux=0.701), range(8), "dapo"),
        (options_with(lambda_inv=1.502), range(8), "dapo"),
        (options_with(view_seed=4), range(8), "dapo"),
        (OPTIONS, range(7), "dapo"),
        (OPTIONS, range(8), "grpo"),
    ]:
        _, wanted = formula(on, data, wrong, list(rows), aggregation)
        assert (ours - theirs - wanted).norm() / wanted.norm() > 10 * BOUND


def rank(number, own_classes, store, out):
    """In a process of its own: half of the rows, and what ROMA adds to their gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    stack = standin.DataParallelPPOActor, standin.DataProto
    if own_classes:
        from verl.protocol import DataProto
        from verl.workers.actor.dp_actor import DataParallelPPOActor

        stack = DataParallelPPOActor, DataProto
    model, processor = standin.small_model(), standin.image_processor()
    sizes = {"global_batch_size_per_device": 4, "micro_batch_size_per_device_for_update": 2}
    on = actor_for(stack, model, processor, OPTIONS, **sizes)
    off = actor_for(stack, model, processor, None, **sizes)
    on.world_size = off.world_size = 2
    half = data_for(stack, off, processor).split(4)[number]
    (ours,), metrics = gradients(on, half)
    (theirs,), _ = gradients(off, half)
    torch.save((ours - theirs, metrics), out)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_average_to_one(stack, model, processor, tmp_path):
    """What FSDP does with the gradients of ranks is a mean; of the metrics too."""
    context = torch.multiprocessing.get_context("spawn")
    own = not issubclass(stack[0], standin.DataParallelPPOActor)
    outs = [tmp_path / f"rank {number}" for number in range(2)]
    given = [(number, own, tmp_path / "store", out) for number, out in enumerate(outs)]
    ranks = [context.Process(target=rank, args=args) for args in given]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    shards = [torch.load(out, weights_only=False) for out in outs]
    whole = actor_for(stack, model, processor, OPTIONS)
    whole.maker_processor = processor
    data = data_for(stack, stack[0](config_for(stack), model, None), processor)
    _, wanted = formula(whole, data, OPTIONS, list(range(8)), "dapo")
    mean = (shards[0][0] + shards[1][0]) / 2
    assert (mean - wanted).norm() / wanted.norm() < BOUND
    assert (shards[0][0] - wanted).norm() / wanted.norm() > 0.1  # neither shard alone is
    metrics = whole.update_policy(data)
    names = [name for name in metrics if name.startswith("roma/")]
    assert names == [name for name in shards[0][1] if name.startswith("roma/")]
    for name in names:
        seen = np.mean([np.mean(shard[1][name]) for shard in shards])
        np.testing.assert_allclose(seen, np.mean(metrics[name]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [None, options_with(num_views=0)], ids=["none", "no views"])
def test_switched_off_it_is_theirs_bit_for_bit(stack, model, processor, options):
    mine = actor_for(stack, model, processor, options, micro_batch_size_per_device_for_update=2)
    config = config_for(stack, micro_batch_size_per_device_for_update=2)
    stock = stack[0](config, model, standin.Recorder(model))
    data = data_for(stack, stock, processor)
    ours, metrics = gradients(mine, data)
    theirs, expected = gradients(stock, data)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert metrics.keys() == expected.keys()


def test_log_probs_are_theirs(stack, model, processor):
    mine = actor_for(stack, model, processor, OPTIONS)
    stock = stack[0](config_for(stack), model, None)
    data = data_for(stack, stock, processor)
    assert torch.equal(mine.compute_log_prob(data), stock.compute_log_prob(data))


def test_only_pairs_with_a_gradient_are_run_in_one_forward_each(stack, model, processor):
    calls = []

    class Counted(stack[0]):
        def _forward_micro_batch(self, micro_batch, temperature):
            calls.append(len(micro_batch["input_ids"]))
            return super()._forward_micro_batch(micro_batch, temperature)

    for changes, rows in [
        ({"lambda_aux": 0}, 8 + 2 * 4),  # right: rows 0, 2, 3, 7; row 4 is text alone
        ({"lambda_inv": 0}, 8 + 5),  # an advantage and an image: rows 0, 1, 3, 6, 7
    ]:
        actor = actor_for((Counted, stack[1]), model, processor, options_with(**changes))
        data = data_for(stack, stack[0](config_for(stack), model, None), processor)
        calls.clear()
        actor.update_policy(data)
        assert calls == [rows]
    calls.clear()
    wrong = torch.zeros(8, dtype=torch.bool)
    actor = actor_for(
        (Counted, stack[1]), model, processor, options_with(lambda_aux=0)
    )  # nothing to run, still one forward
    actor.update_policy(
        data_for(stack, stack[0](config_for(stack), model, None), processor, roma_correct=wrong)
    )
    assert calls == [8]


def test_metrics(stack, model, processor):
    """The mean over mini-batches of a step; per corruption over all rows of the update."""
    on = actor_for(stack, model, processor, OPTIONS, micro_batch_size_per_device_for_update=2)
    data = data_for(stack, stack[0](config_for(stack), model, None), processor)
    metrics = on.update_policy(data)
    names = [n for n in metrics if n.startswith("roma/penalty/")]
    assert names and set(names) <= {f"roma/penalty/{c}" for c in OPTIONS.corruptions}
    once = actor_for(stack, model, processor, OPTIONS).update_policy(data)
    for name in metrics:
        if name.startswith("roma/"):
            np.testing.assert_allclose(metrics[name], once[name], rtol=1e-4, atol=1e-7)
    whole = np.mean(metrics["roma/penalty_worst"])
    on.maker_processor = processor
    value, _ = formula(on, data, options_with(lambda_aux=0, lambda_inv=1), list(range(8)), "dapo")
    assert whole == pytest.approx(value, rel=1e-4)


class TestRefusals:
    def test_data_without_correctness(self, stack, model, processor):
        actor = actor_for(stack, model, processor, OPTIONS)
        data = data_for(stack, stack[0](config_for(stack), model, None), processor)
        del data.meta_info["roma_step"]
        with pytest.raises(ValueError, match=r"start the run by `python -m roma\.integrations"):
            actor.update_policy(data)

    def test_videos(self, stack, model, processor):
        actor = actor_for(stack, model, processor, OPTIONS)
        data = data_for(stack, stack[0](config_for(stack), model, None), processor)
        data.non_tensor_batch["multi_modal_inputs"][0] = {"pixel_values_videos": torch.zeros(1)}
        with pytest.raises(
            ValueError, match="expected pixel_values, of images, got pixel_values_v"
        ):
            actor.update_policy(data)

    def test_a_model_without_images(self, stack, model):
        config = config_for(stack)
        config.roma_options = OPTIONS
        with pytest.raises(ValueError, match="the model: expected an image processor"):
            maker_for(config, None)

    def test_another_average(self, stack, processor):
        config = config_for(stack, loss_avg_mode="sqrt")
        config.roma_options = OPTIONS
        holder = type("Processor", (), {"image_processor": processor})()
        with pytest.raises(ValueError, match=r"loss_avg_mode: expected 'token' or 'seq'"):
            maker_for(config, holder)


class TestSeams:
    """What the code relies on is what was recorded; where EasyR1 is, what is recorded is there."""

    @pytest.mark.parametrize(
        ("cls", "named"),
        [
            ("DataParallelPPOActor", seams.ACTOR),
            ("DataProto", seams.PROTO),
            ("FSDPWorker", seams.WORKER),
            ("RayPPOTrainer", seams.TRAINER),
            ("AutoRewardManager", seams.REWARD),
        ],
    )
    def test_parameters(self, cls, named):
        for method, parameters in named.items():
            assert list(parameters) == RECORDED["parameters"][cls][method]

    def test_keys_fields_and_names(self):
        micro = {"responses", "response_mask", "advantages", "old_log_probs", "multi_modal_inputs"}
        assert micro <= set(RECORDED["keys of update_policy"])
        # What tells an update from a scoring pass is a key that only an update keeps.
        assert not {"roma_correct"} & set(RECORDED["keys of compute_log_prob"])
        assert set(vars(standin.config())) <= set(RECORDED["ActorConfig"])
        assert set(_TAKEN) <= set(RECORDED["names of trainer.main"])
        assert "DataParallelPPOActor" in RECORDED["imported inside init_model"]
        assert set(RECORDED["keywords to the actor"]) == set(seams.ACTOR["__init__"])

    def test_the_stand_in_has_the_recorded_parameters(self):
        seams.check_class(standin.DataParallelPPOActor, seams.ACTOR)
        seams.check_class(standin.DataProto, seams.PROTO)

    @pytest.mark.skipif(not EASYR1, reason="EasyR1 is not installed: docs/EASYR1.md")
    def test_the_record_is_of_this_easyr1(self):
        import verl

        assert record(Path(verl.__file__).parents[1]) == RECORDED
