"""Prompts to pictures: the same ones in any batch and from any form of the weights; damage is refused."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint import CheckpointError
from models.diffusion.schedules import FlowSchedule, LinearSchedule
from models.loading import build_networks, export, load_pipeline
from models.pipeline import Pipeline, check_size, to_uint8
from models.registry import ConfigError, build
from models.sampling import Job, Sampling

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


def jobs(prompts: Sequence[str] = PROMPTS, indices: Sequence[int] | None = None, **options: Any) -> list[Job]:
    numbers = range(len(prompts)) if indices is None else indices
    return [Job(prompt, k, **options) for prompt, k in zip(prompts, numbers, strict=True)]


@pytest.mark.parametrize("name", ["multistep", "ancestral", "unipc"])
def test_a_picture_does_not_depend_on_its_batch(pipeline: Pipeline, name: str) -> None:
    how = replace(sampling(), sampler=build("sampler", {"name": name}))
    whole = pipeline.generate(jobs(), how, batch_size=5)
    assert whole.shape == (5, 3, 16, 16)
    assert whole.dtype == torch.uint8
    assert len({picture.numpy().tobytes() for picture in whole}) == 5
    for batch_size in range(1, 5):
        assert torch.equal(pipeline.generate(jobs(), how, batch_size=batch_size), whole)
    order = [3, 0, 4, 2, 1]
    mixed = pipeline.generate(jobs([PROMPTS[i] for i in order], order), how, batch_size=2)
    assert torch.equal(mixed, whole[order])


def test_seed_and_index_choose_the_noise(pipeline: Pipeline) -> None:
    pictures = [pipeline.generate(jobs(["sea"], [k]), sampling(seed=seed)) for seed in (0, 1) for k in (0, 1)]
    assert len({picture.numpy().tobytes() for picture in pictures}) == 4


def test_an_empty_prompt_is_the_unconditional_model(pipeline: Pipeline) -> None:
    unconditional = pipeline.generate(jobs(["sea at night"]), sampling(scale=0.0))
    for scale in (0.0, 1.0, 2.5, 8.0):
        # The branches are equal, but their weights 1-s and s do not sum to exactly 1 in float32.
        assert off_by(pipeline.generate(jobs([""]), sampling(scale=scale)), unconditional) <= 1
    assert off_by(pipeline.generate(jobs(["sea at night"]), sampling(scale=8.0)), unconditional) > 1


def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipeline: Pipeline) -> None:
    plain = pipeline.generate(jobs(["sea"]), sampling(8.0))
    assert torch.equal(pipeline.generate(jobs(["sea"], negative_prompt=""), sampling(8.0)), plain)
    assert (
        off_by(pipeline.generate(jobs(["sea"], negative_prompt="hills at night"), sampling(8.0)), plain) > 1
    )


def test_prompts_are_mixed(pipeline: Pipeline) -> None:
    one, other = (pipeline.generate(jobs([text]), sampling(6.0)) for text in ("sea", "hills at night"))
    made = [
        pipeline.generate(jobs(["sea"], other_prompt="hills at night", share=share), sampling(6.0))
        for share in (0.0, 0.5, 1.0)
    ]
    assert torch.equal(made[0], one)
    assert torch.equal(made[2], other)
    assert not torch.equal(made[1], one)
    assert not torch.equal(made[1], other)


def test_a_variation_lies_near_its_seed(pipeline: Pipeline) -> None:
    made = [
        pipeline.generate(jobs(["sea"]), replace(sampling(), variation=share)).float()
        for share in (0.0, 0.1, 1.0)
    ]
    assert 0 < (made[1] - made[0]).abs().mean() < (made[2] - made[0]).abs().mean()


@pytest.fixture
def picture() -> Tensor:
    return torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_picture_to_start_from(pipeline: Pipeline, picture: Tensor) -> None:
    made = [
        pipeline.generate(jobs(["sea"], image=picture), replace(sampling(), strength=strength))
        for strength in (0.05, 1.0)
    ]
    assert torch.equal(made[1], pipeline.generate(jobs(["sea"]), sampling()))
    assert not torch.equal(made[0], made[1])
    with pytest.raises(ConfigError, match="no image to start from"):
        pipeline.generate(jobs(["sea"]), replace(sampling(), strength=0.5))


@pytest.mark.parametrize("repaint", [1, 2])
def test_inpainting_keeps_what_is_known_to_the_bit(pipeline: Pipeline, picture: Tensor, repaint: int) -> None:
    mask = torch.zeros(16, 16)
    mask[:, 10:] = 1
    how = replace(sampling(), feather=2, repaint=repaint)
    made = pipeline.generate(jobs(["sea"], image=picture, mask=mask), how)[0]
    assert torch.equal(made[:, :, :8], picture[:, :, :8])
    assert not torch.equal(made[:, :, 10:], picture[:, :, 10:])
    nothing = pipeline.generate(jobs(["sea"], image=picture, mask=torch.zeros(16, 16)), how)[0]
    assert torch.equal(nothing, picture)


def test_jobs_of_a_batch_are_alike(pipeline: Pipeline, picture: Tensor) -> None:
    with pytest.raises(ConfigError, match="differ in kind or size"):
        pipeline.generate([Job("sea", 0), Job("sea", 1, image=picture)], sampling())
    with pytest.raises(ConfigError, match="not trained to edit by instruction"):
        pipeline.generate(jobs(["sea"], before=picture), sampling())
    with pytest.raises(ConfigError, match="no image of its size"):
        Job("sea", 0, mask=torch.zeros(16, 16))
    with pytest.raises(ConfigError, match="a picture of 16x16 for a size of 24x24"):
        pipeline.generate(jobs(["sea"], image=picture), sampling(), size=24)
    with pytest.raises(ConfigError, match="nothing to make"):
        pipeline.generate([], sampling())


def test_another_size(pipeline: Pipeline) -> None:
    assert pipeline.generate(jobs(["sea"]), sampling(), size=24).shape == (1, 3, 24, 24)
    assert pipeline.generate(jobs(["sea"]), sampling(), size=(32, 16)).shape == (1, 3, 16, 32)
    with pytest.raises(ConfigError, match=r"size is 20, .* a multiple of 8; the nearest are 16 and 24"):
        pipeline.generate(jobs(["sea"]), sampling(), size=20)
    with pytest.raises(ConfigError, match="the nearest are 8 and 16"):
        check_size("size", 0, pipeline.autoencoder, 2)


def test_a_tiled_picture_of_the_training_size_is_the_plain_one(pipeline: Pipeline) -> None:
    tiled = replace(sampling(), tiled=True)
    assert torch.equal(pipeline.generate(jobs(["sea"]), tiled), pipeline.generate(jobs(["sea"]), sampling()))
    for wrap in (False, True):
        made = pipeline.generate(jobs(["sea"]), replace(tiled, wrap=wrap), size=(48, 16))
        assert made.shape == (1, 3, 16, 48)
        assert not torch.equal(made, pipeline.generate(jobs(["sea"]), sampling(), size=(48, 16)))
    with pytest.raises(ConfigError, match="wrap closes pictures wider than 16 pixels"):
        pipeline.generate(jobs(["sea"]), replace(tiled, wrap=True))


@torch.no_grad()
def test_a_ring_is_decoded_without_ends(pipeline: Pipeline, rng: torch.Generator) -> None:
    latents = torch.randn(1, 4, 4, 1, generator=rng).expand(-1, -1, -1, 24).contiguous()
    ring, line = (pipeline._decode(latents, wrap) for wrap in (True, False))
    assert ring.shape == line.shape == (1, 3, 16, 96)
    torch.testing.assert_close(ring[..., :1], ring[..., 48:49], atol=1e-4, rtol=0)
    assert (line[..., :1] - line[..., 48:49]).abs().max() > 0.01


def test_a_grid_that_cannot_be_laid_is_refused_before_anything(pipeline: Pipeline) -> None:
    steep = replace(sampling(steps=20), grid=build("grid", {"name": "warped", "b": 10.0}))
    with pytest.raises(ConfigError, match=r"grid: .* on the same time"):
        pipeline.check(jobs(["sea"]), steep)
    with pytest.raises(ConfigError, match=r"strength is 1e-12 with 3 steps, .*; give more strength"):
        replace(sampling(), strength=1e-12).times(FlowSchedule())
    for strength in (0.9, 0.99):
        times = replace(sampling(steps=4), strength=strength).times(FlowSchedule())
        assert times.shape == (5,)
        assert times[0] < 1


def test_a_weaker_checkpoint_guides(run: Path, pipeline: Pipeline) -> None:
    guided, weaker = (load_pipeline(run, CPU)[0] for _ in range(2))
    guided.guided_by(weaker)
    # Guided by itself nothing is pushed, whatever the scale.
    alone = pipeline.generate(jobs(["sea"]), sampling(1.0))
    assert off_by(guided.generate(jobs(["sea"]), sampling(5.0)), alone) <= 1
    wide = guided.generate(jobs(["sea"]), replace(sampling(5.0), tiled=True), size=(48, 16))
    assert off_by(wide, pipeline.generate(jobs(["sea"]), replace(sampling(1.0), tiled=True), (48, 16))) <= 1
    with torch.no_grad():
        weaker.text_encoder.position.mul_(1.5)
    assert off_by(guided.generate(jobs(["sea"]), sampling(5.0)), alone) > 1
    schedule = weaker.denoiser.schedule
    weaker.denoiser.schedule = LinearSchedule()
    with pytest.raises(ConfigError, match="another schedule"):
        guided.guided_by(weaker)
    weaker.denoiser.schedule = schedule
    with torch.no_grad():
        weaker.autoencoder.latent_mean.add_(1)
    with pytest.raises(ConfigError, match="another autoencoder"):
        guided.guided_by(weaker)


def test_progress_and_previews_are_told(pipeline: Pipeline) -> None:
    told: list[int] = []
    pipeline.generate(jobs(), sampling(steps=1), batch_size=2, progress=told.append)
    assert told == [2, 4, 5]
    seen: list[tuple[int, Tensor]] = []
    how = replace(sampling(), sampler=build("sampler", {"name": "euler"}))  # whose last guess is the picture
    made = pipeline.generate(jobs(["sea"]), how, preview=lambda *now: seen.append(now))
    assert [step for step, _ in seen] == [1, 2, 3]
    assert off_by(seen[-1][1], made) <= 1


def test_pictures_in_one_line(run: Path, pipeline: Pipeline) -> None:
    short = Pipeline.from_checkpoint(run, "cpu")
    assert short.defaults is not None
    made = short(["sea", "hills"], num_images=2, seed=5, num_steps=2, size=24)
    wanted = pipeline.generate(
        jobs(["sea", "sea", "hills", "hills"]), replace(short.defaults, seed=5, num_steps=2), 24
    )
    assert [image.tobytes() for image in made] == [w.permute(1, 2, 0).numpy().tobytes() for w in wanted]
    assert short("sea", sampler="heun")[0].tobytes() != short("sea")[0].tobytes()
    with pytest.raises(ConfigError, match="did you mean 'heun'"):
        short("sea", sampler="huen")
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    assert short("sea", image=picture)[0].tobytes() != short("sea")[0].tobytes()
    with pytest.raises(ConfigError, match="image is no tensor"):
        short("sea", image=Image.new("RGB", (16, 16)))
    with pytest.raises(ConfigError, match="other_prompt has no part in the picture"):
        short("sea", other_prompt="hills")
    with pytest.raises(ConfigError, match=r"no option 'num_step' \(did you mean 'num_steps'"):
        short("sea", num_step=3)


def test_numbers_that_are_not_finite(run: Path) -> None:
    broken = load_pipeline(run, CPU)[0]
    broken.autoencoder.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower guidance_scale"):
        broken.generate(jobs(["sea"]), sampling())


def test_pixels_are_rounded_and_clipped() -> None:
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.0, 0.2, 1.0, 9.0])).tolist() == [0, 0, 128, 153, 255, 255]


@pytest.mark.parametrize(
    ("scale", "steps", "said"),
    [
        (float("nan"), 3, "guidance_scale is nan"),
        (float("inf"), 3, "guidance_scale is inf"),
        (2.0, 0, "num_steps is 0"),
    ],
)
def test_how_to_sample_is_checked(scale: float, steps: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sampling(scale, steps)


def test_an_exported_file_makes_the_same_pictures(run: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    export(run, tmp_path / "model.safetensors")
    other, config, sha256 = load_pipeline(tmp_path / "model.safetensors", CPU)
    assert torch.equal(other.generate(jobs(), sampling()), pipeline.generate(jobs(), sampling()))
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
