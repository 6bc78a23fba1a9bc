"""One update by GRPO and ROMA, a prompt once for all its rollouts; PyTorch and transformers alone.

python examples/shared_update.py

A small Qwen3-VL with random weights; the batch stands in for yours. In your trainer:

* `model` is yours. Call `share_prompts` on it once, when it is loaded and before it is wrapped. A
  model that cannot share prompts raises there; a sampler that runs this model goes on as before.
* `prompts` have no padding, and each image token stands there already, as your processor has it.
  For a text model leave `positions` and `next_position` out, and the images of course.
* `pixels` are the clean images and K degraded ones of the same size: `roma.views` makes them.
* Images are read in the order of the groups.
* A mask of uncounted tokens, `old_logp` and the counts of a whole step go to `roma_loss`.
"""

from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForImageTextToText

import roma
from roma.models.prefix import Group, pack, share_prompts
from roma.models.small import build_small_vlm

torch.manual_seed(0)
P, G, T, K = 2, 8, 12, 2  # prompts, rollouts of each, longest completion, views
B = P * G
with TemporaryDirectory() as folder:
    build_small_vlm(folder, words=[f"word{i}" for i in range(24)])
    model = AutoModelForImageTextToText.from_pretrained(folder)
share_prompts(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

# The batch: 64 × 64 pixels are 8 × 8 patches, and 16 image tokens.
config = model.config
picture = [config.vision_start_token_id, *[config.image_token_id] * 16, config.vision_end_token_id]
prompts = [torch.tensor([*picture, *text]) for text in ([9, 10, 11], [12, 13])]
grids = torch.tensor([[1, 8, 8]] * P)
clean = torch.randn(P, 64, 384)  # patches of each prompt's image
pixels = [clean, *(clean + 0.5 * torch.randn_like(clean) for _ in range(K))]
tokens, lengths = torch.randint(9, 30, (B, T)), torch.randint(1, T + 1, (B,))  # your rollouts
correct = torch.rand(B) < 0.5
advantages = (correct.float().view(P, G) - correct.float().view(P, G).mean(1, True)).flatten()
aux_view = torch.randint(K, (B,))

# What matters: every rollout on the clean images; on a view the right ones, which the penalty
# compares, and those that have it as auxiliary view.
runs = torch.stack([torch.ones_like(correct), *((aux_view == k) | correct for k in range(K))])
groups = []
for variant in range(K + 1):
    for prompt in range(P):
        own = [i for i in range(prompt * G, prompt * G + G) if runs[variant, i]]
        groups += [Group(variant, prompt, tuple(own))] if own else []

# Positions of the prompts, and of the token behind each; then all groups in one row.
kinds = [(ids == config.image_token_id).int() for ids in prompts]
positions = [
    model.model.get_rope_index(ids[None], kind[None], image_grid_thw=grid[None])[0][:, 0]
    for ids, kind, grid in zip(prompts, kinds, grids, strict=True)
]
behind = [int(own.max()) + 1 for own in positions]
row = pack(prompts, tokens, lengths, groups, positions=positions, next_position=behind)

# One forward, one loss, one backward.
states = model.model(
    **row.inputs(),
    pixel_values=torch.cat([pixels[group.variant][group.prompt] for group in groups]),
    image_grid_thw=grids[[group.prompt for group in groups]],
    use_cache=False,
).last_hidden_state[0]
pairs = [(group.variant, i) for group in groups if group.variant for i in group.rollouts]
ends = lengths.cumsum(0)
out = roma.roma_loss(
    states[row.reads([(0, i) for i in range(B)])],
    states[row.reads(pairs)],
    model.lm_head.weight,
    tokens[torch.arange(T) < lengths[:, None]],
    mask=torch.ones(int(ends[-1]), dtype=torch.bool),
    advantages=advantages,
    correct=correct,
    aux_view=aux_view,
    view_rows=row.view_rows(pairs, views=K, rollouts=B),
    cu_seqlens=torch.cat([ends.new_zeros(1), ends]).int(),
)
out.loss.backward()
optimizer.step()

ran = row.input_ids.numel()
every = sum((K + 1) * (len(prompts[i // G]) + T - 1) for i in range(B))
print(f"loss {out.loss:.4f}, worst view {out.metrics['roma_penalty_worst']:.4f} nats")
print(f"tokens run {ran}; with a row per rollout, on every view, {every}: {ran / every:.0%}")
