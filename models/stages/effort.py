"""What the work of an image is beside what a device can do, and the hours of devices that a stage takes."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.stages.compute import Compute


@dataclass(frozen=True)
class Effort:
    """What the work of an image is, beside what the machine could do.

    Args:
        flops_an_image: of a training step, counted; 0 where nobody counted.
        ceiling: FLOP a second that one rank reaches in a matrix product, measured; 0 where nobody did.
    """

    flops_an_image: float = 0.0
    ceiling: float = 0.0

    def utilisation(self, images_per_second: float, ranks: int) -> float | None:
        """The share of the ceiling of all ranks that is used (MFU); None where it is not known."""
        if not (self.flops_an_image and self.ceiling):
            return None
        return images_per_second * self.flops_an_image / (ranks * self.ceiling)


class Meter:
    """Device-hours of a stage, over all commands that trained it.

    Args:
        devices: that train together.
        before: device-hours of earlier commands.
    """

    def __init__(self, devices: int, before: float = 0.0) -> None:
        self.devices = devices
        self.before = before
        self._began = time.perf_counter()

    def figures(self, images_to_go: int, images_per_second: float) -> dict[str, float]:
        """Hours so far, and to go at `images_per_second`."""
        here = (time.perf_counter() - self._began) * self.devices / 3600
        left = images_to_go / images_per_second * self.devices / 3600 if images_per_second else math.inf
        found = {"device_hours": self.before + here}
        return found | ({"device_hours_to_go": left} if math.isfinite(left) else {})


def hours_in(line: Mapping[str, Any]) -> float:
    """The device-hours that a line of metrics tells of; 0 where it tells none."""
    return float(line.get("device_hours", 0.0))


def matmul_ceiling(compute: Compute, seconds: float = 0.4) -> float:
    """FLOP a second of a square matrix product in the precision of `compute`: the most of some tries."""
    on_gpu = compute.device.type == "cuda"
    side = 8192 if on_gpu else 1024
    kind = torch.bfloat16 if compute.bf16 else torch.float32
    one = torch.ones(side, side, device=compute.device, dtype=kind)
    best, began = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        one @ one
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
