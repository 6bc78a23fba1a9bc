"""A second plug-in of swift's for the tiny model: its reward, and its own image token."""

import os

from swift.rewards import ORM, orms
from swift.template.templates.qwen import Qwen2VLTemplate
from transformers import AutoTokenizer


class NamesTheSide(ORM):  # type: ignore[misc]  # swift has no types
    """1 where the answer begins with the right word."""

    def __call__(
        self, completions: list[str], solution: list[str], **columns: object
    ) -> list[float]:
        """One reward for each completion."""
        pairs = zip(completions, solution, strict=True)
        return [float(text.split()[:1] == [answer]) for text, answer in pairs]


orms["names_the_side"] = NamesTheSide

# swift's template has the ids of Qwen's tokenizer; a model of Qwen's needs nothing here.
_tokenizer = AutoTokenizer.from_pretrained(os.environ["TINY_MODEL"])
Qwen2VLTemplate.image_token_id = _tokenizer.convert_tokens_to_ids("<|image_pad|>")
Qwen2VLTemplate.video_token_id = _tokenizer.convert_tokens_to_ids("<|video_pad|>")
