"""What a stage will cost: counted FLOPs, a probe that changes nothing, and a full disk found in time."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.batch import Batch
from models.stages import preflight as module
from models.stages.compute import Precision, Reduce, Switch, TrainerOptions
from models.stages.logs import CsvLog
from models.stages.plan import Plan
from models.stages.preflight import Cost, preflight, require_disk, show
from models.stages.ranks import Ranks
from models.stages.session import Session

OPTIONS = TrainerOptions(precision=Precision.fp32, compile=Switch.off)
SESSION = Session(Path("run"), {}, OPTIONS, CsvLog())
MakeBatch = Callable[..., Batch]


@pytest.fixture(autouse=True)
def _half_a_second_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are made, once a way to compute, but not timed."""

    def once(call: Callable[[], object], device: torch.device) -> float:
        call()
        return 0.5

    monkeypatch.setattr(module, "seconds_a_call", once)


@pytest.fixture
def cost(make_stage: Callable[..., Any], make_batch: MakeBatch) -> Cost:
    return preflight(make_stage("autoencoder"), make_batch, SESSION)


def test_the_probe_changes_nothing(make_stage: Callable[..., Any], make_batch: MakeBatch) -> None:
    stage = make_stage("diffusion")
    before = {k: v.clone() for k, v in stage.networks.state_dict().items()}
    preflight(stage, make_batch, SESSION)
    after = stage.networks.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(p.grad is None for p in stage.networks.parameters())
    assert stage.images_seen == 0


def test_flops_of_one_convolution(make_batch: MakeBatch, make_stage: Callable[..., Any]) -> None:
    stage = make_stage("autoencoder")
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    stage.networks = torch.nn.ModuleDict({"layer": layer})
    stage.mean_loss = lambda batch: layer(batch.images).square().mean()
    forward = 2 * 3 * 5 * 9 * 16 * 16
    # Its backward pass counts the gradient of the weights; the pictures need none.
    assert preflight(stage, make_batch, SESSION).flops_an_image == 2 * forward


def test_the_counts(cost: Cost, make_stage: Callable[..., Any]) -> None:
    parameters = sum(p.numel() for p in make_stage("autoencoder").networks.parameters())
    assert (cost.parameters, cost.division.batch_size, cost.images_to_go, cost.steps_to_go) == (
        parameters,
        4,
        16,
        4,
    )
    assert cost.disk == 4 * (2 + 1 + 1) * 4 * parameters  # two kept, the best, one being written
    assert cost.memory > 20 * parameters
    assert cost.seconds == 4 * 0.5


def test_what_is_left_after_a_stop(make_stage: Callable[..., Any], make_batch: MakeBatch) -> None:
    stage = make_stage("autoencoder")
    stage.images_seen = 12
    assert preflight(stage, make_batch, SESSION).steps_to_go == 1


def test_a_full_disk(cost: Cost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = cost.disk * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert require_disk(tmp_path / "runs" / "new", [cost, cost]) == free
    with pytest.raises(OSError, match=r"free on its disk, but the checkpoints need .*folder="):
        require_disk(tmp_path / "runs" / "new", [cost, cost, cost])


def test_the_table(cost: Cost, capsys: pytest.CaptureFixture[str]) -> None:
    show([cost], 2.0**31)
    printed = capsys.readouterr().out
    for word in ("autoencoder", "16 images, 4 steps", "cpu, float32", "2.00 GiB of disk are free"):
        assert word in printed


@pytest.mark.parametrize(
    ("ranks", "options", "parts", "branches"),
    [
        (1, {}, 1, 0), (2, {}, 1, 0), (2, {"accumulate": 4}, 4, 0),
        (1, {"reduce": Reduce.tree}, 8, 3), (2, {"reduce": Reduce.tree}, 4, 2),
    ],
)  # fmt: skip
def test_micro_batches_are_what_is_computed_at_once(
    ranks: int, options: dict[str, Any], parts: int, branches: int, make_stage: Callable[..., Any],
    make_batch: MakeBatch,
) -> None:  # fmt: skip
    stage, sizes = make_stage("autoencoder", plan=Plan(batch_size=16, images=32, warmup_images=0)), []

    def batch(size: int) -> Batch:
        sizes.append(size)
        return make_batch(size)

    def measured(size: int, **more: Any) -> Cost:
        trainer = TrainerOptions(precision=Precision.fp32, compile=Switch.off, **more)
        session = Session(Path("run"), {}, trainer, CsvLog(), ranks=Ranks(0, size, 0, size))
        return preflight(stage, batch, session)

    cost = measured(ranks, **options)
    assert set(sizes) == {16 // ranks // parts, 1}
    assert cost.seconds == 2 * parts * 0.5
    weights = 4 * cost.parameters
    an_image = (measured(1).memory - 9 * weights) / 16
    assert cost.memory == pytest.approx((9 + branches) * weights + an_image * 16 / ranks / parts)
