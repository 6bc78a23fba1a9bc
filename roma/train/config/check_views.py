"""Which options of `algorithm.views` go together."""

from roma.train.config.sections import AlgorithmConfig
from roma.train.config.unused import check_unused
from roma_kernels.errors import fail


def check_views(algorithm: AlgorithmConfig) -> None:
    """Refuses options of views that do not go together, by the dotted key.

    Raises:
        ValueError: the message says which, and what to do.
    """
    views, mode = algorithm.views, algorithm.view_mode
    attack = views.attack
    late = {
        "candidates": views.candidates is not None,
        "target_divergence": views.target_divergence is not None,
        "attack.count": attack.count > 0,
        "pool": views.pool == "adversarial",
    }
    for key, given in late.items():
        if given and mode != "roma":
            off = {"pool": "seen, unseen or extra", "attack.count": "0"}.get(key, "null")
            remedy = "they follow from the rollouts: leave it out, or set algorithm.view_mode=roma"
            _refuse(key, f"{off} with algorithm.view_mode={mode}", _value(views, key), remedy)
    used = [key for key, given in late.items() if given]
    if len(used) > 1:
        got = " beside ".join(f"algorithm.views.{k}={_value(views, k)}" for k in used[1:])
        remedy = "each makes views after the rollouts in its own way: choose one"
        expected = f"{'0' if used[0] == 'attack.count' else 'null'} with {got}"
        _refuse(used[0], expected, _value(views, used[0]), remedy)
    if views.candidates is not None and views.candidates < views.k:
        remedy = "draw at least as many as are kept"
        expected = f"at least algorithm.views.k = {views.k}"
        _refuse("candidates", expected, str(views.candidates), remedy)
    if views.max_level < 1 and (late["attack.count"] or late["pool"]):
        remedy = "an attack of less than one 8-bit level is the image itself: give 3"
        _refuse("max_level", "at least 1 with attacks", f"{views.max_level:g}", remedy)
    if attack.count > views.k:
        remedy = "they are among the K views"
        expected = f"at most algorithm.views.k = {views.k}"
        _refuse("attack.count", expected, str(attack.count), remedy)
    if not late["attack.count"] and not late["pool"]:
        remedy = "it does nothing there: set algorithm.views.pool=adversarial, or attack.count"
        check_unused(attack, "algorithm.views.attack", "without attacked views", remedy)
    if not late["target_divergence"]:
        remedy = "it does nothing there: set algorithm.views.target_divergence"
        where = "without target_divergence"
        check_unused(views, "algorithm.views", where, remedy, options=("search_steps",))
    elif views.strength != "uniform":
        remedy = "the level follows from the divergence: leave it out"
        _refuse("strength", "uniform with target_divergence", views.strength, remedy)


def _value(views: object, key: str) -> str:
    for name in key.split("."):
        views = getattr(views, name)
    return str(views)


def _refuse(key: str, expected: str, got: str, remedy: str) -> None:
    fail(f"algorithm.views.{key}", expected, got, remedy)
