"""Stand-ins for the small models and datasets that TRL's tests load from the Hugging Face Hub.

`build(folder)` makes two folders there, `small` and `whole`, and in both folders of the relative
names that the tests use (trl-internal-testing/...): a test that runs in one loads them in place of
the Hub's. In `whole` the Qwen models have all of Qwen's ids, for tests that name some; in `small`
all vocabularies are small, and a step takes a quarter of the time. Models are random, two layers of
width 8 or 16; tokenizers are trained on the spot; chat templates are read from the installed TRL,
which knows a template by its exact text. Sentences: the Zen of Python, from the interpreter itself.
"""

import codecs
import contextlib
import importlib
import io
import sys
from pathlib import Path

from trl_suite import processors, words

SEED = 0
OWNER = "trl-internal-testing"
SMALL = 1200  # words of a tokenizer whose ids no test names

TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
EIGHT = TEXT | {"hidden_size": 8, "intermediate_size": 32}
SIXTEEN = TEXT | {"hidden_size": 16, "intermediate_size": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Name below OWNER: TRL's chat template, and what differs from EIGHT.
LANGUAGE = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2_5", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2_5", {"num_labels": 1}),
    "tiny-Qwen3ForCausalLM": ("qwen3", {"head_dim": 4}),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", {"head_dim": 4, "num_labels": 1}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3", EXPERTS | {"num_experts": 4, "head_dim": 4}),
    "tiny-Cohere2ForCausalLM": ("cohere2", {"logit_scale": 1.0}),
    "tiny-Gemma2ForCausalLM": ("gemma", {"head_dim": 4}),
    "tiny-Glm4MoeForCausalLM": (
        "glm4moe",
        EXPERTS | {"n_routed_experts": 4, "head_dim": 2, "attention_bias": True},
    ),
    "tiny-GptOssForCausalLM": ("gptoss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-LlamaForCausalLM-3.2": ("llama3_2", {}),
    "tiny-LlamaForSequenceClassification-3.2": ("llama3_2", {"num_labels": 1}),
    "tiny-MistralForCausalLM-0.2": ("llama3_2", {"head_dim": 4}),
    "tiny-NemotronHForCausalLM-nano": (
        "nemotron_3_nano",
        EXPERTS
        | {
            "hidden_size": 16,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "mamba_n_groups": 1,
            "ssm_state_size": 16,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        },
    ),
}
DROPPED = {"tiny-NemotronHForCausalLM-nano": {"num_hidden_layers"}}  # its blocks are listed

REMOTE = '''"""A model whose code lies beside its weights."""
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
'''


def zen() -> list[str]:
    """The nineteen aphorisms of PEP 20."""
    with contextlib.redirect_stdout(io.StringIO()):
        coded = importlib.import_module("this").s
    return codecs.decode(coded, "rot13").splitlines()[2:]


def template(name: str) -> str:
    """The text of a chat template that the installed TRL ships."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def _datasets(folder: Path) -> None:
    import numpy as np
    from datasets import Dataset, Features, Image, List, Value

    # TRL's tests name twelve prompts by these lengths. Twelve to train on, two to test on.
    cut = [4, 2, 3, 1, 4, 3, 1, 4, 3, 3, 2, 6, 3, 3]
    prompts = [" ".join(s.split()[:n]) for s, n in zip(zen(), cut, strict=False)]
    prompts[6] = "Readability"
    asked = [f"What follows after {p}?" for p in prompts]
    message = [{"content": Value("string"), "role": Value("string")}]
    blocks = List(
        {
            "content": List({"text": Value("string"), "type": Value("string")}),
            "role": Value("string"),
        }
    )
    draw = np.random.default_rng(SEED)

    def picture():
        return draw.integers(0, 256, (*draw.integers(32, 64, 2), 3), dtype=np.uint8)

    def said(text, images):
        content = [{"type": "text", "text": text}, *[{"type": "image", "text": None}] * images]
        return [{"role": "user", "content": content}]

    few, counts = 8, [1, 2, 1, 2, 1, 2, 1, 2]
    chat = [[{"role": "user", "content": text}] for text in asked[:few]]
    made = {
        ("zen", "standard_prompt_only"): Dataset.from_dict({"prompt": prompts}),
        ("zen", "conversational_prompt_only"): Dataset.from_dict({"prompt": chat}),
        ("zen-image", "conversational_prompt_only"): Dataset.from_dict(
            {"prompt": chat, "image": [picture() for _ in range(few)]},
            features=Features(prompt=message, image=Image()),
        ),
        ("zen-multi-image", "conversational_prompt_only"): Dataset.from_dict(
            {
                "prompt": [said(a, n) for a, n in zip(asked[:few], counts, strict=True)],
                "images": [[picture() for _ in range(n)] for n in counts],
            },
            features=Features(prompt=blocks, images=List(Image())),
        ),
    }
    for (name, config), rows in made.items():
        home = folder / OWNER / name
        for split, part in rows.train_test_split(test_size=2, shuffle=False).items():
            part.to_parquet(home / config / f"{split}.parquet")
    for name in {name for name, _ in made}:
        lines = ["---", "configs:"]
        for config in sorted(config for owner, config in made if owner == name):
            lines += [f"- config_name: {config}", "  data_files:"]
            for split in ("train", "test"):
                lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
        (folder / OWNER / name / "README.md").write_text("\n".join([*lines, "---", ""]))


def _scatter(model) -> None:
    """Weights of a size at which a token, an image and a layer can be seen in the output."""
    import torch

    own = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            wide = parameter.shape[1:].numel() if parameter.ndim > 3 else parameter.shape[-1]
            noise = torch.randn(parameter.shape, generator=own)
            parameter.data.copy_(noise * wide**-0.5)


def _model(folder: Path, name: str, config: dict, tokenizer, processor=None) -> None:
    import torch
    import transformers

    kind = getattr(transformers, name.removeprefix("tiny-").split("-")[0])
    torch.manual_seed(SEED)
    model = kind(kind.config_class(**config))
    _scatter(model)
    home = folder / OWNER / name
    model.save_pretrained(home)
    (processor or tokenizer).save_pretrained(home)


def _small(learnt, chat: str, added: tuple[str, ...] = (), **named: str):
    """A tokenizer of SMALL words, with the ends of its chat template's turns as tokens."""
    base = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", *added]
    return words.tokenizer(
        learnt, base, size=SMALL, template=chat, eos="<eos>", pad="<pad>", **named
    )


def _qwen(learnt, chat: str, *, whole: bool, third: bool = False):
    """Qwen's added tokens after SMALL words; of the `whole`, where Qwen (`third`: 3.5) has them."""
    first, spelt = words.QWEN, words.QWEN_WORDS
    if third:
        first, spelt = words.QWEN_3_5, words.QWEN_3_5_WORDS
    return words.tokenizer(
        learnt,
        list(words.QWEN_ADDED),
        size=first if whole else SMALL,
        words=spelt if whole else {},
        template=chat,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )


def _ids(tokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _language(folder: Path, learnt, *, whole: bool) -> None:
    for name, (chat, own) in LANGUAGE.items():
        text = template(chat)
        qwen = "Qwen" in name
        tokenizer = _qwen(learnt, text, whole=whole) if qwen else _small(learnt, text)
        config = EIGHT | own | _ids(tokenizer)
        _model(
            folder,
            name,
            {k: v for k, v in config.items() if k not in DROPPED.get(name, ())},
            tokenizer,
        )
    _remote(folder, _small(learnt, template("llama3_2")))


def _remote(folder: Path, tokenizer) -> None:
    """A model type that transformers does not know: a test wants it refused, then trusted."""
    import json

    from transformers import LlamaConfig, LlamaForCausalLM

    home = folder / OWNER / "tiny-RemoteForCausalLM"
    model = LlamaForCausalLM(LlamaConfig(**EIGHT, **_ids(tokenizer)))
    _scatter(model)
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    (home / "remote.py").write_text(REMOTE)
    config = json.loads((home / "config.json").read_text())
    config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "remote.RemoteConfig",
        "AutoModelForCausalLM": "remote.RemoteForCausalLM",
    }
    (home / "config.json").write_text(json.dumps(config))


def _qwen_vision(folder: Path, learnt, *, whole: bool) -> None:
    from transformers import Qwen2VLImageProcessorPil

    rope = {"rope_type": "default", "rope_theta": 1e4}
    names = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    names |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    turned = {"rope_parameters": rope | {"mrope_section": [1, 1], "type": "default"}}
    hybrid = {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": rope
        | {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
    }
    sparse = hybrid | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}
    deep = {"depth": 2, "num_heads": 4, "patch_size": 8}
    wide = deep | {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16}
    made = [
        ("tiny-Qwen2VL", "", "qwen2_5_vl", turned, deep | {"embed_dim": 16, "hidden_size": 16}),
        ("tiny-Qwen2_5_VL", "", "qwen2_5_vl", turned, wide | {"fullatt_block_indexes": [1]}),
        ("tiny-Qwen3_5", "-NoThink", "qwen3_5_nothink", hybrid, wide),
        ("tiny-Qwen3_5Moe", "-3.6", "qwen3_6", sparse, wide),
    ]
    for stem, suffix, chat, text, vision in made:
        third = "3_5" in stem
        tokenizer = _qwen(learnt, template(chat), whole=whole, third=third)
        kind = processors.StillQwen3VLProcessor if third else processors.StillQwen2VLProcessor
        image = Qwen2VLImageProcessorPil(
            patch_size=8,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
        )
        config = {
            "text_config": SIXTEEN | text | _ids(tokenizer),
            "vision_config": vision,
            "tie_word_embeddings": False,
        }
        for name, token in names.items():
            config[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(token)
        processor = kind(image, tokenizer, chat_template=template(chat))
        _model(folder, f"{stem}ForConditionalGeneration{suffix}", config, tokenizer, processor)


def _other_vision(folder: Path, learnt) -> None:
    from transformers import (
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        Gemma4ImageProcessorPil,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    small = SIXTEEN | {"head_dim": 4}
    marks = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    turns = ("<start_of_turn>", "<end_of_turn>")
    named = {f"{key}_token": token for key, token in marks.items()}
    tokenizer = _small(learnt, template("gemma3"), (*marks.values(), *turns), **named)
    config = {
        "text_config": small | _ids(tokenizer),
        "vision_config": SIXTEEN | {"image_size": 56, "patch_size": 14, "vision_use_head": False},
        "mm_tokens_per_image": 16,
    }
    for key, token in marks.items():
        config[f"{key}_token_index"] = tokenizer.convert_tokens_to_ids(token)
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer,
        chat_template=template("gemma3"),
        image_seq_length=16,
    )
    _model(folder, "tiny-Gemma3ForConditionalGeneration", config, tokenizer, processor)

    marks = {"boi": "<|image>", "eoi": "<image|>", "image": "<|image|>"}
    marks |= {"boa": "<|audio>", "eoa": "<audio|>", "audio": "<|audio|>"}
    named = {f"{key}_token": token for key, token in marks.items()}
    turns = ("<|turn>", "<turn|>", "<|video|>")
    tokenizer = _small(learnt, template("gemma4"), (*marks.values(), *turns), **named)
    config = {
        "text_config": small
        | _ids(tokenizer)
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": len(tokenizer),
        },
        "vision_config": SIXTEEN
        | {"head_dim": 4, "position_embedding_size": 630, "default_output_length": 70},
        "audio_config": None,
    }
    for key, token in (marks | {"video": "<|video|>"}).items():
        config[f"{key}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    processor = processors.StillGemma4Processor(
        Gemma4ImageProcessorPil(max_soft_tokens=70), tokenizer, chat_template=template("gemma4")
    )
    _model(folder, "tiny-Gemma4ForConditionalGeneration", config, tokenizer, processor)

    tokenizer = _small(learnt, template("llava_next"), ("<image>",), image_token="<image>")
    sizes = [[28, 56], [56, 28], [56, 56]]
    config = {
        "text_config": small | _ids(tokenizer) | {"model_type": "mistral"},
        "vision_config": SIXTEEN
        | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        "image_grid_pinpoints": sizes,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }
    edge = {"height": 28, "width": 28}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=edge, image_grid_pinpoints=sizes
        ),
        tokenizer,
        chat_template=template("llava_next"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    _model(folder, "tiny-LlavaNextForConditionalGeneration", config, tokenizer, processor)


def build(folder: Path) -> None:
    """Write every stand-in below `folder`; what lies there already is written again."""
    processors.register()
    chats = {chat for chat, _ in LANGUAGE.values()}
    learnt = words.merges([*zen() * 9, *map(template, sorted(chats))], 600)
    for home, whole in ((folder / "small", False), (folder / "whole", True)):
        _datasets(home)
        _language(home, learnt, whole=whole)
        _qwen_vision(home, learnt, whole=whole)
        _other_vision(home, learnt)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
