"""What does not fit is one line before the first step."""

import sys
from types import SimpleNamespace

import pytest
from swift_stack.test_loss import VIEWS

from roma.integrations.options import RomaOptions
from roma.integrations.swift import plugin_path, register
from roma.integrations.swift.checks import accuracy_index, check_settings, check_swift

PLAIN = {
    "is_multimodal": True,
    "use_liger_loss": False,
    "use_gym_env": False,
    "chord_sft_iterator": None,
    "loss_type": "grpo",
}


def built(**changed):
    """A trainer with swift's defaults, as `check_settings` looks at it."""
    template = {"padding_free": False, "packing": False, "sequence_parallel_size": 1}
    args = {"multi_turn_scheduler": None, "packing": False}
    template |= {name: changed.pop(name) for name in list(changed) if name in template}
    args |= {name: changed.pop(name) for name in list(changed) if name in args}
    teacher = changed.pop("teacher", False)
    trainer = SimpleNamespace(**(PLAIN | changed), model=object())
    trainer.args, trainer.template = SimpleNamespace(**args), SimpleNamespace(**template)
    trainer._has_teacher_explicit = lambda: teacher
    return trainer


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"padding_free": True}, "padding_free"),
        ({"packing": True}, "packing"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"use_liger_loss": True}, "use_liger_kernel"),
        ({"multi_turn_scheduler": "gym"}, "multi_turn_scheduler"),
        ({"use_gym_env": True}, "use_gym_env"),
        ({"chord_sft_iterator": iter(())}, "chord_sft_dataset"),
        ({"teacher": True}, "teacher_model"),
        ({"loss_type": "real"}, "loss_type"),
        ({"is_multimodal": False}, "model: expected one that takes images"),
    ],
)
def test_settings_that_views_were_not_tested_with(changed, said):
    check_settings(built())
    with pytest.raises(ValueError, match=said) as raised:
        check_settings(built(**changed))
    assert "num_views=0" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_real_run_is_refused_before_its_first_step(run):
    with pytest.raises(ValueError, match="loss_type: expected one of grpo"):
        run(VIEWS, loss_type="fipo")


def test_trajectories_of_several_samples(run, monkeypatch):
    from swift_stack.probe import Ours

    scored = Ours._score_completions

    def split(self, samples):
        self.dynamic_num_samples = True
        return scored(self, samples)

    monkeypatch.setattr(Ours, "_score_completions", split)
    with pytest.raises(ValueError, match="multi-turn scheduler: expected one sample"):
        run(VIEWS)


@pytest.mark.parametrize("text", ["num_view=2", "num_views=9", "lambda_inv=-1", "num_views"])
def test_wrong_options(text, monkeypatch):
    monkeypatch.setenv("ROMA_OPTIONS", text)
    with pytest.raises(ValueError, match=r"ROMA_OPTIONS|num_views|lambda_inv|seen"):
        register()


def test_wrong_names_of_a_reward(run):
    names, given = ["Right", "Length", "some-model"], ["right", "length"]
    assert [accuracy_index(names, given, which) for which in ("length", 0, "some-model")] == [
        1,
        0,
        2,
    ]
    for wanted in ("format", 3, -1, ""):
        with pytest.raises(ValueError, match="accuracy_reward: expected one of the rewards Right"):
            accuracy_index(names, given, wanted)
    with pytest.raises(ValueError, match="accuracy_reward"):
        accuracy_index(["Right", "Right"], [], "Right")
    with pytest.raises(ValueError, match="accuracy_reward"):
        run(VIEWS, configured={"accuracy_reward": "accuracy"})


def test_another_swift(monkeypatch):
    import importlib.metadata

    from swift.rlhf_trainers import grpo_trainer

    check_swift()
    version = importlib.metadata.version

    def newer(name):
        return "4.7.0" if name == "ms-swift" else version(name)

    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", newer)
        with pytest.raises(ValueError, match=r"ms-swift: expected version 4\.6"):
            check_swift()

    def moved(self, model, grpo_batch, model_inputs):
        raise AssertionError

    for name in ("_compute_loss_and_metrics", "_get_per_token_logps_and_entropies"):
        with monkeypatch.context() as patched:
            patched.setattr(grpo_trainer.GRPOTrainer, name, moved)
            with pytest.raises(ValueError, match=f"GRPOTrainer.{name}"):
                check_swift()
    with monkeypatch.context() as patched:
        patched.setattr(grpo_trainer.GRPOTrainer, "old_policy", None)
        with pytest.raises((ValueError, TypeError), match=r"old_policy|callable"):
            check_swift()


def test_megatron_and_unsloth(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "swift.megatron", SimpleNamespace())
        with pytest.raises(ValueError, match=r"swift\.megatron"):
            check_swift()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "unsloth", SimpleNamespace())
        with pytest.raises(ValueError, match="unsloth"):
            check_swift()


def test_register_puts_the_trainer_in_its_place(monkeypatch):
    from swift.trainers import TrainerFactory

    monkeypatch.setitem(TrainerFactory.TRAINER_MAPPING, "grpo", "swift.rlhf_trainers.GRPOTrainer")
    register(RomaOptions(num_views=3), accuracy_reward="right")
    chosen = TrainerFactory.get_trainer_cls(SimpleNamespace(rlhf_type="grpo"))
    assert chosen.__name__ == "RomaGRPOTrainer"
    assert chosen._configured == (RomaOptions(num_views=3), "right", "roma")
    assert plugin_path().is_file()
