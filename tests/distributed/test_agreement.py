"""Ranks with another configuration are refused at the start; weights that come apart stop the run."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from models.checkpoint import newest
from scripts.faults.runs import WORDS
from tests.distributed.runs import PATIENCE, Runs, environment

pytestmark = pytest.mark.distributed

PROJECT = Path(__file__).resolve().parents[2]
#: Is train.py, but that one bit of a weight of rank 1 is another after 16 images of the diffusion stage: not
#: the last bit, which a later step may round away.
FLIPPED = """
import os, sys
sys.path.insert(0, {project!r})
import torch
import train
from conf.cli import main
from models.stages import preflight
from models.stages.ema import Ema
preflight.seconds_a_call = lambda call, device: (call(), 0.01)[1]
update = Ema.update
def flip(self, network, images_seen, batch_size):
    update(self, network, images_seen, batch_size)
    if os.environ["RANK"] == "1" and images_seen == 16 and "backbone" in network:
        with torch.no_grad():
            network["backbone"].conv_in.weight.view(torch.int32)[0, 0, 1, 2] ^= 1 << 12
Ema.update = flip
main("train", train.train)
"""

#: Is train.py, but that rank 1 finds no compiler.
WITHOUT_A_COMPILER = """
import os, sys
sys.path.insert(0, {project!r})
if os.environ.get("RANK") == "1":
    os.environ["PATH"] = "/nowhere"
import train
from conf.cli import main
if __name__ == "__main__":
    main("train", train.train)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_ranks(code: str, runs: Runs, place: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """What came of `code`, one of those above, run in `place` with weights compared every 32 images."""
    script = place / "train_otherwise.py"
    script.write_text(code.format(project=str(PROJECT)))
    every = "trainer.devices=2", "trainer.check_ranks_every_images=32"
    return subprocess.run(
        [sys.executable, str(script), *WORDS, f"data.shards={runs.data}", *every, *words],
        cwd=place, capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip


def test_another_configuration_on_one_rank_is_refused(runs: Runs) -> None:
    """Each is a command of its own, as a launcher may start them that gives each what it likes."""
    folder, port = runs.place / "config", free_port()
    folder.mkdir()
    words = (*WORDS, f"data.shards={runs.data}")
    own = (*words, "optimizer.diffusion.lr=0.02", "plan.diffusion.warmup_images=64")
    trials = [
        runs.zygote.start("train", mine, folder, folder / f"log-{rank}", environment(rank, 4, port))
        for rank, mine in enumerate((words, words, own, words))
    ]
    assert [trial.wait(PATIENCE) for trial in trials] == [2, 2, 2, 2]
    assert trials[0].said() == (
        "train.py: rank 2 has another configuration than rank 0: optimizer.diffusion.lr is 0.02 there and "
        "0.0015 on rank 0; plan.diffusion.warmup_images is 64 there and 80 on rank 0; give every rank the "
        "same command\n"
    )
    assert [trial.said() for trial in trials[1:]] == ["", "", ""]
    assert not (folder / "runs").exists()


def test_ranks_say_that_their_configuration_is_one(runs: Runs) -> None:
    assert "2 ranks with one configuration, SHA-256 " in runs.run("two", 2).said


def test_a_weight_that_flips_on_one_rank_stops_the_run(runs: Runs, tmp_path: Path) -> None:
    words = "plan.diffusion.images=80", "plan.diffusion.checkpoint_every_images=32"
    done = two_ranks(FLIPPED, runs, tmp_path, *words)
    assert done.returncode == 6, done.stderr
    assert done.stderr == (
        "train.py: stage diffusion at 32 images: the ranks no longer have the same weights: "
        "backbone.conv_in.weight of ranks 0, 1; all agreed at 0 images; a device or its memory erred: test "
        "it, remove the checkpoints since then if rank 0 is named, and continue with resume=true\n"
    )
    assert not list((tmp_path / "runs" / "run" / "diffusion").glob("checkpoints/images-*"))


def test_ranks_of_which_one_has_no_compiler_step_alike(runs: Runs, tmp_path: Path) -> None:
    """Each steps its matrices for itself, so that kernels on some of them would let the weights drift."""
    words = "plan.diffusion.images=96", "optimizer/diffusion=muon"
    done = two_ranks(WITHOUT_A_COMPILER, runs, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    last = newest(tmp_path / "runs" / "run" / "diffusion" / "checkpoints")
    assert last is not None
    assert last.document("state")["compute"]["native"] is False
