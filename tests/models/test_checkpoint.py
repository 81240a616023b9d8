"""Checkpoints under damage, kills, full disks and repeated steps: what is chosen is always whole."""

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from models import checkpoint as module
from models.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    fingerprint,
    load_single_file,
    newest,
    save_checkpoint,
    save_single_file,
)


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here survives a power cut that a test could make, so fsync need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def content(images: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """Small tensors and documents that tell which checkpoint they belong to."""
    tensors = {
        "weights": {"a.weight": torch.full((2, 3), float(images)), "a.step": torch.tensor(images)},
        "ema": {"a.weight": torch.full((2, 3), images + 0.5, dtype=torch.bfloat16)},
    }
    return tensors, {"config": {"backbone": {"name": "unet"}}, "state": {"images_seen": images}}


def save(parent: Path, images: int) -> Path:
    return save_checkpoint(parent, images, *content(images))


def assert_whole(checkpoint: Checkpoint | None, images: int) -> None:
    assert checkpoint is not None
    assert checkpoint.images == images
    tensors, documents = content(images)
    for name, wanted in tensors.items():
        found = checkpoint.tensors(name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], wanted[k]) and found[k].dtype == wanted[k].dtype for k in wanted)
    assert {name: checkpoint.document(name) for name in documents} == documents


def verified(parent: Path) -> list[str]:
    """Names of the folders that verify."""
    names = []
    for folder in sorted(parent.glob("images-*")):
        try:
            Checkpoint(folder)
        except CheckpointError:
            continue
        names.append(folder.name)
    return names


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# --- saving and finding -----------------------------------------------------------------------------------


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = save(tmp_path / "new" / "checkpoints", 96_000)
    assert folder.name == "images-000000096000"
    assert_whole(Checkpoint(folder), 96_000)
    assert_whole(newest(folder.parent), 96_000)
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


def test_the_highest_number_wins_over_the_latest_change_and_over_the_alphabet(tmp_path: Path) -> None:
    save(tmp_path, 10**12 - 1)
    save(tmp_path, 10**12)  # thirteen digits, which sort before the twelve nines
    os.utime(tmp_path / f"images-{10**12 - 1}", (2e9, 2e9))
    os.utime(tmp_path / f"images-{10**12}", (1e9, 1e9))
    assert_whole(newest(tmp_path), 10**12)
    save(tmp_path, 900)
    assert_whole(newest(tmp_path), 10**12)
    assert len(verified(tmp_path)) == 3  # a save removes nothing that lies above it


def test_a_folder_is_on_the_disk_before_it_is_renamed_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(module, "_fsync", lambda path: order.append(path.name))

    def renamed(path: Path, target: Path) -> Path:
        order.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    folder = save(tmp_path, 1)
    assert set(order[:4]) == {p.name for p in folder.iterdir()} - {MANIFEST}
    assert order[4] == MANIFEST
    assert order[5].endswith(".part")
    assert order[6:] == ["renamed", tmp_path.name]


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    others = ["images-9x", "images-", "images-99-", "pictures", "images-9-x", "other.part"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "images-000000000099").write_text("a file")
    for images in (1, 2, 3):
        save(tmp_path, images)
    assert_whole(newest(tmp_path), 3)
    assert all((tmp_path / name).is_dir() for name in others)


def test_the_same_step_saved_again_is_chosen_and_does_not_touch_the_first(tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    tensors, documents = content(5)
    second = save_checkpoint(tmp_path, 5, tensors, {**documents, "state": {"images_seen": 5, "again": True}})
    assert second != first
    assert before == {p.name: p.read_bytes() for p in first.iterdir()}
    found = newest(tmp_path)
    assert found is not None
    assert (found.images, found.document("state")["again"]) == (5, True)
    third = save(tmp_path, 5)
    assert verified(tmp_path) == [second.name, third.name]
    assert_whole(newest(tmp_path), 5)
    last = [save(tmp_path, 5) for _ in range(10)][-1]
    assert last.name == "images-000000000005-12"
    found = newest(tmp_path)
    assert found is not None
    assert found.folder == last


def test_an_unknown_name_says_what_is_missing(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path, 1))
    for read, name in ((checkpoint.tensors, "optimizer.safetensors"), (checkpoint.document, "plan.json")):
        with pytest.raises(CheckpointError, match=f"holds no {name}"):
            read(name.split(".")[0])


def test_a_folder_removed_while_it_is_read_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path, 1))
    shutil.rmtree(checkpoint.folder)
    with pytest.raises(CheckpointError, match="can no longer be read"):
        checkpoint.tensors("weights")
    with pytest.raises(CheckpointError, match="can no longer be read"):
        checkpoint.document("state")


def test_the_hash_stands_for_every_byte(tmp_path: Path) -> None:
    tensors, documents = content(1)
    hashes = {Checkpoint(save(tmp_path / "a", 1)).sha256, Checkpoint(save(tmp_path / "b", 1)).sha256}
    assert len(hashes) == 1
    tensors["ema"]["a.weight"][1, 2] += 1
    hashes.add(Checkpoint(save_checkpoint(tmp_path / "c", 1, tensors, documents)).sha256)
    documents["state"]["images_seen"] = 2
    hashes.add(Checkpoint(save_checkpoint(tmp_path / "d", 1, tensors, documents)).sha256)
    assert len(hashes) == 3


# --- how many are kept ------------------------------------------------------------------------------------


def test_two_are_kept(tmp_path: Path) -> None:
    for images in (100, 200, 300, 400):
        save(tmp_path, images)
    assert verified(tmp_path) == ["images-000000000300", "images-000000000400"]


def test_never_fewer_than_two_while_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    counts: list[int] = []

    def counted(real: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def call(path: Path) -> Any:
            counts.append(len(list(tmp_path.glob("images-*"))))
            return real(path)

        return call

    for name in ("_fsync", "_sha256"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    save(tmp_path, 3)
    assert len(counts) > 10
    assert min(counts) >= 2


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "ema.safetensors", 80)
    save(tmp_path, 3)
    assert verified(tmp_path) == ["images-000000000001", "images-000000000003"]
    save(tmp_path, 4)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["images-000000000003", "images-000000000004"]


def test_damaged_ones_above_never_cost_the_run_what_it_writes_after_going_on_from_below(
    tmp_path: Path,
) -> None:
    for images in (1000, 2000):
        save(tmp_path, images)
    flip(tmp_path / "images-000000002000" / "weights.safetensors", 900)
    shutil.copytree(tmp_path / "images-000000002000", tmp_path / "images-000000003000")
    assert_whole(newest(tmp_path), 1000)
    save(tmp_path, 1500)
    assert verified(tmp_path) == ["images-000000001000", "images-000000001500"]
    assert_whole(newest(tmp_path), 1500)
    save(tmp_path, 2000)
    assert_whole(newest(tmp_path), 2000)
    assert verified(tmp_path) == ["images-000000001500", "images-000000002000-1"]
    save(tmp_path, 3000)
    assert_whole(newest(tmp_path), 3000)


# --- damage -----------------------------------------------------------------------------------------------


def damaged(folder: Path) -> None:
    """Asserts that the folder is refused, and that an older one is chosen."""
    with pytest.raises(CheckpointError, match=folder.name):
        Checkpoint(folder)
    assert_whole(newest(folder.parent), 1)


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "ema.safetensors", "config.json", "state.json", MANIFEST]
)
def test_a_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 2)
    path = folder / name
    for bit in random.Random(0).sample(range(8 * path.stat().st_size), 150):
        flip(path, bit)
        with pytest.raises(CheckpointError, match=folder.name):
            Checkpoint(folder)
        flip(path, bit)
    assert_whole(Checkpoint(folder), 2)


def test_a_damaged_newest_gives_way_to_the_one_before_and_is_not_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    flip(folder / "weights.safetensors", 1000)
    assert_whole(newest(tmp_path), 1)
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
    tmp_path: Path, harm: Callable[[Path], None], name: str
) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    harm(folder / name)
    damaged(folder)


@pytest.mark.parametrize("harm", [truncate, empty, Path.unlink, replace_by_folder])
def test_a_harmed_manifest_is_found(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    for _ in range(3):  # the end of the file is "}\n}\n"
        harm(folder / MANIFEST)
        if harm is not truncate:
            break
    damaged(folder)


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
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, manifest: Any) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    damaged(folder)


def test_a_manifest_nested_without_end_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (folder / MANIFEST).write_text("[" * 200_000)
    damaged(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret", "..", ".", "", "sub/secret", "/etc/hostname", "..\\secret", "secret\0", "sub/../secret"],
)
def test_a_manifest_cannot_name_what_is_outside(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (folder / "sub").mkdir()
    for path in (tmp_path / "secret", folder / "sub" / "secret", folder / "secret"):
        path.write_text("abcd")
    manifest = json.loads((folder / MANIFEST).read_text())
    sha256 = "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"  # of "abcd"
    manifest["files"][name] = {"size": 4, "sha256": sha256}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        Checkpoint(folder)
    assert_whole(newest(tmp_path), 1)


def test_a_checkpoint_of_a_later_format_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError, match="is of format 2, but this version reads 1"):
        Checkpoint(folder)


def test_a_disk_that_fails_while_reading_counts_as_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    real = module._sha256

    def fail(path: Path) -> str:
        if path == folder / "weights.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(module, "_sha256", fail)
    damaged(folder)


# --- kills and full disks ---------------------------------------------------------------------------------

#: Everything a save does to the disk.
POINTS = [
    *((module, name) for name in ("save_file", "_sha256")),
    *((os, name) for name in ("fsync", "mkdir", "open", "scandir", "rename", "unlink", "rmdir")),
    *((Path, name) for name in ("mkdir", "write_text", "rename", "iterdir", "glob", "stat")),
    (shutil, "rmtree"),
]


@contextmanager
def failing_at(k: int, error: BaseException, cleans_up: bool) -> Iterator[list[str]]:
    """The k-th call among `POINTS` raises `error`; a process that is killed does nothing more to the disk."""
    calls: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(calls) >= k and not cleans_up:
                raise error
            calls.append(name)
            if len(calls) == k:
                raise error
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in POINTS:
            patch.setattr(owner, name, wrap(name, getattr(owner, name)))
        yield calls


@pytest.mark.parametrize("earlier", [[], [1], [1, 2], [1, 2, 3]])
def test_a_kill_at_any_moment_leaves_whole_checkpoints_and_the_next_save_cleans_up(
    tmp_path: Path, earlier: list[int]
) -> None:
    places = set()
    for k in range(1, 1000):
        parent = tmp_path / str(k)
        for images in earlier:
            save(parent, images)
        before = verified(parent)
        with failing_at(k, Killed(), cleans_up=False) as calls:
            try:
                save(parent, 4)
                finished = True
            except Killed:
                finished = False
        if finished and len(calls) < k:
            break
        places.add(calls[-1])
        after = verified(parent)
        new = [name for name in after if name not in before]
        assert new in ([], ["images-000000000004"])
        assert len(after) >= len(before[-2:])  # the two newest stay until the new one is in place
        found = newest(parent)
        if after:
            assert_whole(found, 4 if new else earlier[-1])
        else:
            assert found is None
        save(parent, 5)
        assert_whole(newest(parent), 5)
        assert not list(parent.glob(".*"))
        assert len(list(parent.iterdir())) == min(len(after) + 1, 2)
        shutil.rmtree(parent)
    else:
        pytest.fail("the save never finished")
    assert {"save_file", "fsync", "rename", "write_text"} <= places
    assert k > 30


def test_a_full_disk_at_any_moment_leaves_nothing_half_behind(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    for k in range(1, 1000):
        parent = tmp_path / str(k)
        save(parent, 1)
        save(parent, 2)
        with failing_at(k, error, cleans_up=True) as calls, suppress(OSError):
            save(parent, 3)
        if len(calls) < k:
            break
        after = verified(parent)
        saved = "images-000000000003" in after
        assert "images-000000000002" in after
        assert len(after) >= 2
        assert_whole(newest(parent), 3 if saved else 2)
        shutil.rmtree(parent)
    else:
        pytest.fail("the save never finished")


def test_what_safetensors_says_of_a_full_disk_is_an_oserror_with_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        OSError, match=r"images-000000000002: weights.safetensors could not be written: .* space"
    ):
        save(tmp_path, 2)
    with pytest.raises(OSError, match=r"model.safetensors: could not be written: .* space"):
        save_single_file(tmp_path / "model.safetensors", {"a": torch.zeros(1)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["images-000000000001"]


def test_a_write_that_the_system_refuses_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        with pytest.raises(OSError, match="could not be written"):
            save_checkpoint(tmp_path, 2, {"weights": {"a": torch.zeros(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["images-000000000001"]
    assert_whole(newest(tmp_path), 1)


# --- one file, and fingerprints ---------------------------------------------------------------------------


def test_a_single_file_comes_back_with_its_metadata(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "model.safetensors"
    save_single_file(path, {"a": tied, "b": tied.T}, {"format": "x", "config": "{}"})
    tensors, metadata, sha256 = load_single_file(path)
    assert torch.equal(tensors["a"], tied)
    assert torch.equal(tensors["b"], tied.T)
    assert metadata == {"format": "x", "config": "{}"}
    assert len(sha256) == 64
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("harm", [truncate, empty, Path.unlink, replace_by_folder])
def test_a_harmed_single_file_is_refused(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(path, {"a": torch.zeros(3)}, {})
    harm(path)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_single_file(path)


def test_a_single_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(path, {"a": torch.zeros(3)}, {})
    before = path.read_bytes()
    for k in range(1, 100):
        error = OSError(errno.ENOSPC, "No space left on device")
        with failing_at(k, error, cleans_up=True) as calls, suppress(OSError):
            save_single_file(path, {"a": torch.ones(3)}, {})
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        found = load_single_file(path)[0]["a"]
        assert torch.equal(found, torch.zeros(3)) or torch.equal(found, torch.ones(3))
        if len(calls) < k:
            break
        path.write_bytes(before)
    assert k > 2


def test_the_fingerprint_changes_with_any_weight(rng: torch.Generator) -> None:
    tensors = {
        "a": torch.randn(2, 3, generator=rng),
        "b": torch.randn(4, generator=rng).to(torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "step": torch.tensor(7),
    }
    seen = {fingerprint(tensors)}
    changes = 0
    for name, tensor in tensors.items():
        for i in range(tensor.numel()):
            changed = tensor.clone()
            flat = changed.view(-1)
            flat[i] = ~flat[i] if tensor.dtype is torch.bool else flat[i] + 1
            seen.add(fingerprint({**tensors, name: changed}))
            changes += 1
    others = [
        {**tensors, "a": tensors["a"].reshape(3, 2)},
        {**tensors, "a": tensors["a"].view(torch.int32)},
        {**tensors, "c": torch.zeros(0)},
        {"A" if k == "a" else k: v for k, v in tensors.items()},
        {k: v for k, v in tensors.items() if k != "step"},
        {**tensors, "a": tensors["b"], "b": tensors["a"]},
    ]
    seen |= {fingerprint(other) for other in others}
    assert len(seen) == 1 + changes + len(others)


def test_the_fingerprint_depends_on_values_alone(rng: torch.Generator) -> None:
    images = torch.randn(2, 3, 4, 5, generator=rng)
    plain = {"a": images, "b": torch.ones(2)}
    assert fingerprint(plain) == fingerprint({"b": torch.ones(2), "a": images})
    assert fingerprint(plain) == fingerprint({**plain, "a": images.to(memory_format=torch.channels_last)})
    assert fingerprint(plain) == fingerprint({**plain, "a": images.clone().requires_grad_()})
