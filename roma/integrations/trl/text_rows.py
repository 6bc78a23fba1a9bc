"""Rows of text alone among rows with images, on several ranks.

A micro-batch of text alone leaves the vision tower out. The other ranks then wait for its weights,
where they are sharded, or for its gradients, where DeepSpeed reduces them. DDP copes (TRL sets
`ddp_find_unused_parameters`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from roma_kernels.errors import fail

Images = list[list[Any]]  # of each row


def of_prompts(prompts: Sequence[Any]) -> Images:
    """The images within the messages of each prompt; a plain string has none."""
    found = []
    for prompt in prompts:
        messages = prompt if isinstance(prompt, list) else []
        contents = [message.get("content") for message in messages]
        parts = [part for own in contents if isinstance(own, list) for part in own]
        found.append([part.get("image") for part in parts if part.get("type") == "image"])
    return found


class TextRows:
    """What the ranks know of each other's rows.

    Args:
        trainer: the GRPOTrainer.
    """

    def __init__(self, trainer: Any) -> None:
        """Nothing is known yet."""
        self.trainer = trainer
        self._images: Images = []
        self._apart = False  # some ranks have images and others none

    def compare(self, images: Images) -> None:
        """Compares the ranks' rows of a generation; every rank calls it.

        Args:
            images: of this rank's rows.

        Raises:
            ValueError: on every rank: some micro-batch may be of text alone, others have images,
                and the ranks would wait for each other for ever.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        self._images = images
        if accelerator.num_processes == 1:
            return
        training = trainer.model.training
        size = trainer.args.per_device_train_batch_size if training else len(images)
        text = sum(not own for own in images)
        flags = [text < len(images), text == len(images), text >= size]
        own = torch.tensor(flags, dtype=torch.int64, device=accelerator.device)
        some, none, alone = accelerator.reduce(own, reduction="sum").tolist()
        if some and alone and _waits(trainer):
            expected = f"on each rank fewer than {size} rows of text alone among those with images"
            got = f"{size} or more on {alone} of {accelerator.num_processes} ranks"
            remedy = "leave the rows without an image out, raise the batch size, or train with DDP"
            fail("train_dataset", expected, got, remedy)
        self._apart = bool(some and none)
        if self._apart:
            trainer.log_multimodal = False

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Around a generation: all ranks log their images, those that have none too.

        TRL gathers them on the ranks that have some, which then wait.
        """
        trainer = self.trainer
        wanted, self._apart = trainer.log_multimodal, False
        try:
            yield
        finally:
            trainer.log_multimodal = wanted
        if wanted and self._apart:
            from accelerate.utils import gather_object

            trainer._logs["images"].extend(gather_object(self._images))


def _waits(trainer: Any) -> bool:
    """Whether ranks wait for a part of the model that text alone does not run."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    if plugin is None and not trainer.is_fsdp_enabled:
        return False
    whole = trainer.accelerator.unwrap_model(trainer.model)
    base = getattr(whole, "get_base_model", lambda: whole)()
    language = [base.get_decoder(), base.get_output_embeddings()]
    inside = {id(w) for module in language if module is not None for w in module.parameters()}
    outside = [weight for weight in whole.parameters() if id(weight) not in inside]
    # Sharded weights are gathered whether they are trained or not.
    sharded = plugin is None or plugin.zero_stage == 3
    return any(sharded or weight.requires_grad for weight in outside)
