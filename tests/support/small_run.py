"""The configuration of a run on the small model: four prompts × four rollouts, six tokens."""

from pathlib import Path

from support import small_model

from roma.train.config import Config, load_config

REWARD = Path(__file__).parent / "length_reward.py"


def config(out: Path, *overrides: str) -> Config:
    """Two steps that write metrics.jsonl and a checkpoint below `out`."""
    root = small_model.folder()
    return load_config(
        None,
        [
            f"data.train_files={root / 'data'}@train",
            f"data.val_files={root / 'data'}@val",
            "data.max_response_length=6",
            "data.rollout_batch_size=4",
            f"worker.actor.model_path={root / 'model'}",
            "worker.actor.lr=1e-3",
            "worker.actor.micro_batch_tokens=200",
            "worker.rollout.n=4",
            f"worker.reward.function={REWARD}:compute_score",
            "trainer.total_steps=2",
            "trainer.logger=[file]",
            f"trainer.out={out}",
            *overrides,
        ],
    )
