"""ROMA in a trainer whose loss sees one forward's log-probs: further rows, the trainer's own loss.

The loop is a stand-in for slime, SkyRL, NeMo-RL, AReaL, ROLL, prime-rl and their like. What they
own is `TheirTrainer`; what is added is between the two marks. docs/ROWS.md goes with it.

python examples/rows.py
"""

import torch

from roma.integrations.options import RomaOptions
from roma.integrations.rows import PENALTY, add_rows

torch.manual_seed(0)
B, T, D, V = 64, 4, 32, 20  # rollouts of a step, tokens, features of an image, vocabulary
options = RomaOptions(num_views=2, lambda_inv=1.0, lambda_aux=0.5)
micro_batch = 8


class TheirTrainer:
    """A policy, a forward that returns log-probs, and a clipped loss over the rows that it gets."""

    def __init__(self) -> None:
        self.body, self.head = torch.nn.Linear(D, T * D), torch.nn.Linear(D, V, bias=False)
        weights = [*self.body.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(weights, lr=3e-2)

    def logits(self, images):
        """[R, D] to [R, T, V]."""
        return self.head(self.body(images).tanh().unflatten(-1, (T, D)))

    def logp(self, images, tokens):
        """[R, T] nats, of the tokens."""
        return self.logits(images).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    def update(self, images, tokens, mask, old_logp, advantages):
        """One optimizer step over R rows: a mean over a row's tokens, then over the rows."""
        order = torch.randperm(len(tokens))  # rows are shuffled, and split into micro-batches
        for part in order.split(micro_batch):
            ratio = (self.logp(images[part], tokens[part]) - old_logp[part]).exp()
            gain = advantages[part]
            loss = torch.maximum(-ratio * gain, -ratio.clamp(0.8, 1.3) * gain) * mask[part]
            (loss.sum(1) / mask[part].sum(1)).sum().div(len(tokens)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


trainer = TheirTrainer()
for step in range(10):
    # Theirs: sample on the clean images, reward, advantages (a group's statistics come first).
    images = torch.randn(B, D)
    with torch.no_grad():
        tokens = torch.distributions.Categorical(logits=trainer.logits(images)).sample()
        logp = trainer.logp(images, tokens)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    correct = tokens[:, 0] % 2 == 0  # the stand-in's reward: an even first token
    advantages = correct.float() - correct.float().mean()

    # ---- ROMA: degrade, score the views as the clean images were scored, lay out the rows.
    views = images + 0.5 * torch.randn(options.num_views, B, D)  # yours: roma.views
    with torch.no_grad():
        view_logp = torch.stack([trainer.logp(view, tokens) for view in views])
    rows = add_rows(
        mask=mask,
        advantages=advantages,
        correct=correct,
        logp=logp,
        view_logp=view_logp,
        aux_view=torch.randint(options.num_views, (B,)),
        options=options,
        aggregation="grpo",  # how TheirTrainer averages
        multiple_of=micro_batch,
    ).folded()  # TheirTrainer has no weight of a row: the advantages carry it
    row_images = torch.stack(rows.pick(list(images), [list(view) for view in views]))
    # ---- and back to theirs: more rows, the same code.

    trainer.update(row_images, rows.take(tokens), rows.mask, rows.old_logp, rows.advantages)
    right, worst = correct.float().mean(), int((rows.kind == PENALTY).sum())
    print(f"step {step}: right {right:.0%}, {len(rows)} rows for {B}, {worst} with a worst view")
