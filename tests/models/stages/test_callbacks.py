"""Around the steps: intervals in images, no step that is not a number, metrics after a resume."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from data.batch import Batch
from data.progress import Progress
from models.checkpoint import newest
from models.stages.autoencoder import AutoencoderStage
from models.stages.callbacks import Metrics, crossed
from models.stages.fit import fit
from models.stages.logs import CsvLog
from models.stages.plan import Plan

MakeStage = Callable[..., Any]
MakeBatch = Callable[..., Batch]


class Loaders:
    """What `fit` asks of a data module, from batches in memory."""

    def __init__(self, make_batch: MakeBatch) -> None:
        self.make_batch = make_batch

    def train_loader(self, start: int, stop: int) -> DataLoader[Batch]:
        batches: Any = [self.make_batch(4, first) for first in range(start, stop, 4)]
        return DataLoader(batches, batch_size=None)

    def val_loader(self, images: int) -> list[Batch]:
        return [self.make_batch(4, 100)]


def train(stage: Any, data: Loaders, folder: Path, checkpoint: Any = None) -> list[int]:
    """Trains to the end of the plan; returns the images seen at which pictures were shown."""
    shown: list[int] = []

    def show(images_seen: int) -> Path:
        shown.append(images_seen)
        return folder / "picture.png"

    fit(stage, data, folder, {"a": 1}, {"dataset": "d"}, CsvLog(), checkpoint, lambda: None, show)  # type: ignore[arg-type]
    return shown


@pytest.fixture
def plan() -> Iterator[Plan]:
    return Plan(
        images=24, batch_size=4, warmup_images=0, validate_every_images=8, validation_images=4,
        checkpoint_every_images=8, log_every_images=8,
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("seen", "interval", "wanted"),
    [(4, 4, True), (8, 16, False), (16, 16, True), (18, 16, True), (20, 16, False), (4, 1, True)],
)  # fmt: skip
def test_an_interval_is_met_once(seen: int, interval: int, wanted: bool) -> None:
    assert crossed(SimpleNamespace(images_seen=seen, plan=SimpleNamespace(batch_size=4)), interval) is wanted


def test_a_stage_runs_to_its_end(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, plan: Plan
) -> None:
    stage = make_stage("autoencoder", plan=plan)
    assert train(stage, Loaders(make_batch), tmp_path) == [8, 16, 24]
    assert stage.images_seen == 24
    here = tmp_path / "autoencoder"
    assert sorted(p.name for p in (here / "checkpoints").iterdir()) == [
        "images-000000000016", "images-000000000024",
    ]  # fmt: skip
    metrics = lines(here / "metrics.jsonl")
    assert [line["images"] for line in metrics if "train_loss" in line] == [8, 16, 24]
    assert [line["images"] for line in metrics if "val_psnr_db" in line] == [8, 16, 24]
    rates = [line["learning_rate"] for line in metrics if "learning_rate" in line]
    assert rates[0] == 2e-3  # the half cosine begins at half of 24 images
    assert rates == sorted(rates, reverse=True)
    assert "val_psnr_db" in (here / "log" / "metrics.csv").read_text().splitlines()[0]


def test_going_on_is_as_if_never_stopped(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, plan: Plan
) -> None:
    from models.stages.stage import restore_networks

    whole = make_stage("autoencoder", plan=plan)
    train(whole, Loaders(make_batch), tmp_path)
    parent = tmp_path / "autoencoder" / "checkpoints"
    (parent / "images-000000000024").rename(tmp_path / "last")
    with (tmp_path / "autoencoder" / "metrics.jsonl").open("a") as file:
        file.write('{"images": 24, "val')  # killed while writing
    stage, checkpoint = make_stage("autoencoder", seed=7, plan=plan), newest(parent)
    assert checkpoint is not None
    restore_networks(stage, checkpoint)
    assert train(stage, Loaders(make_batch), tmp_path, checkpoint) == [24]
    for file in ("weights", "ema", "optimizer"):
        name = f"{file}.safetensors"
        assert (parent / "images-000000000024" / name).read_bytes() == (tmp_path / "last" / name).read_bytes()
    metrics = lines(tmp_path / "autoencoder" / "metrics.jsonl")
    assert [line["images"] for line in metrics if "val_loss" in line] == [8, 16, 24]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_a_number_is_not_applied(
    where: str,
    make_stage: MakeStage,
    make_batch: MakeBatch,
    tmp_path: Path,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = make_stage("autoencoder", plan=plan)
    real, kept = AutoencoderStage.training_step, {}

    def broken(self: AutoencoderStage, batch: Batch, step: int) -> torch.Tensor:
        loss = real(self, batch, step)
        if stage.images_seen == 12:
            kept.update({k: v.clone() for k, v in stage.networks.state_dict().items()})
            if where == "loss":
                return loss * float("nan")
            next(iter(stage.networks.parameters())).register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(AutoencoderStage, "training_step", broken)
    with pytest.raises(FloatingPointError, match=r"stage autoencoder at 12 images: .* was not applied"):
        train(stage, Loaders(make_batch), tmp_path)
    after = stage.networks.state_dict()
    assert kept
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    written = json.loads((tmp_path / "autoencoder" / "not_finite.json").read_text())
    assert written == {"images_seen": 12, "keys": ["key-12", "key-13", "key-14", "key-15"]}
    checkpoint = newest(tmp_path / "autoencoder" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.images == 8


def test_an_interrupt_stays_one(
    make_stage: MakeStage,
    make_batch: MakeBatch,
    tmp_path: Path,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = make_stage("autoencoder", plan=plan)
    real = AutoencoderStage.training_step

    def pressed(self: AutoencoderStage, batch: Batch, step: int) -> torch.Tensor:
        if self.images_seen == 12:
            raise KeyboardInterrupt
        return real(self, batch, step)

    monkeypatch.setattr(AutoencoderStage, "training_step", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(stage, Loaders(make_batch), tmp_path)


def test_lines_past_the_resume_point_go(make_stage: MakeStage, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"images": 4}\n{"images": 8}\n{"images": 12}\n{"ima')
    stage = make_stage("autoencoder")
    stage.images_seen = 8
    Metrics(stage, path, Progress("test", 1)).on_train_start(None, stage)  # type: ignore[arg-type]
    assert path.read_text() == '{"images": 4}\n{"images": 8}\n'
