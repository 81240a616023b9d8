"""Reading precomputed shards: the right sample, whole and checked, or a refusal that says what to do."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.batch import Batch
from data.index import Index, IndexView
from data.moments import MomentsCollate, MomentsDataset, open_moments
from data.moments_reader import AROUND, Table
from data.npy import HEADER_BYTES, encode_npy, npy_header, parse_header
from data.order import GlobalBatchSampler, Order, Purpose, uniform
from data.precompute import LeftOut, Output, PictureReader, SourceShard, source_shards, variant_draws
from data.provenance import FILE, Preprocessing, Provenance, check_provenance, read_provenance
from data.shard_index import DataError
from data.shards import MissingCaption
from data.writer import write_shard

TEXT = {"weights": "w" * 64, "tokenizer": "t" * 64, "context_length": 6, "dim": 3, "mask_padding": True}
MADE = Provenance("a" * 64, {"name": "kl"}, Preprocessing(16), "float32", (4, 2, 2), None)
Make = Callable[..., Path]


def moments(number: int, variants: int = 1, dtype: str = "float32") -> np.ndarray:
    """Numbers that name their sample and variant: the first of each variant is number + variant / 10."""
    values = np.arange(variants * 16, dtype=np.float64).reshape(variants, 4, 2, 2) % 16 / 100
    return (values + number + np.arange(variants).reshape(-1, 1, 1, 1) / 10).astype(dtype)


def words(number: int) -> tuple[np.ndarray, np.ndarray]:
    length = 1 + number % 4
    return np.full((length, 3), number, np.float32), np.full(3, -number, np.float32)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(made, count, shards)`: precomputed shards, captioned "picture 7", text if `made` has it."""

    def build(made: Provenance = MADE, count: int = 6, shards: int = 2, uncaptioned: int = -1) -> Path:
        out = tmp_path / "out"
        sources = [f"{n:05d}.tar" for n in range(shards)]
        header = type("H", (), {"sha256": "s" * 64})
        plan = [SourceShard(name, header, None, n) for n, name in enumerate(sources)]  # type: ignore[arg-type]
        output = Output(out, made)
        output.prepare(plan, "dataset", "code")
        for n, shard in enumerate(plan):
            samples = []
            for i in range(n * count, (n + 1) * count):
                fields = {"moments.npy": encode_npy(moments(i, made.preprocessing.variants, made.dtype))}
                if i != uncaptioned:
                    fields["txt"] = f"picture {i}".encode()
                if made.text is not None and i != uncaptioned:
                    fields["text.npy"], fields["pooled.npy"] = (encode_npy(each) for each in words(i))
                samples.append((f"{i:05d}", fields))
            output.finish(shard, write_shard(out / shard.name, samples), [])
        return out

    return build


def dataset(folder: Path, **options: Any) -> MomentsDataset:
    view = IndexView(Index.open(str(folder)))
    return MomentsDataset(view, Order(view.counts, 3), read_provenance(folder), 3, **options)


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption), 1] for caption in captions])


def damage(shard: Path, find: bytes, at: int, change: bytes) -> None:
    data = bytearray(shard.read_bytes())
    place = data.index(find) + at
    assert data[place : place + len(change)] != change
    data[place : place + len(change)] = change
    shard.write_bytes(data)


# --- the arrays' form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(3,), (0, 768), (2, 8, 32, 32), (100_000, 99_999, 99_999)])
def test_numpy_reads_what_we_write_and_we_read_it(dtype: str, shape: tuple[int, ...]) -> None:
    header = npy_header(dtype, shape)
    assert len(header) == HEADER_BYTES
    assert parse_header(header) == (dtype, shape)
    if np.prod(shape) < 1e6:
        array = np.ones(shape, dtype)
        assert np.array_equal(np.load(io.BytesIO(encode_npy(array)), allow_pickle=False), array)


def test_other_arrays_are_refused() -> None:
    for array in (np.array([{}], object), np.ones((2, 2)).T.astype("f4", order="F"), np.ones(3, "i4")):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        with pytest.raises(ValueError, match="header is not that"):
            parse_header(buffer.getvalue()[:HEADER_BYTES])
    with pytest.raises(ValueError, match="header is not that"):
        parse_header(b"")


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_sample_is_its_own(make: Make, dtype: str) -> None:
    data = dataset(make(replace(MADE, dtype=dtype)))
    batch = MomentsCollate(tokenize)(data.__getitems__(list(range(24))))
    assert len(batch) == 24
    assert batch.moments is not None
    assert batch.moments.dtype == getattr(torch, dtype)
    assert batch.indices.tolist() == list(range(24))
    assert batch.captions == [f"picture {int(key)}" for key in batch.keys]
    assert batch.tokens.tolist() == [[len(caption), 1] for caption in batch.captions]
    for key, found in zip(batch.keys, batch.moments, strict=True):
        assert np.array_equal(found.numpy(), moments(int(key), 1, dtype)[0])
    assert sorted(batch.keys[:12]) == sorted(batch.keys[12:]) == [f"{i:05d}" for i in range(12)]
    assert batch.text is None
    assert batch.substituted == 0
    with pytest.raises(ValueError, match="has no images"):
        _ = batch.images


def test_the_order_is_that_of_pictures(make: Make) -> None:
    folder = make()
    train, val = open_moments(str(folder), seed=5, val_fraction=0.3)
    rows = train.__getitems__(list(range(len(train))))
    view = train.view
    places = [Order(view.counts, 5).order(i) for i in range(len(train))]
    assert rows.keys == [index.key(row) for index, row in (view.sample(s, p) for _, s, p in places)]
    held_out = {val[i].keys[0] for i in range(len(val))}
    assert held_out
    assert held_out.isdisjoint(rows.keys)
    assert len(held_out) + len(rows.keys) == 12


def test_a_batch_of_one_each_is_the_batch(make: Make) -> None:
    data, collate = dataset(make(replace(MADE, text=TEXT)), with_text=True), MomentsCollate(tokenize)
    whole, joined = collate(data.__getitems__([4, 9, 2])), collate([data[i] for i in (4, 9, 2)])
    assert whole.keys == joined.keys
    assert whole.moments is not None
    assert joined.moments is not None
    assert torch.equal(whole.moments, joined.moments)
    assert whole.text is not None
    assert joined.text is not None
    assert all(torch.equal(a, b) for a, b in zip(whole.text, joined.text, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_hands_batches_over(make: Make, workers: int) -> None:
    data = dataset(make())
    loader: Any = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=GlobalBatchSampler(4, 0, 20),
        num_workers=workers,
        collate_fn=MomentsCollate(tokenize),
        multiprocessing_context="forkserver" if workers else None,
        generator=torch.Generator().manual_seed(0),
    )
    batches: list[Batch] = list(loader)
    assert [batch.indices.tolist() for batch in batches] == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    for batch in batches:
        assert batch.moments is not None
        assert batch.moments.dtype == torch.float32
        assert [f"{int(m[0, 0, 0]):05d}" for m in batch.moments] == batch.keys


def test_text_is_padded_and_masked(make: Make) -> None:
    data = dataset(make(replace(MADE, text=TEXT)), with_text=True)
    batch = MomentsCollate(tokenize)(data.__getitems__([0, 1, 2, 3]))
    assert batch.text is not None
    assert batch.tokens.shape == (4, 0)
    tokens, mask, pooled = batch.text
    lengths = [1 + int(key) % 4 for key in batch.keys]
    assert tokens.shape == (4, max(lengths), 3)
    assert mask.sum(1).tolist() == lengths
    for i, key in enumerate(batch.keys):
        assert torch.equal(tokens[i], (mask[i][:, None] * float(int(key))).expand(-1, 3))
        assert pooled[i].tolist() == [-float(int(key))] * 3


def test_without_a_caption(make: Make) -> None:
    folder = make(replace(MADE, text=TEXT), uncaptioned=7)
    for with_text in (True, False):
        skipping = dataset(folder, with_text=with_text)
        rows = skipping.__getitems__(list(range(12)))
        assert "00007" not in rows.keys
        assert rows.substituted == 1
        keeping = dataset(folder, with_text=with_text, missing_caption=MissingCaption.UNCONDITIONAL)
        batch = MomentsCollate(tokenize)(keeping.__getitems__(list(range(12))))
        where = batch.keys.index("00007")
        assert batch.captions[where] == ""
        if with_text:
            assert batch.text is not None
            assert [i for i in range(12) if not batch.text[1][i].any()] == [where]


def test_the_variant_is_that_of_the_mirror_draw(make: Make) -> None:
    made = replace(MADE, preprocessing=Preprocessing(16, flip=True, variants=2))
    folder = make(made)
    rows = dataset(folder).__getitems__(list(range(24)))
    for index, key, found in zip(rows.indices, rows.keys, rows.moments, strict=True):
        mirrored = uniform(3, index, Purpose.FLIP) < 0.5
        assert found[0, 0, 0].item() == pytest.approx(int(key) + (0.0 if mirrored else 0.1), abs=1e-4)
    held_out = dataset(folder, held_out=True).__getitems__(list(range(12)))
    assert [round(float(m[0, 0, 0]) % 1, 3) for m in held_out.moments] == [0.1] * 12


@pytest.mark.parametrize("variants", [2, 4])
def test_variants_are_mirrored_by_half_and_cropped_apart(variants: int) -> None:
    options = Preprocessing(16, random_crop=True, flip=True, variants=variants, seed=1)
    draws = list(variant_draws(options, "a/key"))
    assert [mirror < 0.5 for _, _, mirror in draws] == [True] * (variants // 2) + [False] * (variants // 2)
    assert len({x for x, _, _ in draws} | {y for _, y, _ in draws}) == 2 * variants
    assert draws == list(variant_draws(options, "a/key"))
    assert draws != list(variant_draws(options, "another"))
    crops = [x for i in range(400) for x, _, _ in variant_draws(options, str(i))]
    assert np.mean(crops) == pytest.approx(0.5, abs=0.05)
    assert np.std(crops) == pytest.approx(12**-0.5, abs=0.03)


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [HEADER_BYTES + 3, 20, 60])  # a number, the type's name, the shape
def test_damage_is_substituted_and_named(make: Make, tmp_path: Path, at: int) -> None:
    folder = make()
    log = tmp_path / "bad.jsonl"
    damage(folder / "00001.tar", npy_header("float32", (1, 4, 2, 2)), at, b"\x07")
    data = dataset(folder, bad_samples=log, max_bad_fraction=0.1)
    rows = data.__getitems__(list(range(12)))
    assert "00006" not in rows.keys
    assert rows.substituted == 1
    assert [f"{int(m[0, 0, 0]):05d}" for m in rows.moments] == rows.keys
    again = [dataset(folder, max_bad_fraction=0.1)[i].keys[0] for i in range(12)]
    assert again == rows.keys
    data.__getitems__(list(range(12)))
    (entry,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (entry["key"], entry["field"]) == ("00006", "moments.npy")
    with pytest.raises(
        DataError, match=r"1 bad samples, 0 of 12 allowed.*00001\.tar key '00006' moments\.npy"
    ):
        dataset(folder, max_bad_fraction=0.0).__getitems__(list(range(12)))


def test_a_damaged_caption_is_named(make: Make, tmp_path: Path) -> None:
    folder, log = make(), tmp_path / "bad.jsonl"
    damage(folder / "00001.tar", b"picture 8", 3, b"x")
    rows = dataset(folder, bad_samples=log, max_bad_fraction=0.1).__getitems__(list(range(12)))
    assert "00008" not in rows.keys
    assert rows.captions == [f"picture {int(key)}" for key in rows.keys]
    (entry,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (entry["key"], entry["field"]) == ("00008", "txt")


@pytest.mark.parametrize("size", [AROUND - 1536, AROUND + 1])  # the caption just comes along, and does not
def test_a_caption_far_from_its_record_is_read_by_itself(tmp_path: Path, size: int) -> None:
    samples = []
    for i in range(3):
        fields = {"moments.npy": encode_npy(moments(i)), "note": b"x" * size, "txt": b"picture %d" % i}
        samples.append((f"{i:05d}", fields))
    index = write_shard(tmp_path / "00000.tar", samples)
    assert (Table(index, np.arange(3)).entries[:, 6] > 0).tolist() == [size < AROUND] * 3
    view = IndexView(Index.open(str(tmp_path)))
    rows = MomentsDataset(view, Order(view.counts, 3), MADE, 3).__getitems__([0, 1, 2])
    assert sorted(rows.keys) == ["00000", "00001", "00002"]
    assert rows.captions == [f"picture {int(key)}" for key in rows.keys]
    assert [int(m[0, 0, 0]) for m in rows.moments] == [int(key) for key in rows.keys]


def test_more_shards_than_a_process_holds(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.moments.MAX_TABLES", 1)
    data = dataset(make(count=2, shards=4))
    rows = data.__getitems__(list(range(8)))
    assert sorted(rows.keys) == [f"{i:05d}" for i in range(8)]
    assert [f"{int(m[0, 0, 0]):05d}" for m in rows.moments] == rows.keys
    assert len(data._tables) == 1


def test_a_cut_shard_stops_the_run(make: Make) -> None:
    data = dataset(make())
    shard = Path(str(data.view.index.headers[0].shard))
    data.view.index.shard(0)
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(DataError, match="the shard was cut while in use"):
        data.__getitems__(list(range(12)))


def test_a_failing_disk_is_tried_again_then_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(make())
    real, calls = data.reader._files.handle, []

    def failing(shard: str) -> int:
        calls.append(shard)
        if len(calls) in (1, 2):
            raise OSError(5, "Input/output error")
        return real(shard)

    monkeypatch.setattr("data.moments_reader.FIRST_WAIT", 0.0)
    monkeypatch.setattr(data.reader._files, "handle", failing)
    assert len(data.__getitems__([0]).keys) == 1
    assert len(calls) == 3  # the caption comes with the moments
    monkeypatch.setattr(data.reader._files, "handle", lambda shard: real("/nowhere"))
    with pytest.raises(DataError, match="read failed 4 times"):
        data.__getitems__([0])


def test_another_shape_or_type_in_a_shard_is_refused(make: Make) -> None:
    for other in ({"dtype": "float16"}, {"shape": (4, 4, 1)}, {"shape": (4, 2, 1)}):
        folder = make()
        document = json.loads((folder / FILE).read_text()) | other
        (folder / FILE).write_text(json.dumps(document))
        with pytest.raises(DataError, match=r"float32 \(1, 4, 2, 2\), but precomputed.json says .* again"):
            dataset(folder).__getitems__([0])
        (folder / FILE).unlink()
        for shard in folder.glob("*.tar"):
            shard.unlink()


# --- provenance ---------------------------------------------------------------------------------------------


def test_what_fits_is_accepted(make: Make) -> None:
    folder = make(replace(MADE, text=TEXT))
    options = {"random_crop": False, "flip": False, "background": [255, 255, 255]}
    assert check_provenance(folder, "a" * 64, 16, TEXT, options) == replace(MADE, text=TEXT)
    assert check_provenance(folder, "a" * 64, 16).dtype == "float32"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("b" * 64, 16, TEXT), "of autoencoder aaaaaaaaaaaa, this run's is bbbbbbbbbbbb; precompute again"),
        (("a" * 64, 32, TEXT), "of 16 pixels, this run has 32; set data.resolution=16"),
        (("a" * 64, 16, TEXT | {"weights": "x" * 64}), "weights wwwwwwwwwwww, this run's has xxxxxxxxxxxx"),
        (("a" * 64, 16, TEXT | {"tokenizer": "x" * 64}), "tokenizer tttttttttttt, this run's has xxxxxxxxxx"),
        (("a" * 64, 16, TEXT | {"context_length": 77}), "with context_length 6, this run's has 77"),
        (("a" * 64, 16, TEXT | {"mask_padding": False}), "with mask_padding True, this run's has False"),
        (("a" * 64, 16, TEXT, {"flip": True}), "made with data.flip=False, this run has True"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make: Make, asked: tuple[Any, ...], said: str) -> None:
    folder = make(replace(MADE, text=TEXT))
    with pytest.raises(DataError) as caught:
        check_provenance(folder, *asked)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_was_not_encoded_is_refused(make: Make) -> None:
    folder = make()
    with pytest.raises(DataError, match="holds no text embeddings; precompute again with --text"):
        check_provenance(folder, "a" * 64, 16, TEXT)
    with pytest.raises(DataError, match="no text embeddings"):
        dataset(folder, with_text=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "precomputed.json: missing"),
        ("{", "cannot be read"),
        ("[]", "damaged"),
        ('{"format": 2}', "of format 2, this program reads 1"),
        ('{"format": 1}', "damaged"),
    ],
)
def test_a_folder_without_provenance_is_refused(make: Make, content: str | None, said: str) -> None:
    folder = make()
    if content is None:
        (folder / FILE).unlink()
    else:
        (folder / FILE).write_text(content)
    with pytest.raises(DataError, match=said):
        check_provenance(folder, "a" * 64, 16)


def test_an_unfinished_folder_is_refused(make: Make) -> None:
    folder = make()
    (folder / "00001.tar.done.json").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards are done; run the same command again"):
        check_provenance(folder, "a" * 64, 16)


# --- the source ---------------------------------------------------------------------------------------------


def test_pictures_are_decoded_as_training_does(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    from data.shards import ShardDataset
    from data.transforms import Decoder, ResizeCrop

    make_shard("shards/00000.tar", 5)
    (shard,), _ = source_shards(str(tmp_path / "shards"))
    reader = PictureReader(Preprocessing(8, flip=True, variants=2))
    pictures = reader(shard.load(), range(5))
    view = IndexView(Index.open(str(tmp_path / "shards")))
    plain = ShardDataset(view, Order(view.counts, 0), Decoder(), ResizeCrop(8), 0)
    for sample in (plain[i] for i in range(5)):
        (picture,) = [p for p in pictures if not isinstance(p, LeftOut) and p.key == sample.key]
        assert np.array_equal(picture.pixels[1], sample.pixels.numpy())
        assert np.array_equal(picture.pixels[0], sample.pixels.numpy()[:, :, ::-1])
        assert picture.caption == sample.caption
        assert picture.copied["json"] == b'{"label": "x"}'


def test_both_sides_of_a_split_keep_their_folders(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    make_shard("set/train/00000.tar", 3)
    make_shard("set/val/00000.tar", 2, first=3)
    shards, _ = source_shards(str(tmp_path / "set"))
    assert [shard.name for shard in shards] == ["train/00000.tar", "val/00000.tar"]


def test_one_process_makes_a_shard(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    make_shard("set/00000.tar", 3)
    (shard,), _ = source_shards(str(tmp_path / "set"))
    one, other = Output(tmp_path / "out", MADE), Output(tmp_path / "out", MADE)
    one.prepare([shard], "d", "c")
    with one.claim(shard) as mine:
        assert mine
        with other.claim(shard) as theirs:
            assert not theirs
    with other.claim(shard) as theirs:  # the first ended without finishing
        assert theirs
        made = write_shard(tmp_path / "out" / shard.name, [("a", {"txt": b"x"})])
        other.finish(shard, made, [LeftOut("s", "k", "jpg", "why")])
    with one.claim(shard) as mine:
        assert not mine
    assert not list((tmp_path / "out").glob("*.tar.lock"))
    assert one.conclude([shard]) == (1, 1, 1)
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text())["key"] == "k"


def test_what_left_the_source_leaves_the_output(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    make_shard("set/00000.tar", 3)
    make_shard("set/00001.tar", 3, first=3)
    shards, _ = source_shards(str(tmp_path / "set"))
    output = Output(tmp_path / "out", MADE)
    output.prepare(shards, "d", "c")
    for shard in shards:
        output.finish(shard, write_shard(tmp_path / "out" / shard.name, [("a", {"txt": b"x"})]), [])
    output.prepare(shards[:1], "d", "c")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar*")) == [
        "00000.tar", "00000.tar.done.json", "00000.tar.idx",
    ]  # fmt: skip
    changed = replace(shards[0], header=replace(shards[0].header, sha256="0" * 64))
    assert not output.is_done(changed)


def test_the_checksum_covers_the_record(make: Make) -> None:
    data = dataset(make())
    place = data.view.sample(0, 0)
    index, row = place
    headers, records = (
        np.empty((1, HEADER_BYTES), np.uint8),
        np.empty((1, data.reader.record_bytes), np.uint8),
    )
    assert data.reader.read([Table(index, np.array([row])).place(0)], [0], headers, records) == {}
    extent = index.extent(row, "moments.npy")
    assert extent is not None
    assert google_crc32c.value(headers.tobytes() + records.tobytes()) == extent.crc32c
    arrays = dict(index.arrays, crc32c=index.arrays["crc32c"] ^ 1)
    changed = Table(replace(index, arrays=arrays), np.array([row])).place(0)
    faults = data.reader.read([changed], [0], headers, records)
    assert "crc32c is not" in str(faults[0])
