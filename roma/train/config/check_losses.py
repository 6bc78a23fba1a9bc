"""Options of the loss that do not go together, or do nothing where they stand."""

from collections.abc import Callable

from roma.train.config.sections import AlgorithmConfig, Config
from roma.train.config.unused import check_unused
from roma_kernels.errors import fail

CONTRASTS = ("papo", "dvrp")
"""View modes whose views have no gradient."""

_NO_PENALTY = "without a penalty (algorithm.view_mode=roma and lambda_inv > 0)"


def check_loss(config: Config) -> None:
    """Refuses what cannot be, by the dotted key.

    Raises:
        ValueError: an option of a method that is off, a target without a value, a form of the
            update that a method cannot have, weights that an objective takes another way.
    """
    checks: tuple[Callable[[Config], None], ...] = (
        _check_contrast,
        _check_control,
        _check_gate,
        _check_penalised,
        _check_objective,
        _check_sampler,
    )
    for check in checks:
        check(config)


def _check_contrast(config: Config) -> None:
    algorithm = config.algorithm
    for name in CONTRASTS:
        if algorithm.view_mode != name:
            _check_off(algorithm, name, f"algorithm.view_mode={name}")
    if algorithm.view_mode in CONTRASTS and config.worker.actor.update == "two_pass":
        remedy = "no view has a gradient, so that none is chosen: leave it out"
        expected = f"auto, joint or lean with algorithm.view_mode={algorithm.view_mode}"
        fail("worker.actor.update", expected, "two_pass", remedy)


def _check_control(config: Config) -> None:
    algorithm, control = config.algorithm, config.algorithm.control
    if control.target == "none":
        _check_off(algorithm, "control", "algorithm.control.target")
        return
    if algorithm.view_mode != "roma":
        expected = f"none with algorithm.view_mode={algorithm.view_mode}"
        remedy = "there is no penalty whose weight could move: leave it out"
        fail("algorithm.control.target", expected, control.target, remedy)
    if control.value is None:
        usual = "0.02 nats a token" if control.target == "penalty" else "0.3, a share"
        remedy = f"give what is to be held, e.g. {usual}"
        expected = f"a number with target={control.target}"
        fail("algorithm.control.value", expected, "nothing (null)", remedy)
    if control.target == "gradient_share" and control.value >= 1:
        remedy = "it is the penalty's share of both norms"
        expected = "less than 1 with target=gradient_share"
        fail("algorithm.control.value", expected, f"{control.value:g}", remedy)
    if control.target == "penalty" and algorithm.roma.gate_tau is not None:
        expected = "null with algorithm.control.target=penalty"
        remedy = "it lowers the penalty of larger divergences: take gradient_share, or gate_bound"
        fail("algorithm.roma.gate_tau", expected, f"{algorithm.roma.gate_tau:g}", remedy)
    start = algorithm.roma.lambda_inv
    if not control.low <= start <= control.high:
        expected = f"within control.low = {control.low:g} and control.high = {control.high:g}"
        remedy = "it is where λ_inv starts; correct one of the three"
        fail("algorithm.roma.lambda_inv", expected, f"{start:g}", remedy)


def _check_gate(config: Config) -> None:
    algorithm, roma = config.algorithm, config.algorithm.roma
    quantile = algorithm.views.gate_quantile
    used = _penalises(algorithm)
    options = {
        "algorithm.views.gate_quantile": quantile,
        "algorithm.roma.gate_bound": roma.gate_bound,
        "algorithm.roma.gate_tau": roma.gate_tau,
    }
    for key, value in options.items():
        if value is not None and not used:
            remedy = "there is nothing to leave out: leave it out"
            fail(key, f"null {_NO_PENALTY}", f"{value:g}", remedy)
    if quantile is not None and roma.gate_bound is not None:
        remedy = "the quantile is its bound: give one of the two"
        fail("algorithm.roma.gate_bound", "null with views.gate_quantile", "both", remedy)
    if quantile is not None and roma.worst_over != "sequence":
        expected = "sequence with algorithm.views.gate_quantile"
        remedy = "the others have no view of a rollout to leave out"
        fail("algorithm.roma.worst_over", expected, roma.worst_over, remedy)


def _check_penalised(config: Config) -> None:
    if not _penalises(config.algorithm):
        remedy = "there is none to put on a rollout: leave it out"
        check_unused(config.algorithm, "algorithm", _NO_PENALTY, remedy, options=("penalised",))


def _check_objective(config: Config) -> None:
    mode = config.algorithm.view_mode
    if config.algorithm.roma.main is None and mode != "roma":
        expected = f"grpo, cispo, sapo or vespo with algorithm.view_mode={mode}"
        fail("algorithm.roma.main", expected, "null", "nothing else learns from the rewards")
    if config.algorithm.roma.aggregation == "bnpo":
        remedy = (
            "its divisor is the tokens of a micro-batch, which depend on "
            "worker.actor.micro_batch_tokens and on what is run: take dapo"
        )
        fail("algorithm.roma.aggregation", "grpo, dapo, dr_grpo or luspo", "bnpo", remedy)


def _check_sampler(config: Config) -> None:
    rollout = config.worker.rollout
    for name, value in (("weight", rollout.weight), ("off_policy", rollout.off_policy)):
        if rollout.name == "hf" and value not in ("none", None):
            remedy = "transformers samples from the policy itself: leave it out"
            usual = "none" if name == "weight" else "null"
            fail(
                f"worker.rollout.{name}", f"{usual} with worker.rollout.name=hf", str(value), remedy
            )
    if rollout.weight == "none" and rollout.weight_level != "token":
        expected = "token with worker.rollout.weight=none"
        fail("worker.rollout.weight_level", expected, rollout.weight_level, "choose a weight too")
    vespo = config.algorithm.roma.main == "vespo"
    if vespo and rollout.weight == "mask":
        expected = "none or truncate with algorithm.roma.main=vespo"
        remedy = "vespo multiplies a rollout's weights: one token's 0 would silence all of it"
        fail("worker.rollout.weight", expected, "mask", remedy)
    if vespo and rollout.weight != "none" and rollout.weight_level == "sequence":
        expected = "token with algorithm.roma.main=vespo"
        remedy = "vespo multiplies the weights of a rollout's tokens itself: leave it out"
        fail("worker.rollout.weight_level", expected, "sequence", remedy)
    if config.algorithm.view_mode == "noisy_rollout" and rollout.off_policy is not None:
        expected = "null with algorithm.view_mode=noisy_rollout"
        remedy = "the sampler's log-probs of noisy rollouts are of another image: leave it out"
        fail("worker.rollout.off_policy", expected, f"{rollout.off_policy:g}", remedy)


def _penalises(algorithm: AlgorithmConfig) -> bool:
    return algorithm.view_mode == "roma" and algorithm.roma.penalises


def _check_off(algorithm: AlgorithmConfig, name: str, switch: str) -> None:
    remedy = f"it does nothing there: leave it out, or give {switch}"
    check_unused(getattr(algorithm, name), f"algorithm.{name}", f"without {switch}", remedy)
