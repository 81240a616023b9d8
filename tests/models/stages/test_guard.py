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
from models.stages.signals import SAVE, Signals
from models.stages.stage import Stage
from tests.models.stages.together import Threads, together

MakeStage = Callable[..., Any]
MakeBatch = Callable[..., Batch]


class Numbers(Reduction):
    """Gradients of one number, and the loss that is to be met next."""

    loss = math.nan

    def gradients(self, stage: Stage, batch: Batch, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        (number,) = parameters
        number.grad = torch.tensor(1.0)
        return torch.tensor(self.loss, dtype=torch.float64)


class Stepper:
    """A guard with a stage, an optimizer of one number and a batch.

    `step(loss)` makes one step of it; `at_once(loss)` settles it too. An optimizer that is not `fused` cannot
    be told on the device not to step.
    """

    def __init__(
        self, stage: Any, batch: Batch, folder: Path, fused: bool = True, ranks: Ranks | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.number = torch.nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.Adam([self.number], lr=0.1, fused=fused)
        self.batch, self.losses, self.signals = batch, Numbers(), Signals()
        self.guard = Guard(stage, folder, ranks or Ranks.alone(), self.signals, self.losses, **options)
        self.faults = folder / "faults.jsonl"

    def step(self, loss: float) -> None:
        self.losses.loss = loss
        self.guard.step(self.batch, self.optimizer)

    def at_once(self, loss: float) -> None:
        self.step(loss)
        self.guard.settle()

    @property
    def state(self) -> dict[str, float]:
        """The number, and what the optimizer keeps of it."""
        kept = self.optimizer.state[self.number]
        return {"number": self.number.item()} | {name: value.item() for name, value in kept.items()}

    @property
    def written(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.faults.read_text().splitlines()]


@pytest.fixture
def stepper(make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path) -> Callable[..., Stepper]:
    stage, batch = make_stage("autoencoder"), make_batch(4, 12)
    stage.images_seen = 12
    return lambda **options: Stepper(stage, batch, tmp_path, **options)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fused", [True, False])
def test_a_refused_step_changes_nothing_and_says_what_to_do(
    loss: float, fused: bool, stepper: Callable[..., Stepper]
) -> None:
    made = stepper(fused=fused)
    made.guard.stage.images_seen = 8
    made.step(1.0)
    made.guard.stage.images_seen = 12
    made.step(loss)
    before = made.state
    assert before["step"] == 1
    assert before["number"] != 1.0
    made.guard.stage.images_seen = 16
    with pytest.raises(FloatingPointError) as caught:  # the next step finds it out, and is not applied either
        made.step(1.0)
    assert str(caught.value) == (
        "stage autoencoder at 12 images: the loss or a gradient is not finite; the step was not applied and "
        f"the batch's keys are in {made.faults}; lower optimizer.autoencoder.lr, or look at those samples, "
        "then continue with resume=true; or leave them out with trainer.not_finite=skip"
    )
    assert made.state == before
    (entry,) = made.written
    assert entry["keys"] == [f"key-{k}" for k in range(12, 16)]
    assert entry["indices"] == list(range(12, 16))
    assert (entry["images"], entry["what"], entry["rank"]) == (12, "not finite", 0)


def test_the_next_step_settles_the_one_before(stepper: Callable[..., Stepper]) -> None:
    made = stepper()
    stage = made.guard.stage
    (weight, *_), (average, *_) = stage.networks.parameters(), stage.ema.network.parameters()
    torch.nn.init.ones_(weight)
    first = average.clone()
    made.step(1.0)
    assert not made.guard.settled
    assert (stage.unlogged_losses, stage.recent_losses) == ([], [])
    made.step(2.0)
    assert stage.unlogged_losses == stage.recent_losses == [1.0]
    assert made.guard.loss == made.guard.own_loss == 1.0
    moved = average.clone()
    assert not torch.equal(moved, first)
    for _ in range(2):  # and again is nothing
        made.guard.settle()
        assert made.guard.settled
        assert stage.unlogged_losses == [1.0, 2.0]
    assert not torch.equal(average, moved)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_left_out_moves_no_average(fused: bool, stepper: Callable[..., Stepper]) -> None:
    made = stepper(policy=NotFinite.skip, fused=fused)
    stage = made.guard.stage
    (weight, *_), (average, *_) = stage.networks.parameters(), stage.ema.network.parameters()
    torch.nn.init.ones_(weight)
    first, state = average.clone(), None
    for loss, moves in ((math.nan, False), (1.0, True), (math.inf, False), (math.nan, False)):
        state = made.state
        made.at_once(loss)
        assert torch.equal(average, first) is not moves
        assert (made.state == state or made.state["step"] == state.get("step", 0) == 0) is not moves
        first = average.clone()
    assert stage.unlogged_losses == [1.0]


def test_what_one_rank_cannot_apply_none_applies(
    make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path
) -> None:
    def work(ranks: Threads) -> tuple[list[float], list[float], int]:
        folder = tmp_path / str(ranks.rank)
        folder.mkdir()
        made = Stepper(make_stage("autoencoder"), make_batch(4), folder, ranks=ranks, policy=NotFinite.skip)
        numbers = []
        for losses in ((1.0, 2.0), (1.0, math.nan), (math.inf, 1.0), (2.0, 4.0)):
            made.signals.asked = SAVE if ranks.rank == 1 else 0
            made.at_once(losses[ranks.rank])
            numbers.append(made.number.item())
        return numbers, made.guard.stage.unlogged_losses, made.guard.asked

    (one, losses, asked), other = together(2, work)
    assert (one, losses, asked) == other
    assert one[0] == one[1] == one[2] != one[3]
    assert losses == [1.5, 3.0]
    assert asked == SAVE


def test_left_out_batches_are_counted_in_a_row(stepper: Callable[..., Stepper]) -> None:
    made = stepper(policy=NotFinite.skip)
    for _ in range(2):
        for _ in range(MAX_SKIPPED):
            made.at_once(math.nan)
            assert not made.guard.applied
        made.at_once(1.0)  # and the count begins anew
        assert made.guard.applied
    for _ in range(MAX_SKIPPED):
        made.step(math.nan)
    made.step(math.nan)
    with pytest.raises(FloatingPointError, match=rf"not finite {MAX_SKIPPED + 1} times in a row; the step"):
        made.guard.settle()
    assert len(made.written) == 3 * MAX_SKIPPED + 1


def test_a_spike_is_told_and_applied_or_rewinds(
    stepper: Callable[..., Stepper], capsys: pytest.CaptureFixture[str]
) -> None:
    for rewind in (False, True):
        made = stepper(spike_zscore=8.0, rewind_spikes=rewind)
        made.guard.stage.recent_losses.clear()
        for k in range(64):
            made.at_once(1.0 + 0.01 * (k % 2))
        before = made.number.item()
        said = (
            r"stage autoencoder at 12 images: the loss 1e\+04 is a spike, \d+\.\d standard deviations above "
            "the recent ones"
        )
        if rewind:
            with pytest.raises(Rewind, match=said) as caught:
                made.at_once(1e4)
            assert caught.value.images_seen == 16  # the data goes on after the bad batch
        else:
            made.at_once(1e4)
            told = capsys.readouterr().out
            assert re.search(said + f"; the batch's keys are in {made.faults}", told)
            assert made.number.item() != before
        assert made.written[-1]["what"].startswith("spike of ")


def test_many_captions_that_do_not_fit_are_told_once(
    make_stage: MakeStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage: Any = make_stage("diffusion")
    stage.guard = SimpleNamespace(settle=lambda: None)
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
