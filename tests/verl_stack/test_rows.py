"""What the engine reads from a micro-batch: who is right, the older trainer's form, added rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from verl_stack import cases, oracle

from roma.integrations.options import RomaOptions
from roma.testing import tolerance

RIGHT = [True, False, True, True, True, False]  # rows of cases.SCORES above a half
WITH_IMAGE = [True, True, False, True, True, True]


def infos(given, values):
    """Rows whose reward functions returned these."""
    return [
        {**row, "extra_fields": {"reward_extra_info": info}}
        for row, info in zip(given, values, strict=True)
    ]


@pytest.fixture(scope="module")
def given(worker_of):
    return cases.with_old(worker_of(), cases.rows())


def test_right_is_above_the_threshold(given):
    from roma.integrations.verl.micro_batch import correct_of, right_of

    data = cases.batch(given)
    assert correct_of(data, RomaOptions()).tolist() == RIGHT
    both = [a and b for a, b in zip(RIGHT, WITH_IMAGE, strict=True)]
    assert right_of(data, RomaOptions()).tolist() == both
    values = [0.2, 0.9, 0.5, 1.0, -1.0, float("nan")]
    data = cases.batch(infos(given, [{"score": 9.0, "acc": v} for v in values]))
    assert correct_of(data, RomaOptions()).tolist() == [False, True, False, True, False, False]
    assert correct_of(data, RomaOptions(accuracy_threshold=0.1)).tolist()[0]


def test_other_places_of_the_accuracy(given):
    from verl.utils import tensordict_utils as tu

    from roma.integrations.verl.micro_batch import correct_of

    named = cases.batch(infos(given, [{"accuracy": float(v)} for v in RIGHT]))
    assert correct_of(named, RomaOptions()).tolist() == RIGHT
    # A column of the batch, of either kind, comes first.
    data = cases.batch(infos(given, [{"acc": 0.0}] * 6))
    tu.assign_non_tensor_stack(data, "acc", [np.float64(v) for v in RIGHT])
    assert correct_of(data, RomaOptions()).tolist() == RIGHT
    data = cases.batch(given)
    data["acc"] = torch.tensor(RIGHT).float()
    assert correct_of(data, RomaOptions()).tolist() == RIGHT


def test_the_examples_reward_names_its_accuracy(given):
    from runpy import run_path

    from roma.integrations.verl.micro_batch import correct_of

    compute = run_path("examples/verl/reward.py")["compute_score"]
    texts = [r"<think> 3 + 5 </think> \boxed{8}", r"\boxed{8}", "<think> </think> 8"] * 2
    values = [compute("digits", text, "8") for text in texts]
    assert values[1]["score"] == 0.9  # right, without the tags
    data = cases.batch(infos(given, values))
    assert correct_of(data, RomaOptions()).tolist() == [True, True, False] * 2


@pytest.mark.parametrize("info", [{"score": 1.0, "format": 1.0}, {}, None])
def test_a_score_is_not_taken_for_an_accuracy(worker_of, given, info):
    data = cases.batch(infos(given, [info] * 6))
    with pytest.raises(ValueError, match=r"accuracy of a rollout: expected 'acc' .* return \{'sco"):
        cases.step(worker_of(), data)


def test_a_row_that_fills_a_batch_adds_nothing(worker_of, given):
    """verl's trainer copies a row and masks all of it; it counts in the step's sequences alone."""
    empty = {name: given[0][name] * 0 for name in ("response_mask", "loss_mask", "advantages")}
    data = cases.batch([*given, {**given[0], **empty}], micro_batch_size_per_gpu=7)
    _, got = cases.step(worker_of(), data)
    oracle.check_whole(got, oracle.Case(given, RomaOptions(), total=7))


def test_views_do_not_depend_on_the_micro_batch(worker_of, given, monkeypatch):
    from roma.integrations.views import ViewMaker

    made = {}
    stock = ViewMaker.pixels

    def pixels(self, rows, pairs):
        out = stock(self, rows, pairs)
        sizes = [sum(im.shape[0] * im.shape[1] for im in rows.images[b]) // 64 for _, b in pairs]
        for (view, row), own in zip(pairs, out.split(sizes), strict=True):
            made.setdefault((rows.keys[row], view), []).append(own)
        return out

    monkeypatch.setattr(ViewMaker, "pixels", pixels)
    for size in (6, 3, 1):
        cases.step(worker_of(), cases.batch(given, micro_batch_size_per_gpu=size))
    assert len(made) == 7  # rows 0 and 1 share their images, and 1 and 5 have but one view
    for same in made.values():
        assert len(same) >= 3 and all(torch.equal(same[0], other) for other in same)


def test_the_older_trainers_form(worker_of, given):
    """Padded on the left and right, the reward's extra information as columns: same numbers."""
    from verl import DataProto
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    def right(key, width):
        return torch.stack(
            [torch.nn.functional.pad(row[key], (0, width - len(row[key]))) for row in given]
        )

    prompt = max(len(row["prompts"]) for row in given)
    answer = max(len(row["responses"]) for row in given)
    ids, positions, attention, prompts = [], [], [], []
    for row in given:
        before = prompt - len(row["prompts"])
        around = (before, answer - len(row["responses"]))
        pad = torch.nn.functional.pad
        ids.append(pad(row["input_ids"], around))
        positions.append(pad(row["position_ids"], around))
        attention.append(pad(torch.ones_like(row["input_ids"]), around))
        prompts.append(pad(row["prompts"], (before, 0)))
    tensors = {
        "input_ids": torch.stack(ids),
        "position_ids": torch.stack(positions),
        "attention_mask": torch.stack(attention),
        "prompts": torch.stack(prompts),
        **{
            key: right(key, answer)
            for key in ("responses", "response_mask", "advantages", "old_log_probs")
        },
    }
    columns = {
        "multi_modal_inputs": np.array([row["multi_modal_inputs"] for row in given], dtype=object),
        "acc": np.array(cases.SCORES),
    }
    data = DataProto.from_dict(tensors=tensors, non_tensors=columns).to_tensordict()
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(data, temperature=1.0, global_batch_size=6, calculate_entropy=False)
    worker = worker_of()
    old, got = cases.step(worker, data)
    oracle.check_whole(got, oracle.Case(given, RomaOptions()))
    new, _ = cases.step(worker, cases.batch(given))
    name = "roma/aux_clipfrac"  # a share of tokens: the same views were sampled
    assert old["metrics"][name].aggregate() == new["metrics"][name].aggregate()


def test_narrow_keeps_the_graph_of_the_clean_rows():
    from roma.integrations.verl.micro_batch import narrow

    values = torch.arange(6.0).requires_grad_()
    nested = torch.nested.nested_tensor_from_jagged(values * 1, torch.tensor([0, 2, 3, 6]))
    made = narrow({"log_probs": nested}, 2)["log_probs"]
    assert [own.tolist() for own in made.unbind()] == [[0.0, 1.0], [2.0]]
    made.values().sum().backward()
    assert values.grad.tolist() == [1, 1, 1, 0, 0, 0]


def test_entropy_is_of_the_clean_rows(worker_of, given):
    config = cases.actor(entropy_coeff=0.01)
    made = {}
    for views in (0, 2):
        worker = worker_of("plain", RomaOptions(num_views=views))
        data = cases.batch(given, calculate_entropy=True, micro_batch_size_per_gpu=3)
        output, _ = cases.step(worker, data, config)
        made[views] = output["metrics"]["actor/entropy_loss"].aggregate()
    # Other sums of products in the wider forward: roundings at the size of a logit, up to 30.
    assert 0 < abs(made[0]) and abs(made[2] - made[0]) <= tolerance.few(30.0)


def test_aggregation_modes_are_all_known():
    """verl's ActorConfig lists its modes in its own check."""
    from roma.integrations.verl.objective import _AGGREGATIONS

    for mode in _AGGREGATIONS:
        assert cases.actor(loss_agg_mode=mode).loss_agg_mode == mode
