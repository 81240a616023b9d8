"""Where the metrics go besides the run's own `metrics.jsonl`: one of Lightning's loggers.

Settings only, so that composing a configuration need not import lightning.
"""

import logging
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)


class LogSettings(ABC):
    """Interface: settings that can make a logger for a stage's folder."""

    @abstractmethod
    def build(self, folder: Path, stage: str) -> "Logger":
        """The logger of stage `stage` of the run whose folder is `folder`."""


class CsvLog(LogSettings):
    """`<stage>/log/metrics.csv` in the run's folder."""

    def build(self, folder: Path, stage: str) -> "Logger":
        from lightning.pytorch.loggers import CSVLogger

        return CSVLogger(folder / stage, name="log", version="")


class TensorboardLog(LogSettings):
    """Event files under `<stage>/log` in the run's folder."""

    def build(self, folder: Path, stage: str) -> "Logger":
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(folder / stage, name="log", version="")


class WandbLog(LogSettings):
    """Weights & Biases: metrics, pictures and configuration.

    Without a key it works offline, needs no network and says so; `WANDB_*` environment variables win over
    these settings.

    Args:
        project: where the run is shown.
        group: runs that belong together, such as a sweep's.
        tags: labels of the run.
    """

    def __init__(
        self, project: str = "firstlight", group: str | None = None, tags: tuple[str, ...] = ()
    ) -> None:
        self.project = project
        self.group = group
        self.tags = tags

    def build(self, folder: Path, stage: str) -> "Logger":
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        if "WANDB_MODE" not in os.environ and not _has_key(wandb.api.api_key):
            os.environ["WANDB_MODE"] = "offline"
            log.warning(
                "wandb: no key found, so this run is logged offline in %s; "
                "later type: wandb sync %s/wandb/offline-run-*",
                folder / stage,
                folder / stage,
            )
        os.environ.setdefault("WANDB_SILENT", "true")
        return WandbLogger(
            name=os.environ.get("WANDB_NAME", f"{folder.name}-{stage}"),
            project=os.environ.get("WANDB_PROJECT", self.project),
            group=os.environ.get("WANDB_RUN_GROUP", self.group or folder.name),
            tags=list(self.tags),
            save_dir=folder / stage,
        )


def _has_key(key: str | None) -> bool:
    return bool(key)
