"""Think tags as plain text, and prompts with several images or none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from roma.models.processor import Processor

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% for part in m.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
BEHIND = "<|behind|>"  # an added token with a higher number than the two


def tokenizer(template: str = TEMPLATE, *, thinks: bool = True, in_vocabulary: bool = False) -> Any:
    """Bytes, and added tokens in Qwen3-VL's manner: the two tags are added, and not special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "<think>"] if in_vocabulary else letters
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=SPECIAL, eos_token="<|im_end|>"
    )
    if thinks:
        made.add_tokens(["<think>", "</think>"], special_tokens=False)
    made.add_tokens([BEHIND], special_tokens=False)
    made.chat_template = template
    return made


def bytes_of(given: Any, text: str) -> list[int]:
    return [given.convert_tokens_to_ids(chr(byte)) for byte in text.encode()]


def processor(given: Any, **options: Any) -> Processor:
    images = small_model.policy().processor.image_processor
    return Processor(given, images, **options)


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_think_tags_are_text(in_vocabulary: bool) -> None:
    own = tokenizer(in_vocabulary=in_vocabulary)
    made = processor(own)
    text = f"<think>a</think>{BEHIND}<|im_end|>b"
    ids = made.encode(text)
    added = {tag: own.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")}
    assert not set(added.values()) & set(ids)
    tags = [bytes_of(own, tag) for tag in added]
    rest = [own.convert_tokens_to_ids(token) for token in (BEHIND, "<|im_end|>")]
    assert ids == [*tags[0], *bytes_of(own, "a"), *tags[1], *rest, *bytes_of(own, "b")]
    made.plain_think_tokens = False
    assert made.encode(text) == own(text, add_special_tokens=False)["input_ids"]
    assert made.encode(text)[0] == added["<think>"]
    made.plain_think_tokens = True
    assert made.encode(text) == ids


def test_prompts_hold_them_as_text_too() -> None:
    own = tokenizer()
    made, grids = processor(own), torch.tensor([[1, 4, 4], [1, 2, 4]])
    plain = made.prompt_ids("<think> <image> or <image> ?", grids)
    made.plain_think_tokens = False
    added = made.prompt_ids("<think> <image> or <image> ?", grids)
    think, image = (own.convert_tokens_to_ids(token) for token in ("<think>", "<|image_pad|>"))
    assert think in added and think not in plain
    assert plain.count(image) == added.count(image) == 4 + 2
    assert len(plain) == len(added) + len("<think>") - 1
    assert own.decode(plain) == own.decode(added)


def test_completions_read_the_same_either_way() -> None:
    own = tokenizer()
    made, text = processor(own), r"<think> 3 + 5 </think> \boxed{8}"
    plain, added = made.encode(text), own(text, add_special_tokens=False)["input_ids"]
    assert len(plain) > len(added)
    for ids in (plain, added):
        row = torch.tensor([[*ids, own.eos_token_id]])
        assert made.decode(row, torch.ones_like(row, dtype=torch.bool)) == [text]


def test_the_saved_tokenizer_is_the_one_given(tmp_path: Path) -> None:
    own = tokenizer()
    processor(own).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = f"<think>a</think>{BEHIND}"
    assert again.get_vocab() == own.get_vocab()
    assert again(text)["input_ids"] == own(text)["input_ids"]
    loaded = Processor.load(tmp_path)
    assert loaded.encode(text) == processor(own).encode(text) != again(text)["input_ids"]


def test_a_model_that_thinks_by_itself_keeps_its_tokens() -> None:
    own = tokenizer(TEMPLATE.replace("<|im_start|>{% endif", "<|im_start|><think>{% endif"))
    made = processor(own)
    assert made.plain_think_tokens is False
    assert own.convert_tokens_to_ids("<think>") in made.encode("<think>")
    with pytest.raises(ValueError, match=r"data\.plain_think_tokens: .* set it to false"):
        made.plain_think_tokens = True
    with pytest.raises(ValueError, match=r"data\.plain_think_tokens"):
        processor(own, plain_think_tokens=True)


def test_a_tokenizer_without_the_tokens_is_used_as_it_is() -> None:
    own = tokenizer(thinks=False)
    made = processor(own)
    assert made.plain_think_tokens and made._plain is None
    assert made.encode("<think>") == own("<think>")["input_ids"] == bytes_of(own, "<think>")


def test_a_slow_tokenizer_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    own = tokenizer()
    monkeypatch.setattr(type(own), "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match=r"tokenizer: .*data\.plain_think_tokens=false"):
        processor(own)
    assert processor(own, plain_think_tokens=False).encode("<think>")


def test_marks_and_images_must_agree() -> None:
    made = small_model.policy().processor
    with pytest.raises(ValueError, match="one `<image>` per image, got 1 marks for 0 images"):
        made.prompt_ids("<image> sum ?", torch.empty(0, 3, dtype=torch.int64))


def test_a_tag_that_the_prompt_has_opened_belongs_to_the_answer() -> None:
    """A reward reads `<think> … </think>`; a Thinking model's template has written the first."""
    own = tokenizer(TEMPLATE.replace("<|im_start|>{% endif", "<|im_start|><think>{% endif"))
    for made, opening in ((processor(own), "<think>"), (processor(tokenizer()), "")):
        ids = torch.tensor([made.encode("3 + 5")])
        assert made.decode(ids, torch.ones_like(ids, dtype=torch.bool)) == [f"{opening}3 + 5"]
