"""What is said of a checkpoint that is not whole: which file, and what is wrong; and it is passed over."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import MANIFEST, Checkpoint, CheckpointError, newest

pytestmark = pytest.mark.usefixtures("quick_disk")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("ema.safetensors", Path.unlink, r"ema\.safetensors is missing, but the manifest lists it"),
        ("weights.safetensors", cut, r"weights\.safetensors has \d+ bytes, but the manifest says \d+"),
        ("state.json", empty, r"state\.json has 0 bytes, but the manifest says \d+"),
        ("weights.safetensors", flip, r"weights\.safetensors is damaged, its SHA-256 is not the manifest's"),
        (MANIFEST, Path.unlink, r"cannot be read \(.*manifest.*\); it was not finished, or the disk fails"),
        (MANIFEST, empty, r"manifest\.json is damaged \(JSONDecodeError: .*\)"),
        (MANIFEST, cut, r"manifest\.json is damaged \(JSONDecodeError: .*\)"),
    ],
)
def test_what_is_wrong_is_named_and_the_one_before_is_taken(
    tmp_path: Path, name: str, harm: Callable[[Path], None], said: str, kit: Any, caplog: Any
) -> None:
    kit.save(tmp_path, 1)
    folder = kit.save(tmp_path, 2)
    harm(folder / name)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert re.fullmatch(rf"{folder}: {said}", str(caught.value))
    kit.assert_whole(newest(tmp_path), 1)
    assert f"passing over a damaged checkpoint: {caught.value}" in caplog.text
    assert folder.is_dir()


def test_half_a_save_is_never_looked_at(tmp_path: Path, kit: Any, caplog: Any) -> None:
    kit.save(tmp_path, 1)
    staged = kit.save(tmp_path / "other", 2)
    staged.rename(tmp_path / ".images-000000000002.0a1b2c3d.part")
    kit.assert_whole(newest(tmp_path), 1)
    assert caplog.text == ""
