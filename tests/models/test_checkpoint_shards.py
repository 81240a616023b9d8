"""Tensors in shards: rows are shared out as FSDP does it, and come back from any number of files."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.checkpoint import (
    Checkpoint,
    CheckpointError,
    publish,
    save_checkpoint,
    stage_folder,
    staging_of,
    write_tensors,
)
from models.checkpoint_shards import LAYOUT, layout, shard_file, shard_rows

TENSORS = {
    "long": torch.arange(30.0).view(10, 3),
    "short": torch.tensor([1.0, -2.0]),
    "counter": torch.tensor(7.0),
    "kernel": torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)),
}


def save(parent: Path, shards: int, tensors: dict[str, Tensor] = TENSORS) -> Path:
    """A checkpoint as `shards` ranks write it."""
    target = parent / "images-000000000008"
    staging = staging_of(target)
    stage_folder(staging)
    for shard in range(shards):
        part = {
            key: tensor[slice(*shard_rows(len(tensor), shards)[shard : shard + 2])]
            for key, tensor in tensors.items()
            if tensor.ndim
        }
        if shard == 0:
            part |= {key: tensor for key, tensor in tensors.items() if not tensor.ndim}
        write_tensors(staging / shard_file("weights", shard, shards), part)
    shapes = {"weights": {key: tuple(tensor.shape) for key, tensor in tensors.items()}}
    publish(staging, target, {LAYOUT: layout(shapes, {"weights": {"counter"}}, shards), "state": {}})
    return target


@pytest.mark.parametrize(("length", "shards"), [(10, 4), (2, 4), (7, 2), (1, 3), (0, 2), (8, 8), (5, 4)])
def test_rows_are_shared_out_as_torch_does(length: int, shards: int) -> None:
    edges = shard_rows(length, shards)
    chunks = [len(chunk) for chunk in torch.arange(length).chunk(shards)] if length else []
    mine = [stop - start for start, stop in pairwise(edges)]
    assert mine == chunks + [0] * (shards - len(chunks))


@pytest.mark.parametrize("shards", [2, 3, 4, 6])
def test_whole_tensors_and_any_rows_come_back(tmp_path: Path, shards: int) -> None:
    checkpoint = Checkpoint(save(tmp_path, shards))
    assert checkpoint.shards == shards
    tensors = checkpoint.tensors("weights")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    stored = checkpoint.stored("weights")
    assert stored.shapes["kernel"] == (5, 2, 3, 3)
    for start in range(11):
        for stop in range(start, 11):
            rows = stored.rows("long", start, stop)
            assert torch.equal(rows, TENSORS["long"][start:stop]), (start, stop)
            assert rows.shape == (stop - start, 3)


def test_rows_of_an_ordinary_checkpoint_are_read_alike(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_checkpoint(tmp_path, 8, {"weights": TENSORS}, {}))
    assert checkpoint.shards == 1
    stored = checkpoint.stored("weights")
    assert torch.equal(stored.rows("long", 3, 7), TENSORS["long"][3:7])
    assert torch.equal(stored.whole("counter"), TENSORS["counter"])


def test_a_shard_that_is_damaged_or_missing_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    second = folder / shard_file("weights", 1, 2)
    whole = second.read_bytes()
    second.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"weights-00001-of-00002\.safetensors is damaged"):
        Checkpoint(folder)
    second.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint(folder)


def test_what_the_layout_does_not_describe_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"holds no ema-00000-of-00002\.safetensors"):
        checkpoint.tensors("ema")
    path = checkpoint.folder / "layout.json"
    content = json.loads(path.read_text())
    del content["tensors"]["weights"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"layout\.json does not describe weights"):
        checkpoint.tensors("weights")


def test_checkpoints_of_as_many_shards_compare_by_their_digest(tmp_path: Path) -> None:
    one, same = (Checkpoint(save(tmp_path / name, 2)) for name in ("one", "same"))
    other = Checkpoint(save(tmp_path / "other", 2, TENSORS | {"short": torch.tensor([1.0, -2.5])}))
    digests = [each.digest(["weights"]) for each in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
