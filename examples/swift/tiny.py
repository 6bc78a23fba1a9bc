"""A tiny Qwen3-VL with random weights and some rows for it, to see `swift rlhf` run on a CPU.

    python examples/swift/tiny.py runs/swift      writes model/ and rows.jsonl there

What stays with a model of your own is the dataset's form: messages with one `<image>` for each
image, the images' paths, and the columns that a reward takes.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import GenerationConfig

from roma.models.small import SPECIAL, build_small_vlm

WORDS = ("user", "assistant", "which", "side", "is", "red", "?", "left", "right")


def main(out: Path, number: int = 32) -> None:
    """Writes the model and `number` images, of which the red half is to be named."""
    model = build_small_vlm(out / "model", words=WORDS)
    generation = GenerationConfig.from_pretrained(model)
    # With nine words one would often sample an image token, for which there is no image.
    generation.suppress_tokens = [1 + n for n, name in enumerate(SPECIAL) if name != "<|im_end|>"]
    generation.save_pretrained(model)
    rows, draw = [], np.random.default_rng(0)
    for index in range(number):
        image = draw.integers(0, 160, (32, 64, 3), dtype=np.uint8)
        answer = "left" if draw.random() < 0.5 else "right"
        image[:, 0 if answer == "left" else 32 :][:, :32, 0] = 255
        path = out / f"{index}.png"
        Image.fromarray(image).save(path)
        message = {"role": "user", "content": "<image>which side is red ?"}
        rows.append({"messages": [message], "images": [str(path)], "solution": answer})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "rows.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
