"""Applies an optimizer step or refuses it, the same on every rank, and waits for no device.

Once a step the ranks exchange three numbers each: loss, gradient norm, and what a signal asked for. From the
same numbers all of them draw the same conclusions. A step whose loss or gradient is not finite is never
applied: the optimizer's kernel is told on the device, so that the host need not know. It learns of it while
the device computes the next step's gradients, or at once where something is written (`Guard.settle`); what
happens then is `NotFinite`. A loss far above the recent ones is told, and may rewind as well. The average
moves when a step is settled, which is before the next one changes the weights.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor

from data.batch import Batch
from models.stages.faults import NotFinite
from models.stages.ranks import Ranks
from models.stages.readback import Readback
from models.stages.reduce import Reduction, pairwise_mean
from models.stages.sharded import whole
from models.stages.signals import SAVE, Signals
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


@dataclass(frozen=True)
class _Step:
    """A step that was made and not looked at.

    `images` were seen before it; `keys` and `indices` are of its batch; `numbers` [R 3] are each rank's loss,
    gradient norm and what a signal asked for.
    """

    images: int
    keys: list[str]
    indices: Tensor
    numbers: Readback


class Guard:
    """Makes every step, and looks at what became of it.

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
        #: Mean loss of the last step that was settled over all ranks, and of this rank's share.
        self.loss = self.own_loss = math.nan
        #: Whether it was applied, and what the ranks were asked for, at the most.
        self.applied, self.asked = True, 0
        self._skipped = 0
        self._made: _Step | None = None

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        """Computes loss and gradients of a batch, and has `optimizer` apply them if they are finite.

        The step before is settled meanwhile.

        Args:
            batch: this rank's share of the global batch.
            optimizer: of the trained networks; what it changes stays as it is where the step is refused. The
                host waits for the device only where it is none of those that can be told on the device.

        Raises:
            FloatingPointError, Rewind: as `settle` says, of the step before; this one is not applied then.
            RankError: a rank is gone or does not answer.
        """
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            loss = self.reduction.gradients(self.stage, batch, trained)
        except RuntimeError as error:  # gradients are exchanged in the backward pass
            if self.ranks.size > 1 and ("gloo" in str(error) or "NCCL" in str(error)):
                raise self.ranks.explain(error) from error
            raise
        parameters = [p for p in trained if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        mine = torch.stack([loss, norm.to(loss.dtype), loss.new_full((), self.signals.asked)])
        every = self.ranks.collect(mine).view(self.ranks.size, 3)
        numbers = Readback(every)
        self.settle()
        torch.nn.utils.clip_grads_with_norm_(parameters, self.stage.plan.gradient_clip, norm)
        _apply(optimizer, unless=every.isfinite().all().logical_not())
        self._made = _Step(self.stage.images_seen, batch.keys, batch.indices, numbers)

    @property
    def settled(self) -> bool:
        """Whether it is known what became of the last step."""
        return self._made is None

    def settle(self) -> None:
        """Finds out what became of the last step, takes down its loss and moves the average.

        Returns at once where that was done. No rank asks the others for it, but all have to come here after
        the same step, since all leave by the same exception.

        Raises:
            FloatingPointError: not finite, and the policy is to stop, or too many were left out in a row.
            Rewind: not finite or a spike, and the policy is to rewind.
        """
        made, self._made = self._made, None
        if made is None:
            return
        every = made.numbers.values()
        self.loss = pairwise_mean([loss for loss, _, _ in every])
        self.own_loss = every[self.ranks.rank][0]
        self.asked = max(int(asked) for _, _, asked in every)
        self.applied = all(math.isfinite(number) for row in every for number in row)
        if not self.applied:
            self._refuse(made)
            return
        self._skipped = 0
        self._look_for_spike(made)
        stage, batch_size = self.stage, self.stage.plan.batch_size
        stage.unlogged_losses.append(self.loss)
        stage.ema.update(stage.networks, made.images + batch_size, batch_size)

    def saved(self) -> None:
        """Forgets a wish to save that was met."""
        self.signals.saved()
        if self.asked == SAVE:
            self.asked = 0

    def _refuse(self, made: _Step) -> None:
        stage, seen = self.stage.name, made.images
        what = f"stage {stage} at {seen} images: the loss or a gradient is not finite"
        self._write(made, "not finite")
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

    def _look_for_spike(self, made: _Step) -> None:
        recent = self.stage.recent_losses
        if self.spike_zscore and len(recent) >= _ENOUGH:
            score = (self.loss - fmean(recent)) / max(pstdev(recent), 1e-12)
            if score > self.spike_zscore:
                self._write(made, f"spike of {score:.1f} standard deviations")
                what = (
                    f"stage {self.stage.name} at {made.images} images: the loss {self.loss:.4g} "
                    f"is a spike, {score:.1f} standard deviations above the recent ones"
                )
                if self.rewind_spikes:
                    raise Rewind(made.images + self.stage.plan.batch_size, what)
                if self.ranks.first:
                    print(f"{what}; the batch's keys are in {self.path}", flush=True)
        recent.append(self.loss)
        del recent[:-RECENT]

    def _write(self, made: _Step, what: str) -> None:
        entry = {
            "images": made.images, "what": what, "rank": self.ranks.rank,
            "loss": repr(self.own_loss), "indices": made.indices.tolist(), "keys": made.keys,
        }  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _apply(optimizer: torch.optim.Optimizer, unless: Tensor) -> None:
    """A step of `optimizer`, unless that is True [] on the device.

    torch's fused optimizers do nothing, and count no step, where their `found_inf` is 1, as its gradient
    scaler uses them; they say so by an attribute. Of any other the host has to wait for the answer.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = unless.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not unless:
        optimizer.step()
