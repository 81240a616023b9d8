"""Around the steps: intervals in images, no step that is not a number, metrics after a resume."""

import errno
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from data.batch import Batch
from data.progress import Progress
from models import checkpoint_writer
from models.checkpoint import newest
from models.stages.autoencoder import AutoencoderStage
from models.stages.callbacks import Metrics, crossed
from models.stages.compute import Reduce, TrainerOptions
from models.stages.effort import Effort
from models.stages.ema import Ema
from models.stages.faults import NotFinite
from models.stages.fit import Work, fit
from models.stages.logs import CsvLog
from models.stages.pace import Pace
from models.stages.plan import Plan
from models.stages.ranks import Ranks
from models.stages.saving import Saver
from models.stages.session import Session
from models.stages.signals import Stopped
from models.stages.stage import restore_networks
from scripts.benches.reads import Reads

MakeStage = Callable[..., Any]
MakeBatch = Callable[..., Batch]


class Loaders:
    """What `fit` asks of a data module, from batches in memory."""

    def __init__(self, make_batch: MakeBatch) -> None:
        self.make_batch = make_batch

    def train_loader(self, start: int, stop: int, rank: int, size: int) -> DataLoader[Batch]:
        batches: Any = [self.make_batch(4, first) for first in range(start, stop, 4)]
        return DataLoader(batches, batch_size=None)

    def val_loader(self, images: int, rank: int, size: int, parts: int) -> list[Batch]:
        return [self.make_batch(4, 100)]


def train(stage: Any, data: Loaders, folder: Path, checkpoint: Any = None, **options: Any) -> list[int]:
    """Trains to the end of the plan; returns the images seen at which pictures were shown."""
    shown: list[int] = []

    def show(images_seen: int) -> Path:
        shown.append(images_seen)
        return folder / "picture.png"

    work = Work(stage, data, {"dataset": "d"}, checkpoint, lambda: None, show)  # type: ignore[arg-type]
    fit(work, Session(folder, {"a": 1}, TrainerOptions(**options), CsvLog()))
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
        "best", "best.json", "images-000000000016", "images-000000000024", "last",
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
    real, kept = AutoencoderStage.mean_loss, {}

    def broken(self: AutoencoderStage, batch: Batch) -> torch.Tensor:
        loss = real(self, batch)
        if stage.images_seen == 12:
            kept.update({k: v.clone() for k, v in stage.networks.state_dict().items()})
            if where == "loss":
                return loss * float("nan")
            next(iter(stage.networks.parameters())).register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(AutoencoderStage, "mean_loss", broken)
    with pytest.raises(FloatingPointError, match=r"stage autoencoder at 12 images: .* was not applied"):
        train(stage, Loaders(make_batch), tmp_path)
    after = stage.networks.state_dict()
    assert kept
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    (written,) = lines(tmp_path / "autoencoder" / "faults.jsonl")
    assert (written["images"], written["what"]) == (12, "not finite")
    assert written["keys"] == ["key-12", "key-13", "key-14", "key-15"]
    checkpoint = newest(tmp_path / "autoencoder" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.images == 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_and_nothing_is_lost(
    number: int, code: int, make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = make_stage("autoencoder", plan=plan)
    train(whole, Loaders(make_batch), tmp_path / "whole")
    stage, real, before = (
        make_stage("autoencoder", plan=plan),
        AutoencoderStage.mean_loss,
        signal.getsignal(number),
    )

    def signalled(self: AutoencoderStage, batch: Batch) -> torch.Tensor:
        if self.images_seen == 12:
            os.kill(os.getpid(), number)
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderStage, "mean_loss", signalled)
        with pytest.raises(Stopped) as stop:
            train(stage, Loaders(make_batch), tmp_path)
    assert stop.value.code == code
    assert signal.getsignal(number) is before
    checkpoint = newest(tmp_path / "autoencoder" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.images == 16  # the step was finished
    stage = make_stage("autoencoder", seed=5, plan=plan)
    restore_networks(stage, checkpoint)
    train(stage, Loaders(make_batch), tmp_path, checkpoint)
    ends = [newest(folder / "autoencoder" / "checkpoints") for folder in (tmp_path, tmp_path / "whole")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].digest() == ends[1].digest()
    logs = [lines(folder / "autoencoder" / "metrics.jsonl") for folder in (tmp_path, tmp_path / "whole")]
    assert [line.get("train_loss") for line in logs[0]] == [line.get("train_loss") for line in logs[1]]


def test_a_wish_to_save_is_met_and_the_run_goes_on(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(
        images=24, batch_size=4, warmup_images=0, validate_every_images=100, checkpoint_every_images=100
    )
    stage, real = make_stage("autoencoder", plan=plan), AutoencoderStage.mean_loss

    def signalled(self: AutoencoderStage, batch: Batch) -> torch.Tensor:
        if self.images_seen == 8:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, batch)

    saved: list[int] = []
    save = Saver.save

    def noting(self: Saver, *arguments: Any, **options: Any) -> None:
        saved.append(stage.images_seen)
        save(self, *arguments, **options)

    monkeypatch.setattr(AutoencoderStage, "mean_loss", signalled)
    monkeypatch.setattr(Saver, "save", noting)
    train(stage, Loaders(make_batch), tmp_path)
    assert saved == [16, 24]  # it is known a step later, met once, and the last one is of the end


class Counted(Loaders):
    """Counts what is read back from the device in all steps but the first two and the last."""

    def train_loader(self, start: int, stop: int, rank: int, size: int) -> Any:
        self.reads, self.batches = Reads(), [self.make_batch(4, first) for first in range(start, stop, 4)]
        return self

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches[:2]
        with self.reads:
            yield from self.batches[2:-1]
        yield self.batches[-1]


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("autoencoder", {}), ("diffusion", {}), ("diffusion", {"accumulate": 2}),
        ("diffusion", {"reduce": Reduce.tree, "micro_batch": 2}),
    ],
)  # fmt: skip
def test_between_lines_of_metrics_nobody_waits_for_the_device(
    stage: str, options: dict[str, Any], make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path
) -> None:
    plan = Plan(images=24, batch_size=4, log_every_images=100)
    data = Counted(make_batch)
    train(make_stage(stage, plan=plan), data, tmp_path, **options)
    assert data.reads.count == 0


def test_one_read_a_step_would_be_seen(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(images=24, batch_size=4, log_every_images=100)
    stage, real = make_stage("autoencoder", plan=plan), Ema.update

    def reading(self: Ema, network: torch.nn.Module, *arguments: Any) -> None:
        real(self, network, *arguments)
        next(network.parameters()).sum().item()

    monkeypatch.setattr(Ema, "update", reading)
    data = Counted(make_batch)
    train(stage, data, tmp_path)
    assert data.reads.count == 3


def poison(monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
    """Makes the loss of the steps after so many images not a number."""
    real = AutoencoderStage.mean_loss

    def broken(self: AutoencoderStage, batch: Batch) -> torch.Tensor:
        loss = real(self, batch)
        return loss * float("nan") if self.images_seen in at else loss

    monkeypatch.setattr(AutoencoderStage, "mean_loss", broken)


def test_a_bad_batch_can_be_left_out(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 12)
    stage = make_stage("autoencoder", plan=plan)
    train(stage, Loaders(make_batch), tmp_path, not_finite=NotFinite.skip)
    assert stage.images_seen == 24
    assert all(torch.isfinite(p).all() for p in stage.networks.parameters())
    losses = [
        line["train_loss"]
        for line in lines(tmp_path / "autoencoder" / "metrics.jsonl")
        if "train_loss" in line
    ]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))


def test_too_many_bad_batches_in_a_row_are_an_error(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, *range(0, 100, 4))
    stage = make_stage("autoencoder", plan=Plan(images=100, batch_size=4))
    with pytest.raises(FloatingPointError, match=r"at 40 images: .* not finite 11 times in a row"):
        train(stage, Loaders(make_batch), tmp_path, not_finite=NotFinite.skip)


def test_rewinding_takes_the_weights_back_and_goes_on_with_the_data(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 12)
    stage = make_stage("autoencoder", plan=plan)
    train(stage, Loaders(make_batch), tmp_path, not_finite=NotFinite.rewind, trace=True)
    steps = [line["images"] for line in lines(tmp_path / "autoencoder" / "trace-0.jsonl")]
    assert steps == [0, 4, 8, 16, 20]
    assert stage.images_seen == 24
    # The batch after the rewind was computed with the weights of 8 images: its loss is not that of a run that
    # went through 8 to 16 as well.
    monkeypatch.undo()
    plain = make_stage("autoencoder", plan=plan)
    train(plain, Loaders(make_batch), tmp_path / "plain", trace=True)
    rewound, straight = (
        {line["images"]: line["loss"] for line in lines(folder / "autoencoder" / "trace-0.jsonl")}
        for folder in (tmp_path, tmp_path / "plain")
    )
    assert rewound[8] == straight[8]
    assert rewound[16] != straight[16]


def test_rewinding_without_a_checkpoint_is_an_error(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 4)
    with pytest.raises(FloatingPointError, match="there is no checkpoint to go back to"):
        train(
            make_stage("autoencoder", plan=plan), Loaders(make_batch), tmp_path, not_finite=NotFinite.rewind
        )


def test_a_spike_is_told(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = AutoencoderStage.mean_loss

    def spiking(self: AutoencoderStage, batch: Batch) -> torch.Tensor:
        return real(self, batch) * (1e4 if self.images_seen == 160 else 1)

    monkeypatch.setattr(AutoencoderStage, "mean_loss", spiking)
    plan = Plan(images=168, batch_size=4, validate_every_images=1000, checkpoint_every_images=1000)
    train(make_stage("autoencoder", plan=plan), Loaders(make_batch), tmp_path, spike_zscore=8.0)
    (fault,) = lines(tmp_path / "autoencoder" / "faults.jsonl")
    assert fault["images"] == 160
    assert fault["what"].startswith("spike of ")
    assert "at 160 images: the loss" in capsys.readouterr().out


def test_running_out_of_memory_says_what_helps(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(self: AutoencoderStage, batch: Batch) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoencoderStage, "mean_loss", greedy)
    with pytest.raises(
        OSError, match=r"stage autoencoder: out of memory .* lower plan.autoencoder.batch_size, .*"
    ):
        train(make_stage("autoencoder", plan=plan), Loaders(make_batch), tmp_path)


def test_a_full_disk_costs_no_training(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The save at 8 images fails; training goes on, and a checkpoint follows before the next interval."""
    failing = [OSError(errno.ENOSPC, "No space left on device")]
    real = checkpoint_writer.save_checkpoint

    def full(*arguments: Any) -> Path:
        if failing:
            raise failing.pop()
        return real(*arguments)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", full)
    stage = make_stage("autoencoder", plan=plan)
    train(stage, Loaders(make_batch), tmp_path)
    assert stage.images_seen == 24
    assert "training goes on" in caplog.text
    assert newest(tmp_path / "autoencoder" / "checkpoints") is not None


def test_lightning_registers_no_handlers_of_its_own(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = AutoencoderStage.mean_loss

    def looking(self: AutoencoderStage, batch: Batch) -> torch.Tensor:
        seen.append(signal.getsignal(signal.SIGTERM))
        return real(self, batch)

    monkeypatch.setattr(AutoencoderStage, "mean_loss", looking)
    train(make_stage("autoencoder", plan=plan), Loaders(make_batch), tmp_path)
    assert all("Signals._set" in repr(handler) for handler in seen)
    assert seen


def test_lines_past_the_resume_point_go(make_stage: MakeStage, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"images": 4}\n{"images": 8}\n{"images": 12}\n{"ima')
    stage = make_stage("autoencoder")
    stage.images_seen = 8
    Metrics(
        stage, path, Progress("test", 1), Ranks.alone(), Pace(stage, path.parent, Ranks.alone(), Effort())
    ).on_train_start(None, stage)  # type: ignore[arg-type]
    assert path.read_text() == '{"images": 4}\n{"images": 8}\n'
