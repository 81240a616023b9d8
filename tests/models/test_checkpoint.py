"""Checkpoints saved and found again: what is chosen is the highest number, whole, and nothing else counts."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from models import checkpoint as module
from models.checkpoint import MANIFEST, Checkpoint, CheckpointError, newest, save_checkpoint
from models.checkpoint_writer import CheckpointWriter

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, kit: Any) -> None:
    folder = kit.save(tmp_path / "new" / "checkpoints", 96_000)
    assert folder.name == "images-000000096000"
    kit.assert_whole(Checkpoint(folder), 96_000)
    kit.assert_whole(newest(folder.parent), 96_000)
    names = {p.name for p in folder.iterdir()}
    assert names == {MANIFEST, "weights.safetensors", "ema.safetensors", "config.json", "state.json"}


def test_there_is_none_in_a_folder_that_is_missing_or_empty(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") is None
    assert newest(tmp_path) is None


def test_strided_and_shared_tensors_are_saved_by_value(tmp_path: Path) -> None:
    tied = torch.arange(12.0).reshape(3, 4)
    named = {
        "a": tied,
        "b": tied,
        "row": tied[1],
        "columns": tied.T,
        "last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3),
        "other": torch.empty(3, 0),
    }
    folder = save_checkpoint(tmp_path, 1, {"weights": named}, {})
    found = Checkpoint(folder).tensors("weights")
    assert found.keys() == named.keys()
    assert all(torch.equal(found[k], named[k]) for k in named)


def test_the_highest_number_wins_over_the_latest_change_and_over_the_alphabet(
    tmp_path: Path, kit: Any
) -> None:
    kit.save(tmp_path, 10**12 - 1)
    kit.save(tmp_path, 10**12)  # thirteen digits, which sort before the twelve nines
    os.utime(tmp_path / f"images-{10**12 - 1}", (2e9, 2e9))
    os.utime(tmp_path / f"images-{10**12}", (1e9, 1e9))
    kit.assert_whole(newest(tmp_path), 10**12)
    kit.save(tmp_path, 900)
    kit.assert_whole(newest(tmp_path), 10**12)
    assert len(kit.verified(tmp_path)) == 3  # a save removes nothing that lies above it


def test_a_folder_is_on_the_disk_before_it_is_renamed_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any
) -> None:
    order: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(module, "fsync", lambda path: order.append(path.name))

    def renamed(path: Path, target: Path) -> Path:
        order.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    folder = kit.save(tmp_path, 1)
    assert set(order[:4]) == {p.name for p in folder.iterdir()} - {MANIFEST}
    assert order[4] == MANIFEST
    assert order[5].endswith(".part")
    assert order[6:] == ["renamed", tmp_path.name]


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path: Path, kit: Any) -> None:
    others = ["images-9x", "images-", "images-99-", "pictures", "images-9-x", "other.part"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "images-000000000099").write_text("a file")
    for images in (1, 2, 3):
        kit.save(tmp_path, images)
    kit.assert_whole(newest(tmp_path), 3)
    assert all((tmp_path / name).is_dir() for name in others)


def test_the_same_step_saved_again_is_chosen_and_does_not_touch_the_first(tmp_path: Path, kit: Any) -> None:
    first = kit.save(tmp_path, 5)
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    tensors, documents = kit.content(5)
    second = save_checkpoint(tmp_path, 5, tensors, {**documents, "state": {"images_seen": 5, "again": True}})
    assert second != first
    assert before == {p.name: p.read_bytes() for p in first.iterdir()}
    found = newest(tmp_path)
    assert found is not None
    assert (found.images, found.document("state")["again"]) == (5, True)
    third = kit.save(tmp_path, 5)
    assert kit.verified(tmp_path) == [second.name, third.name]
    kit.assert_whole(newest(tmp_path), 5)
    last = [kit.save(tmp_path, 5) for _ in range(10)][-1]
    assert last.name == "images-000000000005-12"
    found = newest(tmp_path)
    assert found is not None
    assert found.folder == last


def test_an_unknown_name_says_what_is_missing(tmp_path: Path, kit: Any) -> None:
    checkpoint = Checkpoint(kit.save(tmp_path, 1))
    for read, name in ((checkpoint.tensors, "optimizer.safetensors"), (checkpoint.document, "plan.json")):
        with pytest.raises(CheckpointError, match=f"holds no {name}"):
            read(name.split(".")[0])


def test_a_folder_removed_while_it_is_read_is_an_error_of_the_checkpoint(tmp_path: Path, kit: Any) -> None:
    checkpoint = Checkpoint(kit.save(tmp_path, 1))
    shutil.rmtree(checkpoint.folder)
    with pytest.raises(CheckpointError, match="can no longer be read"):
        checkpoint.tensors("weights")
    with pytest.raises(CheckpointError, match="can no longer be read"):
        checkpoint.document("state")


def test_a_file_removed_between_two_looks_of_torch_is_an_error_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any
) -> None:
    def gone(*_: Any) -> None:
        raise RuntimeError("unable to open file <weights.safetensors> in read-only mode")

    checkpoint = Checkpoint(kit.save(tmp_path, 1))
    monkeypatch.setattr(module, "load_file", gone)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: can no longer be read"):
        checkpoint.tensors("weights")


def test_the_hash_stands_for_every_byte(tmp_path: Path, kit: Any) -> None:
    tensors, documents = kit.content(1)
    hashes = {Checkpoint(kit.save(tmp_path / "a", 1)).sha256, Checkpoint(kit.save(tmp_path / "b", 1)).sha256}
    assert len(hashes) == 1
    tensors["ema"]["a.weight"][1, 2] += 1
    hashes.add(Checkpoint(save_checkpoint(tmp_path / "c", 1, tensors, documents)).sha256)
    documents["state"]["images_seen"] = 2
    hashes.add(Checkpoint(save_checkpoint(tmp_path / "d", 1, tensors, documents)).sha256)
    assert len(hashes) == 3


def test_bits_that_are_no_numbers_come_back_too(tmp_path: Path) -> None:
    named = {
        "nan": torch.tensor([0x7FC00001, 0x7F800001, -0x400000], dtype=torch.int32).view(torch.float32),
        "zeros": torch.tensor([0.0, -0.0], dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "eight": torch.arange(5, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "none": torch.empty(0, dtype=torch.bfloat16),
        "one": torch.tensor(3, dtype=torch.int64),
    }
    found = Checkpoint(save_checkpoint(tmp_path, 1, {"weights": named}, {})).tensors("weights")
    for name, tensor in named.items():
        assert found[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8)), name


def test_the_digest_is_of_the_tensors_alone(tmp_path: Path, kit: Any) -> None:
    names = ("weights", "ema")
    first = Checkpoint(kit.save(tmp_path / "a", 1))
    tensors, documents = kit.content(1)
    documents["state"]["host"] = "another"
    same = Checkpoint(save_checkpoint(tmp_path / "b", 7, tensors, documents))
    assert same.sha256 != first.sha256
    assert same.digest(names) == first.digest(names)
    assert len(first.digest(names)) == 64
    assert len({first.digest(n) for n in (names, names[:1], names[1:], names[::-1])}) == 4
    tensors["ema"]["a.weight"][0, 0] += 1
    other = Checkpoint(save_checkpoint(tmp_path / "c", 1, tensors, documents))
    assert other.digest(names) != first.digest(names)
    assert other.digest(["weights"]) == first.digest(["weights"])
    with pytest.raises(CheckpointError, match=r"holds no optimizer\.safetensors"):
        first.digest()


def test_a_copy_by_another_name_is_read_but_does_not_tell_its_images(tmp_path: Path, kit: Any) -> None:
    copy = Checkpoint(shutil.copytree(kit.save(tmp_path, 3), tmp_path / "kept"))
    assert copy.document("state") == {"images_seen": 3}
    with pytest.raises(CheckpointError, match=r"kept: does not tell its images; name it images-<number>"):
        _ = copy.images


def test_a_temporary_folder_that_is_missing_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any
) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setattr(tempfile, "tempdir", None)
    kit.save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path)
    writer.save(2, *kit.content(2))
    writer.close()
    kit.assert_whole(newest(tmp_path), 2)


def test_what_another_process_removes_meanwhile_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kit: Any
) -> None:
    kit.save(tmp_path, 1)
    kit.save(tmp_path, 2)
    real, looked = module._compare, []

    def compare(path: Path, size: int, sha256: str) -> None:
        if not looked:
            looked.append(path)
            kit.save(tmp_path, 3)
            kit.save(tmp_path, 4)
        real(path, size, sha256)

    monkeypatch.setattr(module, "_compare", compare)
    kit.assert_whole(newest(tmp_path), 4)
    assert looked[0].parent.name == "images-000000000002"
    assert not caplog.records


def test_reading_while_another_process_saves_never_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kit: Any
) -> None:
    kit.save(tmp_path, 1)

    def save_many() -> None:
        for images in range(2, 202):
            kit.save(tmp_path, images)

    child, seen, gone = kit.start(save_many), [], 0
    while not os.waitpid(child, os.WNOHANG)[0]:
        found = newest(tmp_path)
        assert found is not None
        seen.append(found.images)
        try:
            kit.assert_whole(found, found.images)
        except CheckpointError:  # it may be removed between the two lines above
            assert not found.folder.exists()
            gone += 1
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    assert gone < len(seen) / 2
    kit.assert_whole(newest(tmp_path), 201)
    assert not caplog.records
