"""A run whose checkpoints are evaluated beside it, by the real script, to the figures in its metrics."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.adherence import AdherenceJudge, save_judge
from tests.tiny_networks import NETWORKS, PLAN

WORDS = (
    *("name=tiny", "rendered.images=128", "rendered.held_out=80", *NETWORKS, *PLAN),
    *("evaluation.every_images=64", "evaluation.pictures=16", "evaluation.prompts=2", "evaluation.seeds=4"),
)


@pytest.mark.slow
def test_the_last_checkpoint_is_in_the_metrics_and_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., int]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_judge(AdherenceJudge(), tmp_path / "runs" / "judge")
    assert command("train", *WORDS) == 0
    run = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (run / "diffusion" / "metrics.jsonl").read_text().splitlines()]
    figures = [line for line in lines if "eval_fd" in line]
    assert [line["images"] for line in figures] == [64]
    assert {"eval_fd_floor", "eval_kid", "eval_adherence_all", "eval_memorization_copies"} <= figures[
        0
    ].keys()
    card = json.loads((run / "evaluation" / "training" / f"{64:012d}" / "card.json").read_text())
    assert card["metrics"]["fd"] == figures[0]["eval_fd"]
    assert json.loads((run / "report.json").read_text())["images_seen"] == 64
    assert not [each for each in os.listdir(run / "evaluation" / "training") if each.endswith(".part")]
