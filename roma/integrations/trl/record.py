"""What ROMA tells in TRL's log and in its table of completions."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roma import RomaConfig, RomaLoss, view_divergence
from roma.integrations.terms import PREFIX, by_corruption, corruption_metrics, metrics_of
from roma.integrations.views import Pair

_LOG = logging.getLogger(__name__)
_PATIENCE = 20  # steps
_NEEDED = {  # without it ROMA does nothing
    PREFIX + "correct": "is the first reward function that of accuracy, and accuracy_threshold "
    "below what it gives for a right answer? Else name it: accuracy_reward",
    PREFIX + "has_views": "no row had an image, or your view_fn made no views",
}

_COLUMNS = ("roma/correct", "roma/penalty", "roma/worst_view")


class Record:
    """Metrics under TRL's manner of naming, each over all ranks.

    A step's log has roma/penalty_worst, roma/penalty_mean, roma/aux_loss, roma/aux_clipfrac (the
    formulas are those of `roma.METRICS`), roma/correct and roma/has_views (shares of rollouts),
    roma/penalty/<corruption> (mean divergence of right rollouts, nats) and
    roma/worst_view/<corruption> (how often it was the worst).

    Args:
        trainer: the GRPOTrainer.
        names: of all corruptions that a view can be of, in an order that all ranks share.
    """

    def __init__(self, trainer: Any, names: Sequence[str]) -> None:
        """Remembers where to write."""
        self.trainer, self.names = trainer, list(names)
        self._since: int | None = None  # step of the first loss; of a resumed run not 0
        self._seen: set[str] = set()
        self._warned = False
        self._sums = {mode: self._blank() for mode in ("train", "eval")}
        # Rows that the table got in all, and before the last generation of each mode: an evaluation
        # may come between a generation and the steps that train on it.
        self._written = 0
        self._before = {"train": 0, "eval": 0}

    def _blank(self) -> Tensor:
        return torch.zeros(len(self.names), 3, dtype=torch.float64)

    def _mode(self) -> str:
        return "train" if self.trainer.model.training else "eval"

    def loss(
        self,
        mode: str,
        out: RomaLoss,
        *,
        mask: Tensor,
        correct: Tensor,
        has_views: Tensor,
        pairs: Sequence[Pair],
        names: Sequence[str],
        config: RomaConfig,
        shards: int,
    ) -> None:
        """Notes a micro-batch; every rank calls it.

        Args:
            mode: "train" or "eval".
            out: what `view_terms` returned.
            mask: as there, and so are the following two.
            correct: [B] bool.
            has_views: [B] bool.
            pairs: that were run.
            names: their corruptions.
            config: as there.
            shards: micro-batches times ranks of the totals.
        """
        accelerator = self.trainer.accelerator
        if self._since is None:
            self._since = self.trainer.state.global_step
        right = correct.cpu() & has_views
        values = metrics_of(out, shards)
        values[PREFIX + "correct"] = float(correct.float().mean())
        values[PREFIX + "has_views"] = float(has_views.float().mean())
        sums = by_corruption(out, mask, right, pairs, names, config)
        own = self._blank()
        for number, name in enumerate(self.names):
            own[number] += sums.get(name, 0)
        flat = torch.cat([torch.tensor(list(values.values())), own.flatten().float()])
        total = accelerator.reduce(flat.to(accelerator.device), reduction="sum").cpu().double()
        for (name, _), value in zip(values.items(), total.tolist(), strict=False):
            self.trainer._metrics[mode][name].append(value / accelerator.num_processes)
        self._sums[mode] += total[len(values) :].view(-1, 3)
        self._seen |= {name for name in _NEEDED if self.trainer._metrics[mode][name][-1] > 0}

    def flush(self, mode: str) -> None:
        """Puts what was summed since the last log under its names."""
        step = self.trainer.state.global_step
        if self._since is not None and step - self._since >= _PATIENCE and not self._warned:
            self._warned = True
            for name in [name for name in _NEEDED if name not in self._seen]:
                if self.trainer.accelerator.is_main_process:
                    _LOG.warning("%s was 0 in %d steps: %s", name, _PATIENCE, _NEEDED[name])
        sums = dict(zip(self.names, self._sums[mode], strict=True))
        for name, value in corruption_metrics(sums).items():
            self.trainer._metrics[mode][name].append(value)
        self._sums[mode] = self._blank()

    def completions(self, correct: Tensor) -> None:
        """Adds columns to the table of completions; every rank calls it after a generation."""
        flags = [bool(flag) for flag in self.trainer.accelerator.gather(correct).tolist()]
        self._before[self._mode()] = self._written
        self._written += len(flags)
        blank: list[Any] = [None] * len(flags)
        for column, values in zip(_COLUMNS, (flags, blank, blank), strict=True):
            self.trainer._logs["extra"][column].extend(values)

    def worst(
        self,
        out: RomaLoss,
        rows: Tensor,
        *,
        mask: Tensor,
        correct: Tensor,
        pairs: Sequence[Pair],
        names: Sequence[str],
        config: RomaConfig,
    ) -> None:
        """Fills the columns of the right rollouts of a micro-batch; every rank calls it.

        Args:
            out: what `view_terms` returned.
            rows: [B] int64: where each rollout stands in the table.
            mask: as in `loss`, and so are the following.
            correct: [B] bool: right and with views.
            pairs: that were run.
            names: their corruptions.
            config: as there.
        """
        from accelerate.utils import gather_object

        divergence = view_divergence(out.logp, out.view_logp, mask.bool(), config=config)
        value, view = (x.tolist() for x in divergence.cpu().max(0))
        named = dict(zip(pairs, names, strict=True))
        own = [
            (row, value[b], named[view[b], b])
            for b, (row, right) in enumerate(zip(rows.tolist(), correct.tolist(), strict=True))
            if right and (view[b], b) in named
        ]
        extra = self.trainer._logs["extra"]
        behind = self._written - self._before[self._mode()]
        for row, penalty, name in gather_object(own):
            for column, entry in (("roma/penalty", penalty), ("roma/worst_view", name)):
                place = len(extra[column]) - behind + row
                if place >= 0:
                    extra[column][place] = entry
