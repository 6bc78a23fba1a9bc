"""The command, through EasyR1's own trainer, Ray and worker, on a CPU; needs EasyR1.

What is stood in for: recorded/cpu_worker.py. How it is run: docs/EASYR1.md.
"""

import json
import math

import pytest
from integrations.test_easyr1 import EASYR1

from roma.integrations.easyr1 import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EASYR1, reason="EasyR1 is not installed: docs/EASYR1.md"),
]

REWARD = """
def main(inputs):
    scores = []
    for one in inputs:
        right = float(int(one["response"].split()[0]) % 2)
        scores.append({"overall": 0.9 * right + 0.1, "format": 1.0, "accuracy": right})
    return scores
"""


@pytest.fixture  # one a run: EasyR1 names its placement groups, and they outlive a run
def cluster():
    ray = pytest.importorskip("ray")
    from integrations.recorded import cpu_worker

    cpu_worker.install()
    ray.init(
        num_cpus=5,  # as many processes start at once, and each imports torch
        num_gpus=1,  # a number to EasyR1; nothing looks for a card
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": "integrations.recorded.cpu_worker.install"},
    )
    yield ray
    ray.shutdown()


def run(folder, monkeypatch, *arguments):
    """The metrics of each step."""
    (folder / "reward.py").write_text(REWARD)
    monkeypatch.setattr("sys.argv", ["roma"])
    launch.main(
        [
            "data.rollout_batch_size=4",
            "data.max_response_length=6",
            "data.max_prompt_length=24",
            "data.min_pixels=null",
            "data.max_pixels=null",
            "algorithm.disable_kl=true",
            f"worker.reward.reward_function={folder / 'reward.py'}",
            "worker.rollout.n=2",
            "worker.rollout.val_override_config.n=1",
            "worker.rollout.tensor_parallel_size=1",
            "worker.actor.global_batch_size=4",
            "worker.actor.micro_batch_size_per_device_for_update=4",
            "worker.actor.micro_batch_size_per_device_for_experience=4",
            "worker.actor.padding_free=false",
            "worker.actor.dynamic_batching=false",
            "worker.actor.use_torch_compile=false",
            "trainer.max_steps=2",
            "trainer.n_gpus_per_node=1",
            "trainer.val_before_train=false",
            "trainer.logger=[file]",
            f"trainer.save_checkpoint_path={folder / 'out'}",
            *arguments,
        ]
    )
    lines = (folder / "out" / "experiment_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def flat(tree, head=""):
    for name, value in tree.items():
        path = f"{head}/{name}" if head else name
        yield from flat(value, path) if isinstance(value, dict) else [(path, value)]


@pytest.mark.parametrize("filtering", [False, True], ids=["plain", "online filtering"])
def test_a_run(cluster, tmp_path, monkeypatch, filtering):
    arguments = ["roma.num_views=2", "roma.lambda_inv=2"]
    if filtering:
        arguments += ["algorithm.online_filtering=true", "algorithm.filter_key=accuracy"]
    steps = [dict(flat(line)) for line in run(tmp_path, monkeypatch, *arguments)]
    trained = [step for step in steps if any("pg_loss" in name for name in step)]
    assert len(trained) == 2
    for step in trained:
        worst, mean = step["roma/penalty_worst"], step["roma/penalty_mean"]
        assert worst >= mean > 0 and math.isfinite(step["roma/aux_loss"])
        assert any(name.startswith("roma/penalty/") for name in step)


def test_switched_off_it_is_easyr1(cluster, tmp_path, monkeypatch):
    steps = [dict(flat(line)) for line in run(tmp_path, monkeypatch, "roma.num_views=0")]
    assert any("pg_loss" in name for step in steps for name in step)
    assert not any(name.startswith("roma/") for step in steps for name in step)
