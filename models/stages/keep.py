"""Which checkpoints stay: the newest, milestones, and the best by a metric."""

import math

from models.checkpoint_folders import Retention


class Keep:
    """The checkpoints of a stage that are not removed.

    Args:
        last: the newest so many, at least 2.
        every_images: and the first at or past each multiple of so many images; 0 keeps none.
        best: and the best by this held-out figure, as `metrics.jsonl` names it; empty keeps none.
        highest: whether more of it is better.
    """

    def __init__(
        self, last: int = 2, every_images: int = 0, best: str = "val_loss", highest: bool = False
    ) -> None:
        self.retention = Retention(last, every_images)
        self.best = best
        self.highest = highest

    def better(self, value: float, before: float | None) -> bool:
        """Whether `value` is better than the best so far; the first is, and nothing that is not finite."""
        if before is None or not math.isfinite(value):
            return math.isfinite(value)
        return value > before if self.highest else value < before

    def checkpoints(self, images: int) -> int:
        """At most how many stay after `images` images."""
        every = self.retention.every_images
        return self.retention.last + (images // every if every else 0) + bool(self.best)
