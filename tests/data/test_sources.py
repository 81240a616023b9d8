"""Mixed sources, caption fields, shapes and remote shards, through the options a run gives."""

import functools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import Batch
from data.datamodule import DataModule, ShardData, changes
from data.index import DataError, build_index, write_index
from data.writer import write_shard

SIZES = [(24, 16), (16, 24), (20, 20), (30, 16)]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def make_source(tmp_path: Path, make_image) -> Callable[..., str]:
    """Writes a folder of shards of pictures of several shapes: make_source(name, shards, count)."""

    def make(name: str, shards: int, count: int) -> str:
        (tmp_path / name).mkdir()
        for shard in range(shards):
            samples = [
                (
                    f"{name}-{shard}-{i}",
                    {
                        "jpg": make_image(i, SIZES[i % 4]),
                        "txt": f"text {i}".encode(),
                        "alt": f"other {i}".encode(),
                        "json": json.dumps({"long": f"long {i}", "n": i}).encode(),
                    },
                )
                for i in range(count)
            ]
            write_shard(tmp_path / name / f"{shard:05d}.tar", samples)
        return str(tmp_path / name)

    return make


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption), 7] for caption in captions])


def module(data: ShardData, batch_size: int = 4, workers: int = 0, seed: int = 1) -> DataModule:
    train, val = data.open(seed, divisor=4)
    return DataModule(train, val, tokenize, batch_size, workers)


def told(batch: Batch) -> tuple[Any, ...]:
    return tuple(batch.keys), tuple(batch.captions), batch.pixels.shape[1:], int(batch.pixels.long().sum())


def options(make_source, **more: Any) -> ShardData:
    sources = {make_source("a", 2, 12): 3.0, make_source("b", 3, 8): 1.0}
    return ShardData(
        sources=sources, resolution=16, val_fraction=0.2, random_crop=True, flip=True, block_shards=1,
        captions={"txt": 1.0, "alt": 1.0, "json.long": 2.0}, **more,
    )  # fmt: skip


@pytest.mark.parametrize("buckets", [1, 3])
def test_one_order_whatever_ranks_workers_and_starts(make_source, buckets: int) -> None:
    data = options(make_source, buckets=buckets)
    whole = [told(batch) for batch in module(data).train_loader(0, 80)]
    assert len({shape for _, _, shape, _ in whole}) == buckets
    keys = [key for names, *_ in whole for key in names]
    assert sum(key.startswith("a") for key in keys) == pytest.approx(60, abs=2 + 2 * buckets)
    assert {caption.split()[0] for _, captions, *_ in whole for caption in captions} == {
        "text", "other", "long",
    }  # fmt: skip
    for workers in (3,) if buckets > 1 else ():
        assert [told(batch) for batch in module(data, workers=workers).train_loader(0, 80)] == whole
    for start in (4, 36, 76):
        assert [told(batch) for batch in module(data).train_loader(start, 80)] == whole[start // 4 :]
    for ranks in (2, 4):
        loaders = [module(data).train_loader(0, 80, rank, ranks) for rank in range(ranks)]
        for step, parts in enumerate(zip(*loaders, strict=True)):
            assert tuple(chain(*(part.keys for part in parts))) == whole[step][0]
            assert {part.pixels.shape[1:] for part in parts} == {whole[step][2]}


def test_one_shard_feeds_more_workers_and_ranks(make_source) -> None:
    data = ShardData(make_source("a", 1, 5), resolution=8, val_fraction=0.0)
    loaders = [module(data, workers=3 * rank).train_loader(0, 20, rank, 2) for rank in (0, 1)]
    parts = [[batch.keys for batch in loader] for loader in loaders]
    assert sorted(chain(*chain(*parts))) == sorted(f"a-0-{i}" for i in range(5) for _ in range(4))


def test_held_out_samples_are_those_of_every_source(make_source) -> None:
    data = module(options(make_source, buckets=3))
    batches = list(data.val_loader(100))
    keys = [key for batch in batches for key in batch.keys]
    assert {key[0] for key in keys} == {"a", "b"}
    assert len(set(keys)) == len(keys) == len(data.val)
    assert {batch.pixels.shape[2:] for batch in batches} == {(16, 16)}
    trained = {key for batch in data.train_loader(0, 400) for key in batch.keys}
    assert len(trained) == 48 - len(keys)
    assert not trained & set(keys)


def test_identity_follows_what_is_read(make_source) -> None:
    a, b = make_source("a", 2, 12), make_source("b", 3, 8)
    plain = ShardData(a, resolution=16)
    train = plain.open(0)[0]
    assert train.fingerprint() == train.views[0].fingerprint()
    kinds = [
        plain,
        ShardData(a, resolution=16, where="n >= 3"),
        ShardData(a, resolution=16, captions={"txt": 1.0, "alt": 1.0}),
        ShardData(a, resolution=16, buckets=3),
        ShardData(sources={a: 1.0, b: 1.0}, resolution=16),
        ShardData(sources={a: 1.0, b: 2.0}, resolution=16),
    ]
    trains = [kind.open(0, divisor=4)[0] for kind in kinds]
    assert len({train.fingerprint() for train in trains}) == len(kinds)
    described = [json.loads(json.dumps(train.describe())) for train in trains]
    assert changes(described[0], described[0]) == []
    for other, words in zip(
        described[1:], ("n >= 3", "captions were", "shapes were", "now 2", "now 2"), strict=True
    ):
        assert words in "; ".join(changes(described[0], other))
    assert any("weights were" in line for line in changes(described[4], described[5]))
    same = ShardData(sources={a: 5.0}, resolution=16).open(0)[0]
    assert (same.fingerprint(), same[17].key) == (train.fingerprint(), train[17].key)


def test_a_sample_without_the_json_it_does_not_need(make_source) -> None:
    train = ShardData(make_source("a", 1, 6), resolution=8, val_fraction=0.0).open(0)[0]
    assert train[0].record == {}
    train.records = True
    assert not train.captions.needs_json


def test_options_that_cannot_be(make_source) -> None:
    a = make_source("a", 1, 6)
    with pytest.raises(ValueError, match="shards and sources are both set"):
        ShardData(a, sources={a: 1.0})
    with pytest.raises(ValueError, match="buckets=2; it must be odd"):
        ShardData(a, buckets=2)
    with pytest.raises(ValueError, match="cache_gb=0"):
        ShardData(a, cache_gb=0.0)
    with pytest.raises(ValueError, match="captions="):
        ShardData(a, captions={})
    with pytest.raises(ValueError, match="txt is given 'x', which is no number"):
        ShardData(a, captions={"txt": "x"})
    with pytest.raises(DataError, match=r"captions name 'cap'.* there are alt, jpg, json, txt"):
        ShardData(a, captions={"cap": 1.0}).open(0)
    with pytest.raises(DataError, match=r"'json\.no'.* texts there: json\.long"):
        ShardData(a, captions={"json.no": 1.0}).open(0)
    many = make_source("many", 1, 60)
    with pytest.raises(ValueError, match="start=2 is no multiple of batch_size=4"):
        module(ShardData(many, resolution=16, buckets=3), 4).train_loader(2, 8)


def test_overlong_captions_are_counted(make_source) -> None:
    def words(captions: list[str]) -> torch.Tensor:
        return torch.tensor([[5, 5] if "1" in caption else [5, 7] for caption in captions])

    train, val = ShardData(make_source("a", 1, 10), resolution=8, val_fraction=0.0).open(0)
    data = DataModule(train, val, words, 10, 0, dropped=lambda texts: [int(text[-1]) % 2 for text in texts])
    [batch] = data.train_loader(0, 10)
    assert batch.truncated == 4  # of 3, 5, 7, 9; the row of 1 has padding
    assert next(iter(DataModule(train, val, words, 10, 0).train_loader(0, 10))).truncated == 0


def test_a_probe_is_of_one_shape_and_any_size(make_source) -> None:
    data = module(options(make_source, buckets=3))
    assert [len(data.probe(size)) for size in (1, 3, 9)] == [1, 3, 9]
    assert len(data.shapes) == 3


def test_sources_compose_on_the_command_line() -> None:
    # Not above, as loader workers import this file.
    from hydra import compose, initialize_config_dir

    from conf import schema
    from conf.schema import make, plain, register

    register()
    with initialize_config_dir(str(Path(schema.__file__).parent), version_base="1.3"):
        config = compose(
            "train", ["data.shards=null", "data.sources={a: 1, b/c: 2.5}", "data.captions={json.long: 1}"]
        )
    data = make("data", plain(config)["data"])
    assert data.sources == {"a": 1, "b/c": 2.5}
    assert data.captions == {"txt": 1.0, "json.long": 1}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server of `tmp_path`/remote on loopback: its address, and what it was asked for."""
    asked: list[str] = []
    (tmp_path / "remote").mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path / "remote"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join()


def test_remote_shards_give_the_same_batches(make_source, server, tmp_path: Path) -> None:
    a = make_source("a", 4, 8)
    local = ShardData(a, resolution=8, val_fraction=0.0, block_shards=1)
    whole = [told(batch) for batch in module(local).train_loader(0, 64)]
    shutil.copytree(a, tmp_path / "remote" / "s")
    for tar in (tmp_path / "remote" / "s").glob("*.tar"):
        write_index(build_index(tar))
    address, asked = server
    remote = ShardData(
        f"{address}/s/{{00000..00003}}.tar", resolution=8, val_fraction=0.0, block_shards=1, cache="c"
    )
    data = module(remote)
    assert [told(batch) for batch in data.train_loader(0, 64)] == whole
    assert sorted(path for path in asked if path.endswith(".tar")) == [f"/s/{i:05d}.tar" for i in range(4)]
    # A copy that the disk changed is had again, once.
    for copy in Path("c/shards").glob("*.tar"):
        changed = bytearray(copy.read_bytes())
        changed[600:] = bytes(len(changed) - 600)
        copy.write_bytes(changed)
    assert [told(batch) for batch in module(remote).train_loader(0, 64)] == whole
    assert sum(path.endswith(".tar") for path in asked) == 8
    small = ShardData(remote.shards, resolution=8, block_shards=2, cache="c", cache_gb=1e-5)
    with pytest.raises(ValueError, match=r"raise data.cache_gb to .* or lower data.block_shards"):
        small.open(0)
