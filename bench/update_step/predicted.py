"""What the FLOP model of `roma.models.flops` says: of a benchmark's batch, and of large models."""

from typing import TYPE_CHECKING

from bench.providers import OURS
from roma.models.flops import (
    FORMS,
    ROW_WISE_GRPO,
    Cost,
    Form,
    Prompt,
    TextShape,
    VisionShape,
    update,
)

if TYPE_CHECKING:
    from bench.update_step.made import Made
    from roma.train.batch import UpdateBatch

BY_NAME = {
    "grpo": ROW_WISE_GRPO,
    "trl": ROW_WISE_GRPO,
    "grpo shared": Form("clean"),
    "joint": Form("joint", share_prompt=False),
    "lean rows": Form("lean", share_prompt=False),
    OURS: Form("lean"),
    "two-pass": Form("two_pass"),
}

# The published configurations.
MODELS = {
    "Qwen3-VL-4B": (
        TextShape(36, 2560, 9728, 32, 8, 128, 151_936),
        VisionShape(24, 1024, 4096, inputs=3 * 2 * 16**2, merge=2, mergers=4, out=2560),
    ),
    "Qwen3-VL-8B": (
        TextShape(36, 4096, 12_288, 32, 8, 128, 151_936),
        VisionShape(27, 1152, 4304, inputs=3 * 2 * 16**2, merge=2, mergers=4, out=4096),
    ),
}
VIEWS = (0, 1, 2, 4, 8)
TOKENS, IMAGE, COMPLETION, ROLLOUTS = 1200, 1024, 512, 8
PROMPT = Prompt(
    tokens=TOKENS,
    frames=[4 * IMAGE],
    completions=[COMPLETION] * ROLLOUTS,
    right=[i < ROLLOUTS // 2 for i in range(ROLLOUTS)],
)


def of_batch(made: "Made", name: str) -> Cost:
    """A candidate's update of a benchmark's batch."""
    config = made.policy.model.config
    return update(
        TextShape.of(config),
        VisionShape.of(config),
        prompts_of(made.batch),
        BY_NAME[name],
        views=len(made.batch.view_pixels),
        checkpointed=made.layout.checkpointed,
    )


def prompts_of(batch: "UpdateBatch") -> list[Prompt]:
    """A batch's prompts, as the model takes them; their rollouts are in order."""
    patches = batch.prompts.grids.prod(-1).tolist()
    count = len(batch.prompts.images)
    size = len(batch.group) // count
    lengths, right = batch.mask.sum(-1).tolist(), batch.correct.tolist()
    learns = (batch.advantages.view(len(right), -1) != 0).any(1).tolist()
    drawn = None if batch.aux_view is None else batch.aux_view.tolist()
    found = []
    for p in range(count):
        own = slice(p * size, (p + 1) * size)
        found.append(
            Prompt(
                tokens=batch.prompts.lengths[p],
                frames=[patches[i] for i in batch.prompts.images_of(p)],
                completions=lengths[own],
                right=right[own],
                learns=learns[own],
                aux=None if drawn is None else drawn[own],
            )
        )
    return found


def table() -> str:
    """Of each large model FLOP by form and K, and of the first one what they consist of."""
    parts = [*map(_ratios, MODELS), _shares(next(iter(MODELS)))]
    parts.append(
        f"A prompt of {TOKENS} tokens, {IMAGE} of them of an image; G = {ROLLOUTS} rollouts of "
        f"{COMPLETION} tokens, {sum(PROMPT.right)} of them right, all with an advantage; nothing "
        "frozen, nothing checkpointed."
    )
    return "\n\n".join(parts)


def _ratios(model: str) -> str:
    """FLOP over those of GRPO with a row and a vision pass per rollout."""
    one = _of(model, ROW_WISE_GRPO, 0)
    lines = [
        f"| FLOP, {model} | {' | '.join(f'K = {k}' for k in VIEWS)} |",
        "|---" * (1 + len(VIEWS)) + "|",
    ]
    for label, form in FORMS.items():
        ks = VIEWS[:1] if form.pairs == "clean" else VIEWS
        cells = [f"{_of(model, form, k).total / one.total:.2f}" for k in ks]
        lines.append(f"| {label} | {' | '.join(cells + [''] * (len(VIEWS) - len(ks)))} |")
    return "\n".join(lines)


def _shares(model: str) -> str:
    """GFLOP for each token of a completion, and the tokens that the text model runs for it."""
    lines = [
        f"| GFLOP a completion token, {model} | text model | vision tower | head | all "
        "| packed tokens |",
        "|---" * 6 + "|",
    ]
    for label, form in FORMS.items():
        for views in (0,) if form.pairs == "clean" else (4,):
            found = _of(model, form, views)
            text, vision, head, tokens = (x / COMPLETION / ROLLOUTS for x in found)
            cells = [f"{x / 1e9:.3g}" for x in (text, vision, head, text + vision + head)]
            named = label if not views else f"{label}, K = {views}"
            lines.append(f"| {named} | {' | '.join(cells)} | {tokens:.1f} |")
    return "\n".join(lines)


def _of(model: str, form: Form, views: int) -> Cost:
    return update(*MODELS[model], [PROMPT], form, views=views)
