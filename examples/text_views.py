"""ROMA without an image: the views of a prompt are other wordings of it. A tiny Qwen3, on a CPU.

A completion that is right stays likely, token by token, when the question is put another way. What
a modality needs is K inputs that should not change the answer, and the completion forced on each:
the loss sees log-probs alone.

It begins at 33 % and 7 % right on the two other wordings and ends at 85 % and 75 %; with both λ at
0, which is GRPO, at 33 % and 11 % (one seed, and this file; it shows how, not how much).

python examples/text_views.py        (needs transformers; ten seconds)
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from roma import RomaConfig, roma_loss_from_logp

torch.manual_seed(0)
WORDS = "<pad> ; = add and plus the sum of what is 0 1 2 3 4 5 6 7 8 9".split()
ID = {word: number for number, word in enumerate(WORDS)}
CLEAN = "{} plus {} ="
VIEWS = ("what is the sum of {} and {} ;", "add {} and {} ;")  # K = 2 wordings, not sampled from
P, G = 16, 8  # prompts, rollouts of each; a completion is one token, T = 1
config = RomaConfig(lambda_inv=0.3, lambda_aux=0.5)
policy = Qwen3ForCausalLM(
    Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
)
optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)


def prompts(wording, questions):
    """[B, S] token ids: of one wording all prompts are equally long, so nothing is padded."""
    lines = [wording.format(*question).split() for question in questions.tolist()]
    return torch.tensor([[ID[word] for word in line] for line in lines])


def logp_of(wording, questions, tokens):
    """[B, T] nats: the completion's tokens after a wording of the question, teacher-forced."""
    ids = torch.cat([prompts(wording, questions), tokens], 1)
    logits = policy(input_ids=ids, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def accuracy(wording):
    """Of the likeliest answer, over all 55 sums below ten."""
    every = torch.tensor([(a, b) for a in range(10) for b in range(10 - a)])
    with torch.no_grad():
        answers = policy(input_ids=prompts(wording, every)).logits[:, -1].argmax(-1)
    return float((answers == every.sum(1) + ID["0"]).float().mean())


def questions_for(count):
    """[count, 2] int64: two numbers whose sum is below ten."""
    first = torch.randint(10, (count,))
    return torch.stack([first, (torch.rand(count) * (10 - first)).long()], 1)


def update(loss):
    """One step of the optimizer."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def report(step):
    """Accuracies on each wording."""
    shown = ", ".join(f"{accuracy(wording):.0%}" for wording in (CLEAN, *VIEWS))
    print(f"step {step}: right on the clean wording, and on the views: {shown}", flush=True)


for _ in range(120):  # a policy to begin with: it has seen answers after the clean wording alone
    questions = questions_for(128)
    update(-logp_of(CLEAN, questions, questions.sum(1, keepdim=True) + ID["0"]).mean())

optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4)
for step in range(101):
    if step % 20 == 0:
        report(step)
    questions = questions_for(P).repeat_interleave(G, 0)  # [B, 2], B = P·G
    with torch.no_grad():  # sampled on the clean wording alone
        logits = policy(input_ids=prompts(CLEAN, questions)).logits[:, -1]
        tokens = torch.distributions.Categorical(logits=logits).sample()[:, None]
    correct = tokens[:, 0] == questions.sum(1) + ID["0"]
    rewards = correct.float().view(P, G)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    out = roma_loss_from_logp(
        logp_of(CLEAN, questions, tokens),
        torch.stack([logp_of(wording, questions, tokens) for wording in VIEWS]),
        mask=torch.ones_like(tokens, dtype=torch.bool),
        advantages=advantages.flatten(),
        correct=correct,
        aux_view=torch.randint(len(VIEWS), (P * G,)),
        config=config,
    )
    update(out.loss)
