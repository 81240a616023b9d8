"""Whole runs of `train.py` on several ranks of this machine, forked from one process that has all imports."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from models.checkpoint import newest
from scripts.faults.runs import BATCH, STATE_FILES, WORDS, read_trace, write_data
from scripts.faults.zygote import Trial, Zygote

STEPS = 24
IMAGES = STEPS * BATCH
STAGES = {"autoencoder": 96, "diffusion": IMAGES}
PATIENCE = 200.0


@dataclass(frozen=True)
class Finished:
    """A run that came to its end."""

    folder: Path
    said: str

    def states(self) -> dict[str, tuple[str, ...]]:
        """Stage -> SHA-256 of weights, average and optimizer in its last checkpoint."""
        found = {}
        for stage, images in STAGES.items():
            checkpoint = newest(self.folder / stage / "checkpoints")
            assert checkpoint is not None
            assert checkpoint.images == images
            files = json.loads((checkpoint.folder / "manifest.json").read_text())["files"]
            found[stage] = tuple(files[name]["sha256"] for name in STATE_FILES)
        return found

    def weights(self, stage: str) -> dict[str, Tensor]:
        """The trained weights in a stage's last checkpoint."""
        checkpoint = newest(self.folder / stage / "checkpoints")
        assert checkpoint is not None
        return load_file(checkpoint.folder / "weights.safetensors")

    def losses(self) -> dict[tuple[str, int], float]:
        """(stage, images before the step) -> the loss of all ranks, replays taken off."""
        return {
            (stage, row["images"]): float.fromhex(row["global_loss"])
            for stage, row in read_trace(self.folder)
        }


class Runs:
    """Runs by name, each made once; `run("two", 2, "trainer.reduce=tree")`."""

    def __init__(self, place: Path, zygote: Zygote) -> None:
        self.place = place
        self.zygote = zygote
        self.data = write_data(place / "data")
        self._finished: dict[str, Finished] = {}

    def start(self, name: str, ranks: int, *words: str) -> Trial:
        """Starts a run, or goes on with it, in a folder of its name."""
        folder = self.place / name
        folder.mkdir(exist_ok=True)
        own = (*WORDS, f"plan.diffusion.images={IMAGES}", f"data.shards={self.data}", *words)
        log = folder / f"log-{len(list(folder.glob('log-*')))}"
        if ranks == 1:
            return self.zygote.start("train", own, folder, log)
        return self.zygote.start("ranks", (str(ranks), *own, f"trainer.devices={ranks}"), folder, log)

    def run(self, name: str, ranks: int, *words: str) -> Finished:
        """The run, at its end; AssertionError where it does not get there."""
        if name not in self._finished:
            trial = self.start(name, ranks, *words)
            code = trial.wait(PATIENCE)
            if code is None:
                trial.kill()
            assert code == 0, trial.said()[-2000:]
            self._finished[name] = Finished(self.place / name / "runs" / "run", trial.said())
        return self._finished[name]

    def kill_after(self, step: int, name: str, ranks: int, *words: str) -> None:
        """Starts or goes on with a run, and kills all of it as soon as it has made `step` diffusion steps."""
        trial = self.start(name, ranks, *words)
        trace = self.place / name / "runs" / "run" / "diffusion" / "trace-0.jsonl"
        deadline = time.monotonic() + PATIENCE
        while trial.poll() is None and time.monotonic() < deadline:
            lines = trace.read_text().splitlines() if trace.exists() else []
            if any(line.startswith(f'{{"images": {(step - 1) * BATCH},') for line in lines):
                break
            time.sleep(0.002)
        assert trial.poll() is None, trial.said()[-2000:]
        trial.kill()


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells rank `rank`."""
    values = (
        ("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", size),
        ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port),
    )  # fmt: skip
    return {name: str(value) for name, value in values}
