"""Compares ways of doing the same, in one process and interleaved, with an interval for each ratio.

On a machine that others use, timing one way after the other says nothing: here all take turns, forwards in
one round and backwards in the next (ABBA), so that what drifts cancels. A ratio is taken of each such pair of
rounds; told are the median and its bootstrap interval, of wall time and of processor time, which neighbours
hardly touch. A way should stand there twice: the ratio of the two (A/A) is what the method errs by. Use:
`laps = interleave([Arm("ours", f), Arm("theirs", g)], rounds=12)`; `ratio(laps["ours"], laps["theirs"])`.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.stages.compute import Compute

RESAMPLES = 10_000
MIN_PAIRS = 5  # of rounds, for an interval
#: Processor features that decide how fast numbers are computed.
FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


def _nobody() -> list[int]:
    return []


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Arm:
    """One way of doing the work.

    Args:
        name: what tables and JSON call it.
        run: does one round and returns how many units of work it was, images mostly.
        pids: its processes besides this one, asked for after a round.
        close: ends them.
    """

    name: str
    run: Callable[[], int]
    pids: Callable[[], list[int]] = _nobody
    close: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Lap:
    """One round of one arm: units of work, seconds, and processor seconds of all its processes or None."""

    units: int
    wall: float
    cpu: float | None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: the median over pairs of rounds, and its bootstrap interval of 95 %.

    The interval is None where there were too few rounds for one.
    """

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        ends = "too few rounds for an interval"
        return (
            f"{self.value:.3f} [{ends if self.interval is None else '{:.3f} {:.3f}'.format(*self.interval)}]"
        )


def check_rounds(rounds: int) -> None:
    """Raises ValueError where rounds are no pairs."""
    if rounds < 2 or rounds % 2:
        raise ValueError(f"rounds={rounds}; they are taken in pairs, so it must be an even number")


def interleave(
    arms: Sequence[Arm], rounds: int, warm_up: int = 1, advance: Callable[[int], None] | None = None
) -> dict[str, list[Lap]]:
    """Returns the laps of each arm, by name, after `warm_up` rounds that are not told.

    `advance` is told the units of each lap. Raises ValueError where rounds are no pairs, or where two arms
    did different numbers of units.
    """
    check_rounds(rounds)
    laps: dict[str, list[Lap]] = {arm.name: [] for arm in arms}
    for number in range(-warm_up, rounds):
        for arm in arms if number % 2 == 0 else reversed(arms):
            lap = _lap(arm)
            if number >= 0:
                laps[arm.name].append(lap)
            if advance is not None:
                advance(lap.units)
    for arm in arms:
        units = [lap.units for lap in laps[arm.name]]
        if set(units) != {laps[arms[0].name][0].units}:
            raise ValueError(f"{arm.name} did {units} units, {arms[0].name} {laps[arms[0].name][0].units}")
    return laps


def _lap(arm: Arm) -> Lap:
    before = _cpu(arm.pids())
    own, began = time.process_time(), time.perf_counter()
    units = arm.run()
    wall, own = time.perf_counter() - began, time.process_time() - own
    after = _cpu(arm.pids())
    if before is None or after is None:
        return Lap(units, wall, None)
    # A process that the round itself started has no entry before it.
    return Lap(units, wall, own + sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items()))


def _cpu(pids: Sequence[int]) -> dict[int, float] | None:
    """Returns the processor seconds of other processes, None where the system does not tell."""
    if not pids:
        return {}
    try:
        return {pid: _ticks(pid) / os.sysconf("SC_CLK_TCK") for pid in pids}
    except (OSError, ValueError):
        return None


def _ticks(pid: int) -> int:
    # The process's name, in brackets, may hold anything; user and system time are fields 14 and 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def ratio(over: Sequence[Lap], under: Sequence[Lap], clock: Callable[[Lap], float | None]) -> Ratio | None:
    """Returns how many times as many units a second `over` does as `under`; None without that clock."""
    speeds = _speeds(over, clock), _speeds(under, clock)
    if speeds[0] is None or speeds[1] is None:
        return None
    pairs = speeds[0] / speeds[1]
    if len(pairs) < MIN_PAIRS:
        return Ratio(float(np.median(pairs)), None)
    draws = np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    low, high = np.quantile(np.median(pairs[draws], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(pairs)), (float(low), float(high)))


def wall(lap: Lap) -> float | None:
    """Returns the seconds of a lap."""
    return lap.wall


def cpu(lap: Lap) -> float | None:
    """Returns the processor seconds of a lap, None where they are not known or too few to count."""
    return lap.cpu or None


def _speeds(laps: Sequence[Lap], clock: Callable[[Lap], float | None]) -> np.ndarray | None:
    """Returns the units a second of each pair of rounds, or None."""
    seconds = [clock(lap) for lap in laps]
    if any(each is None for each in seconds):
        return None
    known = [each for each in seconds if each is not None]
    pairs = list(zip(pairwise(laps), pairwise(known), strict=True))[::2]
    return np.array([(a.units + b.units) / (x + y) for (a, b), (x, y) in pairs])


def rate(laps: Sequence[Lap]) -> float:
    """Returns units a second, the median over pairs of rounds."""
    speeds = _speeds(laps, wall)
    assert speeds is not None
    return float(np.median(speeds))


def cpu_ms(laps: Sequence[Lap]) -> float | None:
    """Returns processor milliseconds a unit, the median over pairs of rounds; None where not known."""
    speeds = _speeds(laps, cpu)
    return None if speeds is None else float(np.median(1000 / speeds))


def peak_rss(pids: Sequence[int]) -> float | None:
    """Returns the sum of the most MB that each process ever had resident; None where not told.

    Pages that processes share are counted in each of them.
    """
    kilobytes = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return None
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return kilobytes / 1000


def eager_ways(device: torch.device) -> list[Compute]:
    """The ways among which a rival gets its fastest: float32 and bfloat16, in both layouts, not compiled."""
    return [Compute(device, bf16, last, False, "") for bf16 in (False, True) for last in (False, True)]


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on: the device line, versions and the load of the machine."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            label, _, value = line.partition(":")
            name = value.strip() if label.strip() == "model name" else name
            flags |= set(value.split()) if label.strip() in ("flags", "Features") else set()
    except OSError:
        pass
    features = " ".join(feature for feature in FEATURES if feature in flags)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    device = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {features or '-'}{gpu}"
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"device": device, "torch": torch.__version__, "python": platform.python_version(), "load": load}
