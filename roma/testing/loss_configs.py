"""Which options of the loss Hypothesis draws, and which of them go together."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from roma_kernels.roma_loss.config import RomaConfig


def configs(**fixed: Any) -> st.SearchStrategy[RomaConfig]:
    """Every option of RomaConfig, its numbers from short lists."""
    drawn: dict[str, st.SearchStrategy] = {
        "lambda_inv": st.sampled_from([0.0, 1.0, 3.0]),
        "lambda_aux": st.sampled_from([0.0, 0.5, 1.0]),
        "penalty_ratio": st.sampled_from(["view/clean", "clean/view"]),
        "worst_over": st.sampled_from(["sequence", "token", "batch", "mean"]),
        "penalty_over": st.sampled_from(["all", "correct"]),
        # grpo and None more often: half of all other options are theirs
        "main": st.sampled_from(["grpo", "grpo", None, "cispo", "sapo", "vespo"]),
        "ratio_level": st.sampled_from(["token", "token", "sequence"]),
        "aggregation": st.sampled_from(["grpo", "bnpo", "dapo", "dr_grpo", "luspo"]),
        "clip_low": st.sampled_from([0.1, 0.2]),
        "clip_high": st.sampled_from([0.2, 0.3]),
        "dual_clip": st.sampled_from([None, 1.5, 3.0]),
        "ref_coef": st.sampled_from([0.0, 0.05]),
        "ref_unbiased": st.booleans(),
        "entropy_coef": st.sampled_from([0.0, 0.0, 0.1]),
        "sapo_temperature": st.sampled_from([(1.0, 1.05), (0.5, 2.0)]),
        "vespo": st.sampled_from([(2.0, 3.0, 3.0, 2.0), (1.0, 0.5, 2.0, 1.5)]),
        "aux_old": st.sampled_from(["clean", "view"]),
        "log_ratio_clamp": st.sampled_from([2.0, 20.0]),
        "temperature": st.sampled_from([1.0, 0.7]),
        "softcap": st.sampled_from([None, 5.0]),
        "max_length": st.just(16),
        "gate_bound": st.sampled_from([None, None, 0.02, 0.2]),
        "gate_tau": st.sampled_from([None, None, 0.1]),
    }
    drawn |= {k: st.just(x) for k, x in fixed.items()}
    return st.fixed_dictionaries(drawn).map(lambda options: RomaConfig(**_allowed(options)))


def _allowed(options: dict[str, Any]) -> dict[str, Any]:
    """Drawn options without those that do not apply and would be refused."""
    changes: dict[str, Any] = {}
    if options["main"] is None:  # of which the KL and the bonus are parts
        changes = {"ref_coef": 0.0, "entropy_coef": 0.0}
    if options["main"] is None or options["ref_coef"] == 0:
        changes["ref_unbiased"] = False
    if options["main"] == "vespo":
        changes["ratio_level"] = "token"
    if options["main"] == "cispo" and options["clip_high"] < 1:
        changes["clip_high"] = 1 + options["clip_high"]
    if options["worst_over"] != "sequence":
        changes |= {"gate_bound": None, "gate_tau": None}
    return options | changes
