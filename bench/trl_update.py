"""What an update costs in TRL: its own trainer, and ROMA's with K views, on the same model.

    PYTHONPATH=. .venv/bin/python -m bench.trl_update --rounds 12

A micro-batch of one prompt's eight rollouts of twelve tokens, half of them right, on a Qwen3-VL of
0.6 M parameters: forward of the loss and backward, views and their degradation included, sampling
and optimizer not. CPU seconds of one thread, forms interleaved, the first round left out; medians
and extremes over TRL's median. docs/TRL.md has the table.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

FORMS: dict[str, dict[str, Any] | None] = {  # None: TRL's own trainer
    "TRL": None,
    "K = 0": {"num_views": 0},
    "K = 2": {"num_views": 2},
    "K = 4": {"num_views": 4},
    "K = 2, joint": {"num_views": 2, "view_update": "joint"},
    "K = 2, shared prompts": {"num_views": 2, "share_prompts": True},
    "K = 4, shared prompts": {"num_views": 4, "share_prompts": True},
}


def build(folder: Path, form: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """A trainer after one step, and the micro-batch of that step."""
    from transformers import Qwen3VLForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer

    from examples.trl import tiny
    from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer

    trainer_class, config = (GRPOTrainer, GRPOConfig)
    if form is not None:
        trainer_class, config = RomaGRPOTrainer, RomaGRPOConfig
    trainer = trainer_class(
        model=Qwen3VLForConditionalGeneration.from_pretrained(folder),
        processing_class=tiny.processor(folder),
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        train_dataset=tiny.stripes(8),
        args=config(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=12,
            generation_kwargs={"min_new_tokens": 12},
            gradient_checkpointing=False,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            **(form or {}),
        ),
    )
    trainer.train()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._buffered_inputs[0]


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    from examples.trl import tiny

    with tempfile.TemporaryDirectory() as name:
        folder = tiny.model(Path(name))
        built = {form: build(folder, options) for form, options in FORMS.items()}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for number in range(rounds + 1):
            for form, (trainer, batch) in built.items():
                start = time.process_time()
                trainer._compute_loss(trainer.model, dict(batch)).backward()
                spent = time.process_time() - start
                trainer.model.zero_grad()
                if number:
                    times[form].append(spent)
    one = statistics.median(times["TRL"])
    print("| | CPU ms | of TRL's |\n|---|---|---|")
    for form, spent in times.items():
        share = [x / one for x in (statistics.median(spent), min(spent), max(spent))]
        middle, low, high = (f"{x:.2f}" for x in share)
        print(f"| {form} | {share[0] * one * 1e3:.0f} | {middle} [{low}, {high}] |")


if __name__ == "__main__":
    main()
