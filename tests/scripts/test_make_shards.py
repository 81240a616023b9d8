"""The command: shards that training reads, the same bytes for any workers, resumable, errors in one line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.datamodule import ShardData
from data.index import Index, IndexView, open_split, read_index
from scripts.make_shards import main, parse_bytes

PROJECT = Path(__file__).resolve().parents[2]


def picture(number: int, form: str = "JPEG", size: tuple[int, int] = (30, 20), mode: str = "RGB") -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve pictures with a table; every fourth is held out, one is damaged, one is a duplicate."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = []
    for i in range(12):
        (folder / f"{i:02d}.jpg").write_bytes(b"<html>" if i == 5 else picture(i))
        row = {
            "file_name": f"{i:02d}.jpg",
            "text": f"a photo of {i}",
            "licence": "CC0",
            "score": float("inf"),
        }
        split, original = "val" if i % 4 == 0 else "train", "03.jpg" if i == 7 else None
        rows.append({**row, "split": split, "dup_of": original})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def run(source: Path, out: Path, *options: str) -> int:
    return main([str(source), str(out), "--workers", "1", *options])


def fields(out: Path) -> dict[str, dict[str, bytes]]:
    """Every field of every sample, read through the index."""
    index, samples = Index.open(str(out)), {}
    for i in range(len(index)):
        number, row = index.locate(i)
        shard = index.shard(number)
        data = Path(shard.shard).read_bytes()
        extents = {name: shard.extent(row, name) for name in shard.fields}
        samples[shard.key(row)] = {n: data[e.offset : e.offset + e.size] for n, e in extents.items() if e}
    return samples


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_folder_becomes_shards_that_training_reads(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert run(source, out, "--shard-size", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"next: python train.py data.shards={out}"
    assert any("10 images (train 7, val 3) in 3 shards" in line for line in lines)
    train, val = open_split(str(out))
    assert (len(train), len(val)) == (7, 3)
    dataset = ShardData(str(out), resolution=16).open(0)[0]
    assert {dataset[i].caption for i in range(7)} == {f"a photo of {i}" for i in (1, 2, 3, 6, 9, 10, 11)}
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [
        {"name": "07.jpg", "reason": "duplicate of 03.jpg"},
        {"name": "05.jpg", "reason": "jpg: not an image (text/html); JPEG, PNG and WebP are read"},
    ]


def test_bytes_are_stored_untouched_with_caption_and_record(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "out") == 0
    sample = fields(tmp_path / "out" / "val")["04"]
    assert sample["jpg"] == (source / "04.jpg").read_bytes()
    assert sample["txt"] == b"a photo of 4"
    assert json.loads(sample["json"]) == {
        "file_name": "04.jpg", "licence": "CC0", "score": None, "width": 30, "height": 20,
    }  # fmt: skip


@pytest.mark.slow
def test_workers_change_no_byte(source: Path, tmp_path: Path) -> None:
    for workers in ("1", "3"):
        assert main([str(source), str(tmp_path / workers), "--workers", workers, "--shard-size", "2"]) == 0
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


def test_running_again_keeps_whole_shards_and_remakes_others(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert run(source, out, "--shard-size", "4") == 0
    first = tree(out)
    stamps = {name: (out / name).stat().st_mtime_ns for name in first}
    damaged = out / "train" / "00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    (out / "val" / "00000.tar").unlink()
    capsys.readouterr()
    assert run(source, out, "--shard-size", "4") == 0
    printed = capsys.readouterr().out
    assert "[2/2]" in printed
    assert "1 kept from before" in printed
    assert tree(out) == first
    assert (out / "train" / "00000.tar").stat().st_mtime_ns == stamps["train/00000.tar"]


def test_an_interruption_is_taken_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(source, whole, "--shard-size", "2") == 0
    import scripts.make_shards as command

    real, calls = command.build_shard, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            real(*args)
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(command, "build_shard", interrupted)
    assert run(source, out, "--shard-size", "2") == 130
    monkeypatch.setattr(command, "build_shard", real)
    assert run(source, out, "--shard-size", "2") == 0
    assert tree(out) == tree(whole)


def test_a_changed_plan_remakes_and_removes_old_shards(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(source, out, "--shard-size", "2") == 0
    assert run(source, out, "--shard-size", "100", "--keep-duplicates") == 0
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.tar"))
    assert names == ["train/00000.tar", "val/00000.tar"]
    assert len(open_split(str(out))[0]) == 8
    (source / "01.jpg").write_bytes(picture(99))
    assert run(source, out, "--shard-size", "100", "--keep-duplicates") == 0
    assert fields(out / "train")["01"]["jpg"] == picture(99)


def test_shards_of_others_are_left_alone(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "00000.tar").write_bytes(b"mine")
    assert run(source, out) == 3
    assert "00000.tar: made by something else; choose another OUT" in capsys.readouterr().err
    assert (out / "00000.tar").read_bytes() == b"mine"


def test_shards_are_cut_by_bytes(source: Path, tmp_path: Path) -> None:
    size = (source / "01.jpg").stat().st_size
    assert run(source, tmp_path / "out", "--max-bytes", str(3 * size)) == 0
    index = Index.open(str(tmp_path / "out" / "train"))
    assert len(index.headers) >= 3
    assert all(sum(e.size for row in range(s.count) if (e := s.extent(row, "jpg"))) <= 3.2 * size
               for s in map(index.shard, range(len(index.headers))))  # fmt: skip


def test_resizing_encodes_again_and_keeps_transparency(tmp_path: Path) -> None:
    folder, out = tmp_path / "s", tmp_path / "out"
    folder.mkdir()
    for name, data in {
        "big.jpg": picture(1, size=(60, 40)), "small.png": picture(2, "PNG", (12, 12)),
        "clear.png": picture(3, "PNG", (40, 60), "RGBA"), "web.jpeg": picture(4, "WEBP", (60, 60)),
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(name)
    assert run(folder, out, "--resize", "16", "--quality", "80") == 0
    samples = fields(out)
    assert samples["small"]["png"] == picture(2, "PNG", (12, 12))
    for key, field, size, mode in (
        ("big", "jpg", (24, 16), "RGB"), ("clear", "png", (16, 24), "RGBA"), ("web", "jpg", (16, 16), "RGB"),
    ):  # fmt: skip
        image = Image.open(io.BytesIO(samples[key][field]))
        assert (image.size, image.mode) == (size, mode)
        record = json.loads(samples[key]["json"])
        assert (record["width"], record["height"]) == size
    shard = IndexView(Index.open(str(out))).index.shard(0)
    assert shard.image_size(0) == (24, 16)


def test_an_image_is_named_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.jpg").write_bytes(picture(1, "PNG"))
    (tmp_path / "s" / "a.txt").write_text("a")
    assert run(tmp_path / "s", tmp_path / "out") == 0
    assert list(fields(tmp_path / "out")["a"]) == ["json", "png", "txt"]


def test_a_caption_in_another_encoding_loses_one_picture(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for name, caption in (("a", b"\xe9t\xe9"), ("b", "été".encode()), ("c", b"\x01\x02")):
        (tmp_path / "s" / f"{name}.jpg").write_bytes(picture(1))
        (tmp_path / "s" / f"{name}.txt").write_bytes(caption)
    assert run(tmp_path / "s", tmp_path / "out") == 0
    assert {key: sample["txt"].decode() for key, sample in fields(tmp_path / "out").items()} == {"b": "été"}
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert "no UTF-8 at byte 0" in lines[0]
    assert "control characters" in lines[1]


def test_a_test_set_is_never_trained_on(source: Path, tmp_path: Path) -> None:
    rows = (source / "metadata.jsonl").read_text().replace('"val"', '"test"')
    (source / "metadata.jsonl").write_text(rows)
    assert run(source, tmp_path / "out") == 0
    assert set(fields(tmp_path / "out" / "test")) == {"00", "04", "08"}
    assert not {"00", "04", "08"} & set(fields(tmp_path / "out"))


def test_one_side_of_a_split_is_no_split(source: Path, tmp_path: Path) -> None:
    rows = (source / "metadata.jsonl").read_text().replace('"val"', '"train"')
    (source / "metadata.jsonl").write_text(rows)
    assert run(source, tmp_path / "out") == 0
    assert read_index(tmp_path / "out" / "00000.tar").count == 10


@pytest.mark.parametrize(
    ("change", "options", "code", "message"),
    [("", ("--captions", "none.csv"), 3, "none.csv: no such file, nor in"),
     ("", ("--caption-column", "txt"), 3, "did you mean --caption-column text?"), ("broken", (), 3,
     "metadata.jsonl line 1: bad JSON"), ("html", (), 3, "no picture could be packed"), ("", ("--quality",
     "101"), 2, "--quality"), ("", ("--shard-size", "0"), 2, "whole number above 0"), ("", ("--max-bytes",
     "many"), 2, "'many' is no size; write it as 300MB"), ("", ("--nonsense",), 2, "--nonsense")],
)  # fmt: skip
def test_errors_are_one_line(
    source: Path, tmp_path: Path, capsys, change: str, options: tuple[str, ...], code: int, message: str
) -> None:
    if change == "broken":
        (source / "metadata.jsonl").write_text("{")
    if change == "html":
        for path in source.glob("*.jpg"):
            path.write_bytes(b"<html>")
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            run(source, tmp_path / "out", *options)
    else:
        assert run(source, tmp_path / "out", *options) == code
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
    if code == 3:
        assert "\n" not in error


def test_a_missing_source_and_out_as_source(tmp_path: Path, source: Path, capsys) -> None:
    assert run(tmp_path / "absent", tmp_path / "out") == 3
    assert "absent: no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(source, source)


def test_a_terminal_gets_a_bar(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(source, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "images/s" in printed
    assert "[1/2]" not in printed


def test_sizes() -> None:
    assert [parse_bytes(t) for t in ("300MB", "2g", "4096", "1.5 K")] == [300_000_000, 2 * 10**9, 4096, 1500]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["scripts/make_shards.py"], ["-m", "scripts.make_shards"]])
def test_both_ways_to_call_it(command: list[str], source: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(source), str(tmp_path / "out"), "--workers", "2", "--shard-size", "4"],
        cwd=PROJECT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "next: python train.py" in done.stdout
