"""One run on as many ranks as there are, from a test; rank 0 writes gradients and metrics.

torchrun … two_ranks.py MODEL ROWS OUT WEIGHTS STEPS KIND
"""

import os
import sys
from pathlib import Path

import torch
from swift_stack.small import flags, prepare_swift, train
from swift_stack.test_loss import VIEWS


def main(model: str, rows: str, out: str, weights: str, steps: str, kind: str) -> None:
    """The same eight completions, whatever the number of ranks, in micro-batches of two."""
    prepare_swift(Path(model))
    import swift_stack.probe as probe

    probe.Probe.one_by_one = True
    words = flags(
        Path(model),
        Path(rows),
        Path(out),
        gradient_accumulation_steps=steps,
        per_device_train_batch_size=2,
        num_generations=4,
        loss_type=kind,
        gradient_checkpointing="true",
        gradient_checkpointing_kwargs='{"use_reentrant": true}',
        ddp_backend="gloo",
    )
    made = train(words, f"{VIEWS},penalty_over=correct")
    if int(os.environ.get("RANK", 0)) == 0:
        logs = {name: made.logged(name)[0] for name in made.logs[0] if name.startswith("roma/")}
        pairs = [len(call.logp) - len(call.mask) for call in made.calls]
        texts = [text for call in made.calls for text in call.texts]
        kept = {"grads": made.trainer.grads, "sizes": made.trainer.sizes, "logs": logs}
        kept |= {"pairs": pairs, "texts": texts}
        torch.save(kept, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
