"""Tokenizers of the stand-ins: byte-level BPE, trained on the spot, with Qwen's ids where needed.

TRL's tests of tools feed completions as token ids of Qwen's vocabulary. The ids and spellings that
they use are listed here, as facts of that vocabulary; every other id has a made-up word, so that
what a random model samples decodes to text of varying length, on which a reward can differ.
"""

import json
from collections.abc import Iterable

# The first added token of Qwen2 to Qwen3 has this number, that of Qwen3.5 the other one.
QWEN, QWEN_3_5 = 151643, 248044

# In this order from there on. From <tool_call> on they are not "special": decoding keeps them.
QWEN_ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>"
    " <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>"
    " <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|>"
    " <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response>"
    " <think> </think>"
).split(" ")
KEPT = frozenset(QWEN_ADDED[14:]) | {"<start_function_call>", "<end_function_call>"}

# Spellings by id; bytes have 0 to 255 in GPT-2's order.
QWEN_WORDS = {
    314: " {", 293: " b", 330: ' "', 397: ">\n", 411: "out", 450: "de", 497: '",', 522: "</",
    606: "name", 788: '":', 894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know",
    1513: " don", 2765: " won", 4913: '{"', 5212: ' {"', 5392: " tool", 6023: "hi", 6659: "call",
    7692: "async", 9520: "step", 11248: "}}\n", 13477: "crement", 14172: "tool",
    16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool", 35744: "increment",
    64648: "multiply", 93054: "_multiply", 95642: '"}}\n',
}  # fmt: skip
QWEN_3_5_WORDS = {
    510: "</", 866: " any", 914: "'t", 1366: " know", 1459: " don", 1628: "function",
    5224: " tool", 13744: "=s", 16936: "Done", 22076: "_tool", 30091: "creenshot",
}  # fmt: skip


def alphabet() -> dict[int, str]:
    """GPT-2's letter of each byte, in the order of their numbers: printable bytes come first."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def spell(text: str) -> str:
    """A token's text in byte-level BPE's letters."""
    letters = alphabet()
    return "".join(letters[byte] for byte in text.encode())


def made_up(number: int) -> str:
    """A word of one to some ten letters for an id: unique, and of a length that varies."""
    word, rest = "", number
    while rest:
        rest, letter = divmod(rest, 24)
        word += "abcdefghijklmnopqrstuvwx"[letter]
    return "Ġ" + "z" * (number % 7) + "y" + word  # no merge makes a word with "zy" in it


def merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """`count` merges of byte-level BPE, learnt from the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator(
        list(texts),
        trainers.BpeTrainer(
            vocab_size=256 + count,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]


def tokenizer(
    learnt: list[tuple[str, str]],
    added: list[str],
    *,
    size: int,
    words: dict[int, str] | None = None,
    template: str | None = None,
    eos: str,
    pad: str,
    **named: str,
):
    """A fast tokenizer of `size` words and the added tokens after them.

    Args:
        learnt: merges, from `merges`.
        added: tokens that text is never split into; the first has the number `size`.
        size: words before the added tokens; at least 256 + len(learnt).
        words: spelling by number, for the ids that a test names.
        template: the chat template.
        eos: the token that ends a completion.
        pad: the token that fills up.
        named: further tokens of a name, such as image_token.

    Returns:
        A `PreTrainedTokenizerFast`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(alphabet().values())}
    vocabulary |= {spell(text): i for i, text in (words or {}).items()}
    taken = set(vocabulary.values())
    free = (i for i in range(size) if i not in taken)
    for word in [a + b for a, b in learnt]:
        if word not in vocabulary:
            vocabulary[word] = next(free)
    vocabulary |= {made_up(i): i for i in free}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=learnt))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(t, special=t not in KEPT, normalized=False) for t in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token=pad,
        chat_template=template,
        extra_special_tokens=named,
        padding_side="left",
        model_max_length=32768,
    )
