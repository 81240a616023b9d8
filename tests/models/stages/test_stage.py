"""A stage's state through a checkpoint: every bit comes back, and another network's is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import Batch
from models.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from models.stages.compute import Compute
from models.stages.stage import (
    restore_compute,
    restore_networks,
    restore_optimizer,
    stage_state,
    stage_tensors,
)

MakeStage = Callable[..., Any]
MakeBatch = Callable[..., Batch]


def save_stage(
    stage: Any, optimizer: torch.optim.Optimizer, parent: Path, config: Any, fingerprints: Any
) -> Path:
    documents = {"config": config, "state": stage_state(stage, fingerprints)}
    return save_checkpoint(parent, stage.images_seen, stage_tensors(stage, optimizer), documents)


def steps(stage: Any, optimizer: torch.optim.Optimizer, make_batch: MakeBatch, count: int) -> None:
    """`count` steps as the callbacks make them: learning rate aside."""
    for _ in range(count):
        stage.mean_loss(make_batch(4, stage.images_seen)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stage.images_seen += 4
        stage.ema.update(stage.networks, stage.images_seen, 4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["autoencoder", "diffusion", "distillation"])
def test_going_on_changes_no_bit(
    name: str, channels_last: bool, make_stage: MakeStage, make_batch: MakeBatch, tmp_path: Path
) -> None:
    way = Compute(torch.device("cpu"), False, channels_last, False, "")
    first = make_stage(name)
    first.use(way)
    optimizer = first.configure_optimizers()
    steps(first, optimizer, make_batch, 2)
    checkpoint = Checkpoint(save_stage(first, optimizer, tmp_path, {"a": 1}, {"dataset": "d"}))
    steps(first, optimizer, make_batch, 2)

    second = make_stage(name, seed=5)
    if name == "distillation":
        taught = first._teacher[0].state_dict()
        second.load_teacher({f"backbone.{k}": v for k, v in taught.items()}, "test")
    if name != "autoencoder":
        frozen = {f"autoencoder.{k}": v for k, v in first._autoencoder[0].state_dict().items()}
        second.load_autoencoder(frozen, "test")
    second.use(way)
    restore_networks(second, checkpoint)
    assert second.images_seen == 8
    again = second.configure_optimizers()
    restore_optimizer(second, again, checkpoint)
    steps(second, again, make_batch, 2)
    for mine, other in ((first.networks, second.networks), (first.ema.network, second.ema.network)):
        theirs = other.state_dict()
        assert all(torch.equal(theirs[key], value) for key, value in mine.state_dict().items())


@pytest.mark.parametrize("name", ["autoencoder", "diffusion", "distillation"])
def test_it_may_be_compiled_once_it_is_there(
    name: str, make_stage: MakeStage, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every run on a GPU is, and long ones on a CPU where that is faster; and eager again."""
    compiled: list[Any] = []

    def compile(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        compiled.append(function)
        return lambda *given: function(*given)

    monkeypatch.setattr(torch, "compile", compile)
    stage = make_stage(name)
    parts = [child for child, _ in stage.named_children()]
    eager = stage.compute
    found = [stage.mean_loss(make_batch(4)).item()]
    for way in (replace(eager, compiled=True), eager):
        stage.use(way)
        found.append(stage.mean_loss(make_batch(4)).item())
    assert compiled
    assert found[0] == found[1] == found[2]
    assert [child for child, _ in stage.named_children()] == parts
    assert "_backbone" not in parts


def test_what_it_says_of_itself(make_stage: MakeStage, tmp_path: Path) -> None:
    stage = make_stage("autoencoder")
    stage.images_seen = 12
    optimizer = stage.configure_optimizers()
    checkpoint = Checkpoint(save_stage(stage, optimizer, tmp_path, {"a": [1]}, {"dataset": "d"}))
    state = checkpoint.document("state")
    assert (state["stage"], state["images_seen"], state["dataset"]) == ("autoencoder", 12, "d")
    assert state["versions"]["torch"] == torch.__version__
    assert checkpoint.document("config") == {"a": [1]}
    assert checkpoint.images == 12
    restored = restore_compute(checkpoint)
    assert restored is not None
    assert str(restored) == "cpu, float32, channels-first, eager (as before)"
    assert restore_compute(None) is None


def test_another_shape_is_refused(make_stage: MakeStage, tiny_config: dict[str, Any], tmp_path: Path) -> None:
    stage = make_stage("diffusion")
    checkpoint = Checkpoint(save_stage(stage, stage.configure_optimizers(), tmp_path, {}, {}))
    wider = make_stage("diffusion", backbone=tiny_config["backbone"] | {"channels": [8, 32]})
    before = {k: v.clone() for k, v in wider.networks.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"another shape than the configuration \(\d+ differences"):
        restore_networks(wider, checkpoint)
    assert all(torch.equal(before[k], v) for k, v in wider.networks.state_dict().items())
    with pytest.raises(CheckpointError, match="missing"):
        restore_networks(make_stage("autoencoder"), checkpoint)


def test_another_optimizer_state_is_refused(
    make_stage: MakeStage, make_batch: MakeBatch, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    stage = make_stage("autoencoder")
    optimizer = stage.configure_optimizers()
    steps(stage, optimizer, make_batch, 1)
    checkpoint = Checkpoint(save_stage(stage, optimizer, tmp_path, {}, {}))
    other = make_stage("autoencoder", autoencoder=tiny_config["autoencoder"] | {"channels": [8, 8, 16]})
    with pytest.raises(CheckpointError, match=r"optimizer state of .* is of another shape"):
        restore_optimizer(other, other.configure_optimizers(), checkpoint)
