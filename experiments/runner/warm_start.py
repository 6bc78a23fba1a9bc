"""Supervised training on written solutions and clean images, before RL."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from roma.data import Example
from roma.models.qwen_vl import Policy
from roma_kernels.errors import fail
from roma_kernels.linear_logprob.api import linear_logprob


def encode_solutions(policy: Policy, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Solutions as completion tokens [B, T] with the end token, and their mask [B, T].

    Raises:
        ValueError: an example has no solution.
    """
    tokenizer = policy.processor.tokenizer
    rows = []
    for example in examples:
        if example.solution is None:
            fail(
                "solution",
                "a written response",
                "none",
                f"give {example.origin} a column `solution`",
            )
        ids = policy.processor.encode(example.solution)
        rows.append([*ids, tokenizer.eos_token_id])
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [policy.pad_id] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens.to(policy.device), (torch.arange(longest) < lengths[:, None]).to(policy.device)


def warm_start(
    policy: Policy,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    warmup: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Trains a policy in place: AdamW, linear warm-up, then a cosine down to zero.

        loss = −(1/Σ|y|) Σ_i Σ_t logp(y_t)

    Args:
        policy: the model to train.
        examples: with a `solution` each.
        steps: optimizer steps.
        batch_size: examples per step, drawn without replacement, epoch after epoch.
        lr: peak learning rate.
        warmup: share of the steps over which the rate rises.
        seed: of the order of examples; the same seed gives the same weights on the same machine.
        progress: called after each step with (step, loss).

    Raises:
        ValueError: there are no examples, or one without a solution.
    """
    if not examples:
        fail("examples", "at least one", "none", "check the data")
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [
            torch.randperm(len(examples), generator=generator)
            for _ in range(1 + steps * batch_size // len(examples))
        ]
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    ramp = max(round(steps * warmup), 1)

    def rate(step: int) -> float:
        if step < ramp:
            return (step + 1) / ramp
        return 0.5 * (
            1 + float(torch.cos(torch.tensor(torch.pi * (step - ramp) / max(steps - ramp, 1))))
        )

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    policy.train()
    for step in range(steps):
        batch = [examples[i] for i in order[step * batch_size : (step + 1) * batch_size].tolist()]
        prompts = policy.encode_prompts(
            [e.problem for e in batch], [e.load_images() for e in batch]
        )
        features = policy.image_features(prompts.pixel_values, prompts.grids)
        tokens, mask = encode_solutions(policy, batch)
        rows = torch.arange(len(batch), device=policy.device)
        hidden = policy.completion_hidden(prompts, features, rows, tokens, mask)
        loss = -linear_logprob(hidden[mask], policy.head_weight, tokens[mask]).logp.mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if progress:
            progress(step + 1, loss.item())
