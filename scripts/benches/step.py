"""What a training step costs beside diffusers' UNet of the same size and weights, at its best setting.

One step is forward pass, loss, backward pass, gradient norm, fused AdamW and dropping the gradients, on
latents and text states that lie in memory. First both networks must agree in outputs and gradients. Then the
ways to compute diffusers' are timed briefly and the fastest is kept; ours computes as training would. The
arms take turns, ours twice, for the A/A ratio. `ratio` is our time over theirs, `memory_ratio` the same of
peak memory, each in a fresh process that imports what its step takes, `net_memory_ratio` of the peak beyond
what is there after the imports. The share of the ceiling (MFU) is counted FLOPs over time over what a
matrix product of the same precision reaches in the same minute.

A network too large for a CPU is measured on a GPU only; elsewhere it is said what would be measured, and its
structure goes through the same code at a tiny width.
"""

import copy
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from conf.cli import composed
from data.progress import Progress
from models.kernels import kernels
from models.stages.compute import Compute, TrainerOptions, decide, device_of, set_threads
from models.stages.effort import matmul_ceiling
from models.unet import UNet
from scripts.benches.findings import Findings, cell
from scripts.benches.measuring import (
    Arm,
    Lap,
    Ratio,
    check_rounds,
    cpu,
    cpu_ms,
    eager_ways,
    interleave,
    machine,
    rate,
    ratio,
    wall,
)
from scripts.benches.step_arms import Batch, Problem, Steps, Theirs, parity
from scripts.benches.step_peak import peak

OURS, THEIRS, AGAIN = "ours", "diffusers", "ours again"
PAIRS = {"ratio": (THEIRS, OURS), "aa": (OURS, AGAIN)}
#: The most that our time and memory should be of theirs.
CPU_LIMITS = {"ratio": 0.60, "memory_ratio": 0.85}
GPU_LIMITS = {"ratio": 0.90, "memory_ratio": 0.85}
FACTOR = 8  # pixels a latent, as in Stable Diffusion
LARGE = 100_000_000  # parameters from which on a network is for a GPU
#: Width and length of the texts that published networks read; other backbones read our own encoder's.
TEXTS = {"sd2": (1024, 77), "sdxl": (2048, 77)}
CPU_BATCH, GPU_BATCHES = 16, (64, 32, 16, 8)
MEMORY_BATCH = 64  # on a CPU, where the peak at less is mostly imports
#: So many that the kernels for many are used on the smallest map too.
PARITY_BATCH = 4
WARM_UP, BRIEF, CEILING_TRIES = 6, 7, 3
#: An eager way that takes so many times as long as the fastest is not compiled.
HOPELESS = 2.0
#: Dense bfloat16 FLOP a second, as NVIDIA's data sheets have it.
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
#: Stable Diffusion 2 at 512 px in NVIDIA's MLPerf v4.0 result: images/s of an H200, and that as MFU.
MLPERF_RATE, MLPERF_MFU, MLPERF_SIZE = 129.0, 0.314, 512


def step(
    backbone: str = "plain",
    size: int = 0,
    batch: int = 0,
    memory_batch: int = 0,
    calls: int = 60,
    threads: int = 1,
    compile: bool = False,
) -> Findings:
    """Returns the time and memory of our training step beside diffusers' of the same network.

    Args:
        backbone: as train.py names it; without patches and position map, which diffusers does not know.
        size: pixels of a side, 8 a latent; 0 is 128, and both 256 and 512 for a network as large as sd2.
        batch: images a step; 0 is 16, and on a GPU the largest of 64, 32, 16 and 8 that fits.
        memory_batch: images a step where memory is measured; 0 is 64, and on a GPU as timed.
        calls: timed steps of each arm, an even number.
        threads: of torch on a CPU; one is the quietest.
        compile: whether compiling is tried on a CPU, which takes minutes; on a GPU it always is.
    """
    check_rounds(calls)
    if min(size, batch, memory_batch) < 0 or threads < 1 or size % FACTOR:
        raise ValueError(
            "size and batches must not be negative, size a multiple of 8, and threads at least 1"
        )
    values = composed("train", f"backbone={backbone}", f"trainer.threads={threads}")
    options = TrainerOptions(threads=0 if torch.cuda.is_available() else threads)
    set_threads(options)
    problem = make_problem(values, backbone, 0)
    with torch.device("meta"):
        large = sum(p.numel() for p in problem.unet().parameters()) > LARGE
    sizes = [size] if size else [256, 512] if large else [128]
    problems = [replace(problem, side=each // FACTOR) for each in sizes]
    rehearsal = large and not torch.cuda.is_available()
    notes = [would_measure(backbone, each, batch) for each in problems if rehearsal]
    if rehearsal:
        problems, batch, memory_batch = [narrow(problem)], 2, 2
    way = Way(options, compile or torch.cuda.is_available(), calls, memory_batch)
    found = [measure(each, batch, way) for each in problems]
    told = {"backbone": backbone, "calls": calls, "rehearsal": rehearsal, **machine()}
    return findings(found, told, notes)


def make_problem(values: dict[str, Any], backbone: str, side: int) -> Problem:
    """The backbone of a configuration on latents of `side` and text states as it would read them."""
    text = values["text_encoder"]
    width, length = TEXTS.get(backbone, (int(text["width"]), int(text["context_length"])))
    return Problem(values["backbone"], width, length, side)


def narrow(problem: Problem) -> Problem:
    """The same structure, so narrow that a CPU does a step in no time.

    Several channels share a norm: the bias before a norm of one channel has no gradient but rounding.
    """
    levels = len(problem.backbone["channels"])
    tiny = {"channels": [32, *[64] * (levels - 1)], "head_dim": 32, "norm_groups": 8}
    return replace(problem, backbone=problem.backbone | tiny, width=64, side=2**levels)


def would_measure(backbone: str, problem: Problem, batch: int) -> str:
    """What would be measured on a GPU, in a line."""
    with torch.device("meta"):
        unet = problem.unet()
    parameters, flops = sum(p.numel() for p in unet.parameters()), problem.flops(unet)
    size = FACTOR * problem.side
    peak_rate = MLPERF_MFU * PEAKS["NVIDIA H200"] / flops
    goal = MLPERF_RATE if (backbone, size) == ("sd2", MLPERF_SIZE) else peak_rate
    batches = str(batch) if batch else f"the largest of {', '.join(map(str, GPU_BATCHES))} that fits"
    return (
        f"on a GPU: {backbone} ({parameters / 1e6:,.0f} M) at {size} px, batch {batches}; "
        f"{flops / 1e9:,.0f} GFLOP an image; to beat: {MLPERF_MFU:.1%} MFU = {goal:,.0f} images/s per H200, "
        f"and {GPU_LIMITS['ratio']:g} of the time of diffusers compiled"
    )


@dataclass(frozen=True)
class Way:
    """How to measure: what `decide` is told, whether compiling is tried, timed steps of each arm, and images
    a step where memory is measured, 0 for as many as there is a default for."""

    options: TrainerOptions
    compile: bool
    calls: int
    memory_batch: int = 0


@dataclass(frozen=True)
class Timed:
    """What was timed at one size.

    Args:
        batch: images a step.
        errors: of output and gradients between the networks, relative.
        ways: how each arm computed.
        tried: seconds a step of each way to compute theirs; None where memory did not suffice.
        laps: of each arm.
        ceilings: FLOP a second of a matrix product, of each arm's precision.
    """

    batch: int
    errors: dict[str, float]
    ways: dict[str, Compute]
    tried: dict[str, float | None]
    laps: dict[str, list[Lap]]
    ceilings: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """What was measured at one size.

    Args:
        size: in pixels.
        timed: of it.
        flops: of an image, of each network.
        memory: MB at the peak and before, of each network.
        memory_batch: images a step, of that.
    """

    size: int
    timed: Timed
    flops: dict[str, float]
    memory: dict[str, tuple[float, float]]
    memory_batch: int

    @property
    def memory_ratio(self) -> float:
        """Our peak over theirs."""
        return self.memory[OURS][0] / self.memory[THEIRS][0]

    @property
    def net_memory_ratio(self) -> float:
        """The same of what the steps took beyond the imports."""
        ours, theirs = (peak - before for peak, before in (self.memory[OURS], self.memory[THEIRS]))
        return ours / theirs

    def document(self) -> dict[str, Any]:
        """All of it as JSON values, but for the ratios of time."""
        rates = {name: rate(laps) for name, laps in self.timed.laps.items()}
        mfu = {name: self.mfu(name, wall) for name in (OURS, THEIRS)}
        by_cpu = {name: self.mfu(name, cpu) for name in (OURS, THEIRS)}
        nominal = (
            PEAKS.get(torch.cuda.get_device_name()) if self.timed.ways[OURS].device.type == "cuda" else None
        )
        return {
            "size": self.size,
            "batch": self.timed.batch,
            "parity": self.timed.errors,
            "computes": {name: str(way) for name, way in self.timed.ways.items()},
            "tried_ms": {k: None if v is None else round(1000 * v, 2) for k, v in self.timed.tried.items()},
            "milliseconds_a_step": {k: round(1000 * self.timed.batch / v, 3) for k, v in rates.items()},
            "images_per_second": {k: round(v, 3) for k, v in rates.items()},
            "ceiling_gflops": {k: round(v / 1e9, 1) for k, v in self.timed.ceilings.items()},
            "gflop_an_image": {k: round(v / 1e9, 3) for k, v in self.flops.items()},
            "mfu": mfu,
            "mfu_by_cpu_time": None if self.timed.ways[OURS].device.type == "cuda" else by_cpu,
            "mfu_of_nominal_peak": None if nominal is None else {
                name: round(rate(self.timed.laps[name]) * self.flops[name] / nominal, 4) for name in mfu
            },
            "peak_mb": {name: round(each[0], 1) for name, each in self.memory.items()},
            "memory_batch": self.memory_batch,
            "net_memory_ratio": round(self.net_memory_ratio, 4),
            "before_mb": {name: round(each[1], 1) for name, each in self.memory.items()},
            "cpu_ratios": {name: _rounded(self.ratio(name, cpu)) for name in PAIRS},
        }  # fmt: skip

    def ratio(self, name: str, clock: Callable[[Lap], float | None]) -> Ratio | None:
        """One of `PAIRS`: speed over speed, which is a ratio of times the other way round."""
        over, under = PAIRS[name]
        return ratio(self.timed.laps[over], self.timed.laps[under], clock)

    def mfu(self, name: str, clock: Callable[[Lap], float | None]) -> float | None:
        """The share of the ceiling that an arm's steps reach, by wall or processor time."""
        cost = cpu_ms(self.timed.laps[name]) if clock is cpu else 1000 / rate(self.timed.laps[name])
        return (
            None if cost is None else round(self.flops[name] / (cost / 1000) / self.timed.ceilings[name], 4)
        )


def measure(problem: Problem, batch: int, way: Way) -> Measured:
    """Proves that both networks agree, chooses how to compute, and times both.

    Raises:
        NotEqualError: the networks do not agree; nothing was timed.
        ConfigError: diffusers is not installed.
        ValueError: diffusers has no such network, or no batch fits.
    """
    timed = compare(problem, batch, way)
    _free()
    ways, batch = timed.ways, timed.batch
    room = way.memory_batch or (batch if ways[OURS].device.type == "cuda" else MEMORY_BATCH)
    memory = {name: peak(problem, how, name == OURS, room) for name, how in ways.items()}
    with torch.device("meta"):
        flops = {OURS: problem.flops(problem.unet()), THEIRS: problem.flops(Theirs(problem.unet()))}
    return Measured(FACTOR * problem.side, timed, flops, memory, room)


def compare(problem: Problem, batch: int, way: Way) -> Timed:
    """The part of `measure` that holds both networks; raises as that does."""
    unet = problem.unet()
    theirs = Theirs(unet).take(unet)
    exact = exactly()
    exact.place(unet)
    exact.set_blocks(unet)
    errors = parity(unet, theirs, problem.batch(PARITY_BATCH, 0).lay_out(exact))
    device = device_of(way.options)
    batch = batch or (CPU_BATCH if device.type == "cpu" else largest_batch(problem, unet, theirs))
    batches = [problem.batch(batch, number) for number in range(2)]
    mine, _ = decide(way.options, lambda how: seconds(unet, how, batches), 10**9 if way.compile else 1)
    best, tried = best_way(theirs, device, batches, way.compile)
    ways = {OURS: mine, THEIRS: best}
    before = ceilings(ways)
    laps = turns(Steps(unet, mine, batches), Steps(theirs, best, batches), batch, way.calls)
    after = ceilings(ways)
    return Timed(batch, errors, ways, tried, laps, {name: max(before[name], after[name]) for name in ways})


def exactly() -> Compute:
    """In float32 on a CPU, where nothing rounds to less, through the same kernels as what is timed."""
    return Compute(torch.device("cpu"), False, True, False, "", native=kernels() is not None)


def ceilings(ways: dict[str, Compute]) -> dict[str, float]:
    """FLOP a second of a matrix product in the precision of each arm, one figure for one precision.

    The most of many tries: neighbours only ever make it less, and a share of too low a ceiling is too high.
    """
    known = {how.bf16: 0.0 for how in ways.values()}
    for _ in range(CEILING_TRIES):
        for how in ways.values():
            known[how.bf16] = max(known[how.bf16], matmul_ceiling(how))
    return {name: known[how.bf16] for name, how in ways.items()}


def turns(ours: Steps, theirs: Steps, batch: int, calls: int) -> dict[str, list[Lap]]:
    """The laps of both and of ours again, one step each."""
    # Ours again is the same copy: another would take another gigabyte and be no other thing.
    arms = [Arm(OURS, ours.step), Arm(THEIRS, theirs.step), Arm(AGAIN, ours.step)]
    with Progress("timing", len(arms) * (calls + WARM_UP) * batch) as progress:
        return interleave(arms, calls, WARM_UP, progress.advance)


def largest_batch(problem: Problem, unet: UNet, theirs: Theirs) -> int:
    """The largest of a few batches that a GPU has memory for, with both networks on it."""
    way = Compute(torch.device("cuda"), True, True, False, "")
    for batch in GPU_BATCHES:
        try:
            _both(problem, batch, way, unet, theirs)
        except torch.OutOfMemoryError:
            continue
        finally:
            _free()
        return batch
    raise ValueError(f"no batch of {GPU_BATCHES[-1]} fits on this GPU; give a smaller --batch or --size")


def _both(problem: Problem, batch: int, way: Compute, unet: UNet, theirs: Theirs) -> None:
    batches = [problem.batch(batch, 0)]
    arms = [Steps(copy.deepcopy(each), way, batches) for each in (unet, theirs)]
    for arm in arms:
        arm.step()


def best_way(
    theirs: Theirs, device: torch.device, batches: list[Batch], compiled: bool
) -> tuple[Compute, dict[str, float | None]]:
    """The fastest way to compute theirs, and seconds of each that was tried."""
    eager = eager_ways(device)
    times = {way: _unless_full(theirs, way, batches) for way in eager}
    if compiled:
        fastest = min(times.values())
        promising = [replace(way, compiled=True) for way in eager if times[way] < HOPELESS * fastest]
        times |= {way: _unless_full(theirs, way, batches) for way in promising}
    best = min(times, key=lambda way: times[way])
    if math.isinf(times[best]):
        raise ValueError("diffusers' step needs more memory than there is; give a smaller --batch")
    names = {str(way): value for way, value in times.items()}
    tried = {name: None if math.isinf(value) else value for name, value in names.items()}
    return replace(best, reason=f"fastest of {len(times)} timed"), tried


def _unless_full(network: nn.Module, way: Compute, batches: list[Batch]) -> float:
    try:
        return seconds(network, way, batches)
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        _free()


def seconds(network: nn.Module, way: Compute, batches: list[Batch]) -> float:
    """The least seconds of a few steps of a copy; of processor time on a CPU, where neighbours count less."""
    steps = Steps(copy.deepcopy(network), way, batches)
    clock = time.perf_counter if way.device.type == "cuda" else time.process_time
    least = math.inf
    for number in range(-2, BRIEF):
        began = clock()
        steps.step()
        least = min(least, clock() - began) if number >= 0 else least
    if way.compiled:
        torch._dynamo.reset()  # copies share their code, of which only a few versions are compiled
    return least


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def findings(found: Sequence[Measured], told: dict[str, Any], notes: Sequence[str]) -> Findings:
    """Table and JSON of all sizes; `ratio`, `memory_ratio` and `aa` are those of the last."""
    limits = GPU_LIMITS if found[-1].timed.ways[OURS].device.type == "cuda" else CPU_LIMITS
    ratios: dict[str, Ratio] = {}
    rows: list[Sequence[str]] = [
        ("", "px", "batch", "ms/step", "CPU ms/step", "images/s", "MFU %", "peak MB")
    ]
    lines = list(notes)
    for each in found:
        document = each.document()
        suffix = "" if each is found[-1] else f" at {each.size} px"
        for name in PAIRS:
            value = each.ratio(name, wall)
            assert value is not None
            ratios[name + suffix] = value
        for name, laps in each.timed.laps.items():
            processor = cpu_ms(laps)
            rows.append((
                name, str(each.size), str(each.timed.batch),
                cell(document["milliseconds_a_step"][name], ".2f"),
                cell(None if processor is None else processor * each.timed.batch, ".2f"),
                cell(rate(laps), ".2f"),
                cell(100 * document["mfu"][name], ".1f") if name in document["mfu"] else "",
                cell(each.memory[name][0]) if name in each.memory else "",
            ))  # fmt: skip
        lines += [f"{name}: {way}" for name, way in document["computes"].items()]
        errors = each.timed.errors
        lines.append(f"agree to {errors['output']:.1e} (output), {errors['gradient']:.1e} (gradients)")
        lines.append(
            f"memory_ratio {each.memory_ratio:.3f} at batch {each.memory_batch}, net of imports "
            f"{each.net_memory_ratio:.3f}  wanted at most {limits['memory_ratio']:g}: "
            + ("met" if each.memory_ratio <= limits["memory_ratio"] else "missed")
        )
    last = found[-1]
    figures = {
        "memory_ratio": round(last.memory_ratio, 4),
        **last.document(),
        "measurements": [
            {**each.document(), "memory_ratio": round(each.memory_ratio, 4),
             **{name: _rounded(each.ratio(name, wall)) for name in PAIRS}}
            for each in found
        ],
        "notes": list(notes),
        **told,
    }  # fmt: skip
    most = {} if told["rehearsal"] else limits
    by = {name: name.replace("ratio", "aa") for name in ratios if name.startswith("ratio")}
    return Findings("step", figures, rows, ratios, {}, by, most, lines)


def _rounded(value: Ratio | None) -> float | None:
    return None if value is None else round(value.value, 4)
