"""GRPO of TRL on images, with ROMA: a small Qwen3-VL learns which way stripes run, on a CPU.

    make example-trl

What differs from a script that trains with TRL alone is marked with +.
"""

import argparse
from pathlib import Path

import tiny
from transformers import Qwen3VLForConditionalGeneration

from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer  # + in the place of TRL's two


def main() -> None:
    """Trains, then loads the checkpoint with transformers alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/example-trl"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    folder = tiny.model(options.out / "model")
    tiny.warm_start(folder)
    trainer = RomaGRPOTrainer(
        model=Qwen3VLForConditionalGeneration.from_pretrained(folder),
        processing_class=tiny.processor(folder),
        reward_funcs=tiny.accuracy,
        train_dataset=tiny.stripes(64),
        args=RomaGRPOConfig(
            output_dir=str(options.out),
            num_views=2,  # + two degraded views of each image
            lambda_inv=1.0,  # + weight of the penalty on the worst of them
            lambda_aux=0.5,  # + weight of the clipped loss on one of them
            per_device_train_batch_size=8,
            num_generations=8,
            gradient_accumulation_steps=2,
            max_completion_length=2,
            max_steps=options.steps,
            learning_rate=1e-4,
            logging_steps=5,
            save_steps=options.steps,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print({k: float(f"{v:.3g}") for k, v in entry.items() if k.startswith(("roma/", "reward"))})
    last = options.out / f"checkpoint-{options.steps}"
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(last)
    print(f"{last} loads in transformers: {sum(p.numel() for p in loaded.parameters())} parameters")


if __name__ == "__main__":
    main()
