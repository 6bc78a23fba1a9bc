"""Processors that need no torchvision: those of transformers without their video half.

`register` puts them where `AutoProcessor` looks a class up by the name in processor_config.json.
Videos are no part of TRL's tests of this trainer.
"""

from transformers import (
    AutoProcessor,
    Gemma4Processor,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)


def _qwen(processor, image_processor, tokenizer, chat_template) -> None:
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    processor.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    ProcessorMixin.__init__(processor, image_processor, tokenizer, chat_template=chat_template)


class StillQwen2VLProcessor(Qwen2_5_VLProcessor):
    """Qwen2-VL's and Qwen2.5-VL's, for still images."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        _qwen(self, image_processor, tokenizer, chat_template)


class StillQwen3VLProcessor(Qwen3VLProcessor):
    """Qwen3-VL's and Qwen3.5's, for still images."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
        _qwen(self, image_processor, tokenizer, chat_template)


class StillGemma4Processor(Gemma4Processor):
    """Gemma 4's, for still images and no sound."""

    def __init__(
        self, image_processor=None, tokenizer=None, chat_template=None, image_seq_length=70, **_
    ):
        self.image_seq_length = image_seq_length
        for name in ("image", "boi", "eoi", "audio", "boa", "eoa"):
            setattr(self, f"{name}_token", getattr(tokenizer, f"{name}_token"))
        self.image_token_id = tokenizer.image_token_id
        self.audio_token_id = tokenizer.audio_token_id
        self.video_token = "<|video|>"
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def register() -> None:
    """Make the classes known to `AutoProcessor`. Once a process."""
    for own in (StillQwen2VLProcessor, StillQwen3VLProcessor, StillGemma4Processor):
        key = type(f"{own.__name__}Key", (PreTrainedConfig,), {})  # no model's: found by name only
        AutoProcessor.register(key, own)
