"""Supervised fine-tuning in a plain loop, with roma's head in a model of transformers; no TRL.

    python examples/patched_sft.py [TEXT ...]

A Llama of 0.3 M parameters learns the bytes of text files, README.md unless others are named. What
the two lines change: the forward returns log-probs of the labels in fp32, from states of counted
positions alone, and no logits are ever whole.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from roma.integrations import patch_lm_head

WIDTH, LENGTH, ROWS, STEPS = 96, 96, 16, 100
BYTES = 256

files = [Path(name) for name in sys.argv[1:]] or [Path(__file__).parents[1] / "README.md"]
text = torch.tensor(list(b"".join(file.read_bytes() for file in files)))

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=BYTES,
    hidden_size=WIDTH,
    intermediate_size=3 * WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config)
patch_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(STEPS):
    starts = torch.randint(len(text) - LENGTH, (ROWS, 1))
    ids = text[starts + torch.arange(LENGTH)]
    labels = ids.clone()
    labels[:, : LENGTH // 4] = -100  # the prompt is not scored
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    if step % 20 == 19:
        counted = out.label_mask.sum()
        right, entropy = out.is_top1.sum() / counted, out.entropy.sum() / counted
        print(
            f"step {step + 1}: loss {out.loss:.3f} nats a byte, entropy {entropy:.3f}, "
            f"{right:.0%} of the bytes foretold"
        )

# Every other call is the model's own.
prompt = text[None, :LENGTH]
made = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False
)
print(repr(bytes(made[0, LENGTH:].tolist()).decode(errors="replace")))
