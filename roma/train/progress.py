"""A run on a terminal: one bar with step, reward, tokens a second, memory and the time left."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_SHOWN = {
    "reward/overall": "reward {:.3f}",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
    "perf/memory_mib": "{:,.0f} MiB",
    "timing_s/step": "{:.1f} s",
}


class ProgressLogger:
    """A bar in the place of a line a step; what is printed meanwhile, warnings too, stays above it.

    Validations keep a line each, since there are few and one compares them.

    Args:
        console: a terminal.
        total_steps: of the run; None: unknown.
        resumed_at: steps that are done already; the time left is that of the others.
    """

    def __init__(
        self, console: Console, *, total_steps: int | None = None, resumed_at: int | None = None
    ) -> None:
        """Shows the bar at once: the first step may take minutes."""
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            # Rich forgets what is older; steps of minutes need more than its 30 s.
            speed_estimate_period=3600.0,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=resumed_at or 0, shown="")
        self._bar.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the bar, and keeps a line of a validation."""
        shown = [form.format(values[name]) for name, form in _SHOWN.items() if name in values]
        self._bar.update(self._task, completed=step, shown="  ".join(shown))
        found = [f"{name} {value:.3f}" for name, value in values.items() if name.startswith("val/")]
        if found:
            self._bar.console.print(Text("  ".join([f"step {step}", *found])), soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.stop()
