"""What is said and done about steps that are not finite, spikes, and captions that do not fit."""

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.batch import Batch
from models.stages.callbacks import Metrics
from models.stages.effort import Effort
from models.stages.faults import NotFinite
from models.stages.guard import MAX_SKIPPED, Guard, Rewind
from models.stages.pace import Pace
from models.stages.ranks import Ranks
from models.stages.reduce import Reduction
from models.stages.signals import Signals
from models.stages.stage import Stage

MakeStage = Callable[..., Any]
MakeBatch = Callable[..., Batch]


class Numbers(Reduction):
    """Gradients of one number, and the loss that is to be met next."""

    loss = math.nan

    def gradients(self, stage: Stage, batch: Batch, parameters: Sequence[torch.Tensor]) -> float:
        (number,) = parameters
        number.grad = torch.tensor(1.0)
        return self.loss


class Stepper:
    """A guard with a stage, an optimizer of one number and a batch; `step(loss)` makes one step of it."""

    def __init__(self, stage: Any, batch: Batch, folder: Path, **options: Any) -> None:
        self.number = torch.nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.SGD([self.number], lr=0.1)
        self.batch, self.losses = batch, Numbers()
        self.guard = Guard(stage, folder, Ranks.alone(), Signals(), self.losses, **options)
        self.faults = folder / "faults.jsonl"

    def step(self, loss: float) -> None:
        self.losses.loss = loss
        self.guard.step(self.batch, self.optimizer)

    @property
    def written(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.faults.read_text().splitlines()]


@pytest.fixture
def stepper(make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path) -> Callable[..., Stepper]:
    stage, batch = make_stage("autoencoder"), make_batch(4, 12)
    stage.images_seen = 12
    return lambda **options: Stepper(stage, batch, tmp_path, **options)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_refused_step_changes_nothing_and_says_what_to_do(
    loss: float, stepper: Callable[..., Stepper]
) -> None:
    made = stepper()
    with pytest.raises(FloatingPointError) as caught:
        made.step(loss)
    assert str(caught.value) == (
        "stage autoencoder at 12 images: the loss or a gradient is not finite; the step was not applied and "
        f"the batch's keys are in {made.faults}; lower optimizer.autoencoder.lr, or look at those samples, "
        "then continue with resume=true; or leave them out with trainer.not_finite=skip"
    )
    assert made.number.item() == 1.0
    (entry,) = made.written
    assert entry["keys"] == [f"key-{k}" for k in range(12, 16)]
    assert entry["indices"] == list(range(12, 16))
    assert (entry["images"], entry["what"], entry["rank"]) == (12, "not finite", 0)


def test_left_out_batches_are_counted_in_a_row(stepper: Callable[..., Stepper]) -> None:
    made = stepper(policy=NotFinite.skip)
    for _ in range(2):
        for _ in range(MAX_SKIPPED):
            made.step(math.nan)
            assert not made.guard.applied
        made.step(1.0)  # and the count begins anew
        assert made.guard.applied
    for _ in range(MAX_SKIPPED):
        made.step(math.nan)
    with pytest.raises(FloatingPointError, match=rf"not finite {MAX_SKIPPED + 1} times in a row; the step"):
        made.step(math.nan)
    assert len(made.written) == 3 * MAX_SKIPPED + 1


def test_a_spike_is_told_and_applied_or_rewinds(
    stepper: Callable[..., Stepper], capsys: pytest.CaptureFixture[str]
) -> None:
    for rewind in (False, True):
        made = stepper(spike_zscore=8.0, rewind_spikes=rewind)
        made.guard.stage.recent_losses.clear()
        for k in range(64):
            made.step(1.0 + 0.01 * (k % 2))
        before = made.number.item()
        said = (
            r"stage autoencoder at 12 images: the loss 1e\+04 is a spike, \d+\.\d standard deviations above "
            "the recent ones"
        )
        if rewind:
            with pytest.raises(Rewind, match=said) as caught:
                made.step(1e4)
            assert caught.value.images_seen == 16  # the data goes on after the bad batch
            assert made.number.item() == before
        else:
            made.step(1e4)
            told = capsys.readouterr().out
            assert re.search(said + f"; the batch's keys are in {made.faults}", told)
            assert made.number.item() != before
        assert made.written[-1]["what"].startswith("spike of ")


def test_many_captions_that_do_not_fit_are_told_once(
    make_stage: MakeStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage: Any = make_stage("diffusion")
    stage.guard = SimpleNamespace(applied=True, loss=1.0)
    shown = SimpleNamespace(update=lambda *_: None)
    trainer: Any = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"lr": 1e-3}])], loggers=[])
    metrics = Metrics(
        stage,
        tmp_path / "metrics.jsonl",
        shown,
        Ranks.alone(),
        Pace(stage, tmp_path, Ranks.alone(), Effort()),
    )  # type: ignore[arg-type]
    every = stage.plan.log_every_images
    for truncated in (0, 1, 1):
        stage.images_seen += every
        batch: Any = SimpleNamespace(truncated=truncated, substituted=2)
        with caplog.at_level(logging.WARNING):
            metrics.on_train_batch_end(trainer, stage, None, batch, 0)
        assert len(caplog.records) == (1 if truncated else 0)
    assert (
        "stage diffusion: 25 % of the captions are longer than text_encoder.context_length, and what is "
        "beyond it is not learnt; raise it, or shorten the captions"
    ) in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["caption_truncated_share"] for line in lines] == [0.0, 0.25, 0.25]
    assert [line["substituted_share"] for line in lines] == [0.5] * 3
