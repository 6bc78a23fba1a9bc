"""Which methods of `methods.py` go together, and options of one that is not chosen."""

from roma.train.config.methods import SrpoConfig
from roma.train.config.sections import AlgorithmConfig, Config
from roma.train.config.unused import check_unused
from roma_kernels.errors import fail

_SWITCH = {
    "mssr": ("adv_estimator", "mssr"),
    "srpo": ("reweight", "srpo"),
    "vgpo": ("reweight", "vgpo"),
    "noisy_rollout": ("view_mode", "noisy_rollout"),
}
"""Sub-section of `algorithm` -> the key and the value that turn its method on."""


_PART = {
    ("mssr", "entropy_coef", 0.0): ("entropy", "entropy_divisor"),
    ("noisy_rollout", "anneal", False): ("steepness", "midpoint"),
}
"""Sub-section, option of it and the value that turns a part of its method off -> options of that
part."""


def check_methods(config: Config) -> None:
    """Refuses methods that cannot be combined, by the dotted key.

    Raises:
        ValueError: an option of a method, or of a part of it, that is off; a group of one, or of
            several, where the estimator needs the other; tags that are none; NoisyRollout without a
            clean and a noisy rollout.
    """
    _check_options(config.algorithm)
    _check_parts(config.algorithm)
    _check_group(config)
    _check_tags(config.algorithm.srpo)
    if config.algorithm.view_mode == "noisy_rollout":
        _check_noisy(config)


def scoring_passes(algorithm: AlgorithmConfig) -> int:
    """How often a step scores its rollouts for their advantages, before the update.

    A pass serves all that reads the log-probs, entropies or hidden states on the clean images.
    """
    entropy = algorithm.adv_estimator == "mssr" and algorithm.mssr.entropy_coef > 0
    clean = int(entropy or algorithm.reweight != "none")
    if algorithm.reweight != "srpo":
        return clean
    return clean + (2 if algorithm.srpo.contrast == "blind" else 1)


def _check_options(algorithm: AlgorithmConfig) -> None:
    for name, (key, value) in _SWITCH.items():
        if getattr(algorithm, key) != value:
            switch = f"algorithm.{key}={value}"
            remedy = f"it does nothing there: leave it out, or give {switch}"
            section = getattr(algorithm, name)
            check_unused(section, f"algorithm.{name}", f"without {switch}", remedy)


def _check_parts(algorithm: AlgorithmConfig) -> None:
    remedy = "it does nothing there: leave one of the two out"
    for (name, switch, off), options in _PART.items():
        section = getattr(algorithm, name)
        if getattr(section, switch) == off:
            where = f"with algorithm.{name}.{switch}={off}"
            check_unused(section, f"algorithm.{name}", where, remedy, options=options)


def _check_group(config: Config) -> None:
    count, estimator = config.worker.rollout.n, config.algorithm.adv_estimator
    if estimator == "mssr" and count != 1:
        remedy = f"set it to 1, and data.rollout_batch_size to {count} times as many questions"
        fail("worker.rollout.n", "1 with algorithm.adv_estimator=mssr", str(count), remedy)
    if estimator == "rloo" and count == 1:
        remedy = "it averages a prompt's other rollouts"
        fail("worker.rollout.n", "at least 2 with rloo", "1", remedy)
    if estimator != "mssr" and count == 1:
        remedy = "A is 0 for every rollout: raise it"
        if config.algorithm.view_mode != "noisy_rollout":  # which mssr cannot have
            remedy += ", or take algorithm.adv_estimator=mssr"
        fail("worker.rollout.n", f"at least 2 with {estimator}", "1", remedy)


def _check_tags(options: SrpoConfig) -> None:
    tags = {"perception_tag": options.perception_tag, "reasoning_tag": options.reasoning_tag}
    for name, texts in tags.items():
        if not all(texts) or texts[0] == texts[1]:
            remedy = "give what opens and what closes it"
            fail(f"algorithm.srpo.{name}", "two different texts, none empty", str(texts), remedy)
    if options.perception_tag[0] == options.reasoning_tag[0]:
        expected, got = (
            "a tag that opens otherwise than perception_tag",
            repr(tags["reasoning_tag"]),
        )
        fail("algorithm.srpo.reasoning_tag", expected, got, "name two different tags")


def _check_noisy(config: Config) -> None:
    rollout, noisy = config.worker.rollout, config.algorithm.noisy_rollout.noisy
    if config.algorithm.adv_estimator == "mssr":  # all others have refused n = 1
        remedy = "its one rollout a question cannot be both clean and noisy: take grpo"
        expected = "grpo, dr_grpo or rloo with algorithm.view_mode=noisy_rollout"
        fail("algorithm.adv_estimator", expected, "mssr", remedy)
    if noisy is not None and noisy >= rollout.n:
        expected = f"less than worker.rollout.n = {rollout.n}"
        remedy = "a rollout at least sees the clean image; view_mode=rollout degrades all"
        fail("algorithm.noisy_rollout.noisy", expected, str(noisy), remedy)
    if rollout.weight != "none":
        remedy = "the sampler's log-probs of noisy rollouts are of another image; take none"
        expected = "none with algorithm.view_mode=noisy_rollout"
        fail("worker.rollout.weight", expected, rollout.weight, remedy)
