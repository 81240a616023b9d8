"""What training would need, computed: beside the same things counted on real tensors, and by hand."""

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.utils.flop_counter import FlopCounterMode

from conf.cli import FOLDER
from conf.schema import plain, register
from models.loading import build_networks
from models.registry import ConfigError
from models.stages.estimate import (
    Anatomy,
    Layout,
    device_hours,
    dissect,
    in_hours,
    layouts,
    show_autoencoder,
    show_estimate,
    smallest_card,
)
from models.stages.losses import half

LARGE = ["text_encoder=vit_b_32", "autoencoder=sd", "data.resolution=512"]


def values(*words: str) -> dict[str, Any]:
    register()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        return plain(compose("train", list(words)))


@pytest.fixture(scope="module")
def tiny() -> tuple[dict[str, Any], Anatomy]:
    config = values()
    return config, dissect(config, bf16=False)


def test_parameters_are_those_of_the_networks(tiny: tuple[dict[str, Any], Anatomy]) -> None:
    config, anatomy = tiny
    autoencoder, text_encoder, backbone = build_networks(config)
    assert anatomy.trained == sum(p.numel() for n in (text_encoder, backbone) for p in n.parameters())
    assert anatomy.frozen == sum(p.numel() for p in autoencoder.parameters())


def test_activations_and_flops_are_those_of_real_tensors(tiny: tuple[dict[str, Any], Anatomy]) -> None:
    config, anatomy = tiny
    autoencoder, text_encoder, backbone = build_networks(config)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for n in (text_encoder, backbone) for p in n.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    side = config["data"]["resolution"] // autoencoder.factor
    x = torch.zeros(1, backbone.latent_channels, side, side)
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        told = text_encoder(torch.zeros(1, text_encoder.context_length, dtype=torch.int64))
        backbone(x, torch.zeros(1), told).square().mean().backward()
    real = sum(size for place, size in kept.items() if place not in own)
    assert anatomy.activations == pytest.approx(real, rel=0.05)
    counted = anatomy.flops["text encoder"] + anatomy.flops["backbone"]
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_bfloat16_and_recomputing_keep_less(tiny: tuple[dict[str, Any], Anatomy]) -> None:
    config, anatomy = tiny
    assert dissect(config, bf16=True).activations == pytest.approx(anatomy.activations / 2)
    assert 0 < anatomy.recomputed < 0.5 * anatomy.activations


def test_precomputed_moments_need_no_autoencoder_in_the_step(tiny: tuple[dict[str, Any], Anatomy]) -> None:
    config, anatomy = tiny
    read = dissect(config | {"data": config["data"] | {"precomputed": "moments"}}, bf16=False)
    assert "autoencoder" in anatomy.flops
    assert "autoencoder" not in read.flops


def test_memory_by_hand() -> None:
    anatomy = Anatomy(trained=1000, frozen=10, block=100, flops={"a": 1.0}, activations=7.0, recomputed=3.0)
    assert anatomy.memory(Layout(1, 1), 2, False) == 20_000 + 40 + 14
    assert anatomy.memory(Layout(4, 1), 2, False) == 20_000 + 40 + 14 + 4_000  # its buckets
    assert anatomy.memory(Layout(1, 4), 2, True) == 5_000 + 40 + 6 + 800  # two blocks gathered
    assert anatomy.memory(Layout(2, 2), 2, True) == 10_000 + 40 + 6 + 800


def test_traffic_by_hand() -> None:
    assert Layout(1, 1).traffic(1000) == 0
    assert Layout(4, 1).traffic(1000) == pytest.approx(2 * 3 / 4 * 4_000)
    assert Layout(1, 4).traffic(1000) == pytest.approx(3 * 3 / 4 * 4_000)
    assert Layout(2, 4).traffic(1000) == pytest.approx(3 * 3 / 4 * 4_000 + 2 * 1 / 2 * 1_000)


def test_layouts() -> None:
    assert [layout.name for layout in layouts(1, 0)] == ["one device"]
    assert [layout.name for layout in layouts(2, 0)] == ["ddp", "fsdp"]
    assert [layout.name for layout in layouts(4, 0)] == ["ddp", "fsdp", "hsdp 2x2"]
    assert [layout.name for layout in layouts(64, 0)] == ["ddp", "fsdp", "hsdp 8x8"]
    assert [layout.name for layout in layouts(64, 4)] == ["ddp", "fsdp", "hsdp 16x4"]
    with pytest.raises(ConfigError, match="does not divide 8 devices"):
        layouts(8, 3)


def test_a_batch_that_cannot_be_shared_out_is_refused_with_the_nearest(
    tiny: tuple[dict[str, Any], Anatomy],
) -> None:
    with pytest.raises(ConfigError, match=r"must divide by 5 devices x 2 portions; nearest: 30 and 40"):
        show_estimate(tiny[1], layouts(5, 0), 32, 2, 100)


def test_hours_and_dollars_by_hand() -> None:
    """100 M images of 2,474 GFLOP at 31.4 % of 989 TFLOP/s are 221 hours: docs/scaling.md."""
    assert device_hours(100e6 * 2.474e12) == pytest.approx(221.3, abs=0.1)
    told = in_hours(100e6 * 2.474e12, 100_000_000, 64)
    assert "221.3 hours of an H200" in told
    assert "3.5 hours on 64; $663.88 at $3 an hour" in told
    assert " on 1" not in in_hours(1e15, 10, 1)


@pytest.mark.parametrize("half_size_weight", [0.0, 0.5])
def test_the_autoencoders_work_is_that_of_real_tensors(
    tiny: tuple[dict[str, Any], Anatomy], capsys: pytest.CaptureFixture[str], half_size_weight: float
) -> None:
    config, anatomy = tiny
    autoencoder, side = build_networks(config)[0], 4 * config["data"]["resolution"]
    config = config | {
        "reconstruction": {"half_size_weight": half_size_weight},
        "data": config["data"] | {"resolution": side},
    }
    with FlopCounterMode(display=False) as counter:
        latents = autoencoder.encode(torch.zeros(1, 3, side, side))[:, :4]
        loss = autoencoder.decode(latents).square().mean()
        if half_size_weight:
            loss = loss + autoencoder.decode(half(latents)).square().mean()
        loss.backward()
    show_autoencoder(config, 1_000_000, 1)
    counted = float(capsys.readouterr().out.split(" GFLOP")[0].split()[-1].replace(",", "")) * 1e9
    # Three times what is walked forwards; the first layer has no picture to learn for.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert anatomy.flops["autoencoder"] * 16 < counted / 3  # for a picture of a quarter of the side


def test_cards() -> None:
    assert smallest_card(1.0) == "8 GB"
    assert smallest_card(73 * 2**30) == "141 GB"  # a tenth of 80 is spare
    assert smallest_card(500 * 2**30) == "none"


def test_stable_diffusion_2_costs_what_is_known_of_it() -> None:
    """866 M parameters and 2.41 TFLOP an image of 512 px with flash attention's second pass left out."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    anatomy = dissect(values("backbone=sd2", *LARGE), bf16=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert anatomy.trained == pytest.approx(866e6, rel=0.02)  # a text of width 512 instead of 1024
    assert anatomy.flops["backbone"] == pytest.approx(2.41e12, rel=0.05)
    assert grown * 1024 < 0.5 * anatomy.trained * 4, "the weights were allocated"


@pytest.mark.slow
def test_sdxl_has_its_size() -> None:
    anatomy = dissect(values("backbone=sdxl", *LARGE), bf16=True)
    assert anatomy.flops["backbone"] == pytest.approx(4.71e12, rel=0.05)
    assert replace(anatomy).trained == pytest.approx(
        2.57e9, rel=0.11
    )  # likewise, and without size conditions


def test_the_command_prints_a_table_and_begins_nothing(
    tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("train", "plan=true", "devices=8") == 0
    told = capsys.readouterr().out
    assert "hsdp 2x4" in told
    assert "8 devices, 16 images a step, 2 at a time" in told
    assert list(tmp_path.iterdir()) == []
