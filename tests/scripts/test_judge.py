"""The command that trains the judge: a judge that is there is kept, and errors are one line."""

import os
from pathlib import Path
from typing import Any

import pytest

from evaluation import report
from evaluation.adherence import AdherenceJudge, load_judge
from scripts.judge import main


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of judges trained so far, each in no time."""
    seeds: list[int] = []

    def train_judge(seed: int, progress: Any) -> tuple[AdherenceJudge, dict[str, float]]:
        seeds.append(seed)
        progress(1.0)
        return AdherenceJudge(), {}

    monkeypatch.setattr(report, "train_judge", train_judge)
    return seeds


def test_it_is_trained_once(tmp_path: Path, trained: list[int], capsys: Any) -> None:
    assert report.kept_judge(tmp_path / "judge") is None
    assert main([str(tmp_path / "judge")]) == 0
    assert report.kept_judge(tmp_path / "judge") is not None
    weights = (tmp_path / "judge" / "judge.safetensors").read_bytes()
    assert main([str(tmp_path / "judge"), "--nice", "0"]) == 0
    assert trained == [0]
    assert (tmp_path / "judge" / "judge.safetensors").read_bytes() == weights
    (tmp_path / "judge" / "judge.safetensors").write_bytes(weights[:-1])  # damaged: trained again
    assert main([str(tmp_path / "judge")]) == 0
    assert trained == [0, 0]
    load_judge(tmp_path / "judge")
    assert "right on held-out landscapes" in capsys.readouterr().out


def test_it_stands_behind(tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(os, "nice", told.append)
    assert main([str(tmp_path / "judge"), "--nice=10"]) == 0
    assert told == [10]


def test_errors(tmp_path: Path, trained: list[int], capsys: Any) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file" / "judge")]) == 5
    assert "check that the folder can be written" in capsys.readouterr().err
    assert trained == []  # it is noticed before the minute of work
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "judge"), "--nice=20"])
    assert stop.value.code == 2
