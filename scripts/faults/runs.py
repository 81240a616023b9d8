"""A small run to be broken, and the law it is held to: what the uninterrupted run saved, logged and read.

`Bench` makes shards and the uninterrupted run, which saves after every step, so that whatever a broken run
saves at any step can be compared. Bits are compared by the SHA-256 of weights, average and optimizer.
"""

import io
import json
import shutil
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts.faults.zygote import Trial, Zygote

BATCH = 8
#: Steps of the diffusion stage, and in a short torture.
STEPS, FEW_STEPS = 60, 16
SAMPLES = 96
#: Seconds in which a whole run ends on a busy machine.
PATIENCE = 240.0
STATE_FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")
#: Figures of metrics.jsonl that depend on the machine's speed and memory.
TIMED = {"images_per_second", "data_wait_share", "peak_memory_gib", "step_ms_p50", "step_ms_p99"}
TIMED |= {"step_ms_max", "mfu", "slowest_rank", "slowest_rank_factor", "device_hours", "device_hours_to_go"}
WORDS = (
    "data.resolution=16", "data.val_fraction=0.1", "data.workers=0", "data.block_shards=2",
    "autoencoder=f4c4", "optimizer/autoencoder=adamw", "optimizer/diffusion=adamw",
    "optimizer.diffusion.lr=1.5e-3",
    "autoencoder.channels=[8,8,8]", "autoencoder.norm_groups=4", "backbone.channels=[16,16]",
    "backbone.norm_groups=4", "backbone.head_dim=16", "backbone.transformer_depth=[0,1]",
    "text_encoder.width=16", "text_encoder.layers=1", "text_encoder.heads=2",
    "text_encoder.context_length=12", "trainer.precision=fp32", "trainer.compile=off", "trainer.threads=1",
    "plan.autoencoder.images=96", "plan.autoencoder.batch_size=32", "plan.autoencoder.warmup_images=32",
    "plan.autoencoder.log_every_images=32", "plan.autoencoder.checkpoint_every_images=32",
    "plan.autoencoder.validation_images=8", f"plan.diffusion.batch_size={BATCH}",
    f"plan.diffusion.log_every_images={BATCH}",
    "plan.diffusion.warmup_images=80", f"plan.diffusion.checkpoint_every_images={5 * BATCH}",
    f"plan.diffusion.validate_every_images={12 * BATCH}", "plan.diffusion.validation_images=8",
    "sampling.num_steps=1", "trainer.trace=true", "resume=true", "name=run",
)  # fmt: skip


def write_data(folder: Path, samples: int = SAMPLES, shards: int = 3, side: int = 24, seed: int = 0) -> Path:
    """The folder of a few shards of noisy pictures with captions and records, the same bytes every time."""
    from data.writer import write_shard

    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = []
        for k in range(shard, samples, shards):
            pixels = random.integers(0, 256, (side, side, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            caption = f"picture {k} of {'sea' if k % 2 else 'hills'}"
            record = json.dumps({"number": k, "credit": f"nobody {k}"})
            fields = {"jpg": buffer.getvalue(), "txt": caption.encode(), "json": record.encode()}
            members.append((f"{k:06d}", fields))
        write_shard(folder / f"{shard:05d}.tar", members)
    return folder


Steps = dict[tuple[str, int], dict[str, Any]]


@dataclass
class Broken:
    """One run that is being broken: its place, its length, and the logs of every attempt to run it."""

    place: Path
    images: int
    words: tuple[str, ...] = ()
    attempts: int = 0

    @property
    def folder(self) -> Path:
        """Of the run itself."""
        return self.place / "runs" / "run"

    @property
    def saved(self) -> Path:
        """What was saved, a line a checkpoint, by all attempts together."""
        return self.place / "saved.jsonl"

    def checkpoints(self, stage: str = "diffusion") -> Path:
        """The folder of a stage's checkpoints."""
        return self.folder / stage / "checkpoints"


@dataclass
class Reference:
    """What the uninterrupted run saved, logged and, of each rank, read; keys are (stage, images seen)."""

    states: dict[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)
    figures: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    steps: dict[int, Steps] = field(default_factory=dict)


class Bench:
    """Shards, the uninterrupted run, and places for runs that are broken.

    Args:
        out: the folder of everything.
        words: of the command line, besides `WORDS`.
        ranks: processes that train together.
        steps: of the diffusion stage.
    """

    def __init__(self, out: Path, words: Sequence[str] = (), ranks: int = 1, steps: int = STEPS) -> None:
        self.out = out
        self.ranks = ranks
        self.images = steps * BATCH
        self.data = out / "data"
        if not self.data.exists():
            write_data(self.data)
        self.words = (*WORDS, f"plan.diffusion.images={self.images}", *words, f"data.shards={self.data}")
        self.whole = Broken(out / "whole", self.images)
        self.reference = Reference()
        self.seconds = 0.0

    def run_whole(self, zygote: Zygote) -> None:
        """Makes the uninterrupted run; RuntimeError if it fails."""
        every = ("plan.diffusion.checkpoint_every_images=1", "plan.autoencoder.checkpoint_every_images=1")
        self.whole.words = every
        trial = self.start(zygote, self.whole)
        code = trial.wait(PATIENCE)
        if code != 0:
            trial.kill()
            raise RuntimeError(f"the uninterrupted run ended with {code}: {tail(trial.said())}")
        self.seconds = trial.seconds
        self.reference = Reference(
            states=dict(saved_states(self.whole.saved)),
            figures=read_figures(self.whole.folder),
            steps={
                rank: {(stage, row["images"]): row for stage, row in read_trace(self.whole.folder, rank)}
                for rank in range(self.ranks)
            },
        )
        wanted = {("diffusion", n) for n in range(BATCH, self.images + 1, BATCH)}
        missing = wanted - self.reference.states.keys()
        if missing:
            raise RuntimeError(f"the uninterrupted run saved nothing at {sorted(missing)[:3]}")

    def place(self, name: str, words: Sequence[str] = (), with_autoencoder: bool = True) -> Broken:
        """A place for a run to be broken; its autoencoder is trained already where `with_autoencoder`."""
        broken = Broken(self.out / name, self.images, tuple(words))
        broken.folder.mkdir(parents=True)
        if with_autoencoder:
            shutil.copytree(self.whole.folder / "autoencoder", broken.folder / "autoencoder")
        return broken

    def command(self, broken: Broken) -> tuple[str, ...]:
        """The words of the command line of a run."""
        return (*self.words, *broken.words)

    def start(self, zygote: Zygote, broken: Broken, ranks: int = 0) -> Trial:
        """Starts the run's command once more, as `ranks` processes (the bench's own number unless given)."""
        broken.place.mkdir(parents=True, exist_ok=True)
        ranks, words = ranks or self.ranks, self.command(broken)
        log = broken.place / f"attempt-{broken.attempts:03d}.log"
        broken.attempts += 1
        saved = {"TORTURE_SAVED": str(broken.saved)}
        if ranks > 1:
            words = (str(ranks), *words, f"trainer.devices={ranks}")
        return zygote.start("ranks" if ranks > 1 else "train", words, broken.place, log, saved)

    def faults(self, broken: Broken, finished: bool) -> list[str]:
        """What a run did otherwise than the uninterrupted one; nothing is as it should be.

        Args:
            broken: the run.
            finished: whether it has come to its end, so that nothing may be missing.
        """
        found = state_faults(broken.saved, self.reference)
        found += figure_faults(broken.folder, self.reference, finished)
        proven = {(stage, row["images"]) for stage, row in read_trace(broken.folder)}
        for rank, steps in self.reference.steps.items():
            trace = list(read_trace(broken.folder, rank))
            found += trace_faults(trace, steps, finished, proven if rank else set())
        if finished:
            found += final_faults(broken, self.reference)
        return found


def saved_states(path: Path) -> Iterable[tuple[tuple[str, int], tuple[str, ...]]]:
    """((stage, images seen), hashes of the state files) of every line a trial noted."""
    for line in _lines(path):
        images = int(line["name"].split("-")[1])
        yield (line["stage"], images), tuple(line["files"].get(name, "") for name in STATE_FILES)


def read_figures(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    """(stage, images seen) -> the figures of metrics.jsonl that do not depend on the machine's speed."""
    figures: dict[tuple[str, int], dict[str, float]] = {}
    for path in run.glob("*/metrics.jsonl"):
        for line in _lines(path):
            kept = {key: value for key, value in line.items() if key not in TIMED and key != "images"}
            figures.setdefault((path.parent.name, line["images"]), {}).update(kept)
    return figures


def read_trace(run: Path, rank: int = 0) -> Iterable[tuple[str, dict[str, Any]]]:
    """(stage, line) of a rank's traces, in the order they were written."""
    for path in sorted(run.glob(f"*/trace-{rank}.jsonl")):
        for line in _lines(path):
            yield path.parent.name, line


def state_faults(saved: Path, reference: Reference) -> list[str]:
    """Checkpoints that differ from those of the uninterrupted run at the same step."""
    found = []
    for (stage, images), hashes in saved_states(saved):
        wanted = reference.states.get((stage, images))
        if wanted is None:
            found.append(f"{stage}: saved at {images} images, where no step ends")
        elif wanted != hashes:
            differ = [n for n, one, other in zip(STATE_FILES, hashes, wanted, strict=True) if one != other]
            found.append(f"{stage}: {', '.join(differ)} differ at {images} images")
    return found


def figure_faults(run: Path, reference: Reference, finished: bool) -> list[str]:
    """Lines of metrics.jsonl that differ or, where the run is finished, are missing."""
    mine, found = read_figures(run), []
    for key, figures in mine.items():
        wanted = reference.figures.get(key, {})
        differ = [name for name, value in figures.items() if wanted.get(name) != value]
        if differ:
            found.append(f"{key[0]}: {', '.join(differ)} differ at {key[1]} images in metrics.jsonl")
    if finished:
        missing = sorted(reference.figures.keys() - mine.keys())
        if missing:
            found.append(f"metrics.jsonl has no line at {missing[0]} and {len(missing) - 1} more places")
    return found


def trace_faults(
    trace: list[tuple[str, dict[str, Any]]],
    wanted_steps: Steps,
    finished: bool,
    proven: Set[tuple[str, int]] = frozenset(),
) -> list[str]:
    """Steps that were computed otherwise, left out or done twice, once replays are taken off.

    Args:
        trace: of one rank, in the order it was written.
        wanted_steps: of the same rank of the uninterrupted run.
        finished: whether nothing may be missing at the end.
        proven: steps that the first rank has written down with the loss of all ranks, which this rank made
            too even where it was killed before it wrote its line.
    """
    found: list[str] = []
    done: dict[str, dict[int, dict[str, Any]]] = {}
    for stage, row in trace:
        wanted = wanted_steps.get((stage, row["images"]))
        differ = [key for key in row if wanted is None or wanted.get(key) != row[key]]
        if differ:
            found.append(f"{stage}: {', '.join(differ)} differ in the step after {row['images']} images")
        steps = done.setdefault(stage, {})
        for again in [images for images in steps if images >= row["images"]]:
            del steps[again]  # made anew after a resume
        steps[row["images"]] = row
    for stage, steps in done.items():
        mine = [key for row in steps.values() for key in row["keys"]]
        last = max(steps)
        rows = [
            row for (name, images), row in wanted_steps.items()
            if name == stage and (finished or images <= last)
            and not (images not in steps and (name, images) in proven)
        ]  # fmt: skip
        keys = [key for row in rows for key in row["keys"]]
        if mine != keys:
            lost, twice = lost_and_twice(mine, keys)
            found.append(f"{stage}: {lost} samples lost, {twice} read twice")
    return found


def lost_and_twice(mine: Sequence[str], wanted: Sequence[str]) -> tuple[int, int]:
    """How many of the `wanted` samples are missing from `mine`, and how many of `mine` are too many."""
    left: dict[str, int] = {}
    for key in wanted:
        left[key] = left.get(key, 0) + 1
    for key in mine:
        left[key] = left.get(key, 0) - 1
    return sum(n for n in left.values() if n > 0), -sum(n for n in left.values() if n < 0)


def final_faults(broken: Broken, reference: Reference) -> list[str]:
    """What is wrong with what a finished run leaves behind."""
    from models.checkpoint import newest

    found = []
    for stage, images in (("autoencoder", 96), ("diffusion", broken.images)):
        checkpoint = newest(broken.checkpoints(stage))
        if checkpoint is None or checkpoint.images != images:
            found.append(f"{stage}: its last checkpoint is {checkpoint and checkpoint.folder.name}")
            continue
        files = json.loads((checkpoint.folder / "manifest.json").read_text())["files"]
        hashes = tuple(files[name]["sha256"] for name in STATE_FILES)
        if hashes != reference.states[stage, images]:
            found.append(f"{stage}: its last state differs")
    return found


def tail(text: str, lines: int = 3) -> str:
    """The last lines of a log in one."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-lines:])


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a file of JSON lines; a last one that was not finished is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            yield json.loads(line)
