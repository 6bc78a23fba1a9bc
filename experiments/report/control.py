"""How λ moved, and what it was to hold: `python -m experiments.report.control OUT.png RUN …`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from roma.evaluate.figures import KINDS, save, styled

HELD = {
    "penalty": ("actor/roma_penalty_right", "penalty, nats a token"),
    "gradient_share": ("actor/gradient_share", "share of norms"),
}
"""Target of `algorithm.control` → the metric that it holds, and its unit."""

Run = tuple[str, float, Sequence[Mapping[str, Any]]]
"""Target, value, and rows of metrics.jsonl."""


def read_run(folder: str | Path) -> Run:
    """A run folder's target, value and metrics."""
    config = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    control = config["algorithm"]["control"]
    return control["target"], control["value"], [json.loads(line) for line in lines]


@styled
def moving(runs: Sequence[Run]) -> Figure:
    """For each run λ_inv over the steps, and below it what it holds, with its target.

    Args:
        runs: of `read_run`.
    """
    figure = Figure(figsize=(5.0 * len(runs), 4.6), layout="constrained")
    panels = figure.subplots(2, len(runs), sharex=True, squeeze=False)
    for (target, value, rows), (above, below) in zip(runs, panels.T, strict=True):
        metric, unit = HELD[target]
        steps = [row["step"] for row in rows if "actor/lambda_inv" in row]
        above.plot(steps, [row["actor/lambda_inv"] for row in rows if "actor/lambda_inv" in row],
                   color=KINDS[0])  # fmt: skip
        above.set(title=f"target: {target.replace('_', ' ')} {value:g}", ylabel="λ_inv")
        above.set_yscale("log")
        seen = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        at, held = np.array(seen, dtype=np.float64).reshape(-1, 2).T
        below.plot(at, held, ".", ms=3, color=KINDS[2])
        width = max(1, len(held) // 20)
        smooth = np.convolve(held, np.ones(width) / width, "valid")
        below.plot(at[width // 2 :][: len(smooth)], smooth, color=KINDS[0])
        below.axhline(value, color="#777777", linewidth=1, linestyle="--")
        below.set(xlabel="step", ylabel=unit)
    return figure


if __name__ == "__main__":
    print(save(moving([read_run(folder) for folder in sys.argv[2:]]), Path(sys.argv[1])))
