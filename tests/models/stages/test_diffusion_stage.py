"""The diffusion stage: its loss is a function of samples, not of batches, and it learns."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from data.batch import Batch
from models.conditioning import Conditioning
from models.diffusion.draws import Draws, Purpose
from models.portions import PortionedBackbone
from models.stages.dropout import check_dropout, without_picture, without_text

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
    assert stage.mean_loss(make_batch(8)).item() == pytest.approx(losses(stage, make_batch(8)).mean().item())


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
    stage.mean_loss(make_batch(4)).backward()
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
        loss = stage.mean_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_its_pictures_are_the_pipelines(stage: Any) -> None:
    pipeline = stage.pipeline(16)
    network = pipeline.denoiser.backbone  # called on portions on a CPU
    assert isinstance(network, PortionedBackbone)
    assert network.backbone is stage.ema.network["backbone"]
    assert pipeline.autocast == stage.compute.autocast
    assert pipeline.resolution == 16


@pytest.fixture
def editor(make_stage: MakeStage, tiny_config: dict[str, Any]) -> Any:
    return make_stage("diffusion", backbone=tiny_config["backbone"] | {"image_conditioning": True})


def paired(batch: Batch) -> Batch:
    return replace(batch, before=batch.pixels.flip(3))


def test_dropout_of_pairs_is_by_one_number(editor: Any, make_batch: MakeBatch) -> None:
    """Each of text, both and picture is left out for half of p; all else is told."""
    batch, seen = paired(make_batch(64)), []

    def backbone(x: torch.Tensor, c_noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        seen.append(conditioning)
        return torch.zeros_like(x)

    p = 0.4
    for dropout in (0.0, p):
        editor._loss(editor.text_encoder, backbone, batch, 0, dropout)
    whole, told = seen
    u = Draws(0, batch.indices).uniform(Purpose.CONDITIONING_DROPOUT)
    latents = editor._autoencoder[0].mode(editor._autoencoder[0].encode(batch.images_before))
    assert whole.image is not None
    assert told.image is not None
    torch.testing.assert_close(whole.image, latents)
    null = editor.text_encoder.encode([""]).pooled[0]
    for i in range(64):
        no_text, no_picture = u[i] < p, p / 2 <= u[i] < 1.5 * p
        assert torch.allclose(told.pooled[i], null if no_text else whole.pooled[i], atol=1e-5)
        assert torch.equal(told.image[i], whole.image[i] * (not no_picture))


def test_shares_of_dropout() -> None:
    u = torch.arange(100_000) / 100_000
    text, picture = without_text(u, 0.1), without_picture(u, 0.1)
    shares = [(text & ~picture), (text & picture), (~text & picture), ~(text | picture)]
    assert [each.float().mean().item() for each in shares] == pytest.approx(
        [0.05, 0.05, 0.05, 0.85], abs=1e-4
    )


def test_pairs_and_dropout_are_checked(editor: Any, make_stage: MakeStage, make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match=r"set data\.before"):
        losses(editor, make_batch(4))
    with pytest.raises(ValueError, match="at most 2/3"):
        check_dropout(0.7, editor.backbone)
    assert losses(editor, paired(make_batch(4))).shape == (4,)


def test_a_stage_without_pairs_never_looks_at_them(stage: Any, make_batch: MakeBatch) -> None:
    assert torch.equal(losses(stage, paired(make_batch(4))), losses(stage, make_batch(4)))
