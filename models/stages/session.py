"""What one training command shares among its stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.stages.compute import TrainerOptions
from models.stages.evaluations import Evaluations
from models.stages.keep import Keep
from models.stages.logs import LogSettings
from models.stages.ranks import Ranks
from models.stages.signals import Signals


@dataclass(frozen=True)
class Session:
    """One command.

    Args:
        folder: of the run.
        config: the run's configuration as plain values.
        options: how to compute, and what to do about faults.
        logger: besides `metrics.jsonl`.
        keep: which checkpoints stay.
        ranks: the processes that train together.
        signals: what this process is asked for.
        evaluations: of checkpoints of the diffusion stage while it trains, on the first rank; None is none.
    """

    folder: Path
    config: Mapping[str, Any]
    options: TrainerOptions
    logger: LogSettings
    keep: Keep = field(default_factory=Keep)
    ranks: Ranks = field(default_factory=Ranks.alone)
    signals: Signals = field(default_factory=Signals)
    evaluations: Evaluations | None = None
