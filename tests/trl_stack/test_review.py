"""What a second reading found: another device, empty batches, evaluation in between, tools."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl_stack import small

from roma import RomaConfig
from roma.integrations.trl import RomaGRPOTrainer, fields
from roma.integrations.trl.fields import Alternative, Joined
from roma.integrations.trl.record import Record

FAR = torch.device("cuda", 0)
_TAKES_BOTH = ("__getitem__", "__setitem__", "index_put", "index_put_", "copy_")


def far(x):
    """The tensor, taken for one on another device."""
    x.is_far = True
    return x


def _is_far(x):
    return isinstance(x, torch.Tensor) and getattr(x, "is_far", False)


class TwoDevices(TorchFunctionMode):
    """Within it a tensor is here or far; a function that mixes them fails as CUDA's would."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        goes_far = any(_is_far(x) for x in given)
        if func == torch.Tensor.device.__get__:
            return FAR if goes_far else torch.device("cpu")
        if func == torch.Tensor.is_cuda.__get__:
            return goes_far
        if name == "cpu":
            return func(*args, **kwargs).clone() if goes_far else args[0]
        if name == "numpy" and goes_far:
            raise RuntimeError("two devices: numpy")
        places = [a for a in args[1:] if isinstance(a, (str, torch.device))] if name == "to" else []
        places += [kwargs.pop("device")] if kwargs.get("device") is not None else []
        if name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
            places = [FAR if _is_far(args[1]) else "cpu"]
        if name == "to" or places:
            args = tuple(a for a in args if not isinstance(a, (str, torch.device)))
            made = func(*args, **kwargs) if name != "to" or args[1:] or kwargs else args[0]
            goes_far = torch.device(places[0]).type == "cuda" if places else goes_far
            # Another object where it is now elsewhere.
            return self._placed(made if _is_far(made) == goes_far else made.view_as(made), goes_far)
        if goes_far and name not in (*_TAKES_BOTH, "__get__", "__set__"):
            here = [x for x in given if not _is_far(x) and x.ndim]
            if here:
                raise RuntimeError(f"two devices: {name} with {[list(x.shape) for x in here]}")
        if name in _TAKES_BOTH and not _is_far(args[0]) and goes_far:
            raise RuntimeError(f"two devices: {name}")
        return self._placed(func(*args, **kwargs), goes_far)

    @staticmethod
    def _placed(made, goes_far):
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and goes_far:
                far(x)
        return made


def test_two_devices_notices():
    here, there = torch.ones(2, dtype=torch.bool), far(torch.ones(2, dtype=torch.bool))
    with TwoDevices():
        assert there.device == FAR and here.device.type == "cpu"
        assert not (there.cpu() & here).device.type == "cuda"
        assert (there & here.to(there.device)).device == FAR
        with pytest.raises(RuntimeError, match="two devices"):
            there & here
        with pytest.raises(RuntimeError, match="two devices"):
            here[there.long()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_prompts": True},
        {"view_update": "joint", "penalty_over": "correct", "loss_type": "grpo"},
    ],
    ids=["lean", "shared", "joint"],
)
@pytest.mark.parametrize("own_views", [False, True], ids=["degraded", "view_fn"])
def test_a_loss_on_another_device(folder, tmp_path, monkeypatch, options, own_views):
    """All that TRL has on the accelerator is far; what ROMA adds is brought there, or fetched."""
    given = {"view_fn": lambda row, views, step: [dict(row)] * views} if own_views else {}
    trainer = small.build(
        folder, tmp_path, base=RomaGRPOTrainer, given=given, log_completions=True, **options
    )
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs["roma_correct"] = torch.tensor([True, False, True, True])
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and name not in ("roma_step", "roma_row"):
            inputs[name] = far(value.clone())
    for own in (*trainer.model.parameters(), *trainer.model.buffers()):
        far(own)
    monkeypatch.setattr(type(trainer.accelerator), "device", FAR)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with TwoDevices():
        loss = trainer._compute_loss(trainer.model, inputs)
        assert loss.device == FAR
    assert bool(loss.isfinite())
    assert trainer._metrics["train"]["roma/correct"] == [0.75]


def picture(number):
    return Pillow.fromarray(
        np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_generation_without_an_image(folder, tmp_path, column):
    """None is no image, also where no row of a whole generation has one."""
    pictures = [None, None, picture(0), picture(1)]
    if column == "images":
        pictures = [None if own is None else [own] for own in pictures]
    message = List({"role": Value("string"), "content": Value("string")})
    kind = Image() if column == "image" else List(Image())
    data = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": "say which way"}]] * 4, column: pictures},
        features=Features({"prompt": message, column: kind}),
    )
    trainer = small.run(folder, tmp_path, data=data, shuffle_dataset=False, max_steps=2)
    assert [log["roma/has_views"] for log in trainer.state.log_history[:2]] == [0, 1]


def test_rows_without_images():
    own = [{"prompt": "p", "image": None}] * 2
    assert [row["images"] for row in fields.without_images(own)] == [[], []]
    mixed = [{"prompt": "p", "images": None}, {"prompt": "p", "images": [picture(0)]}]
    assert fields.without_images(mixed) is mixed
    text = [{"prompt": "p"}]
    assert fields.without_images(text) is text


def table(rows):
    """A trainer with a table of that many rows, and our columns in it."""
    extra = defaultdict(lambda: deque(maxlen=rows))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda x: x),
        model=SimpleNamespace(training=True),
        _logs={"extra": extra},
    )
    return trainer, extra


def test_an_evaluation_between_a_generation_and_its_steps():
    """Rollouts of the generation are found again behind rows that an evaluation has put there."""
    trainer, extra = table(8)
    record = Record(trainer, ["jpeg"])
    views = torch.full((1, 4, 2), -1.0)
    out = SimpleNamespace(logp=torch.zeros(4, 2), view_logp=views)
    told = dict(
        mask=torch.ones(4, 2),
        correct=torch.tensor([True] * 4),
        pairs=[(0, row) for row in range(4)],
        names=["jpeg"] * 4,
        config=RomaConfig(main=None),
    )
    record.completions(torch.tensor([True] * 8))
    trainer.model.training = False
    record.completions(torch.tensor([False] * 4))  # the first four of the generation are gone
    trainer.model.training = True
    record.worst(out, torch.tensor([2, 3, 6, 7]), **told)
    assert list(extra["roma/worst_view"]) == [None, None, "jpeg", "jpeg"] + [None] * 4
    trainer.model.training = False
    record.worst(out, torch.arange(4), **told)
    assert list(extra["roma/worst_view"]) == [None, None, "jpeg", "jpeg"] + ["jpeg"] * 4


def test_evaluation_within_a_generation_that_spans_steps(folder, tmp_path):
    trainer = small.run(
        folder,
        tmp_path,
        given={"eval_dataset": small.questions(2)},
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        log_completions=True,
        accuracy_threshold=-1.0,  # all are right
    )
    assert trainer.state.global_step == 2
    names = trainer._logs["extra"]["roma/worst_view"]
    assert len(names) == 8 and all(names)


def test_a_completion_with_an_image_shares_no_prompt(folder, tmp_path):
    """Its positions are not those of text: the log-probs would be other ones."""
    trainer = small.build(folder, tmp_path, share_prompts=True)
    mark = trainer.model.config.image_token_id
    ids = torch.tensor([[4, 8, 9, 10, mark, 11]])
    shown = {"num_images": [1], "image_grid_thw": torch.tensor([[1, 2, 2]])}
    shown["pixel_values"] = torch.zeros(4, 384)
    with pytest.raises(ValueError, match=r"share_prompts.*in a completion.*share_prompts=False"):
        trainer._shared.score(None, Joined(ids, torch.ones_like(ids), shown, 2), ["a"], [])
    with contextlib.suppress(TypeError):  # an image in its prompt is well: on to the forward
        trainer._shared.score(None, Joined(ids, torch.ones_like(ids), shown, 1), ["a"], [])


def weigh(unit: str) -> str:
    """Weighs.

    Args:
        unit: of weight.
    """
    return unit


def test_views_of_prompts_with_tools(folder, tmp_path):
    """A prompt that says which tools there are says so in each of its views."""
    trainer = small.build(folder, tmp_path, given={"view_fn": lambda row, k, step: [row] * k})
    reader = trainer.processing_class
    said = "{% if tools %}say the way {% endif %}"
    reader.chat_template = reader.tokenizer.chat_template = said + reader.chat_template
    trainer.tools = [weigh]
    row = small.questions(1)[0]
    messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
    (want,), _, _ = trainer._tokenize_prompts([messages])
    ((view, _),) = fields.alternatives(trainer, [row], trainer.view_fn, 2, 0)
    assert view.ids.tolist() == list(want)
    trainer.tools = []
    ((bare, _),) = fields.alternatives(trainer, [row], trainer.view_fn, 2, 0)
    assert len(bare.ids) == len(want) - 3


def test_rows_with_arrays_are_asked_for_once(folder, tmp_path):
    asked = []

    def view_fn(row, views, step):
        asked.append(row.get("sound"))
        return [row] * views

    trainer = small.build(folder, tmp_path, given={"view_fn": view_fn})
    asked.clear()  # it is asked for the first row of the data, too
    row = small.questions(1)[0]
    rows = [{**row, "sound": np.arange(n)} for n in (3, 3, 4)]
    rows.append({**row, "sound": torch.arange(4)})
    rows.append({**row, "sound": np.arange(4) + 1})
    made = fields.alternatives(trainer, rows, view_fn, 2, 0)
    assert made[0] is made[1] and made[1] is not made[2] and made[3] is not made[4]
    assert len(asked) == len({id(own) for own in made})


def test_tiles_of_views():
    """InternVL's rows of pixel_values are tiles, of which an image has several."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    clean = {"pixel_values": torch.zeros(5, 3, 2, 2), "num_images": [1, 1], "num_tiles": [2, 3]}
    shown = {"pixel_values": torch.ones(4, 3, 2, 2), "num_images": [1]}
    chosen = [(1, Alternative(torch.tensor([1, 2]), shown))]
    chosen.append((0, Alternative(torch.tensor([2]), {})))
    both = fields.joined(ids, torch.ones_like(ids), 1, clean, chosen, 0).fields
    assert both["num_tiles"] == [2, 3, 4, 0] and both["num_images"] == [1, 1, 1, 0]
    assert len(both["pixel_values"]) == sum(both["num_tiles"])


def test_an_environment_writes_into_prompts_that_a_view_fn_does_not_see(folder, tmp_path):
    given = {"view_fn": lambda row, k, step: None, "environment_factory": object}
    with pytest.raises(ValueError, match="view_fn, environment_factory: expected one of the two"):
        small.build(folder, tmp_path, given=given)


def test_correct_fn_gets_what_a_reward_function_gets(folder, tmp_path):
    seen = []

    def right(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **_):
        log_metric("length", float(len(completion_ids[0])))
        seen.append(trainer_state.global_step)
        return [small.right(own) for own in completion_ids]

    trainer = small.run(folder, tmp_path, given={"correct_fn": right})
    assert seen == [0] and "length" in trainer.state.log_history[0]


def test_no_configuration_is_given_by_place(folder, tmp_path, monkeypatch):
    """As TRL's own signature allows: (model, reward_funcs, None, …)."""
    got = {}

    def init(self, model, reward_funcs=None, args=None, train_dataset=None):
        got.update(args=args, data=train_dataset)
        raise InterruptedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(GRPOTrainer, "__init__", init)
    data = small.questions(1)
    with pytest.raises(InterruptedError):
        RomaGRPOTrainer("a model", [small.form], None, data)
    assert got["args"].num_views == 2 and got["data"] is data
