"""What the documents' tables hold, and how their rows are called."""

from experiments.science.plan import CHOSEN, SEVERITIES, at

ROMA, NAIVE = at("roma", CHOSEN), at("naive", CHOSEN)
_MOST = max(SEVERITIES)

ABLATIONS = {
    "roma_no_penalty": "no penalty (λ_inv 0)",
    "roma_no_aux": "no auxiliary loss (λ_aux 0)",
    "roma_no_mask": "penalty on wrong answers too",
    "roma_mean_view": "mean of the views, not the worst",
    "roma_token_worst": "worst view of each token",
    "roma_k1": "K = 1",
    "roma_k4": "K = 4",
    "roma_inv3": "λ_inv 3",
    "roma_aux0.5": "λ_aux 0.5",
    "roma_reverse": "penalty in the other direction",
    "roma_gate": "legibility gate, τ 0.3",
}
"""Arms of the ablations → what they change, in the order of their table."""

ABLATED_COLUMNS = ("clean", "seen L3", "unseen L3", "unseen L4")

ROLLOUTS = (
    ("base", "warm start", "clean"),
    ("base", "warm start", "views to 2"),
    ("base", "warm start", "views to 3.5"),
    ("base", "warm start", "views to 5"),
    ("naive_2", "naive augmentation, trained", "views to 2"),
    ("naive_3.5", "naive augmentation, trained", "views to 3.5"),
    ("naive_5", "naive augmentation, trained", "views to 5"),
    ("roma_3.5", "ROMA, trained on views to 3.5", "clean"),
    ("roma_5", "ROMA, trained on views to 5", "clean"),
)
"""Arm, what it is called, the images of its rollouts."""

READERS = {
    "base": "warm start",
    "grpo": "GRPO",
    **{at("naive", s): f"naive augmentation, views to {s:g}" for s in SEVERITIES},
    **{at("roma", s): f"ROMA, views to {s:g}" for s in SEVERITIES},
}
"""Arms whose greedy answers are read → their names."""

HOPES = (
    ("severity-test", ROMA, NAIVE, "ROMA − naive augmentation", "unseen L3", 3.0),
    ("severity-test", ROMA, NAIVE, "ROMA − naive augmentation", "clean", 1.5),
    ("severity-test", ROMA, "grpo", "ROMA − GRPO", "seen L3", 8.0),
    ("severity-test", ROMA, "grpo", "ROMA − GRPO", "unseen L3", 3.0),
    ("severity-test", ROMA, "grpo", "ROMA − GRPO", "clean", -0.5),
    ("time-test", ROMA, "grpo_equal_time", "ROMA − GRPO of equal time", "unseen L3", 2.0),
    ("time-test", ROMA, "grpo_equal_time", "ROMA − GRPO of equal time", "clean", -0.5),
)
"""File, arm, against, their name, column, the least that was hoped for in points."""

NAMES = {
    "severity_pairs": [
        *((at("roma", s), at("naive", s), f"ROMA − naive, views to {s:g}") for s in SEVERITIES),
        *((at("roma", s), "grpo", f"ROMA − GRPO, views to {s:g}") for s in SEVERITIES),
        *((at("naive", s), "grpo", f"naive − GRPO, views to {s:g}") for s in SEVERITIES),
    ],
    "poison_pairs": [
        (at("naive", _MOST), "grpo", "naive − GRPO, usual reward"),
        (f"{at('naive', _MOST)}_checked", "grpo_checked", "naive − GRPO, digits checked"),
        ("grpo_checked", "grpo", "GRPO: checked − usual"),
        (f"{at('naive', _MOST)}_checked", at("naive", _MOST), "naive: checked − usual"),
    ],
    "time_arms": {
        "grpo": "GRPO",
        "grpo_equal_time": "GRPO, equal time",
        NAIVE: "naive augmentation",
        f"{NAIVE}_equal_time": "naive augmentation, equal time",
        ROMA: "ROMA",
        "roma_k1": "ROMA, K = 1",
        "roma_k1_equal_time": "ROMA, K = 1, equal time",
        f"{at('naive', _MOST)}_equal_time": f"naive augmentation, views to {_MOST:g}, equal time",
        at("roma", _MOST): f"ROMA, views to {_MOST:g}",
    },
    "time_pairs": [
        (ROMA, "grpo_equal_time", "ROMA − GRPO, equal time"),
        (ROMA, f"{NAIVE}_equal_time", "ROMA − naive, equal time"),
        (
            at("roma", _MOST),
            f"{at('naive', _MOST)}_equal_time",
            f"ROMA − naive, views to {_MOST:g}, equal time",
        ),
        ("roma_k1_equal_time", "grpo_equal_time", "ROMA, K = 1 − GRPO, both equal time"),
        ("roma_k1_equal_time", f"{NAIVE}_equal_time", "ROMA, K = 1 − naive, both equal time"),
        ("roma_k1_equal_time", ROMA, "ROMA, K = 1, equal time − ROMA"),
        ("grpo_equal_time", "grpo", "GRPO: more steps"),
        (f"{NAIVE}_equal_time", NAIVE, "naive: more steps"),
    ],
    "bar_arms": {
        "grpo": "GRPO",
        "grpo_equal_time": "GRPO, equal time",
        "naive": "naive augmentation",
        "naive_equal_time": "naive augmentation, equal time",
        "roma": "ROMA",
    },
    "bar_pairs": [
        ("roma", "grpo", "ROMA − GRPO"),
        ("roma", "naive", "ROMA − naive"),
        ("naive", "grpo", "naive − GRPO"),
        ("roma", "grpo_equal_time", "ROMA − GRPO, equal time"),
        ("roma", "naive_equal_time", "ROMA − naive, equal time"),
    ],
    "demo_arms": {
        "grpo": "GRPO",
        "grpo_equal_time": "GRPO, equal CPU time",
        "naive": "naive augmentation (GRPO on degraded rollouts)",
        "naive_mild": "naive augmentation, views to 2",
        "roma": "ROMA",
    },
    "demo_pairs": [
        ("roma", "grpo", "ROMA − GRPO"),
        ("roma", "naive", "ROMA − naive augmentation"),
        ("roma", "naive_mild", "ROMA − naive augmentation, views to 2"),
        ("roma", "grpo_equal_time", "ROMA − GRPO, equal CPU time"),
        ("naive", "grpo", "naive augmentation − GRPO"),
    ],
}
"""Rows of the tables, by the names that templates call them."""
