"""Damaged checkpoints: each is found, refused by name, passed over and left where it is."""

import errno
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import checkpoint as module
from models.checkpoint import MANIFEST, Checkpoint, CheckpointError, newest, save_checkpoint
from models.loading import load_weights

pytestmark = pytest.mark.usefixtures("quick_disk")


def damaged(folder: Path, kit: Any) -> None:
    """Asserts that the folder is refused, and that an older one is chosen."""
    with pytest.raises(CheckpointError, match=folder.name):
        Checkpoint(folder)
    kit.assert_whole(newest(folder.parent), 1)


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "ema.safetensors", "config.json", "state.json", MANIFEST]
)
def test_a_flipped_bit_is_found(tmp_path: Path, name: str, kit: Any) -> None:
    folder = kit.save(tmp_path, 2)
    path = folder / name
    for bit in random.Random(0).sample(range(8 * path.stat().st_size), 100):
        kit.flip(path, bit)
        with pytest.raises(CheckpointError, match=folder.name):
            Checkpoint(folder)
        kit.flip(path, bit)
    kit.assert_whole(Checkpoint(folder), 2)


def test_a_damaged_newest_gives_way_to_the_one_before_and_is_not_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kit: Any
) -> None:
    kit.save(tmp_path, 1)
    folder = kit.save(tmp_path, 2)
    kit.flip(folder / "weights.safetensors", 1000)
    kit.assert_whole(newest(tmp_path), 1)
    assert "weights.safetensors is damaged" in caplog.text
    assert folder.is_dir()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [truncate, append, empty, Path.unlink, replace_by_folder])
@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
def test_cut_missing_and_misplaced_files_are_found(
    tmp_path: Path, harm: Callable[[Path], None], name: str, kit: Any
) -> None:
    kit.save(tmp_path, 1)
    folder = kit.save(tmp_path, 2)
    harm(folder / name)
    damaged(folder, kit)


@pytest.mark.parametrize("harm", [truncate, empty, Path.unlink, replace_by_folder])
def test_a_harmed_manifest_is_found(tmp_path: Path, harm: Callable[[Path], None], kit: Any) -> None:
    kit.save(tmp_path, 1)
    folder = kit.save(tmp_path, 2)
    for _ in range(3):  # the end of the file is "}\n}\n"
        harm(folder / MANIFEST)
        if harm is not truncate:
            break
    damaged(folder, kit)


LISTED = {"size": 4, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        [],
        "text",
        None,
        {"format": 1},
        {"format": 1, "files": {}},
        {"format": 1, "files": [1]},
        {"format": 1, "files": {"weights.safetensors": 3}},
        {"format": 1, "files": {"weights.safetensors": {"size": 4}}},
        {"format": 1, "files": {"weights.safetensors": {"size": float("inf"), "sha256": ""}}},
        {"format": 1, "files": {"x" * 10_000: LISTED}},
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, manifest: Any, kit: Any) -> None:
    kit.save(tmp_path, 1)
    folder = kit.save(tmp_path, 2)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    damaged(folder, kit)


def test_a_manifest_nested_without_end_is_refused(tmp_path: Path, kit: Any) -> None:
    kit.save(tmp_path, 1)
    folder = kit.save(tmp_path, 2)
    (folder / MANIFEST).write_text("[" * 200_000)
    damaged(folder, kit)


@pytest.mark.parametrize(
    "name",
    ["../secret", "..", ".", "", "sub/secret", "/etc/hostname", "..\\secret", "secret\0", "sub/../secret"],
)
def test_a_manifest_cannot_name_what_is_outside(tmp_path: Path, name: str, kit: Any) -> None:
    kit.save(tmp_path, 1)
    folder = kit.save(tmp_path, 2)
    (folder / "sub").mkdir()
    for path in (tmp_path / "secret", folder / "sub" / "secret", folder / "secret"):
        path.write_text("abcd")
    manifest = json.loads((folder / MANIFEST).read_text())
    sha256 = "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"  # of "abcd"
    manifest["files"][name] = {"size": 4, "sha256": sha256}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        Checkpoint(folder)
    kit.assert_whole(newest(tmp_path), 1)


def test_a_checkpoint_of_a_later_format_says_so(tmp_path: Path, kit: Any) -> None:
    folder = kit.save(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError, match="is of format 2, but this version reads 1"):
        Checkpoint(folder)


def test_a_disk_that_fails_while_reading_counts_as_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any
) -> None:
    kit.save(tmp_path, 1)
    folder = kit.save(tmp_path, 2)
    real = module._sha256

    def fail(path: Path) -> str:
        if path == folder / "weights.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(module, "_sha256", fail)
    damaged(folder, kit)


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def relist(folder: Path) -> None:
    """A manifest that is right for what lies in the folder, as whoever plants something would write it."""
    names = sorted(p.name for p in folder.iterdir() if p.name != MANIFEST)
    files = {n: {"size": (folder / n).stat().st_size, "sha256": module._sha256(folder / n)} for n in names}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", MANIFEST])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, kit: Any, name: str) -> None:
    folder, marker = kit.save(tmp_path, 2), tmp_path / "marker"
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    if name == MANIFEST:
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            Checkpoint(folder)
    else:
        relist(folder)
        found = Checkpoint(folder)
        with pytest.raises(CheckpointError, match=rf"{name}: (is no safetensors file|can no longer be read)"):
            found.tensors("weights") if name.startswith("weights") else found.document("state")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # the payload works


def test_a_file_as_torch_writes_it_is_refused_though_torch_would_read_it(tmp_path: Path, kit: Any) -> None:
    folder = kit.save(tmp_path, 1)
    torch.save({"a.weight": torch.zeros(3)}, folder / "weights.safetensors")
    relist(folder)
    with pytest.raises(CheckpointError, match=r"is no safetensors file .* nothing else is read"):
        Checkpoint(folder).tensors("weights")


def test_a_checkpoint_of_another_network_says_what_differs(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, {"weights": nn.Linear(2, 3).state_dict()}, {})
    with pytest.raises(CheckpointError, match=r"another shape .*\(3, 2\) in the checkpoint, \(4, 2\)"):
        load_weights(nn.Linear(2, 4), Checkpoint(folder).tensors("weights"), str(folder))


@pytest.mark.parametrize("written", ["weights", "ema", "config", "state"])
def test_a_disk_that_does_not_give_back_what_it_was_given_is_noticed_by_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any, written: str
) -> None:
    kit.save(tmp_path, 1)
    real = module.fsync

    def lying(path: Path) -> None:
        real(path)
        if path.stem == written and path.is_file():
            kit.flip(path, 8 * path.stat().st_size - 20)

    with monkeypatch.context() as patch:
        patch.setattr(module, "fsync", lying)
        with pytest.raises(OSError, match=rf"images-000000000002: {written}.* does not read back as it was"):
            kit.save(tmp_path, 2)
    assert kit.listing(tmp_path) == ["images-000000000001"]
    kit.assert_whole(newest(tmp_path), 1)


@pytest.mark.parametrize(
    ("old", "new"), [(b'"F32"', b'"I32"'), (b"[2,3]", b"[3,2]"), (b'"name"', b'"nome"'), (b"{", b"[")]
)
def test_a_header_that_reads_back_otherwise_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes
) -> None:
    real = module.save_file

    def save_file(tensors: Any, path: Path) -> None:
        real(tensors, path)
        path.write_bytes(path.read_bytes().replace(old, new))

    monkeypatch.setattr(module, "save_file", save_file)
    with pytest.raises(OSError, match=r"weights\.safetensors does not read back as it was written"):
        save_checkpoint(tmp_path, 1, {"weights": {"name": torch.zeros(2, 3)}}, {})
    assert not list(tmp_path.iterdir())
