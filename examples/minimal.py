"""The loss in a plain PyTorch loop: a stand-in policy, two degraded views, no roma trainer."""

import torch

import roma

torch.manual_seed(0)
B, T, K, D, V = 8, 12, 2, 32, 1000  # sequences, tokens, views, hidden size, vocabulary
body, head = torch.nn.Linear(D, D), torch.nn.Linear(D, V, bias=False)
optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-3)
clean = torch.randn(B, T, D)  # stands for your model's input; yours are images and a prompt
views = clean + 0.5 * torch.randn(K, B, T, D)  # the same rollouts on K degraded images
tokens, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)
advantages, correct = torch.randn(B), torch.rand(B) > 0.5  # from your rewards
aux_view = torch.randint(K, (B,))  # the view of each sequence's auxiliary loss
with torch.no_grad():
    old_logp = roma.linear_logprob(body(clean), head.weight, tokens).logp

for step in range(10):
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
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    print(f"step {step}: loss {out.loss:.4f}, worst view {out.metrics['roma_penalty_worst']:.4f}")
