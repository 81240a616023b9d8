"""The diffusion stage: its loss is a function of samples, not of batches, and it learns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from data.batch import Batch
from models.conditioning import Conditioning

MakeStage = Callable[..., Any]
MakeBatch = Callable[..., Batch]


@pytest.fixture
def stage(make_stage: MakeStage) -> Any:
    stage = make_stage("diffusion")
    for parameter in stage.networks.parameters():  # an untrained backbone predicts 0 whatever it is told
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return stage


def losses(stage: Any, batch: Batch, dropout: float = 0.1) -> torch.Tensor:
    return stage._loss(stage.text_encoder, stage.backbone, batch, 0, dropout)


def test_the_loss_does_not_depend_on_how_a_batch_is_split(stage: Any, make_batch: MakeBatch) -> None:
    whole = losses(stage, make_batch(8), 0.5)
    parts = torch.cat([losses(stage, make_batch(3), 0.5), losses(stage, make_batch(5, 3), 0.5)])
    assert whole.shape == (8,)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    assert stage.training_step(make_batch(8), 0).item() == pytest.approx(
        losses(stage, make_batch(8)).mean().item()
    )


def test_dropout_puts_the_empty_caption(stage: Any, make_batch: MakeBatch, monkeypatch: Any) -> None:
    batch, seen = make_batch(8, 1), []

    def backbone(x: torch.Tensor, c_noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        seen.append(conditioning)
        return torch.zeros_like(x)

    for dropout in (0.0, 0.5, 1.0):
        stage._loss(stage.text_encoder, backbone, batch, 0, dropout)
    none, half, all_of_them = seen
    null = stage.text_encoder.encode([""])
    told = stage.text_encoder(batch.tokens)
    torch.testing.assert_close(none.tokens, told.tokens, rtol=1e-4, atol=1e-5)
    for i in range(8):
        torch.testing.assert_close(all_of_them.pooled[i], null.pooled[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(all_of_them.mask[i], null.mask[0])
    dropped = [torch.equal(half.pooled[i], all_of_them.pooled[i]) for i in range(8)]
    kept = [torch.equal(half.pooled[i], none.pooled[i]) for i in range(8)]
    assert any(dropped)
    assert any(kept)
    assert all(d or k for d, k in zip(dropped, kept, strict=True))


def test_dropout_is_checked(make_stage: MakeStage) -> None:
    with pytest.raises(ValueError, match=r"conditioning_dropout is 1.0"):
        make_stage("diffusion", dropout=1.0)


def test_validation_never_changes(stage: Any, make_batch: MakeBatch) -> None:
    first = stage.validate([make_batch(4, 50), make_batch(2, 54)])["loss"]
    assert first.shape == (6,)
    stage.images_seen = 400
    torch.manual_seed(1)
    assert torch.equal(stage.validate([make_batch(4, 50), make_batch(2, 54)])["loss"], first)
    torch.testing.assert_close(stage.validate([make_batch(6, 50)])["loss"], first, rtol=1e-4, atol=1e-6)
    torch.nn.init.ones_(stage.ema.network["backbone"].conv_out.weight)
    assert not torch.equal(stage.validate([make_batch(4, 50)])["loss"], first[:4])


def test_the_autoencoder_stays_as_it_is(stage: Any, make_batch: MakeBatch) -> None:
    assert not any("autoencoder" in name for name, _ in stage.named_parameters())
    before = {k: v.clone() for k, v in stage._autoencoder[0].state_dict().items()}
    stage.training_step(make_batch(4), 0).backward()
    assert all(torch.equal(before[k], v) for k, v in stage._autoencoder[0].state_dict().items())
    assert all(p.grad is None for p in stage._autoencoder[0].parameters())
    assert any(p.grad is not None and p.grad.any() for p in stage.text_encoder.parameters())


def test_it_learns_one_batch(make_stage: MakeStage, make_batch: MakeBatch) -> None:
    stage, batch = make_stage("diffusion", dropout=0.0), make_batch(8)
    moments = stage._autoencoder[0].encode(batch.images)
    stage._autoencoder[0].set_normalisation(moments[:, :4].mean((0, 2, 3)), moments[:, :4].std((0, 2, 3)) + 1)
    optimizer = stage.configure_optimizers()
    history = []
    for _ in range(40):
        loss = stage.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_its_pictures_are_the_pipelines(stage: Any) -> None:
    pipeline = stage.pipeline(16)
    assert pipeline.denoiser.backbone is stage.ema.network["backbone"]
    assert pipeline.resolution == 16
