"""The methods' configurations: they load, and a method differs from the demo in itself alone."""

from pathlib import Path

import pytest

from experiments.digits.arms import ARMS, METHODS, methods_of
from roma.train.config import Config, load_config, to_dict
from roma.train.schema import leaves

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = sorted(CONFIGS.glob("qwen25vl_7b_*.yaml"))

ON = {
    # a method -> what it sets, beside the folder of the run
    "mssr": {
        "algorithm.adv_estimator": "mssr",
        "algorithm.view_mode": "none",
        "data.rollout_batch_size": 256,
        "worker.actor.mini_batch_size": 256,
        "worker.rollout.n": 1,
        "trainer.val_batches": 1,
    },
    "srpo": {
        "algorithm.reweight": "srpo",
        "algorithm.view_mode": "none",
        "algorithm.srpo.perception_tag": ["<think>", "so"],
        "algorithm.srpo.reasoning_tag": ["so", "</think>"],
    },
    "vgpo": {"algorithm.reweight": "vgpo", "algorithm.view_mode": "none"},
    "papo": {"algorithm.view_mode": "papo"},
    "noisyrollout": {"algorithm.view_mode": "noisy_rollout"},
    "dvrp": {"algorithm.view_mode": "dvrp"},
}


def of(name: str) -> Config:
    """The configuration of an arm."""
    arm = (ARMS | METHODS)[name]
    return load_config(CONFIGS / arm.file, arm.overrides)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_changes_itself_alone(name: str) -> None:
    demo = dict(leaves(to_dict(load_config(CONFIGS / "demo.yaml"))))
    own = dict(leaves(to_dict(of(name))))
    assert own.keys() == demo.keys()
    changed = {key: value for key, value in own.items() if value != demo[key]}
    changed.pop("trainer.out")
    wanted = dict(ON[name.removesuffix("_roma")])
    if name.endswith("_roma"):
        wanted.pop("algorithm.view_mode")
    assert changed == wanted


@pytest.mark.parametrize("name", METHODS)
def test_every_arm_has_as_many_steps_and_rollouts_a_step(name: str) -> None:
    own, grpo = of(name), of("grpo")
    assert own.trainer.total_steps == grpo.trainer.total_steps
    rollouts = [c.data.rollout_batch_size * c.worker.rollout.n for c in (own, grpo)]
    assert rollouts[0] == rollouts[1]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_published_settings_have_the_method_on(path: Path) -> None:
    """What switches a method on is the same here and on the demo's task."""
    name = path.stem.removeprefix("qwen25vl_7b_")
    found = dict(leaves(to_dict(load_config(path))))
    switches = ("algorithm.adv_estimator", "algorithm.reweight", "algorithm.view_mode")
    for key in switches:
        assert found[key] == dict(leaves(to_dict(of(name))))[key]
    head = path.read_text(encoding="utf-8").partition("\ndata:")[0]
    assert "# Published: " in head and "# Ours: " in head and f"qwen25vl_7b_{name}.yaml" in head


def test_every_method_has_published_settings() -> None:
    assert {path.stem.removeprefix("qwen25vl_7b_") for path in PUBLISHED} == set(ON)


def test_methods_by_name() -> None:
    assert methods_of(["vgpo", "mssr_roma"]) == ["vgpo", "mssr_roma"]
    with pytest.raises(
        ValueError, match=r"methods: expected some of mssr, .* got 'vgpoo'; correct"
    ):
        methods_of(["vgpoo"])
    with pytest.raises(
        ValueError, match="methods: expected each once, got vgpo vgpo; name it once"
    ):
        methods_of(["vgpo", "vgpo"])
