"""A run that begins with another's networks: the same first output and autoencoder, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import Batch
from models.checkpoint import CheckpointError, fingerprint, newest
from models.loading import export, load_pipeline
from models.stages.base import Base, grown, is_handed_over, same_autoencoder

Run = Callable[..., Path]
Config = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, make_run: Run, tiny_config: Config) -> Path:
    return make_run(tmp_path / "base", tiny_config)


def changed(config: Config, part: str, **values: Any) -> Config:
    return config | {part: config[part] | values}


@pytest.mark.parametrize("edits", [False, True])
def test_the_first_output_is_the_bases(
    edits: bool,
    folder: Path,
    tiny_config: Config,
    make_stage: Callable[..., Any],
    make_batch: Callable[..., Batch],
) -> None:
    config = changed(tiny_config, "backbone", image_conditioning=edits)
    stage = make_stage("diffusion", seed=5, backbone=config["backbone"])
    base = Base.open(folder, config)
    base.start(stage)
    theirs = load_pipeline(folder, torch.device("cpu"))[0]
    told = theirs.text_encoder.encode(["dawn", "the sea"])
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    wanted = theirs.denoiser(x, torch.tensor([0.3, 0.9]), told)
    for networks in (stage.networks, stage.ema.network):
        mine = networks["text_encoder"].encode(["dawn", "the sea"])
        if edits:
            mine = mine.with_image(torch.ones_like(x))
        at = stage.objective.schedule
        c_noise = at.timestep(torch.tensor([0.3, 0.9]))
        output = networks["backbone"](x, c_noise, mine)
        x0 = stage.objective.parameterization.clean(x, output, at(torch.tensor([0.3, 0.9])))
        torch.testing.assert_close(x0, wanted, rtol=1e-4, atol=1e-5)
    if edits:
        inputs = stage.backbone.conv_in.weight.shape[1] // 2
        assert not stage.backbone.conv_in.weight[:, inputs:].any()
        assert stage.backbone.conv_in.weight[:, :inputs].any()
        assert stage.backbone.conv_in.weight.requires_grad


def test_a_run_and_its_export_are_the_same_base(folder: Path, tmp_path: Path, tiny_config: Config) -> None:
    export(folder, tmp_path / "base.safetensors")
    one, other = (Base.open(path, tiny_config) for path in (folder, tmp_path / "base.safetensors"))
    assert one.sha256 == other.sha256
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


def test_the_autoencoder_is_handed_over(folder: Path, tmp_path: Path, tiny_config: Config) -> None:
    base, parent = Base.open(folder, tiny_config), tmp_path / "new" / "autoencoder" / "checkpoints"
    base.hand_over_autoencoder(parent, {"run": tiny_config})
    mine, theirs = newest(parent), newest(folder / "autoencoder" / "checkpoints")
    assert mine is not None
    assert theirs is not None
    assert fingerprint(mine.tensors("ema")) == fingerprint(theirs.tensors("ema"))
    assert (is_handed_over(mine), is_handed_over(theirs)) == (True, False)
    assert same_autoencoder(mine, base)
    assert mine.document("state")["base"] == base.sha256


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("backbone", {"channels": [8, 8]}, r"backbone.channels is \[8, 16\], here \[8, 8\]"),
        ("backbone", {"head_dim": 4}, "backbone.head_dim is 8, here 4"),
        ("text_encoder", {"heads": 4}, "text_encoder.heads is 2, here 4"),
        ("autoencoder", {"latent_channels": 8}, "autoencoder.latent_channels is 4, here 8"),
        ("objective", {"parameterization": {"name": "v"}}, "objective.parameterization.name is flow, here v"),
    ],
)
def test_other_networks_are_refused(
    part: str, values: Config, said: str, folder: Path, tiny_config: Config
) -> None:
    with pytest.raises(CheckpointError, match=said):
        Base.open(folder, changed(tiny_config, part, **values))


def test_other_losses_are_allowed(folder: Path, tiny_config: Config) -> None:
    Base.open(folder, changed(tiny_config, "objective", times={"name": "uniform"}))


def test_a_picture_is_not_unlearnt(tmp_path: Path, make_run: Run, tiny_config: Config) -> None:
    edits = changed(tiny_config, "backbone", image_conditioning=True)
    folder = make_run(tmp_path / "edits", edits)
    Base.open(folder, edits)
    with pytest.raises(CheckpointError, match="image_conditioning is True, here False"):
        Base.open(folder, tiny_config)


def test_weights_of_another_shape_are_refused(
    folder: Path, tiny_config: Config, make_stage: Callable[..., Any]
) -> None:
    """Where the configuration says nothing of it, the shapes do."""
    stage = make_stage("diffusion", backbone=tiny_config["backbone"] | {"blocks_per_level": 2})
    with pytest.raises(CheckpointError, match=f"base={folder}: the checkpoint is of another shape"):
        Base.open(folder, tiny_config).start(stage)


def test_nothing_there_is_refused(tmp_path: Path, tiny_config: Config) -> None:
    with pytest.raises(CheckpointError, match="no such run folder or file"):
        Base.open(tmp_path / "none", tiny_config)


def test_only_twice_the_inputs_grow() -> None:
    weight = torch.ones(3, 2, 3, 3)
    assert grown(weight, torch.Size([3, 4, 3, 3]))[:, 2:].sum() == 0
    for shape in ((3, 2, 3, 3), (3, 3, 3, 3), (6, 4, 3, 3), (3, 4, 1, 1)):
        assert grown(weight, torch.Size(shape)) is weight
