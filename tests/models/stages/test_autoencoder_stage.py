"""The autoencoder stage: it learns, its loss belongs to samples, and its latents end up normalised."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from data.batch import Batch
from models.diffusion.draws import Draws, Purpose
from models.stages.losses import ReconstructionLoss

MakeStage = Callable[..., Any]
MakeBatch = Callable[..., Batch]


def test_finishing_normalises_the_latents(make_stage: MakeStage, make_batch: MakeBatch) -> None:
    stage = make_stage("autoencoder")
    network = stage.ema.network["autoencoder"]
    batches = [make_batch(4), make_batch(3, 4)]
    stage.finish(batches)
    with torch.no_grad():
        latents = torch.cat([network.mode(network.encode(batch.images)) for batch in batches])
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx([0.0] * 4, abs=1e-4)
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1.0] * 4, abs=1e-3)
    assert torch.equal(stage.autoencoder.latent_mean, network.latent_mean)
    assert torch.equal(stage.autoencoder.latent_std, network.latent_std)
    assert network.latent_mean.any()


def test_it_learns_one_batch(make_stage: MakeStage, make_batch: MakeBatch) -> None:
    stage, batch = make_stage("autoencoder"), make_batch(4)
    optimizer = stage.configure_optimizers()
    before = stage.validate([batch])
    for step in range(30):
        stage.mean_loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        stage.ema.update(stage.networks, 4 * (step + 1), 4)
    after = stage.validate([batch])
    assert after["loss"].mean() < 0.8 * before["loss"].mean()
    assert after["psnr_db"].mean() > before["psnr_db"].mean() + 0.5


def test_the_loss_does_not_depend_on_how_a_batch_is_split(
    make_stage: MakeStage, make_batch: MakeBatch
) -> None:
    stage = make_stage("autoencoder")
    whole = stage.mean_loss(make_batch(6)).item()
    parts = [stage.mean_loss(make_batch(2, first)).item() for first in (0, 2, 4)]
    assert whole == pytest.approx(sum(parts) / 3, rel=1e-4)


def test_the_loss_is_what_it_says(make_stage: MakeStage, make_batch: MakeBatch) -> None:
    stage, batch = make_stage("autoencoder"), make_batch(2)
    network = stage.autoencoder
    moments = network.encode(batch.images)
    noise = Draws(0, batch.indices).normal(Purpose.POSTERIOR, (4, 4, 4))
    decoded = network.decode(network.sample(moments, noise))
    wanted = (decoded - batch.images).square().mean() + 1e-5 * network.kl(moments).mean() / 64
    assert stage.mean_loss(batch).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_loss_at_half_size_is_of_halved_latents(make_stage: MakeStage, make_batch: MakeBatch) -> None:
    stage, batch = make_stage("autoencoder"), make_batch(2)
    without = stage.mean_loss(batch)
    stage.loss = ReconstructionLoss(half_size_weight=0.5)
    network = stage.autoencoder
    noise = Draws(0, batch.indices).normal(Purpose.POSTERIOR, (4, 4, 4))
    latents = network.sample(network.encode(batch.images), noise)
    decoded = network.decode(F.interpolate(latents, scale_factor=0.5, mode="area"))
    small = F.interpolate(batch.images, scale_factor=0.5, mode="area")
    wanted = without + 0.5 * (decoded - small).square().mean()
    assert stage.mean_loss(batch).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_pictures_are_originals_and_reconstructions(make_stage: MakeStage, make_batch: MakeBatch) -> None:
    pictures = make_stage("autoencoder").pictures(make_batch(3))
    assert pictures.shape == (6, 3, 16, 16)
    assert torch.equal(pictures[:3], make_batch(3).images)
    assert pictures.abs().max() <= 1
