"""The command: one file that makes the same pictures, diffusers' folders, and errors in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.loading import load_pipeline
from models.registry import build
from models.sampling import Job, Sampling
from scripts.export import main

PROJECT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def run(make_run: Callable[..., Path], tiny_config: dict[str, Any], tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", tiny_config)


def pictures(path: Path) -> torch.Tensor:
    sampler, grid = build("sampler", {"name": "euler"}), build("grid", {"name": "uniform"})
    return load_pipeline(path, CPU)[0].generate(
        [Job("sea", 0), Job("", 1)], Sampling(2.0, 2, sampler, grid, 0)
    )


def test_the_file_makes_the_same_pictures(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([str(run)]) == 0
    assert f"sample.py checkpoint={run / 'model.safetensors'}" in capsys.readouterr().out
    assert main([str(run), str(tmp_path / "other.safetensors")]) == 0
    for name in (run / "model.safetensors", tmp_path / "other.safetensors"):
        assert torch.equal(pictures(name), pictures(run))


def test_diffusers_folders(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--diffusers", str(tmp_path / "out")]) == 0
    for name, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        config = json.loads((tmp_path / "out" / name / "config.json").read_text())
        assert config["_class_name"] == kind
        assert load_file(tmp_path / "out" / name / "diffusion_pytorch_model.safetensors")
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["sample_size"] == 4


@pytest.mark.slow
def test_diffusers_loads_them(run: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    assert main([str(run), "--diffusers", str(tmp_path)]) == 0
    pipeline = load_pipeline(run, CPU)[0]
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(latents).sample, pipeline.autoencoder.decode(latents))


@pytest.mark.parametrize(
    ("part", "option", "said"),
    [
        ("backbone", {"position_size": 4}, "train with position_size=0 to export"),
        ("autoencoder", {"patch_size": 2}, "train with autoencoder.patch_size=1 and"),
        ("autoencoder", {"linear_path": True}, "autoencoder.linear_path=false to export"),
    ],
)
def test_what_diffusers_lacks_is_refused(
    make_run: Callable[..., Path],
    tiny_config: dict[str, Any],
    tmp_path: Path,
    capsys: Any,
    part: str,
    option: dict[str, int],
    said: str,
) -> None:
    config = tiny_config | {part: tiny_config[part] | option}
    run = make_run(tmp_path / "run", config)
    assert main([str(run), "--diffusers", str(tmp_path / "out")]) == 4
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["{tmp}/absent"], 4, "has no verified diffusion checkpoint"),
        (["{tmp}/absent", "--diffusers", "{tmp}/out"], 4, "there is no such run folder or file"),
        (["{run}", "{tmp}/no/such/folder/model.safetensors"], 5, "check that the folder exists"),
        (["{run}", "--diffusers", "{tmp}/file"], 5, "check that the folder exists"),
        (["{run}", "a.safetensors", "--diffusers", "b"], 2, "not both"),
        ([], 2, "required: run"),
        (["{run}", "--difusers", "x"], 2, "unrecognized arguments"),
    ],
)
def test_errors_are_one_line(
    run: Path, tmp_path: Path, capsys: Any, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    words = [word.format(run=run, tmp=tmp_path) for word in words]
    try:
        found = main(words)
    except SystemExit as stop:
        found = int(stop.code or 0)
    error = capsys.readouterr().err.strip()
    assert found == code
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("command", [["scripts/export.py"], ["-m", "scripts.export"]])
def test_both_ways_to_call_it(command: list[str], run: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command, str(run)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (run / "model.safetensors").exists()
