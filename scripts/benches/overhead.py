"""What a training step costs beside a bare loop over the same networks.

Two copies of the diffusion stage make the same steps on the same batches in one process: one through `fit`,
with Lightning's loop, the guard and every callback of a run, the other in a dozen lines of torch. They take
turns (the bare loop runs where Lightning asks its loader for the next batch, so that both stay warm and
nothing of a start or an end is counted), and the bare loop runs twice, for the A/A ratio. At the end both
must hold the same weights to the bit, or else they did not do the same work. The configuration is composed
by Hydra as always; a step has nothing more to do with it.

`host_reads` counts how often a step reads a number of the device back between two lines of metrics
(reads.py): each such read makes the host wait for a GPU.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from conf.cli import composed
from conf.schema import make
from data.batch import Batch
from data.datamodule import DataModule
from data.progress import Progress
from models.loading import build_networks
from models.registry import build
from models.stages.compute import Compute, choose, set_threads
from models.stages.diffusion import DiffusionStage
from models.stages.fit import Work, fit
from models.stages.heap import keep_heap
from models.stages.keep import Keep
from models.stages.logs import CsvLog
from models.stages.optim import learning_rate_factor
from models.stages.plan import Plan
from models.stages.session import Session
from scripts.benches.findings import Findings, cell
from scripts.benches.measuring import Lap, check_rounds, cpu, cpu_ms, machine, rate, ratio, wall
from scripts.benches.reads import Reads

#: At most 3 % of a step of 100 ms.
WANTED = {"kept": 0.97}
ERRORS = {"kept": "aa"}
BARE, AGAIN, OURS = "bare loop", "bare again", "ours"


def overhead(
    backbone: str = "tiny", batch: int = 16, steps: int = 4, rounds: int = 64, threads: int = 1
) -> Findings:
    """Returns what of the speed of a bare loop is kept by training with Lightning, guard and callbacks.

    Args:
        backbone: as train.py names it.
        batch: images a step; 16 of the tiny backbone are about 100 ms on one core.
        steps: of each arm a round.
        rounds: of each arm, an even number.
        threads: of torch; one is the quietest.
    """
    check_rounds(rounds)
    if min(batch, steps, threads) < 1:
        raise ValueError("batch, steps and threads must be at least 1")
    values = composed("train", f"backbone={backbone}", f"trainer.threads={threads}")
    options = make("trainer", values["trainer"])
    set_threads(options)
    keep_heap()
    images = batch * (steps * (rounds + 1) + 1)
    never = 2 * images  # no validation and no checkpoint between the steps
    plan = Plan(images, batch, validate_every_images=never, checkpoint_every_images=never)
    batches = [make_batch(values, batch, k) for k in range(8)]
    ours = make_stage(values, plan)
    compute = choose(options)
    ours.use(compute)
    turns = Turns(batches, Bare(copy.deepcopy(ours)), Bare(copy.deepcopy(ours)), steps, rounds)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder), {}, options, CsvLog(), Keep())
        data = cast(DataModule, turns)  # all that `fit` asks of it
        fit(Work(ours, data, {}, None, lambda: None, lambda seen: _picture(Path(folder))), session)
    turns.bare.step(batches[0])  # ours has made one more, after which its loader is not asked again
    return _findings(turns, ours, compute, {
        "backbone": backbone, "batch": batch, "steps": steps, "rounds": rounds, **machine(),
    })  # fmt: skip


def make_stage(values: dict[str, Any], plan: Plan, seed: int = 0) -> DiffusionStage:
    """A fresh diffusion stage as `values` describe it, but for `plan` and the `seed` of all that is drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = build_networks(values)
    return DiffusionStage(
        *networks,
        build("objective", values["objective"]),
        float(values["conditioning_dropout"]),
        make("optimizer/diffusion", values["optimizer"]["diffusion"]),
        plan,
        Compute(torch.device("cpu"), False, False, False, ""),
        seed,
        make("ema", values["ema"]),
    )


def make_batch(values: dict[str, Any], size: int, number: int) -> Batch:
    """A batch of noise, with captions of no words."""
    rng = torch.Generator().manual_seed(number)
    side, length = int(values["data"]["resolution"]), int(values["text_encoder"]["context_length"])
    return Batch(
        pixels=torch.randint(0, 256, (size, 3, side, side), generator=rng, dtype=torch.uint8),
        tokens=torch.randint(0, 49_406, (size, length), generator=rng),
        indices=torch.arange(size) + size * number,
        captions=[""] * size,
        keys=[""] * size,
    )


class Bare:
    """The loop that anybody would write: loss, gradients, their norm, the step, the average."""

    def __init__(self, stage: DiffusionStage) -> None:
        self.stage = stage
        self.optimizer = stage.configure_optimizers()
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, batch: Batch) -> Tensor:
        """One of them; returns its loss."""
        stage, plan = self.stage, self.stage.plan
        factor = learning_rate_factor(
            stage.images_seen, plan.images, plan.warmup_images, plan.cooldown_fraction
        )
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad()
        loss = stage.mean_loss(batch.to(stage.compute.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, plan.gradient_clip)
        self.optimizer.step()
        stage.images_seen += plan.batch_size
        stage.ema.update(stage.networks, stage.images_seen, plan.batch_size)
        return loss.detach()


@dataclass
class Turns:
    """The batches of a run, between which other arms have their turn: stands where `fit` wants its data.

    Args:
        batches: walked round and round, by all arms alike.
        bare: the loop; `again` is the same on another copy.
        steps: of an arm's turn.
        rounds: that are told, after one that is not.
    """

    batches: list[Batch]
    bare: Bare
    again: Bare
    steps: int
    rounds: int
    laps: dict[str, list[Lap]] = field(default_factory=lambda: {BARE: [], OURS: [], AGAIN: []})
    host_reads: int = 0

    def train_loader(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> "Turns":
        """These batches, once; the arguments are those of a run from its start."""
        return self

    def val_loader(self, images: int, rank: int = 0, world_size: int = 1, parts: int = 1) -> list[Batch]:
        """One batch."""
        return self.batches[:1]

    def __len__(self) -> int:
        return self.steps * (self.rounds + 1) + 1

    def __iter__(self) -> Iterator[Batch]:
        with Progress("timing", 3 * len(self)) as progress:
            for number in range(-1, self.rounds):
                order = [BARE, OURS, AGAIN] if number % 2 == 0 else [AGAIN, OURS, BARE]
                mine = [
                    self.batches[(number * self.steps + k) % len(self.batches)] for k in range(self.steps)
                ]
                for name in order:
                    began, own = time.perf_counter(), time.process_time()
                    if name == OURS:
                        reads = Reads()
                        with reads if number < 0 else _NOTHING:
                            yield from mine
                        self.host_reads = max(self.host_reads, reads.count)
                    else:
                        loop = self.bare if name == BARE else self.again
                        for batch in mine:
                            loop.step(batch)
                    lap = Lap(self.steps, time.perf_counter() - began, time.process_time() - own)
                    if number >= 0:
                        self.laps[name].append(lap)
                    progress.advance(self.steps)
        yield self.batches[0]


_NOTHING: AbstractContextManager[None] = nullcontext()


def _picture(folder: Path) -> Path:
    """Nothing is shown: pictures are no part of a step."""
    return folder / "none.png"


def _same(one: DiffusionStage, other: DiffusionStage) -> bool:
    pairs = zip(one.networks.state_dict().values(), other.networks.state_dict().values(), strict=True)
    averages = zip(
        one.ema.network.state_dict().values(), other.ema.network.state_dict().values(), strict=True
    )
    return all(torch.equal(a, b) for a, b in (*pairs, *averages))


def _findings(turns: Turns, ours: DiffusionStage, compute: Compute, told: dict[str, Any]) -> Findings:
    if not _same(ours, turns.bare.stage):
        raise ValueError("the bare loop came to other weights: the two did not do the same work")
    laps = turns.laps
    ratios, by_cpu = {}, {}
    for name, (over, under) in {"kept": (OURS, BARE), "aa": (AGAIN, BARE)}.items():
        found = ratio(laps[over], laps[under], wall)
        assert found is not None
        ratios[name] = found
        processor = ratio(laps[over], laps[under], cpu)
        by_cpu[name] = None if processor is None else round(processor.value, 4)
    rows = [("", "ms/step", "CPU ms/step")]
    rows += [(name, cell(1000 / rate(each), ".2f"), cell(cpu_ms(each), ".2f")) for name, each in laps.items()]
    figures = {
        "overhead_percent": round(100 * (1 / ratios["kept"].value - 1), 3),
        "milliseconds_a_step": {name: round(1000 / rate(each), 3) for name, each in laps.items()},
        "host_reads_a_step": turns.host_reads / turns.steps,
        "same_weights": True,
        "cpu_ratios": by_cpu,
        "computes": str(compute),
        **told,
    }
    return Findings("overhead", figures, rows, ratios, WANTED, ERRORS)
