"""The figures that a sweep looks at, read from the files of a run.

diffusion.val_loss          the last one in <run>/diffusion/metrics.jsonl
diffusion.images_per_second
report.adherence.all        from <run>/report.json
card.fd                     from the card that scripts/evaluate.py made, <run>/evaluation/card.json
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import StageName
from data.json_lines import read_json_lines
from models.registry import ConfigError, did_you_mean

_FILES = {"report": Path("report.json"), "card": Path("evaluation") / "card.json"}


@dataclass(frozen=True)
class Figure:
    """One figure of a run, and whether more of it is better.

    Args:
        name: as above.
        maximize: whether larger is better.

    Raises:
        ConfigError: a name that no file of a run has.
    """

    name: str
    maximize: bool

    def __post_init__(self) -> None:
        source = self.name.partition(".")[0]
        known = [*_FILES, *StageName.__members__]
        if source not in known or "." not in self.name:
            raise ConfigError(
                f"metric is '{self.name}'{did_you_mean(source, known)}; give diffusion.val_loss, "
                "report.adherence.all, card.fd or the like"
            )

    @property
    def of_training(self) -> bool:
        """Whether it is told while training goes on, so that a trial can be pruned by it."""
        return self.name.partition(".")[0] not in _FILES

    @property
    def of_card(self) -> bool:
        """Whether it needs scripts/evaluate.py."""
        return self.name.startswith("card.")

    def points(self, run: Path) -> list[tuple[int, float]]:
        """(images seen, value) as often as the run has told it; nothing for a figure of the end."""
        if not self.of_training:
            return []
        stage, _, key = self.name.partition(".")
        lines = read_json_lines(run / stage / "metrics.jsonl")
        return [(int(line["images"]), float(line[key])) for line in lines if _is_number(line.get(key))]

    def value(self, run: Path) -> float | None:
        """The figure of a run that has ended; None where it tells none."""
        if self.of_training:
            points = self.points(run)
            return points[-1][1] if points else None
        source, *keys = self.name.split(".")
        try:
            found: Any = json.loads((run / _FILES[source]).read_text())
        except (OSError, ValueError):
            return None
        found = found.get("metrics", {}) if source == "card" else found
        for key in keys if source == "report" else [".".join(keys)]:
            found = found.get(key) if isinstance(found, dict) else None
        return float(found) if _is_number(found) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
