"""Evaluations beside training: one at a time, taken up once, no failure of the run, never left behind."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.stages.evaluating import Evaluating
from models.stages.evaluations import Evaluated, EvaluationOptions, Evaluations, evaluations_of

#: Stands for scripts/evaluate.py: writes a card whose figure is what the checkpoint is called.
CARD = """
import json, os, pathlib, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
assert "RANK" not in os.environ and os.environ["OMP_NUM_THREADS"] == "1", "place"
assert os.environ["FIRSTLIGHT_PARENT"] == str(os.getppid()), "parent"
out = pathlib.Path(words["out"])
out.mkdir(parents=True)
images = int(words["checkpoint"].rpartition("-")[2])
card = {"metrics": {"fd": images / 2, "none": None}, "alarms": ["variety: all repeat", "variety: more"]}
(out / "card.json").write_text(json.dumps(card))
"""
FAILING = "print('evaluate.py: no such thing'); raise SystemExit(3)"
SLOW = "import time; time.sleep(60)"


def evaluations(folder: Path, code: str, every: int = 8) -> Evaluations:
    options = EvaluationOptions(every_images=every)
    return Evaluations([sys.executable, "-c", code], folder / "evaluation", options)


def ended(each: Evaluations) -> Evaluated:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = each.poll()
        if found is not None:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not end")


class Recorded:
    """Stands for the metrics: keeps what is recorded, and its file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[tuple[int, dict[str, float]]] = []

    def record(self, trainer: Any, figures: dict[str, float], images: int) -> None:
        self.lines.append((images, figures))
        with self.path.open("a") as file:
            file.write(json.dumps({"images": images, **figures}) + "\n")


@pytest.fixture
def callback(tmp_path: Path) -> Callable[..., Evaluating]:
    """A callback over `evaluations`, with a stage at so many images, whose metrics are kept as `.metrics`."""

    def make(each: Evaluations, images: int, asked: int = 0) -> Evaluating:
        stage: Any = SimpleNamespace(images_seen=images)
        metrics: Any = Recorded(tmp_path / "metrics.jsonl")
        signals: Any = SimpleNamespace(asked=asked)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        return Evaluating(stage, tmp_path / "checkpoints", each, metrics, signals)

    return make


def test_a_card_becomes_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with evaluations(tmp_path, CARD) as each:
        assert each.start(tmp_path / "images-000000000016", 16) is None
        assert each.running
        found = ended(each)
        assert found == Evaluated(16, {"fd": 8.0}, ("variety: all repeat", "variety: more"))
        assert not each.running
        assert each.poll() is None
        assert each.done() == [found]


def test_a_failure_is_a_line(tmp_path: Path) -> None:
    with evaluations(tmp_path, FAILING) as each:
        each.start(tmp_path / "images-000000000016", 16)
        assert ended(each).failure == "it ended with 3: evaluate.py: no such thing"
    missing = Evaluations([str(tmp_path / "nothing")], tmp_path / "e", EvaluationOptions(every_images=8))
    failed = missing.start(tmp_path, 8)
    assert failed is not None
    assert "could not be started" in failed.failure


def test_it_is_stopped_with_the_run(tmp_path: Path) -> None:
    with evaluations(tmp_path, SLOW) as each:
        each.start(tmp_path / "images-000000000016", 16)
        assert each._process is not None
        number = each._process.pid
        os.kill(number, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_figures_are_recorded_where_they_belong_and_alarms_told_once(
    tmp_path: Path, callback: Callable[..., Evaluating], caplog: Any
) -> None:
    caplog.set_level(logging.WARNING)
    trainer: Any = None
    with evaluations(tmp_path, CARD) as each:
        evaluating = callback(each, 20)
        evaluating.on_train_start(trainer, trainer)
        (tmp_path / "checkpoints" / "images-000000000004").mkdir()
        evaluating.finish(trainer)  # 4 images are short of the first 8
        assert not each.running
        for images in (9, 17):
            (tmp_path / "checkpoints" / f"images-{images:012d}").mkdir()
            evaluating.finish(trainer)
    metrics: Any = evaluating.metrics
    assert metrics.lines == [(9, {"eval_fd": 4.5}), (17, {"eval_fd": 8.5})]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["evaluation at 9 images: variety: all repeat"]


def test_what_ended_with_the_run_is_taken_up_by_the_next(
    tmp_path: Path, callback: Callable[..., Evaluating]
) -> None:
    trainer: Any = None
    with evaluations(tmp_path, CARD) as each:
        for images in (8, 16, 24):
            each.start(tmp_path / f"images-{images:012d}", images)
            ended(each)
        (tmp_path / "metrics.jsonl").write_text(
            '{"images": 8, "eval_fd": 4.0}\n{"images": 16, "val_loss": 1}\n{"images": 16, "eval_'
        )
        evaluating = callback(each, 20)  # resumed before 24 images
        evaluating.on_train_start(trainer, trainer)
        metrics: Any = evaluating.metrics
        assert metrics.lines == [(16, {"eval_fd": 8.0})]
        (tmp_path / "checkpoints" / "images-000000000016").mkdir()
        evaluating.finish(trainer)
        assert metrics.lines == [(16, {"eval_fd": 8.0})]


def test_a_failure_is_told_and_training_goes_on(
    tmp_path: Path, callback: Callable[..., Evaluating], caplog: Any
) -> None:
    trainer: Any = None
    with evaluations(tmp_path, FAILING) as each:
        evaluating = callback(each, 20)
        (tmp_path / "checkpoints" / "images-000000000016").mkdir()
        evaluating.finish(trainer)
        evaluating.finish(trainer)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "the evaluation at 16 images failed, it ended with 3: evaluate.py: no such thing; training goes on"
    ]


def test_a_stop_is_not_kept_waiting(tmp_path: Path, callback: Callable[..., Evaluating]) -> None:
    trainer: Any = None
    began = time.monotonic()
    with evaluations(tmp_path, SLOW) as each:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "images-000000000016").mkdir()
        callback(each, 20, asked=143).finish(trainer)
        assert each.running
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("wrong", [{"every_images": -1}, {"pictures": 2}, {"nice": 20}, {"device": "tpu"}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        EvaluationOptions(**wrong)


def test_none_are_made_unless_asked_for() -> None:
    assert evaluations_of(Path("run"), Path("evaluate.py"), EvaluationOptions()) is None
    assert evaluations_of(Path("run"), Path("evaluate.py"), EvaluationOptions(every_images=8)) is not None
