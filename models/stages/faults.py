"""What may be done about a step that must not be applied."""

from enum import Enum


class NotFinite(Enum):
    """What follows a loss or gradient that is not finite: the run ends, the batch is left out, or the weights
    go back to the last checkpoint and everything since then is left out."""

    stop = "stop"
    skip = "skip"
    rewind = "rewind"
