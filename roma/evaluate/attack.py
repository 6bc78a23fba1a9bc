"""Accuracy under attack: each question is answered on its image, attacked, and answered again.

The target of an attack is the model's own clean answer: PGD (`roma.train.views.attack`) looks for
the image within ε levels on which that answer's log-probs move most. So two models see different
images, each those that are worst for it.

Passes for n questions: a greedy answer and one scoring pass; and for each ε `steps` forward and
backward to the pixels, one forward, and one greedy answer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from roma import RomaConfig
from roma.data import Example
from roma.evaluate.answers import Answer, answers_of, correct_answers
from roma.evaluate.conditions import Cell, Image
from roma.evaluate.result import CellResult, EvalResult
from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.rewards import RewardFunction, compute_score
from roma.rollout.hf import generate
from roma.train.batch import UpdateBatch
from roma.train.config.views import AttackConfig
from roma.train.scoring import Scorer
from roma.train.views.attack import perturb
from roma.train.views.probe import Probe
from roma.views import ADVERSARIAL, CORRUPTIONS, Corruption, seed_for
from roma_kernels.errors import fail


def evaluate_attacked(
    policy: Policy,
    examples: Iterable[Example],
    cells: Sequence[Cell],
    *,
    max_new_tokens: int,
    corruptions: Mapping[str, Corruption] | None = None,
    options: AttackConfig | None = None,
    score: RewardFunction = compute_score,
    seed: int = 0,
    batch_size: int = 64,
    limit: int | None = 16384,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Greedy answers of a policy on clean images, and on images attacked at each level.

    Args:
        policy: the model.
        examples: the questions; one without an image is answered as it stands.
        cells: of pool "adversarial", as `cells_of(["adversarial"], [3])` gives them.
        max_new_tokens: budget of an answer, tokens.
        corruptions: the table of levels; None: the package's.
        options: steps of the attack, and their size; None: 3 of the usual size. `count` is not
            read.
        score: the reward function; only its "accuracy" is read.
        seed: of the random starts; a part of every image's own seed.
        batch_size: questions answered and attacked at once, ≥ 1.
        limit: tokens of the text model in one pass with a graph; None: no limit.
        progress: called with the number of images just answered.

    Returns:
        The clean cell, then `cells`.

    Raises:
        ValueError: no question, `batch_size` < 1, or a cell of another pool.

    Example:
        >>> from roma.evaluate.conditions import cells_of
        >>> [str(cell) for cell in cells_of(["adversarial"], [3])]
        ['pgd L3']
    """
    asked = list(examples)
    if not asked:
        fail("examples", "at least one", "none", "check the split and the limit")
    if batch_size < 1:
        fail("batch_size", "at least 1", str(batch_size), "8 to 256 are customary")
    attack = Attack(
        policy,
        cells,
        max_new_tokens=max_new_tokens,
        corruptions=corruptions,
        options=options,
        seed=seed,
        limit=limit,
        progress=progress,
    )
    told: dict[Cell, list[Answer]] = {cell: [] for cell in attack.cells}
    for start in range(0, len(asked), batch_size):
        some = asked[start : start + batch_size]
        for cell, answers in attack(some, [example.load_images() for example in some]).items():
            told[cell] += answers
    found = {
        cell: CellResult(correct_answers(own, asked, score), [answer.text for answer in own])
        for cell, own in told.items()
    }
    return EvalResult([example.id for example in asked], found)


class Attack:
    """Answers batches of questions on clean images, and on these attacked at each level.

    Args:
        policy, cells, max_new_tokens, corruptions, options, seed, limit, progress: as those of
            `evaluate_attacked`.

    Attributes:
        cells: the clean one, then those of the pool.

    Raises:
        ValueError: a cell of another pool.
    """

    def __init__(
        self,
        policy: Policy,
        cells: Sequence[Cell],
        *,
        max_new_tokens: int,
        corruptions: Mapping[str, Corruption] | None = None,
        options: AttackConfig | None = None,
        seed: int = 0,
        limit: int | None = 16384,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Checks the cells."""
        for cell in cells:
            if cell.pool != ADVERSARIAL:
                remedy = "evaluate() measures the other pools"
                fail("cells", f"cells of pool {ADVERSARIAL!r}", str(cell), remedy)
        self.cells = (Cell(), *cells)
        self._policy, self._budget, self._limit = policy, max_new_tokens, limit
        self._table, self._options = corruptions or CORRUPTIONS, options or AttackConfig()
        self._seed, self._progress = seed, progress or (lambda _: None)
        self._scorer = Scorer(policy, RomaConfig())

    def __call__(
        self, examples: Sequence[Example], images: Sequence[Sequence[Image]]
    ) -> dict[Cell, list[Answer]]:
        """The greedy answers of a batch at each of `cells`; its images may have any size."""
        policy = self._policy
        prompts = policy.encode_prompts([example.problem for example in examples], images)
        clean = generate(policy, prompts, max_new_tokens=self._budget, temperature=None)
        told = {Cell(): answers_of(policy, clean)}
        self._progress(len(examples))
        if len(self.cells) == 1:
            return told
        group = torch.arange(len(examples), device=policy.device)
        batch = UpdateBatch.to_score(prompts, clean, group)
        every = torch.ones(len(examples), 1, dtype=torch.bool, device=policy.device)
        probe = Probe(self._scorer, batch, every, views=1, limit=self._limit)
        for cell in self.cells[1:]:
            attacked = _attacked(probe, examples, cell, self._table, self._options, self._seed)
            seen = _with_images(policy, prompts, attacked)
            made = generate(policy, seen, max_new_tokens=self._budget, temperature=None)
            told[cell] = answers_of(policy, made)
            self._progress(len(examples))
        return told


def _attacked(
    probe: Probe,
    examples: Sequence[Example],
    cell: Cell,
    table: Mapping[str, Corruption],
    options: AttackConfig,
    seed: int,
) -> list[list[Image]]:
    """The images of each question at a level; an example's own depend on no other."""
    assert cell.corruption is not None  # no cell of the pool lacks one
    eps = table[cell.corruption].parameter(cell.level)
    assert not isinstance(eps, tuple)  # a whole number, where a table has one

    def start(_: int, prompt: int, number: int) -> int:
        return seed_for(seed, examples[prompt].id, number, str(cell.corruption), cell.level)

    return perturb(probe, [[eps] * len(examples)], start, options).images[0]


def _with_images(policy: Policy, prompts: PromptBatch, images: list[list[Image]]) -> PromptBatch:
    return replace(prompts, images=images, pixel_values=policy.view_pixels(prompts, images))
