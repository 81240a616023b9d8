"""Ranks that share a model (FSDP2, HSDP) learn what one process learns, and go on anywhere."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.checkpoint import Checkpoint, newest
from models.stages.snapshots import reconstruct

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).parent / "spread.py"
STAGES = ("autoencoder", "diffusion")
Train = Callable[..., Path]


def train(folder: Path, ranks: int, *words: str, code: int = 0) -> Path:
    """Trains into `folder`, and compares the exit code."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(SCRIPT), str(folder), str(ranks), *words]
    ended = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=580
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return folder


def last(folder: Path, stage: str) -> Checkpoint:
    checkpoint = newest(folder / stage / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def losses(folder: Path, stage: str) -> list[float]:
    """The exact loss of each global batch, the last of those that were made twice."""
    lines = [json.loads(line) for line in (folder / stage / "trace-0.jsonl").read_text().splitlines()]
    return [float.fromhex(loss) for _, loss in sorted({e["images"]: e["global_loss"] for e in lines}.items())]


def assert_close(mine: Path, theirs: Path, *stages: str) -> None:
    """Losses, weights, averages and moments are the same to float tolerance."""
    for stage in stages:
        assert losses(mine, stage) == pytest.approx(losses(theirs, stage), rel=2e-6)
        one, other = last(mine, stage), last(theirs, stage)
        assert one.images == other.images == 48
        for name in ("weights", "ema", "optimizer", *(["ema_1"] if stage == "diffusion" else [])):
            tensors, wanted = one.tensors(name), other.tensors(name)
            assert tensors.keys() == wanted.keys()
            for key, tensor in tensors.items():
                torch.testing.assert_close(tensor, wanted[key], rtol=1e-4, atol=3e-6, msg=f"{name} {key}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return train(tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that share one model."""
    return train(tmp_path_factory.mktemp("two") / "run", 2, "strategy=fsdp")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed in the step after 32 images."""
    return train(tmp_path_factory.mktemp("killed") / "run", 2, "strategy=fsdp", "kill=40", code=5)


def test_two_that_share_a_model_learn_what_one_learns(alone: Path, two: Path) -> None:
    assert_close(two, alone, *STAGES)
    checkpoint = last(two, "diffusion")
    assert checkpoint.shards == 2
    sizes = [path.stat().st_size for path in sorted(checkpoint.folder.glob("weights-*-of-00002.safetensors"))]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)


def test_another_average_is_made_of_what_two_have_snapped(alone: Path, two: Path) -> None:
    mine, wanted = (reconstruct(run / "diffusion" / "averages", 0.13) for run in (two, alone))
    assert mine.keys() == wanted.keys() == last(alone, "diffusion").tensors("ema").keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-4, atol=1e-5, msg=key)
    snapped = reconstruct(two / "diffusion" / "averages", 0.05)
    tracked = last(two, "diffusion").tensors("ema")
    assert all(torch.allclose(snapped[key], tracked[key], atol=1e-5) for key in tracked)


def test_four_that_share_two_models_learn_the_same(alone: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", 4, "strategy=hsdp", "shards=2")
    assert_close(run, alone, *STAGES)
    assert last(run, "diffusion").shards == 2


def test_killed_and_gone_on_with_is_the_same_to_the_bit(two: Path, killed: Path, tmp_path: Path) -> None:
    assert last(killed, "diffusion").images == 32
    again = train(Path(shutil.copytree(killed, tmp_path / "run")), 2, "strategy=fsdp")
    assert last(again, "diffusion").digest() == last(two, "diffusion").digest()


@pytest.mark.parametrize(("ranks", "words"), [(1, []), (4, ["strategy=fsdp", "accumulate=2"])])
def test_killed_and_gone_on_with_by_more_or_fewer(
    alone: Path, killed: Path, tmp_path: Path, ranks: int, words: list[str]
) -> None:
    run = train(Path(shutil.copytree(killed, tmp_path / "run")), ranks, *words)
    assert_close(run, alone, "diffusion")
    assert last(run, "diffusion").shards == ranks
