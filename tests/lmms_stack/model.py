"""A tiny Qwen3-VL that answers the tiny suite: right mostly, on clean images.

Its weights are random but for the head, which is fitted to the right answers, each of them one
token. Degraded images change some.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager
from qwen_vl_utils import process_vision_info

LETTERS = "ABCD"
RIDGE = 0.03
SYSTEM = {
    "role": "system",
    "content": [{"type": "text", "text": "You are a helpful assistant."}],
}  # lmms-eval's Qwen classes set it before a task's own
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def answers() -> list[str]:
    """Whole answers, each one token; letters in both ways in which the seven tasks read them."""
    letters = [f"<answer>{letter}</answer> Answer: {letter}" for letter in LETTERS]
    return [*letters, *(f"<answer>{number}</answer>" for number in range(4))]


def words() -> list[str]:
    """Words of the prompts; what is not among them is read as unknown."""
    labels = "Rice Corn Wheat Oats Barley Rye Millet Beans Paris Rome Oslo Lima Cairo Delhi Quito"
    labels += " Seoul Mon Tue Wed Thu Fri Sat Sun Pens Lamps Cups Bags Hats Rugs Keys Bells"
    text = "system user assistant You are a helpful assistant. When the user asks a question, your"
    text += " response must include two parts: Which bar is highest? lowest? What value of How much"
    text += " more than are together? many bars higher Options: A: B: C: D: (A) (B) (C) (D)"
    return [*labels.split(), *text.split(), *(str(number) for number in range(100))]


def build_model(folder: Path, tasks: Path, *, seed: int = 0) -> Path:
    """A Qwen3-VL of 0.5 M parameters with transformers' own processor; about 2 MB.

    Patches are of 16 pixels, merged 2 × 2, as in the large models: lmms-eval's Qwen classes count
    on it. Heads are of 32: vLLM's attention on a CPU takes none smaller.

    Args:
        folder: to write.
        tasks: of whose answers its head knows some.
        seed: of the weights.
    """
    from transformers import (
        GenerationConfig,
        Qwen2VLImageProcessorPil,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]
    )
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 512 * 512}
    options = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": pixels}
    even = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**options, **even),
        tokenizer,
        Qwen3VLVideoProcessor(**options, **even),
        chat_template=TEMPLATE,
    )
    _fit_head(model, processor, tasks)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _fit_head(model: Any, processor: Any, tasks: Path) -> None:
    """Ridge regression of the right answers, each a token, on the states after the prompts."""
    states, targets = [], []
    for messages, target in _asked(tasks):
        chat = ChatMessages(messages=[SYSTEM, *messages]).to_hf_messages()
        prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images, _ = process_vision_info([chat], image_patch_size=16)
        inputs = processor(text=[prompt], images=images, do_resize=False, return_tensors="pt")
        states.append(model.model(**inputs).last_hidden_state[0, -1])
        letter = f" Answer: {target}" if target in LETTERS else ""
        targets.append(answers().index(f"<answer>{target}</answer>{letter}"))
    x = torch.stack(states)  # [n, 64]
    wanted = torch.nn.functional.one_hot(torch.tensor(targets), len(answers())).float()
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1])
    rows = torch.linalg.solve(gram, x.T @ wanted).T
    model.lm_head.weight.zero_()
    model.lm_head.weight[processor.tokenizer.convert_tokens_to_ids(answers())] = rows


def _asked(tasks: Path) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """Every question's messages and right answer, a letter or a number."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for task in manager.load_task_or_group(manager.all_subtasks, task_type="chat").values():
        for doc in task.test_docs():
            target = doc["answer"]
            if doc.get("question_type") == "multi_choice":
                target = LETTERS[doc["choices"].index(target)]
            yield task.doc_to_messages(doc), target


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    listed = dict.fromkeys(["<unk>", *SPECIAL, *words(), *answers()])
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[1:2] + SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
