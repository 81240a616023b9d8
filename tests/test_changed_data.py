"""A run whose shards have changed is refused, saying what differs, and goes on where that is allowed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data.writer import write_shard
from scripts.faults.runs import WORDS, write_data

Command = Callable[..., int]


def test_changed_shards_are_described_and_only_used_where_that_is_meant(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = write_data(tmp_path / "shards", samples=48)
    words = (*WORDS, f"data.shards={shards}", "stages=[autoencoder]", "plan.autoencoder.images=64")
    assert command("train", *words) == 0
    capsys.readouterr()
    more = (*words, "plan.autoencoder.images=96")
    write_shard(shards / "00003.tar", [(f"new-{k}", {"jpg": jpeg(shards), "txt": b"new"}) for k in range(5)])
    assert command("train", *more) == 4
    said = capsys.readouterr().err
    checkpoint = Path("runs/run/autoencoder/checkpoints/images-000000000064")
    assert said.startswith(
        f"train.py: {checkpoint} was made with other settings (the shards hold other samples; "
    )
    assert "+ 00003.tar (5 samples)" in said
    assert "if that is meant, data.allow_change=true goes on with them" in said
    assert said.endswith("use those again, or give this run another name=...\n")
    assert said.count("\n") == 1
    assert command("train", *more, "data.allow_change=true") == 0
    told = capsys.readouterr().out
    assert "goes on with them, as data.allow_change says" in told
    assert "+ 00003.tar (5 samples)" in told
    assert (checkpoint.parent / "images-000000000096").is_dir()


def jpeg(shards: Path) -> bytes:
    """Some picture of the shards."""
    from data.index import read_index

    index = read_index(shards / "00000.tar")
    offset, size, _ = index.extent(0, "jpg")
    return (shards / "00000.tar").read_bytes()[offset : offset + size]
