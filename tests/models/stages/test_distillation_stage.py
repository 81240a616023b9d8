"""The distillation stage: a loss of samples, only the student learns, and it is sampled as it was taught."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from data.batch import Batch
from models.checkpoint import CheckpointError
from models.registry import ConfigError, build
from models.sampling import Job, Sampling

MakeStage = Callable[..., Any]
MakeBatch = Callable[..., Batch]


@pytest.fixture
def stage(make_stage: MakeStage) -> Any:
    """A student of a teacher with weights of another kind than none."""
    stage = make_stage("distillation")
    for k, network in enumerate((stage.networks, stage._autoencoder[0], stage._teacher[0])):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(k))
    stage.ema.network.load_state_dict(stage.networks.state_dict())
    return stage


def losses(stage: Any, batch: Batch) -> torch.Tensor:
    found: torch.Tensor = stage._losses(stage.backbone, stage.decoder, batch, 0)[0]
    return found


def test_the_loss_does_not_depend_on_how_a_batch_is_split(stage: Any, make_batch: MakeBatch) -> None:
    whole = losses(stage, make_batch(8))
    parts = torch.cat([losses(stage, make_batch(3)), losses(stage, make_batch(5, 3))])
    assert whole.shape == (8,)
    assert whole.min() > 0
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def test_pictures_have_no_part_in_it(stage: Any, make_batch: MakeBatch) -> None:
    batch = make_batch(4)
    first = stage.mean_loss(batch)
    batch.pixels.zero_()
    assert torch.equal(stage.mean_loss(batch), first)


def test_only_student_and_decoder_learn(stage: Any, make_batch: MakeBatch) -> None:
    frozen = {"autoencoder": stage._autoencoder[0], "teacher": stage._teacher[0], "text": stage.text_encoder}
    before = {name: [p.clone() for p in network.parameters()] for name, network in frozen.items()}
    assert not any(name.startswith(("_autoencoder", "_teacher")) for name, _ in stage.named_parameters())
    optimizer = stage.configure_optimizers()
    stage.mean_loss(make_batch(4)).backward()
    optimizer.step()
    for name, network in frozen.items():
        assert all(p.grad is None for p in network.parameters()), name
        assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before[name], strict=True)), name
    for network in (stage.backbone, stage.decoder):
        assert any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_the_decoder_teaches_the_student_nothing(stage: Any, make_batch: MakeBatch) -> None:
    stage.mean_loss(make_batch(4)).backward()
    with_decoder = [p.grad.clone() for p in stage.backbone.parameters() if p.grad is not None]
    stage.networks.zero_grad(set_to_none=True)
    stage.decoder = None
    stage.mean_loss(make_batch(4)).backward()
    alone = [p.grad for p in stage.backbone.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(with_decoder, alone, strict=True))


def test_validation_never_changes(stage: Any, make_batch: MakeBatch) -> None:
    first = stage.validate([make_batch(4, 50), make_batch(2, 54)])
    assert {key: value.shape for key, value in first.items()} == {"loss": (6,), "decoder_psnr_db": (6,)}
    stage.images_seen = 400
    torch.manual_seed(1)
    again = stage.validate([make_batch(4, 50), make_batch(2, 54)])
    assert all(torch.equal(again[key], first[key]) for key in first)
    torch.nn.init.ones_(stage.ema.network["backbone"].conv_out.weight)
    assert not torch.equal(stage.validate([make_batch(4, 50)])["loss"], first["loss"][:4])


def test_it_learns_one_batch(stage: Any, make_batch: MakeBatch) -> None:
    batch = make_batch(8)
    optimizer, history = stage.configure_optimizers(), []
    for _ in range(30):
        history.append(losses(stage, batch).mean().item())
        optimizer.zero_grad()
        stage.mean_loss(batch).backward()
        optimizer.step()
    assert history[-1] < 0.7 * history[0]


def test_its_pictures_are_those_of_a_student(stage: Any) -> None:
    pipeline = stage.pipeline(16)
    assert pipeline.student.guidance_scale == 3.0
    assert pipeline.student.times.tolist() == [1.0, 0.5, 0.0]
    assert pipeline._decoder() is stage.ema.network["decoder"]
    how = Sampling(1.0, 2, build("sampler", {"name": "euler"}), build("grid", {"name": "uniform"}), 0)
    small = pipeline.generate([Job("a dawn", 0)], how)
    assert small.shape == (1, 3, 16, 16)
    pipeline.decode_fully()
    assert not torch.equal(pipeline.generate([Job("a dawn", 0)], how), small)
    with pytest.raises(ConfigError, match="a student of 2 steps"):
        pipeline.check(
            [Job("a dawn", 0)], Sampling(1.0, 3, how.sampler, build("grid", {"name": "uniform"}), 0)
        )


def test_a_teacher_of_another_shape_is_refused(stage: Any, make_stage: MakeStage) -> None:
    tensors = {f"backbone.{k}": v for k, v in stage._teacher[0].state_dict().items()}
    tensors.pop("backbone.conv_in.weight")
    with pytest.raises(CheckpointError, match="another shape"):
        make_stage("distillation").load_teacher(tensors, "test")
