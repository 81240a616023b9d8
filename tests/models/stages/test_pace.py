"""Steps are timed, a slow rank is named, hours go on after a stop, and a hang leaves its stacks."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from models.stages.compute import Compute
from models.stages.effort import Effort, Meter, hours_in, matmul_ceiling
from models.stages.pace import Pace
from models.stages.ranks import Ranks
from models.stages.recorder import FlightRecorder

PROJECT = Path(__file__).resolve().parents[3]
CPU = Compute(torch.device("cpu"), False, False, False, "in a test")


class Told(Ranks):
    """Ranks whose other members answer what a test wants: `paces` [(pace, wait share)] after one's own."""

    others: ClassVar[list[list[float]]] = []

    @property
    def first(self) -> bool:
        return True

    def gather(self, values: Any) -> list[list[float]]:
        return [list(values), *self.others]


def stage(images_seen: int = 64) -> Any:
    return SimpleNamespace(
        name="diffusion", images_seen=images_seen, plan=SimpleNamespace(batch_size=8), compute=CPU
    )


def steps(pace: Pace, seconds: float, count: int = 3) -> None:
    none: Any = None
    pace.on_train_start(none, none)
    for i in range(count):
        pace.on_train_batch_start(none, none, none, i)
        time.sleep(seconds)
        pace.on_before_backward(none, none, none)
        pace.on_before_backward(none, none, none)  # of a second micro-batch: does not count
        pace.on_train_batch_end(none, none, none, none, i)


def test_steps_are_timed_and_kept_as_a_histogram(tmp_path: Path) -> None:
    pace = Pace(stage(), tmp_path, Ranks.alone(), Effort(1e9, 4e9))
    steps(pace, 0.02)
    found = pace.figures(images_per_second=2.0)
    assert 20 <= found["step_ms_p50"] <= found["step_ms_p99"] <= found["step_ms_max"] < 500
    assert found["mfu"] == 0.5
    assert "slowest_rank" not in found
    bins = json.loads((tmp_path / "step_times.json").read_text())["from_ms"]
    assert sum(bins.values()) == 3
    assert all(float(edge) >= 16 for edge in bins)
    line = json.loads((tmp_path / "ranks.jsonl").read_text())
    assert line["images"] == 64
    assert 8 / 0.5 < line["images_per_second_alone"][0] <= 8 / 0.02
    assert pace.figures(2.0) == {}, "nothing since"


def test_what_is_not_known_is_not_told(tmp_path: Path) -> None:
    pace = Pace(stage(), tmp_path, Ranks.alone(), Effort())
    steps(pace, 0.0)
    assert "mfu" not in pace.figures(1.0)


@pytest.mark.parametrize(("others", "named"), [([[9.0, 0.0]], 1), ([[1.0, 0.0], [1.0, 0.0]], None)])
def test_a_straggler_is_named_once(
    tmp_path: Path, caplog: Any, others: list[list[float]], named: int | None
) -> None:
    ranks = Told(0, 1 + len(others))
    Told.others = others
    pace = Pace(stage(), tmp_path, ranks, Effort())
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            steps(pace, 0.02)
            found = pace.figures(1.0)
            if number == 1:
                assert caplog.records == [], "slow for a moment is no straggler"
    said = [record.getMessage() for record in caplog.records]
    if named is None:
        assert found["slowest_rank_factor"] < 1.25
        assert said == []
    else:
        assert found["slowest_rank"] == named
        assert len(said) == 1
        assert "rank 1 needs" in said[0]


def test_hours_go_on_after_a_stop() -> None:
    figures = Meter(4, before=2.0).figures(images_to_go=3600, images_per_second=2.0)
    assert figures["device_hours"] == pytest.approx(2.0, abs=0.01)
    assert figures["device_hours_to_go"] == pytest.approx(2.0)
    assert hours_in({"images": 1}) == 0
    assert hours_in({"device_hours": 1.5}) == 1.5


def test_the_ceiling_is_what_a_product_reaches() -> None:
    once = torch.ones(1024, 1024)
    started = time.perf_counter()
    once @ once
    assert matmul_ceiling(CPU, seconds=0.05) > 0.2 * 2 * 1024**3 / (time.perf_counter() - started)


def test_a_hang_leaves_its_stacks(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(PROJECT)!r})
from pathlib import Path
from types import SimpleNamespace
from models.stages.ranks import Ranks
from models.stages.recorder import FlightRecorder
recorder = FlightRecorder(SimpleNamespace(images_seen=7), Path({str(tmp_path)!r}), Ranks(1, 2), 0.3)
recorder.on_train_start(None, None)
def waits_for_ever():
    time.sleep(1.2)
waits_for_ever()
recorder.on_train_end(None, None)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    text = (tmp_path / "stacks-rank1.txt").read_text()
    assert text.startswith("no step has ended for 0.3 seconds after 7 images")
    assert "waits_for_ever" in text


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_run_without_a_hang_leaves_nothing(tmp_path: Path, seconds: float) -> None:
    recorder = FlightRecorder(stage(), tmp_path, Ranks.alone(), seconds)
    none: Any = None
    recorder.on_train_start(none, none)
    recorder._armed = 0.0
    recorder.on_train_batch_end(none, none, none, none, 0)
    recorder.on_exception(none, none, ValueError())
    assert list(tmp_path.iterdir()) == []
