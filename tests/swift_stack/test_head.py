"""Log-probs by `roma.linear_logprob` inside swift's trainer, and by swift's own code."""

import pytest
import torch
from swift_stack.test_loss import VIEWS, hold

from roma.integrations.options import RomaOptions
from roma.testing import tolerance


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_two_heads_agree(run, temperature):
    made = {}
    for head in ("roma", "swift"):
        made[head] = run(
            f"{VIEWS},lambda_aux=0",
            learning_rate=0,
            temperature=temperature,
            log_entropy="true",
            top_entropy_quantile=0.5,
            beta=0.04,
            configured={"lm_head": head},
        )
    (ours,), (theirs,) = made["roma"].calls, made["swift"].calls
    assert ours.texts == theirs.texts
    assert len(ours.logp) == len(theirs.logp) > len(ours.mask)
    # A head of D = 96, V = 26 and a soft-max, in two orders; every logit is below 20 in size.
    bound = 2 * tolerance.many(20.0)
    rows = ours.mask.repeat(2, 1)[:4]
    assert (ours.logp[:4] - theirs.logp[:4])[rows].abs().max() <= bound
    views = (ours.logp[4:] - theirs.logp[4:])[ours.logp[4:] != 0]
    assert views.numel() and views.abs().max() <= bound
    (one,), (two,) = made["roma"].logged("entropy/mean"), made["swift"].logged("entropy/mean")
    assert one == pytest.approx(two, abs=bound)


def test_half_precision_keeps_fp32_log_probs(run):
    made = run(VIEWS, torch_dtype="bfloat16", bf16="true", max_steps=2)
    for call in made.calls:
        assert call.logp.dtype == torch.float32
        values = call.logp.detach()[call.logp.detach() != 0]
        assert not torch.equal(values, values.bfloat16().float())  # not rounded on the way
        hold(call, RomaOptions.parse(VIEWS), "grpo", steps=1)
    assert all(norm > 0 for norm in made.norms())


def test_a_wrong_name_of_a_head(run):
    with pytest.raises(ValueError, match="lm_head: expected 'roma' or 'swift', got 'liger'"):
        run(VIEWS, configured={"lm_head": "liger"})
