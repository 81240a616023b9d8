"""What a stage will cost, said before its first step: counted FLOPs, a timed probe, memory and disk."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.batch import Batch
from data.progress import duration
from models import attention, feed_forward, winograd
from models.portions import on_threads
from models.stages.compute import Compute, Reduce, choose, decide, seconds_a_call, threads_for
from models.stages.division import Division, divide
from models.stages.effort import Effort, matmul_ceiling
from models.stages.session import Session
from models.stages.sharded import local
from models.stages.stage import Stage

_FLOAT_BYTES = 4
#: Copies of the trained weights: themselves, their gradients, AdamW's two moments and the average.
_COPIES_IN_MEMORY = 5
#: Copies in a checkpoint: no gradients. As many in memory while one is written beside training.
_COPIES_ON_DISK = 4


@dataclass(frozen=True)
class Cost:
    """What a stage will cost; counts are of images, sizes in bytes, `ceiling` FLOP a second of a rank."""

    stage: str
    parameters: int
    flops_an_image: float
    division: Division
    images_to_go: int
    steps_to_go: int
    seconds: float
    memory: float
    disk: float
    compute: Compute
    ceiling: float = 0.0
    ranks: int = 1

    @property
    def effort(self) -> Effort:
        """What an image asks of the machine, for the share that training uses."""
        return Effort(self.flops_an_image, self.ceiling)


def preflight(
    stage: Stage,
    batch: Callable[[int], Batch],
    session: Session,
    before: Compute | None = None,
    threads: int = 0,
) -> Cost:
    """The cost of what is left of `stage`, measured; the stage computes in the fastest way from here on.

    Args:
        stage: its networks may hold any weights; they are not changed.
        batch: makes a batch of that many samples, of the shapes of training.
        session: what the user fixed, and the ranks that share a batch.
        before: how the checkpoint was computed that the stage goes on from.
        threads: that the stage was given when the run began, as another number may change the last bits; 0
            for a stage that no preflight has seen.

    Raises:
        ConfigError: the options ask for what the machine does not have.
    """
    images = max(stage.plan.images - stage.images_seen, 0)
    steps = -(-images // stage.plan.batch_size)
    options = session.options
    division = divide(f"plan.{stage.name}", stage.plan.batch_size, session.ranks.size, options)
    flops, activations = _count(stage, choose(options, before), batch)
    threads = threads_for(options, flops * division.micro_batch, threads)

    def step_seconds(way: Compute) -> float:
        stage.use(way)
        part = batch(division.micro_batch).to(way.device)
        if stage.sharding is None:
            return division.parts * seconds_a_call(lambda: _step(stage, part), way.device)
        # Ranks that share a model make their steps together: as many each, and the slowest one counts.
        seconds = seconds_a_call(lambda: _step(stage, part), way.device, budget=0.0)
        return division.parts * max(each for (each,) in session.ranks.gather([seconds]))

    with on_threads(threads):
        compute, seconds_a_step = decide(options, step_seconds, steps, before)
        ceiling = matmul_ceiling(compute)
    compute = replace(compute, threads=threads)
    stage.use(compute)
    parameters = sum(p.numel() for p in stage.networks.parameters())
    weights = parameters * _FLOAT_BYTES
    # Sums of gradients that wait for the other branch of the tree, one of each size.
    branches = division.parts.bit_length() - 1 if options.reduce is Reduce.tree else 0
    averages = len(stage.ema.networks) - 1  # besides the first
    share = weights / (1 if stage.sharding is None else stage.sharding.shards)
    written = _COPIES_ON_DISK if stage.sharding is None else 0  # beside training, where one rank writes
    return Cost(
        stage=stage.name,
        parameters=parameters,
        flops_an_image=flops,
        division=division,
        images_to_go=images,
        steps_to_go=steps,
        seconds=seconds_a_step * steps,
        memory=(_COPIES_IN_MEMORY + averages + written + branches) * share
        + activations * division.micro_batch,
        disk=(_COPIES_ON_DISK + averages) * weights * (session.keep.checkpoints(stage.plan.images) + 1),
        compute=compute,
        ceiling=ceiling,
        ranks=session.ranks.size,
    )


def require_disk(folder: Path, costs: list[Cost]) -> float:
    """Free bytes where `folder` will be.

    Raises:
        OSError: less than the stages' checkpoints need.
    """
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = float(shutil.disk_usage(existing).free)
    needed = sum(cost.disk for cost in costs)
    if free < needed:
        raise OSError(
            f"{folder}: {_size(free)} free on its disk, but the checkpoints need {_size(needed)}; "
            "free some, or choose another place with folder=..."
        )
    return free


def show(costs: list[Cost], free_disk: float) -> None:
    """Prints the table, a column a stage."""
    table = Table(title="Preflight", title_justify="left")
    table.add_column("")
    for cost in costs:
        table.add_column(cost.stage)
    rows: list[tuple[str, Callable[[Cost], str]]] = [
        ("parameters", lambda c: f"{c.parameters / 1e6:,.2f} M"),
        ("FLOPs per image", lambda c: f"{c.flops_an_image / 1e9:,.2f} G (forward and backward)"),
        ("global batch", lambda c: str(c.division)),
        ("to go", lambda c: f"{c.images_to_go:,} images, {c.steps_to_go:,} steps"),
        ("time", lambda c: f"about {duration(c.seconds)} ({_rate(c)} images/s in a probe)"),
        ("of the ceiling", _share),
        ("computes", lambda c: str(c.compute)),
        ("peak memory", lambda c: f"at most about {_size(c.memory)}"),
        ("disk", lambda c: f"{_size(c.disk)} for checkpoints"),
    ]
    for label, cell in rows:
        table.add_row(label, *(cell(cost) for cost in costs))
    Console(width=110, soft_wrap=False).print(table)
    total = duration(sum(c.seconds for c in costs))
    print(f"Training takes about {total} in all; {_size(free_disk)} of disk are free.", flush=True)


def _step(stage: Stage, batch: Batch) -> Tensor:
    """The loss of one training step, whose gradients are dropped."""
    loss = stage.mean_loss(batch)
    loss.backward()
    stage.networks.zero_grad(set_to_none=True)
    return loss


def _count(stage: Stage, compute: Compute, batch: Callable[[int], Batch]) -> tuple[float, float]:
    """FLOPs of a training step and bytes kept for its backward pass, for one image, run eagerly."""
    eager = replace(compute, compiled=False, by_block=False)
    stage.use(eager)
    one = batch(1).to(compute.device)
    kept: dict[int, int] = {}

    def weights() -> set[int]:
        return {local(p).untyped_storage().data_ptr() for p in stage.networks.parameters()}

    # Those of a model that is spread are whole, and elsewhere, only while they are used.
    known = weights() if stage.sharding is None else None

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in (weights() if known is None else known):
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    counter = FlopCounterMode(
        display=False, custom_mapping=attention.FLOPS | feed_forward.FLOPS | winograd.FLOPS
    )
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _step(stage, one)
    activations = sum(kept.values())
    return float(counter.get_total_flops()), float(activations)


def _share(cost: Cost) -> str:
    """The share of what a matrix product reaches on this machine that the probe used."""
    if not (cost.seconds and cost.ceiling):
        return "-"
    used = cost.images_to_go / cost.seconds * cost.flops_an_image / (cost.ceiling * cost.ranks)
    return f"{used:.1%} of {cost.ceiling / 1e9:,.0f} GFLOP/s a device, by a matrix product"


def _rate(cost: Cost) -> str:
    return f"{cost.images_to_go / cost.seconds:,.0f}" if cost.seconds else "-"


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
