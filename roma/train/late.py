"""Views that follow from the policy and its rollouts: chosen, searched, made against it.

They are made between sampling and the update, where every rank calls the model equally often.
"""

import time
from dataclasses import replace

from torch import Tensor

from roma.train.collect import Experience
from roma.train.learner import Learner
from roma.train.views import ViewMaker, Views
from roma.train.views.attack import perturb
from roma.train.views.probe import Probe
from roma.train.views.search import search_levels
from roma.views import ViewSpec, seed_for


class LateViews:
    """Completes a step's views.

    Args:
        learner: of the run; has its configuration and its engine.
        view_maker: says what is wanted.
    """

    def __init__(self, learner: Learner, view_maker: ViewMaker) -> None:
        """Keeps both."""
        self.learner, self.maker = learner, view_maker

    @property
    def needed(self) -> bool:
        """Whether the views that the thread made are not yet those of the update."""
        return self.maker.mode.late

    def of(self, experience: Experience, views: Views, step: int) -> Views:
        """The views of the update.

        Args:
            experience: of the step, its rollouts rewarded.
            views: those made while the policy sampled.
            step: counted from 1.
        """
        if self.maker.mode.chooses:
            return self.learner.choose(experience, views)
        if self.maker.mode.searches:
            return self._searched(experience, step)
        return self._attacked(experience, views, step)

    def _probe(self, experience: Experience, views: int) -> Probe:
        engine = self.learner.engine
        return Probe(
            engine.policy_loss,
            experience.batch(Views.none()),
            experience.penalised.view(len(experience.examples), -1),
            views=views,
            call=engine.call,
            limit=self.learner.config.worker.actor.micro_batch_tokens,
        )

    def _searched(self, experience: Experience, step: int) -> Views:
        begin, maker = time.perf_counter(), self.maker
        options, examples = maker.options, experience.examples
        assert options.target_divergence is not None  # the mode says so

        def at(specs: list[list[ViewSpec]]) -> Views:
            policy, prompts = self.learner.engine.policy, experience.prompts
            return maker.at(policy, prompts, examples, specs, step)

        def make(specs: list[list[ViewSpec]]) -> list[Tensor]:
            return at(specs).pixels

        drawn = maker.draw(examples, step)
        found = search_levels(
            self._probe(experience, len(drawn)),
            [[spec.corruption for spec in column] for column in drawn],
            make,
            target=options.target_divergence,
            steps=options.search_steps,
            highest=maker.max_level(step),
            corruptions=maker.corruptions,
        )
        seconds = time.perf_counter() - begin
        return replace(at(found.specs), seconds=seconds, divergence=found.divergence)

    def _attacked(self, experience: Experience, views: Views, step: int) -> Views:
        begin, maker, examples = time.perf_counter(), self.maker, experience.examples
        specs = maker.attacks([example.id for example in examples], step)
        first = len(views.specs)

        def seed(view: int, prompt: int, number: int) -> int:
            own = examples[prompt].id
            return seed_for(maker.seed, step, own, first + view, "attack", number)

        made = perturb(
            self._probe(experience, len(specs)),
            [[_eps(spec) for spec in column] for column in specs],
            seed,
            maker.options.attack,
        )
        policy, prompts = self.learner.engine.policy, experience.prompts
        pixels = [policy.view_pixels(prompts, images) for images in made.images]
        attacks = Views(specs, made.images, pixels, time.perf_counter() - begin)
        both = views.beside(attacks)
        return both if views.specs else replace(both, divergence=made.divergence)


def _eps(spec: ViewSpec) -> float:
    assert not isinstance(spec.parameter, tuple)
    return float(spec.parameter)  # a table may have whole numbers
