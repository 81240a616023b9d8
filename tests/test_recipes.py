"""The recipes of real sizes: what they would take, and that their commands work, made small."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

import train
from conf.cli import FOLDER
from conf.schema import plain, register
from data.landscapes import write_landscapes
from evaluation.adherence import AdherenceJudge, save_judge
from models.checkpoint import newest
from models.stages import preflight
from models.stages.base import TAKEN, apart
from models.stages.compute import Compute
from scripts.precompute import main as precompute

Command = Callable[..., int]
RECIPES = ("landscapes_128", "landscapes_256", "sd2_256", "sd2_512", "flowers", "emoji")
#: Networks and horizons of a minute, with the depth and the factors of those that they stand for.
SMALL = (
    "text_encoder.width=16", "text_encoder.layers=1", "text_encoder.heads=2",
    "text_encoder.context_length=12", "sampling.num_steps=1", "data.workers=0",
    "plan.autoencoder.images=16", "plan.autoencoder.batch_size=4", "plan.diffusion.images=32",
    "plan.diffusion.batch_size=8", "plan.diffusion.validation_images=4",
    "trainer.precision=fp32", "trainer.compile=off", "trainer.threads=1",
)  # fmt: skip
SMALL_SD = (
    *SMALL, "autoencoder.channels=[8,8,8,8]", "autoencoder.norm_groups=4", "autoencoder.blocks_per_level=1",
    "autoencoder.mid_attention=false", "backbone.channels=[16,16,16,16]", "backbone.norm_groups=4",
    "backbone.blocks_per_level=1", "backbone.head_dim=16", "data.shards=captioned",
)  # fmt: skip


def values(*words: str) -> dict[str, Any]:
    register()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        return plain(compose("train", list(words)))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to train in, with a judge that knows nothing; how to compute is not timed."""
    fixed = Compute(torch.device("cpu"), False, True, False, "fixed by a test")
    monkeypatch.setattr(preflight, "decide", lambda *_: (fixed, 0.01))
    monkeypatch.setattr(preflight, "matmul_ceiling", lambda _: 1e11)
    monkeypatch.setattr(train, "NORMALISATION_IMAGES", 24)
    before = Path.cwd()
    os.chdir(tmp_path)
    save_judge(AdherenceJudge(), Path("runs/judge"))
    yield tmp_path
    os.chdir(before)


@pytest.mark.parametrize(
    ("experiment", "devices", "said"),
    [
        ("landscapes_128", 8, ["8.6 M parameters trained", "32 images a step, 4 at a time"]),
        pytest.param(
            *("landscapes_256", 64, ["1.0 M parameters;", "73.3 M parameters trained", "128 images a step"]),
            marks=pytest.mark.slow,
        ),
        # 866 M of the UNet and 202 M of the text encoder, and the autoencoder of 83.65 M.
        pytest.param(
            *("sd2_256", 64, ["1,067.7 M parameters trained", "83.7 M parameters; 2,684.7 GFLOP"]),
            marks=pytest.mark.slow,
        ),
        ("sd2_512", 64, ["1,067.7 M parameters trained, 83.7 M frozen", "2,048 images a step, 32 at a time"]),
    ],
)
def test_what_a_recipe_takes(
    experiment: str, devices: int, said: list[str], command: Command, capsys: Any
) -> None:
    assert command("train", f"experiment={experiment}", "plan=true", f"devices={devices}") == 0
    printed = " ".join(capsys.readouterr().out.split()).replace(f"{2048} images", "2,048 images")
    for words in said:
        assert words in printed
    assert f"on {devices}; $" in printed
    # The second run has the first one's autoencoder, and trains none.
    assert ("Autoencoder stage" in printed) == (experiment != "sd2_512")


@pytest.mark.parametrize("experiment", RECIPES)
def test_a_recipe_prints_its_configuration(experiment: str, command: Command, capsys: Any) -> None:
    assert command("train", f"experiment={experiment}", "--cfg", "job") == 0
    assert "resolution:" in capsys.readouterr().out


def test_the_larger_run_takes_the_networks_of_the_smaller_one() -> None:
    first, second = values("experiment=sd2_256"), values("experiment=sd2_512")
    assert apart(first, second, TAKEN) == []
    assert second["base"] == f"{first['folder']}/{first['name']}"
    sides = second["data"]["resolution"] / first["data"]["resolution"]
    moved = second["objective"]["times"]["mean"] - first["objective"]["times"]["mean"]
    assert moved == pytest.approx(math.log(sides), abs=1e-4)


@pytest.mark.slow
def test_landscapes_at_128_px_end_to_end(place: Path, command: Command) -> None:
    small = ("autoencoder.channels=[8,8,8]", "autoencoder.norm_groups=4", "backbone.channels=[16,16]")
    sizes = ("backbone.norm_groups=4", "backbone.head_dim=16", "rendered.images=24", "rendered.held_out=4")
    assert command("train", "experiment=landscapes_128", *SMALL, *small, *sizes) == 0
    run = place / "runs" / "landscapes_128"
    assert (run / "contact_sheet.png").stat().st_size > 0
    saved = newest(run / "diffusion" / "checkpoints")
    assert saved is not None
    assert saved.document("config")["resolution"] == 128
    # The map of positions has the side of the backbone's grid: 128 px, f4, patches of 2.
    assert saved.tensors("ema")["backbone.position"].shape[-2:] == (16, 16)


@pytest.mark.slow
def test_from_256_to_512_px_by_the_commands_of_the_recipe(place: Path, command: Command) -> None:
    write_landscapes(place / "captioned", 24, 128, 1, 24, 0)
    smaller = (*SMALL_SD, "data.resolution=64", "data.val_fraction=0.2")
    larger = (*SMALL_SD, "data.resolution=128", "data.val_fraction=0.2")
    first = [*smaller, "experiment=sd2_256", "data.precomputed=small"]
    assert command("train", *first) == 4  # no moments before there is an autoencoder
    assert command("train", *first, "stages=[autoencoder]") == 0
    assert precompute(["runs/sd2_256", "small", "--workers", "0"]) == 0
    assert command("train", *first) == 0
    words = ["runs/sd2_256", "large", "--workers", "0", "--resolution", "128", "--dtype", "float16"]
    assert precompute(words) == 0
    second = [*larger, "experiment=sd2_512", "data.precomputed=large"]
    assert command("train", *second) == 0
    saved = newest(place / "runs" / "sd2_512" / "diffusion" / "checkpoints")
    assert saved is not None
    assert saved.document("config")["resolution"] == 128
    assert command("train", *second, "name=other", "data.precomputed=small") == 3  # moments of 64 px
