"""The loaders give the same batches whatever the workers, ranks and starting point."""

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import Batch
from data.datamodule import DataModule, Precompute, ShardData
from data.index import DataError
from data.shards import MissingCaption


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of what a pass over an index found lies in the working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption), ord(caption[-1])] for caption in captions])


def module(shards: Path, batch_size: int = 4, workers: int = 0, **options: object) -> DataModule:
    train, val = ShardData(str(shards), resolution=8, val_fraction=0.3, **options).open(seed=1)
    return DataModule(train, val, tokenize, batch_size, workers)


def digest(batch: Batch) -> tuple[list[int], list[str], str]:
    pixels = hashlib.sha256(batch.pixels.numpy().tobytes()).hexdigest()
    return batch.indices.tolist(), batch.keys, pixels


@pytest.fixture
def shards(make_shard) -> Path:
    make_shard("s/00000.tar", 12)
    return make_shard("s/00001.tar", 11, first=12).parent


def test_workers_change_nothing(shards: Path) -> None:
    runs = []
    for workers in (0, 2):
        loader = module(shards, workers=workers, random_crop=True, flip=True).train_loader(0, 40)
        assert len(loader) == 10
        runs.append([digest(batch) for batch in loader])
    assert runs[0] == runs[1]
    assert [i for batch in runs[0] for i in batch[0]] == list(range(40))


def test_resuming_anywhere_gives_the_rest(shards: Path) -> None:
    data = module(shards)
    whole = [digest(batch) for batch in data.train_loader(0, 48)]
    for consumed in (4, 20, 44):
        assert [digest(b) for b in data.train_loader(consumed, 48)] == whole[consumed // 4 :]


def test_ranks_share_the_global_batch(shards: Path) -> None:
    data = module(shards)
    whole = [digest(batch)[1] for batch in data.train_loader(0, 24)]
    for ranks in (2, 4):
        parts = [[digest(b)[1] for b in data.train_loader(0, 24, rank, ranks)] for rank in range(ranks)]
        assert [list(chain(*keys)) for keys in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match="multiple of the 3 ranks"):
        data.train_loader(0, 24, 0, 3)


def test_a_dataset_smaller_than_a_batch_wraps_and_warns(make_shard, caplog) -> None:
    data = module(make_shard(count=3), batch_size=8, workers=0)
    [batch] = data.train_loader(0, 8)
    assert len(batch) == 8
    assert "fewer than the global batch of 8" in caplog.text
    assert set(batch.keys) == {data.train[i].key for i in range(len(data.train))}


def test_validation_is_the_same_for_every_seed_and_every_crop(shards: Path) -> None:
    options = ShardData(str(shards), resolution=8, val_fraction=0.4, random_crop=True, flip=True)
    runs = []
    for seed in (0, 7):
        train, val = options.open(seed)
        loader = DataModule(train, val, tokenize, 4, 0).val_loader(1000)
        runs.append([digest(batch) for batch in loader])
        keys = [key for batch in runs[-1] for key in batch[1]]
        assert len(keys) == len(set(keys)) == len(val) > 4
        assert not set(keys) & {train[i].key for i in range(len(train))}
    assert runs[0] == runs[1]


def test_ranks_share_validation(shards: Path) -> None:
    data = module(shards)
    whole = [key for batch in data.val_loader(3) for key in batch.keys]
    parts = [key for rank in range(2) for batch in data.val_loader(3, rank, 2) for key in batch.keys]
    assert parts == whole
    assert len(whole) == 3


def test_nothing_held_out_is_an_empty_loader(make_shard) -> None:
    train, val = ShardData(str(make_shard()), resolution=8, val_fraction=0.0).open(0)
    loader = DataModule(train, val, tokenize, 4, 0).val_loader(10)
    assert (len(loader), list(loader)) == (0, [])


def test_loading_leaves_the_global_generator_alone(shards: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(module(shards).train_loader(0, 8))
    assert torch.equal(torch.rand(1), expected)


def test_a_workers_error_is_one_line(shards: Path) -> None:
    data = module(shards, workers=1)
    tar = shards / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:700] + bytes(tar.stat().st_size - 700))
    with pytest.raises(DataError) as caught:
        list(data.train_loader(0, 48))
    assert "\n" not in str(caught.value)
    assert "00001.tar key" in str(caught.value)
    assert "raise data.max_bad_fraction" in str(caught.value)


def test_options_reach_what_they_name(make_shard, tmp_path: Path) -> None:
    train, val = ShardData(
        str(make_shard(count=9)), 16, 0.3, True, True, (1, 2, 3), MissingCaption.UNCONDITIONAL, 0.5, 2
    ).open(4, tmp_path / "bad.jsonl")
    assert (train.crop.resolution, train.crop.random_crop, train.crop.flip) == (16, True, True)
    assert (val.crop.resolution, val.crop.random_crop, val.crop.flip) == (16, False, False)
    assert train.decoder.background == val.decoder.background == (1, 2, 3)
    assert train.missing_caption is MissingCaption.UNCONDITIONAL
    assert (train.max_bad_fraction, train.plan.orders[0].block_shards, train.seed) == (0.5, 2, 4)
    assert train.bad_samples == tmp_path / "bad.jsonl"
    assert DataModule(train, val, tokenize, 4, 0).fingerprint() == train.fingerprint()
    with pytest.raises(ValueError, match="workers=-1"):
        DataModule(train, val, tokenize, 4, -1)


@pytest.mark.parametrize(
    ("options", "samples", "images", "ahead"),
    [
        ({"resolution": 256}, 10_000, 20_000, True),
        ({"resolution": 256}, 10_000, 19_999, False),  # as much work as it spares
        ({"resolution": 256}, 1_000, 2_000, False),  # little is spared
        ({"resolution": 256}, 100, 10_000, True),
        ({"resolution": 256, "flip": True}, 10_000, 39_999, False),  # each is stored twice
        ({"resolution": 256, "flip": True}, 10_000, 40_000, True),
        ({"resolution": 256, "random_crop": True}, 10, 10**9, False),
        ({"resolution": 256, "buckets": 3}, 10, 10**9, False),
        ({"resolution": 256, "unique": True}, 10, 10**9, False),
        ({"resolution": 256, "where": "width >= 64"}, 10, 10**9, False),
        ({"resolution": 256, "captions": {"txt": 0.5, "json.x": 0.5}}, 10, 10**9, False),
        ({"resolution": 256, "precompute": Precompute.off}, 10, 10**9, False),
        ({"resolution": 256, "precomputed": "moments"}, 10, 10**9, False),
        ({"resolution": 8, "precompute": Precompute.on}, 10, 1, True),
    ],
)
def test_pictures_are_encoded_ahead_where_it_pays(
    options: dict[str, Any], samples: int, images: int, ahead: bool
) -> None:
    assert ShardData("shards", **options).encodes_ahead(samples, images) is ahead


@pytest.mark.parametrize(
    "options",
    [
        {"random_crop": True},
        {"unique": True},
        {"where": "width >= 64"},
        {"before": "before"},
        {"captions": {"json.x": 1.0}},
    ],
)
def test_what_cannot_be_stored_is_not_precomputed(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leave out random_crop"):
        ShardData("shards", precompute=Precompute.on, **options)
    with pytest.raises(ValueError, match="would make another"):
        ShardData("shards", precompute=Precompute.on, precomputed="moments")
