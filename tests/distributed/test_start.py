"""What cannot start is refused in one line: no process waits for another that does not come."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from scripts.faults.runs import WORDS
from tests.distributed.runs import PATIENCE, Runs, environment
from tests.distributed.test_agreement import free_port

pytestmark = pytest.mark.distributed


class Attempts:
    """Commands that should fail, each in a folder of its own: `refused(2, "trainer.devices=3")`."""

    def __init__(self, runs: Runs, folder: Path) -> None:
        self.runs = runs
        self.folder = folder

    def refused(self, code: int, *words: str, variables: Mapping[str, str] | None = None) -> str:
        """What the command says; AssertionError unless it ends with `code` and has written nothing."""
        log, own = self.folder / "log", (*WORDS, f"data.shards={self.runs.data}", *words)
        trial = self.runs.zygote.start("train", own, self.folder, log, variables or {})
        assert trial.wait(PATIENCE) == code, trial.said()
        assert not (self.folder / "runs").exists()
        said = trial.said()
        assert said.count("\n") == 1
        return said.strip()


@pytest.fixture
def attempts(runs: Runs, tmp_path: Path) -> Attempts:
    return Attempts(runs, tmp_path)


def test_ranks_that_do_not_divide_the_batch(attempts: Attempts) -> None:
    assert attempts.refused(2, "trainer.devices=3") == (
        "train.py: plan.autoencoder.batch_size is 32, the batch of all ranks, but does not divide by 3 "
        "ranks; give 30 or 33, or train on 2 or 4 ranks"
    )


def test_micro_batches_that_do_not_divide_a_share(attempts: Attempts) -> None:
    assert attempts.refused(2, "trainer.devices=2", "trainer.accumulate=3") == (
        "train.py: trainer.accumulate is 3, but a rank's share of plan.autoencoder.batch_size=32 is 16 "
        "images, which do not divide by it; give 2 or 4"
    )


@pytest.mark.parametrize("stages", [["autoencoder"], ["autoencoder", "diffusion"]])
def test_optimizers_of_whole_matrices_where_they_are_spread(stages: list[str], attempts: Attempts) -> None:
    words = ("trainer.devices=2", "trainer.strategy=fsdp", *(f"optimizer/{stage}=muon" for stage in stages))
    assert attempts.refused(2, *words) == (
        f"train.py: {', '.join(f'optimizer.{stage}' for stage in stages)}: works on whole matrices, and "
        "trainer.strategy=fsdp spreads them over the ranks; use trainer.strategy=ddp, or "
        + " ".join(f"optimizer/{stage}=adamw optimizer.{stage}.lr=1e-3" for stage in stages)
    )


def test_an_environment_that_is_no_launchers(attempts: Attempts) -> None:
    said = attempts.refused(5, variables={"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"})
    assert said == (
        "train.py: WORLD_SIZE is 2, but LOCAL_RANK, MASTER_PORT are not set; start all ranks with torchrun, "
        "or one process with trainer.devices=N, which starts the others"
    )


@pytest.mark.parametrize(("address", "why"), [("127.0.0.1", "refused"), ("nowhere.invalid", "name")])
def test_a_first_rank_that_cannot_be_reached(address: str, why: str, attempts: Attempts) -> None:
    began, port = time.monotonic(), free_port()
    variables = {**environment(1, 2, port), "MASTER_ADDR": address}
    said = attempts.refused(5, "trainer.connect_timeout=3", variables=variables)
    assert said.startswith(
        f"train.py: rank 1: rank 1 of 2 could not reach rank 0 at {address}:{port} within 3 s ("
    )
    assert said.endswith(
        "); see whether MASTER_ADDR and MASTER_PORT are its own, whether it runs, and whether a firewall is "
        "between"
    )
    assert why in said.rpartition("(")[2].lower()
    assert time.monotonic() - began < 60


def test_a_rank_that_does_not_come(attempts: Attempts) -> None:
    variables = environment(0, 2, free_port())
    assert attempts.refused(5, "trainer.connect_timeout=3", variables=variables) == (
        "train.py: rank 0 of 2 waited 3 s at the start, but rank 1 has not come; see whether it was started "
        "and what it says, or raise trainer.connect_timeout"
    )


def test_a_port_that_is_taken(attempts: Attempts) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        said = attempts.refused(5, "trainer.connect_timeout=3", variables=environment(0, 2, port))
    assert said == (
        f"train.py: rank 0 of 2 cannot listen at 127.0.0.1:{port}: another process does; choose another "
        "MASTER_PORT"
    )


def test_more_ranks_than_samples(runs: Runs, tmp_path: Path) -> None:
    words = ("plan.diffusion.images=8", "data.val_fraction=0.97")
    trial = runs.start("few", 4, *words)
    assert trial.wait(PATIENCE) == 2
    assert trial.said().splitlines()[-1] == (
        f"train.py: {runs.data}: 3 training samples are fewer than the 4 ranks; train on fewer ranks, or add "
        "samples"
    )
