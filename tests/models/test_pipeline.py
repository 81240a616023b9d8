"""Prompts to pictures: the same ones in any batch and from any form of the weights; damage is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint import CheckpointError
from models.pipeline import Pipeline, Sampling, build_networks, check_size, export, load_pipeline, to_uint8
from models.registry import ConfigError, build

CPU = torch.device("cpu")
PROMPTS = ["a dawn over the sea", "noon", "hills at night, the moon on the left", "", "snow"]
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def run(make_run: MakeRun, tiny_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_config)


@pytest.fixture(scope="module")
def pipeline(run: Path) -> Pipeline:
    return load_pipeline(run, CPU)[0]


def sampling(scale: float = 2.0, steps: int = 3, seed: int = 0) -> Sampling:
    sampler, grid = build("sampler", {"name": "multistep"}), build("grid", {"name": "uniform"})
    return Sampling(scale, steps, sampler, grid, seed)


def off_by(one: Tensor, other: Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def test_a_picture_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    whole = pipeline(PROMPTS, range(5), sampling(), batch_size=5)
    assert whole.shape == (5, 3, 16, 16)
    assert whole.dtype == torch.uint8
    assert len({picture.numpy().tobytes() for picture in whole}) == 5
    # Matrix kernels sum in another order for another batch size: a value near a border may fall to its other
    # side, and nothing more may change.
    for batch_size in range(1, 5):
        made = pipeline(PROMPTS, range(5), sampling(), batch_size=batch_size)
        assert off_by(made, whole) <= 1
        assert (made != whole).float().mean() < 0.005
    order = [3, 0, 4, 2, 1]
    mixed = pipeline([PROMPTS[i] for i in order], order, sampling(), batch_size=2)
    assert off_by(mixed, whole[order]) <= 1


def test_seed_and_index_choose_the_noise(pipeline: Pipeline) -> None:
    pictures = [pipeline(["sea"], [k], sampling(seed=seed)) for seed in (0, 1) for k in (0, 1)]
    assert len({picture.numpy().tobytes() for picture in pictures}) == 4


def test_an_empty_prompt_is_the_unconditional_model(pipeline: Pipeline) -> None:
    unconditional = pipeline(["sea at night"], [0], sampling(scale=0.0))
    for scale in (0.0, 1.0, 2.5, 8.0):
        # The branches are equal, but their weights 1-s and s do not sum to exactly 1 in float32.
        assert off_by(pipeline([""], [0], sampling(scale=scale)), unconditional) <= 1
    assert off_by(pipeline(["sea at night"], [0], sampling(scale=8.0)), unconditional) > 1


def test_another_size(pipeline: Pipeline) -> None:
    assert pipeline(["sea"], [0], sampling(), size=24).shape == (1, 3, 24, 24)
    with pytest.raises(ConfigError, match=r"size is 20, .* a multiple of 8; the nearest are 16 and 24"):
        pipeline(["sea"], [0], sampling(), size=20)
    with pytest.raises(ConfigError, match="the nearest are 8 and 16"):
        check_size("size", 0, pipeline.autoencoder, 2)


def test_progress_is_told(pipeline: Pipeline) -> None:
    told: list[int] = []
    pipeline(PROMPTS, range(5), sampling(steps=1), batch_size=2, progress=told.append)
    assert told == [2, 4, 5]


def test_numbers_that_are_not_finite(run: Path) -> None:
    broken = load_pipeline(run, CPU)[0]
    broken.autoencoder.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower guidance_scale"):
        broken(["sea"], [0], sampling())


def test_pixels_are_rounded_and_clipped() -> None:
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.0, 0.2, 1.0, 9.0])).tolist() == [0, 0, 128, 153, 255, 255]


@pytest.mark.parametrize(
    ("scale", "steps", "said"),
    [(float("nan"), 3, "guidance_scale is nan"), (float("inf"), 3, "finite"), (2.0, 0, "num_steps is 0")],
)
def test_how_to_sample_is_checked(scale: float, steps: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sampling(scale, steps)


def test_an_exported_file_makes_the_same_pictures(run: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    export(run, tmp_path / "model.safetensors")
    other, config, sha256 = load_pipeline(tmp_path / "model.safetensors", CPU)
    assert torch.equal(other(PROMPTS, range(5), sampling()), pipeline(PROMPTS, range(5), sampling()))
    assert config["resolution"] == other.resolution == 16
    assert sha256 == load_pipeline(run, CPU)[2]
    assert not any(network.training for network in (other.autoencoder, other.text_encoder))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such run folder or file"):
        load_pipeline(tmp_path / "absent", CPU)
    with pytest.raises(CheckpointError, match="has no verified diffusion checkpoint"):
        load_pipeline(tmp_path, CPU)


def test_stages_of_two_runs_do_not_mix(
    make_run: MakeRun, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    mine, other = make_run(tmp_path / "a", tiny_config, 0), make_run(tmp_path / "b", tiny_config, 1)
    (mine / "autoencoder").rename(tmp_path / "old")
    (other / "autoencoder").rename(mine / "autoencoder")
    with pytest.raises(CheckpointError, match="the latents of another autoencoder"):
        load_pipeline(mine, CPU)
    with pytest.raises(CheckpointError, match="another autoencoder"):
        export(mine, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_damage_is_not_passed_over(make_run: MakeRun, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_config)
    path = next((run / "diffusion").rglob("ema.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="no verified diffusion checkpoint"):
        load_pipeline(run, CPU)


def exported(path: Path, networks: dict[str, Any], **metadata: str) -> Path:
    """A file of the networks of that configuration, saying of itself what `metadata` says."""
    named = zip(("autoencoder", "text_encoder", "backbone"), build_networks(networks), strict=True)
    tensors = {f"{name}.{key}": value for name, net in named for key, value in net.state_dict().items()}
    said = {"format": "firstlight-1", "config": json.dumps(networks), "checkpoint_sha256": "0"}
    save_file(tensors, path, said | metadata)
    return path


def test_files_that_are_no_model(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_pipeline(text, CPU)
    with pytest.raises(CheckpointError, match=r"not a model exported by scripts/export.py"):
        load_pipeline(exported(tmp_path / "b.safetensors", tiny_config, format="pt"), CPU)
    wide = tiny_config | {"backbone": tiny_config["backbone"] | {"channels": [16, 16]}}
    with pytest.raises(CheckpointError, match=r"backbone: the checkpoint is of another shape .* differences"):
        load_pipeline(exported(tmp_path / "c.safetensors", tiny_config, config=json.dumps(wide)), CPU)
    with pytest.raises(CheckpointError, match="its configuration cannot be built"):
        load_pipeline(exported(tmp_path / "d.safetensors", tiny_config, config="{}"), CPU)
    with pytest.raises(CheckpointError, match="its configuration"):
        load_pipeline(exported(tmp_path / "e.safetensors", tiny_config, config="{"), CPU)
    evil = tiny_config | {"sampler": {"name": "euler"}, "autoencoder": {"name": "os.system"}}
    with pytest.raises(CheckpointError, match=r"there is no 'os.system'"):
        load_pipeline(exported(tmp_path / "f.safetensors", tiny_config, config=json.dumps(evil)), CPU)
