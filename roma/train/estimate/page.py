"""The estimate as text."""

from roma.train.config import Config
from roma.train.estimate.run import Estimate

_PHASES = {"sampling": "while sampling", "update": "in the update", "step": "at the step"}


def page(config: Config, found: Estimate) -> str:
    """What `roma train --dry-run` prints below the configuration."""
    parameters, steps = found.parameters, config.trainer.total_steps
    prompts = config.data.rollout_batch_size
    answers = prompts * config.worker.rollout.n
    tokens = answers * found.sizes.response
    a_step = found.sampling_s + found.learning_s
    rows = [(part.name, part.size, part) for part in found.parts if part.size]
    width = max(len(name) for name, _, _ in rows)
    when = "".join(f"{phase:>10}" for phase in _PHASES)
    lines = [
        f"engine: {found.engine}, {found.ranks} rank{'s' * (found.ranks > 1)}",
        f"parameters: {parameters.total:,}, trained {parameters.trained:,}",
        "",
        f"{'memory a rank, MiB':<{width}}{'':>12}{when}",
        *(
            f"{name:<{width}}{size / 2**20:>12,.1f}"
            + "".join(f"{'x' if getattr(part, phase) else '':>10}" for phase in _PHASES)
            for name, size, part in rows
        ),
        *(
            f"{'peak ' + text:<{width}}{found.peak(phase) / 2**20:>12,.1f}"
            for phase, text in _PHASES.items()
        ),
        "",
        f"largest micro-batch: {found.batch.tokens:,.0f} tokens of the text model, "
        f"{found.batch.patches:,.0f} patches, {found.batch.rows:,.0f} rows of the head; "
        f"{found.micro_batches} of them an optimizer step",
        f"steps: {steps:,} of {prompts:,} prompts and {answers:,} answers, "
        f"{config.updates_per_step} optimizer steps each; "
        f"{steps * prompts / found.rows:.2f} epochs of {found.rows:,} rows",
        f"tokens: {tokens:,.0f} of answers a step, {steps * tokens:,.0f} in all",
        f"FLOP: {found.work.total:.3g} a step (update {found.work.update:.3g}, scoring "
        f"{found.work.scoring:.3g}, sampling {found.work.sampling:.3g}), "
        f"{steps * found.work.total:.3g} in all",
        f"time: {a_step:,.3g} s a step (sampling {found.sampling_s:,.3g}, learning "
        f"{found.learning_s:,.3g}), {_span(steps * a_step)} in all",
        "",
        *found.said,
        "not counted: docs/METRICS.md, Before a run",
    ]
    return "\n".join(lines) + "\n"


def _span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
