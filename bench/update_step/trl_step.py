"""TRL's own step on the same batch: `GRPOTrainer._compute_loss`, forward and backward.

A trainer is built on the same weights, as a user would build it, and its loss is called with inputs
in the form in which its sampling leaves them: a row for each rollout, with its own copy of the
prompt's pixels, so that the vision tower runs for each row. The head is TRL's (chunked, log-probs
and entropies). Sampling, rewards and the optimizer are not called.
"""

from typing import Any

import torch
from torch import Tensor

from bench.providers import Unavailable
from bench.providers.base import taken
from bench.update_step.made import Made, checkpoint
from roma.models.processor import Processor
from roma.models.qwen_vl import Policy
from roma.train.batch import UpdateBatch

CLIP_LOW, CLIP_HIGH = 0.2, 0.3


class TrlStep:
    """A GRPOTrainer over the folder's weights, and a batch as its loss takes it."""

    def __init__(self, made: Made) -> None:
        """Raises Unavailable without TRL."""
        config, trainer = taken("trl", "trl", "GRPOConfig", "GRPOTrainer")
        from transformers import AutoModelForImageTextToText

        model: Any = AutoModelForImageTextToText.from_pretrained(made.folder)
        layout = made.layout
        self.trainer: Any = trainer(
            model=model,
            reward_funcs=_no_reward,
            args=config(
                output_dir=str(made.folder / "trl"),
                per_device_train_batch_size=layout.prompts * layout.rollouts,
                num_generations=layout.rollouts,
                max_completion_length=layout.completion,
                loss_type="grpo",
                epsilon=CLIP_LOW,
                epsilon_high=CLIP_HIGH,
                beta=0.0,
                gradient_checkpointing=False,  # read by its training loop, which is not run
                use_cpu=made.policy.device.type == "cpu",
                bf16=False,
                report_to="none",
            ),
            train_dataset=_prompts(made),
            processing_class=_processor(made.policy.processor),
        )
        self.model: Any = self.trainer.model.train()
        if layout.checkpointed:
            checkpoint(self.model)
        self.trainer.current_gradient_accumulation_steps = 1  # its training loop sets it
        self.inputs = _inputs(made.batch, model.config.image_token_id)

    def weights(self, policy: Policy) -> list[Tensor]:
        """Of its model, in the order of the policy's."""
        own = dict(self.model.named_parameters())
        return [own[name] for name, _ in policy.model.named_parameters()]

    def run(self) -> None:
        """One loss and its backward."""
        self.model.zero_grad()
        for values in self.trainer._metrics["train"].values():
            values.clear()
        self.trainer._compute_loss(self.model, self.inputs).backward()


def _inputs(batch: UpdateBatch, image_token: int) -> dict[str, Any]:
    """What `GRPOTrainer._generate_and_score_completions` returns, as far as the loss reads it."""
    prompts, group = batch.prompts, batch.group
    one = prompts.grids.prod(-1).tolist()
    if len(one) != len(prompts.images):
        raise Unavailable("one image for each prompt here")
    pixels = prompts.pixel_values.split(one)
    ids = prompts.input_ids[group]
    return {
        "prompt_ids": ids,
        "prompt_mask": prompts.attention_mask[group],
        "completion_ids": batch.tokens,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logp,
        "num_items_in_batch": batch.mask.sum(),
        "pixel_values": torch.cat([pixels[p] for p in group.tolist()]),
        "image_grid_thw": prompts.grids[group],
        "num_images": [1] * len(group),
        "mm_token_type_ids": (torch.cat([ids, batch.tokens], dim=1) == image_token).long(),
    }


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def _prompts(made: Made) -> Any:
    """A dataset of the prompts: a trainer wants one, and takes nothing from it here."""
    from datasets import Dataset

    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    rows = [[{"role": "user", "content": content}] for _ in made.batch.prompts.images]
    return Dataset.from_dict({"prompt": rows})


def _processor(own: Processor) -> Any:
    """The processor of transformers without its part for videos, which needs torchvision."""
    from transformers import ProcessorMixin, Qwen3VLProcessor

    class WithoutVideos(Qwen3VLProcessor):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
                [self.image_token, self.video_token]
            )
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return WithoutVideos(own.image_processor, own.tokenizer, own.tokenizer.chat_template)
