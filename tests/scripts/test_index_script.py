"""`scripts/index.py`: what it writes, what it keeps, how it stops, and what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.catalogue import CATALOGUE
from data.duplicates import DUPLICATES
from data.index import Index, index_path, open_split
from data.writer import write_shard
from scripts.index import main
from tests.servers import faulty_server, served

PROJECT = Path(__file__).resolve().parents[2]
ONE = ("--workers", "1")


def picture(seed: int, **options: object) -> bytes:
    """A JPEG whose content depends on `seed`."""
    import io

    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def make(folder: Path, shards: int = 3, count: int = 4) -> list[Path]:
    """Writes shards of distinct pictures without their indexes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for n in range(shards):
        path = folder / f"{n:05d}.tar"
        samples = ((f"{n}-{i}", {"jpg": picture(100 * n + i), "txt": b"a picture"}) for i in range(count))
        write_shard(path, samples)
        index_path(path).unlink()
        paths.append(path)
    return paths


def report(folder: Path) -> dict[str, object]:
    return json.loads((folder / "report.json").read_text())


def test_a_folder_is_indexed_beside_its_shards_and_kept(tmp_path: Path, capsys) -> None:
    make(tmp_path / "s")
    assert main([str(tmp_path / "s"), "--workers", "2"]) == 0
    said = capsys.readouterr()
    assert "12 images in 3 shards" in said.out
    assert f"next: python train.py data.shards={tmp_path / 's'}\n" in said.out
    names = {path.name for path in (tmp_path / "s").iterdir()}
    tars = {f"{n:05d}.tar{end}" for n in range(3) for end in ("", ".idx")}
    assert names == tars | {CATALOGUE, DUPLICATES, "report.json", "report.html"}
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.tar.idx")}
    assert main([str(tmp_path / "s"), *ONE]) == 0
    assert "3 kept from before" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.tar.idx")}
    assert report(tmp_path / "s")["parts"][0]["fingerprint"] == Index.open(str(tmp_path / "s")).fingerprint()
    assert len(open_split(str(tmp_path / "s"), 0.0, unique=True)[0]) == 12


def test_damaged_shards_do_not_stop_the_others(tmp_path: Path, capsys) -> None:
    paths = make(tmp_path / "s", 4)
    paths[1].write_bytes(paths[1].read_bytes()[:-9000])
    paths[2].write_bytes(b"<html>")
    assert main([str(tmp_path / "s"), "--workers", "1"]) == 3
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == [str(path) for path in paths[1:3]]
    assert "2 damaged shards; no catalogue written" in lines[2]
    assert "next" not in said.out
    assert index_path(paths[3]).is_file()
    assert not (tmp_path / "s" / CATALOGUE).exists()
    assert "--leave-out-damaged" in (tmp_path / "s" / "report.html").read_text()
    assert main([str(tmp_path / "s"), *ONE, "--leave-out-damaged"]) == 3
    assert "2 kept from before" in capsys.readouterr().out
    assert Index.open(str(tmp_path / "s")).counts == (4, 4)


def test_duplicates_are_found_and_left_out(tmp_path: Path, capsys) -> None:
    make(tmp_path / "s", 2)
    near = picture(1, quality=40)
    samples = [("copy", {"jpg": picture(0)}), ("near", {"jpg": near}), ("other", {"jpg": picture(999)})]
    write_shard(tmp_path / "s" / "00002.tar", samples)
    assert main([str(tmp_path / "s"), *ONE]) == 0
    assert "1 pictures are duplicates" in capsys.readouterr().out
    assert main([str(tmp_path / "s"), *ONE, "--perceptual-hash"]) == 0
    said = capsys.readouterr().out
    assert "2 pictures are duplicates of others, 1 of them only nearly the same" in said
    assert "data.unique=true" in said
    found = report(tmp_path / "s")["parts"][0]["duplicates"]
    assert found["identical"]["examples"][0]["first"] == [
        {"shard": "00000.tar", "key": "0-0"}, {"shard": "00002.tar", "key": "copy"}
    ]  # fmt: skip
    train, _ = open_split(str(tmp_path / "s"), 0.0, unique=True)
    assert train.counts == (4, 4, 1)
    assert train.sample(2, 0)[1] == 2
    assert main([str(tmp_path / "s"), *ONE, "--perceptual-hash", "--near", "0"]) == 0
    assert "1 pictures are duplicates" in capsys.readouterr().out


def test_keys_in_two_shards_stop_the_catalogue(tmp_path: Path, capsys) -> None:
    paths = make(tmp_path / "s", 2)
    (tmp_path / "s" / "copy.tar").write_bytes(paths[0].read_bytes())
    assert main([str(tmp_path / "s"), *ONE]) == 3
    assert "4 keys occur in two shards, such as" in capsys.readouterr().out
    assert not (tmp_path / "s" / CATALOGUE).exists()


def test_split_folders_and_folders_elsewhere(tmp_path: Path, capsys) -> None:
    make(tmp_path / "s" / "train")
    (tmp_path / "s" / "val").mkdir()
    write_shard(tmp_path / "s" / "val" / "0.tar", [("held", {"jpg": picture(5000), "txt": b"x"})])
    assert main([str(tmp_path / "s"), str(tmp_path / "out"), *ONE]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "out" / "val").iterdir()) == [
        "00000-0.tar.idx", CATALOGUE, DUPLICATES
    ]  # fmt: skip
    assert not index_path(tmp_path / "s" / "train" / "00000.tar").exists()
    train, val = open_split(str(tmp_path / "out"))
    assert (len(train), len(val)) == (12, 1)
    assert train.index.headers[0].shard == str(tmp_path / "s" / "train" / "00000.tar")


def test_remote_shards_pass_through_the_cache(tmp_path: Path, capsys) -> None:
    paths = make(tmp_path / "s", 3)
    with faulty_server() as server:
        for path in paths:
            server.add(f"/p/{path.name}", path.read_bytes(), served())
        address = f"{server.address}/p/{{00000..00002}}.tar"
        words = [address, str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--workers", "1"]
        assert main(words) == 0
        assert "12 images in 3 shards" in capsys.readouterr().out
        assert not any((tmp_path / "cache" / "indexing").iterdir())
        asked = len(server.log)
        assert main(words) == 0
        index = Index.open(str(tmp_path / "out"))
        assert len(server.log) == asked
        assert index.fingerprint() == Index.open(str(tmp_path / "s")).fingerprint()
        assert index.headers[1].shard == f"{server.address}/p/00001.tar"


def test_errors_are_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for words, code, message in (
        ([str(tmp_path / "absent")], 3, "no such file or folder"),
        ([str(tmp_path / "empty")], 3, "the folder is empty"),
        (["pipe:touch X"], 3, "only local files"),
        ([str(tmp_path / "{0.tar"), "out"], 3, "its braces do not match"),
    ):
        assert main(words) == code
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for words in (
        ["https://example.org/{0..1}.tar"],
        [str(tmp_path / "*.tar")],
        ["x", "--near", "13"],
        ["x", "--workers", "0"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    capsys.readouterr()


def test_an_interrupt_leaves_what_is_done_and_the_next_run_goes_on(tmp_path: Path) -> None:
    make(tmp_path / "s", 60, 20)
    words = [sys.executable, "scripts/index.py", str(tmp_path / "s"), "--perceptual-hash", "--workers", "2"]
    process = subprocess.Popen(
        words, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not list((tmp_path / "s").glob("*.idx")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error.decode().splitlines() == ["interrupted; run the same command again to go on"]
    done = len(list((tmp_path / "s").glob("*.tar.idx")))
    assert 0 < done < 60
    finished = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True)
    assert "1,200 images in 60 shards" in finished.stdout
    assert "kept from before" in finished.stdout
