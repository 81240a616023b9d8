"""A run whose checkpoints are evaluated beside it, by the real script, to the figures in its metrics."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.adherence import AdherenceJudge, save_judge

WORDS = (
    "name=tiny", "rendered.images=128", "rendered.held_out=80", "data.resolution=32", "data.workers=0",
    "autoencoder.channels=[8,8,8]", "autoencoder.norm_groups=4", "backbone.channels=[16,16]",
    "backbone.norm_groups=4", "backbone.head_dim=16", "backbone.transformer_depth=[0,1]",
    "text_encoder.width=16", "text_encoder.layers=1", "text_encoder.heads=2",
    "text_encoder.context_length=12", "trainer.precision=fp32", "trainer.compile=off", "trainer.threads=1",
    "plan.autoencoder.images=32", "plan.autoencoder.batch_size=4",
    "plan.autoencoder.checkpoint_every_images=16", "plan.autoencoder.log_every_images=8",
    "plan.diffusion.images=64", "plan.diffusion.batch_size=8", "plan.diffusion.checkpoint_every_images=32",
    "plan.diffusion.validate_every_images=32", "sampling.num_steps=1",
    "evaluation.every_images=64", "evaluation.pictures=16", "evaluation.prompts=2", "evaluation.seeds=4",
)  # fmt: skip


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
