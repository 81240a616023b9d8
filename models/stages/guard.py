"""Applies an optimizer step or refuses it, the same on every rank.

Once a step the ranks exchange three numbers each: loss, gradient norm, and what a signal asked for. From the
same numbers all of them draw the same conclusions. A step whose loss or gradient is not finite is never
applied; what happens then is `NotFinite`. A loss far above the recent ones is told, and may rewind as well.
"""

import json
import math
from pathlib import Path
from statistics import fmean, pstdev

import torch

from data.batch import Batch
from models.stages.faults import NotFinite
from models.stages.ranks import Ranks
from models.stages.reduce import Reduction, pairwise_mean
from models.stages.sharded import whole
from models.stages.signals import Signals
from models.stages.stage import Stage

#: Steps the loss is compared with, and how many there must be.
RECENT, _ENOUGH = 128, 32
#: Batches in a row that may be left out.
MAX_SKIPPED = 10


class Rewind(Exception):  # noqa: N818 - it is no error, but the way back to the last checkpoint
    """The weights have to go back to the last checkpoint; the data goes on after `images_seen`."""

    def __init__(self, images_seen: int, reason: str) -> None:
        super().__init__(reason)
        self.images_seen = images_seen
        self.reason = reason


class Guard:
    """Makes every step, and looks at it before it is applied.

    Args:
        stage: what is trained.
        folder: of the stage, for `faults.jsonl`: what happened, and the keys of the batch, a line a rank.
        ranks: that train together.
        signals: what was asked for.
        reduction: how the gradients come about.
        policy: what follows a step that is not finite.
        spike_zscore: standard deviations above the recent losses from which a loss is a spike; 0 is never.
        rewind_spikes: whether a spike rewinds too.
    """

    def __init__(
        self,
        stage: Stage,
        folder: Path,
        ranks: Ranks,
        signals: Signals,
        reduction: Reduction,
        policy: NotFinite = NotFinite.stop,
        spike_zscore: float = 0.0,
        rewind_spikes: bool = False,
    ) -> None:
        self.stage = stage
        self.path = folder / "faults.jsonl"
        self.ranks = ranks
        self.signals = signals
        self.reduction = reduction
        self.policy = policy
        self.spike_zscore = spike_zscore
        self.rewind_spikes = rewind_spikes
        #: Mean loss of the last step over all ranks, and of this rank's share.
        self.loss = self.own_loss = math.nan
        #: Whether the last step was applied, and what the ranks were asked for, at the most.
        self.applied, self.asked = True, 0
        self._skipped = 0
        self._batch: Batch | None = None

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        """Computes loss and gradients of a batch, and lets `optimizer` apply them if they are finite.

        Args:
            batch: this rank's share of the global batch.
            optimizer: of the trained networks; unchanged where the step is refused.

        Raises:
            FloatingPointError: not finite, and the policy is to stop, or too many were left out in a row.
            Rewind: not finite or a spike, and the policy is to rewind.
            RankError: a rank is gone or does not answer.
        """
        self._batch = batch
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            self.own_loss = self.reduction.gradients(self.stage, batch, trained)
        except RuntimeError as error:  # gradients are exchanged in the backward pass
            if self.ranks.size > 1 and ("gloo" in str(error) or "NCCL" in str(error)):
                raise self.ranks.explain(error) from error
            raise
        parameters = [p for p in trained if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        every = self.ranks.gather([self.own_loss, float(norm), float(self.signals.asked)])
        self.loss = pairwise_mean([loss for loss, _, _ in every])
        self.asked = max(int(asked) for _, _, asked in every)
        self.applied = all(math.isfinite(number) for row in every for number in row)
        if not self.applied:
            self._refuse()
            return
        self._skipped = 0
        self._look_for_spike()
        torch.nn.utils.clip_grads_with_norm_(parameters, self.stage.plan.gradient_clip, norm)
        optimizer.step()

    def _refuse(self) -> None:
        stage, seen = self.stage.name, self.stage.images_seen
        what = f"stage {stage} at {seen} images: the loss or a gradient is not finite"
        self._write("not finite")
        self._skipped += 1
        if self.policy is NotFinite.rewind:
            raise Rewind(seen + self.stage.plan.batch_size, what)
        if self.policy is NotFinite.skip and self._skipped <= MAX_SKIPPED:
            return
        times = f" {self._skipped} times in a row" if self._skipped > 1 else ""
        raise FloatingPointError(
            f"{what}{times}; the step was not applied and the batch's keys are in {self.path}; lower "
            f"optimizer.{stage}.lr, or look at those samples, then continue with resume=true; or leave them "
            "out with trainer.not_finite=skip"
        )

    def _look_for_spike(self) -> None:
        recent = self.stage.recent_losses
        if self.spike_zscore and len(recent) >= _ENOUGH:
            score = (self.loss - fmean(recent)) / max(pstdev(recent), 1e-12)
            if score > self.spike_zscore:
                self._write(f"spike of {score:.1f} standard deviations")
                what = (
                    f"stage {self.stage.name} at {self.stage.images_seen} images: the loss {self.loss:.4g} "
                    f"is a spike, {score:.1f} standard deviations above the recent ones"
                )
                if self.rewind_spikes:
                    raise Rewind(self.stage.images_seen + self.stage.plan.batch_size, what)
                if self.ranks.first:
                    print(f"{what}; the batch's keys are in {self.path}", flush=True)
        recent.append(self.loss)
        del recent[:-RECENT]

    def _write(self, what: str) -> None:
        assert self._batch is not None
        entry = {
            "images": self.stage.images_seen, "what": what, "rank": self.ranks.rank,
            "loss": repr(self.own_loss), "indices": self._batch.indices.tolist(), "keys": self._batch.keys,
        }  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
