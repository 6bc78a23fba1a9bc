"""A whole loop around the loss in plain PyTorch, without the trainer; a stand-in for the policy.

python examples/minimal.py
"""

import torch

import roma

torch.manual_seed(0)
B, T, K, D, V = 64, 4, 2, 32, 20  # sequences, tokens, views, hidden size, vocabulary
body, head = torch.nn.Linear(D, D), torch.nn.Linear(D, V, bias=False)
optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-2)

for step in range(10):
    # The rollouts. Yours are prompts with images, and tokens that your policy sampled on them.
    clean = torch.randn(B, T, D)
    views = clean + 0.5 * torch.randn(K, B, T, D)  # the same prompts with degraded images
    with torch.no_grad():
        tokens = torch.distributions.Categorical(logits=head(body(clean))).sample()
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))  # True where a token counts
    correct = tokens[:, 0] % 2 == 0  # the stand-in's reward: an even first token
    advantages = correct.float() - correct.float().mean()
    aux_view = torch.randint(K, (B,))  # the view of each sequence's auxiliary loss

    old_logp = None  # first update: this very policy sampled
    for _ in range(2):
        out = roma.roma_loss(
            body(clean),
            body(views),
            head.weight,
            tokens,
            mask=mask,
            advantages=advantages,
            correct=correct,
            old_logp=old_logp,
            aux_view=aux_view,
        )
        if old_logp is None:
            old_logp = out.logp.detach()
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    right, worst = correct.float().mean(), out.metrics["roma_penalty_worst"]
    print(f"step {step}: loss {out.loss:.4f}, right {right:.0%}, worst view {worst:.4f} nats")
