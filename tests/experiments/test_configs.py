"""The methods' configurations: they load, and a method differs from the demo in itself alone."""

import re
from pathlib import Path

import pytest
import yaml

from experiments.digits.arms import ARMS, METHODS, methods_of
from roma.train.config import Config, from_dict, load_config, to_dict
from roma.train.config.schema import leaves, parse_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
METHODS_MD = (ROOT / "docs/METHODS.md").read_text(encoding="utf-8")
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


def _lines() -> list[str]:
    """Each line of the YAML in docs/METHODS.md, which is a configuration by itself."""
    blocks = re.findall(r"```yaml\n(.*?)```", METHODS_MD, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("line", _lines())
def test_a_line_of_the_document_switches_something_on(line: str) -> None:
    tree = {"data": {"train_files": "a"}, "worker": {"actor": {"model_path": "b"}}}
    usual = to_dict(from_dict(tree))
    given = yaml.safe_load(line)
    if given["algorithm"].get("adv_estimator") == "mssr":
        tree["worker"]["rollout"] = {"n": 1}  # type: ignore[dict-item]
    assert to_dict(from_dict(tree | given))["algorithm"] != usual["algorithm"]


def test_the_objectives_of_the_document_are_those_of_the_trainer() -> None:
    table = METHODS_MD.partition("| objective |")[2].partition("\n\n")[0]
    cells = [row.split("|")[2] for row in table.splitlines()[2:]]
    options = [re.findall(r"`(.*?)`", cell)[0] for cell in cells]
    actor = {"model_path": "b", "lora": {"rank": 8}}  # a reference is the model without adapters
    tree = {"data": {"train_files": "a"}, "worker": {"actor": actor}}
    given = [{"algorithm": {"roma": parse_yaml(f"{{{own}}}", own)}} for own in options]
    made = [from_dict(tree | own).algorithm.roma for own in given]
    assert len(made) >= 10 and len({repr(config) for config in made}) == len(made)


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
