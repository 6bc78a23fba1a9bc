"""What is trained and compared: every study of docs/SCIENCE.md, its arms, seeds and pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experiments.runner.jobs import Arm
from experiments.science.task import BARS, DIGITS, Task

SEVERITIES = (2.0, 3.5, 5.0)
"""Highest levels of training views."""
CHOSEN = 3.5
"""The severity of ablations and of equal time, chosen on validation questions."""
SEEDS = (0, 1, 2, 3, 4)

GRPO = Arm(("algorithm.view_mode=none",))
METHODS = {
    "naive": Arm(("algorithm.view_mode=rollout",)),
    "noisyrollout": Arm(("algorithm.view_mode=noisy_rollout",), "demo_noisyrollout.yaml"),
    "dvrp": Arm(("algorithm.view_mode=dvrp",), "demo_dvrp.yaml"),
    "roma": Arm(("algorithm.view_mode=roma",)),
}
"""Methods with views, whose strength is the axis of the figure."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms on a task, and what is compared."""

    name: str
    task: Task
    arms: Mapping[str, Arm]
    pairs: Sequence[tuple[str, str]]
    seeds: Sequence[int] = SEEDS
    as_long_as: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Arm → (its kind, the arm whose CPU time it is given): steps by the ratio of the two runs'
    CPU times, seed by seed."""


def at(method: str, severity: float) -> str:
    """The name of a method's arm.

    Example:
        >>> at("roma", 3.5), at("roma", 2.0)
        ('roma_3.5', 'roma_2')
    """
    return f"{method}_{severity:g}"


def _with_views(method: str, severity: float, *overrides: str) -> Arm:
    own = METHODS[method]
    views = f"algorithm.views.max_level={severity:g}"
    return Arm((views, *own.overrides, *(f"algorithm.{more}" for more in overrides)), own.file)


def _severity() -> Study:
    arms = {"grpo": GRPO}
    pairs = []
    for severity in SEVERITIES:
        names = {method: at(method, severity) for method in METHODS}
        arms |= {name: _with_views(method, severity) for method, name in names.items()}
        pairs += [(name, "grpo") for name in names.values()]
        pairs += [(names["roma"], other) for other in list(names.values())[:-1]]
    return Study(name="severity", task=DIGITS, arms=arms, pairs=pairs)


ABLATIONS = {
    "no_penalty": ("roma.lambda_inv=0",),
    "no_aux": ("roma.lambda_aux=0",),
    "no_mask": ("penalised=every",),
    "mean_view": ("roma.worst_over=mean",),
    "token_worst": ("roma.worst_over=token",),
    "k1": ("views.k=1",),
    "k4": ("views.k=4",),
    "inv3": ("roma.lambda_inv=3",),
    "aux0.5": ("roma.lambda_aux=0.5",),
    "reverse": ("roma.penalty_ratio=clean/view",),
    "gate": ("roma.gate_tau=0.3",),
}
"""What is changed of ROMA at the chosen severity, below `algorithm`."""


def _time() -> Study:
    """GRPO and naive augmentation for as long as ROMA; and ROMA with one view, which is cheaper."""
    arms, pairs, as_long_as = {"grpo": GRPO}, [], {}
    roma, cheap = at("roma", CHOSEN), "roma_k1"
    longer = "grpo_equal_time"
    arms[roma], arms[longer] = _with_views("roma", CHOSEN), GRPO
    as_long_as[longer] = ("grpo", roma)
    pairs += [(roma, longer), (longer, "grpo")]
    for severity in (CHOSEN, max(SEVERITIES)):
        own, naive = at("roma", severity), at("naive", severity)
        longer = f"{naive}_equal_time"
        arms |= {own: _with_views("roma", severity), naive: _with_views("naive", severity)}
        arms[longer] = arms[naive]
        as_long_as[longer] = (naive, own)
        pairs += [(own, longer), (longer, naive)]
    arms[cheap] = _with_views("roma", CHOSEN, *ABLATIONS["k1"])
    longer = f"{cheap}_equal_time"
    arms[longer] = arms[cheap]
    as_long_as[longer] = (cheap, roma)
    others = ("grpo_equal_time", f"{at('naive', CHOSEN)}_equal_time", roma)
    pairs += [(longer, other) for other in others]
    return Study(name="time", task=DIGITS, arms=arms, pairs=pairs, as_long_as=as_long_as)


def _ablations() -> Study:
    roma = at("roma", CHOSEN)
    arms = {"grpo": GRPO, roma: _with_views("roma", CHOSEN)}
    arms |= {
        f"roma_{name}": _with_views("roma", CHOSEN, *changes) for name, changes in ABLATIONS.items()
    }
    pairs = [(name, roma) for name in arms if name not in ("grpo", roma)]
    return Study(name="ablations", task=DIGITS, arms=arms, pairs=pairs, seeds=SEEDS[:3])


CHECKED = (
    "data.answer_key=solution",
    "worker.reward.function=experiments/science/rewards.py:seen_and_right",
)
"""A reward for right answers whose chain names what is there."""


def _poison() -> Study:
    """Naive augmentation at the highest severity, rewarded as usual and without the poison."""
    most = max(SEVERITIES)
    naive = at("naive", most)
    arms = {
        "grpo": GRPO,
        "grpo_checked": Arm((*GRPO.overrides, *CHECKED)),
        naive: _with_views("naive", most),
        f"{naive}_checked": Arm((*_with_views("naive", most).overrides, *CHECKED)),
        at("roma", most): _with_views("roma", most),
    }
    pairs = [
        (naive, "grpo"),
        (f"{naive}_checked", "grpo_checked"),
        ("grpo_checked", "grpo"),
        (f"{naive}_checked", naive),
    ]
    return Study(name="poison", task=DIGITS, arms=arms, pairs=pairs)


def _bars() -> Study:
    file = BARS.config
    arms = {
        "grpo": Arm(("algorithm.view_mode=none",), file),
        "naive": Arm(("algorithm.view_mode=rollout",), file),
        "roma": Arm(("algorithm.view_mode=roma",), file),
        "grpo_equal_time": Arm(("algorithm.view_mode=none",), file),
        "naive_equal_time": Arm(("algorithm.view_mode=rollout",), file),
    }
    pairs = [("roma", "grpo"), ("roma", "naive"), ("naive", "grpo")]
    pairs += [("roma", "grpo_equal_time"), ("roma", "naive_equal_time")]
    return Study(
        name="bars",
        task=BARS,
        arms=arms,
        pairs=pairs,
        as_long_as={"grpo_equal_time": ("grpo", "roma"), "naive_equal_time": ("naive", "roma")},
    )


STUDIES = {study.name: study for study in (_severity(), _time(), _poison(), _bars(), _ablations())}
"""In the order in which they are run: a later one takes runs of an earlier one as they are."""
