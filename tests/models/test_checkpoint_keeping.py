"""Which checkpoints stay, and the links and the file that people find them by."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import checkpoint as module
from models.checkpoint import (
    Best,
    Checkpoint,
    CheckpointError,
    Retention,
    best_of,
    mark_best,
    newest,
)

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_two_are_kept(tmp_path: Path, kit: Any) -> None:
    for images in (100, 200, 300, 400):
        kit.save(tmp_path, images)
    assert kit.verified(tmp_path) == ["images-000000000300", "images-000000000400"]


def test_never_fewer_than_two_while_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any
) -> None:
    kit.save(tmp_path, 1)
    kit.save(tmp_path, 2)
    counts: list[int] = []

    def counted(real: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def call(path: Path) -> Any:
            counts.append(len(list(tmp_path.glob("images-*"))))
            return real(path)

        return call

    for name in ("fsync", "_sha256"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    kit.save(tmp_path, 3)
    assert len(counts) > 10
    assert min(counts) >= 2


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path, kit: Any) -> None:
    kit.save(tmp_path, 1)
    kit.flip(kit.save(tmp_path, 2) / "ema.safetensors", 80)
    kit.save(tmp_path, 3)
    assert kit.verified(tmp_path) == ["images-000000000001", "images-000000000003"]
    kit.save(tmp_path, 4)
    assert kit.listing(tmp_path) == ["images-000000000003", "images-000000000004"]


def test_damaged_ones_above_never_cost_the_run_what_it_writes_after_going_on_from_below(
    tmp_path: Path, kit: Any
) -> None:
    for images in (1000, 2000):
        kit.save(tmp_path, images)
    kit.flip(tmp_path / "images-000000002000" / "weights.safetensors", 900)
    shutil.copytree(tmp_path / "images-000000002000", tmp_path / "images-000000003000")
    kit.assert_whole(newest(tmp_path), 1000)
    kit.save(tmp_path, 1500)
    assert kit.verified(tmp_path) == ["images-000000001000", "images-000000001500"]
    kit.assert_whole(newest(tmp_path), 1500)
    kit.save(tmp_path, 2000)
    kit.assert_whole(newest(tmp_path), 2000)
    assert kit.verified(tmp_path) == ["images-000000001500", "images-000000002000-1"]
    kit.save(tmp_path, 3000)
    kit.assert_whole(newest(tmp_path), 3000)


@pytest.mark.parametrize("values", [(1, 0), (0, 0), (-2, 0), (2, -1)])
def test_a_retention_that_would_leave_too_few_is_refused(values: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\w+ is -?\d, but must be [20] or more"):
        Retention(*values)


def test_more_than_two_can_be_kept_and_damaged_ones_do_not_count(tmp_path: Path, kit: Any) -> None:
    rule = Retention(last=4)
    for images in range(1, 8):
        kit.save(tmp_path, images, rule)
    assert kit.numbers(tmp_path) == [4, 5, 6, 7]
    kit.flip(tmp_path / "images-000000000006" / "ema.safetensors")
    kit.save(tmp_path, 8, rule)
    assert kit.numbers(tmp_path) == [4, 5, 7, 8]
    for images in (9, 10, 11):
        kit.save(tmp_path, images, rule)
    assert kit.numbers(tmp_path) == [8, 9, 10, 11]
    assert len(kit.listing(tmp_path)) == 4
    kit.save(tmp_path, 12)
    assert kit.numbers(tmp_path) == [11, 12]


def test_the_first_at_or_past_each_multiple_stays(tmp_path: Path, kit: Any) -> None:
    rule = Retention(every_images=100)
    for images in (0, 30, 60, 99, 130, 160, 199, 200, 230, 450, 460, 470, 480):
        kit.save(tmp_path, images, rule)
    assert kit.numbers(tmp_path) == [130, 200, 450, 470, 480]
    kit.save(tmp_path, 490)  # without the rule they are as good as any other
    assert kit.numbers(tmp_path) == [480, 490]


def test_a_damaged_milestone_gives_way_to_the_next_of_its_multiple(tmp_path: Path, kit: Any) -> None:
    rule = Retention(every_images=100)
    kit.flip(kit.save(tmp_path, 100, rule) / "weights.safetensors")
    for images in (120, 140, 160, 200, 220):
        kit.save(tmp_path, images, rule)
    assert kit.listing(tmp_path) == [f"images-{n:012d}" for n in (120, 200, 220)]


def test_the_best_stays_until_another_one_is(tmp_path: Path, kit: Any) -> None:
    kit.save(tmp_path, 1, Retention(), Best("loss", 0.5))
    for images in (2, 3, 4):
        kit.save(tmp_path, images)
    assert kit.numbers(tmp_path) == [1, 3, 4]
    assert best_of(tmp_path) == ("images-000000000001", "loss", 0.5)
    assert Checkpoint(tmp_path / "best").images == 1
    mark_best(tmp_path, tmp_path / "images-000000000003", "loss", 0.25)
    for images in (5, 6):
        kit.save(tmp_path, images)
    assert kit.numbers(tmp_path) == [3, 5, 6]
    kit.flip(tmp_path / "images-000000000003" / "weights.safetensors")
    kit.flip(tmp_path / "images-000000000006" / "weights.safetensors")
    kit.save(tmp_path, 7)
    assert kit.numbers(tmp_path) == [5, 7]
    kit.assert_whole(newest(tmp_path), 7)


def test_the_links_name_their_folder_and_are_read_through(tmp_path: Path, kit: Any) -> None:
    kit.save(tmp_path / "checkpoints", 1, Retention(), Best("loss", 0.5))
    kit.save(tmp_path / "checkpoints", 2)
    moved = tmp_path / "moved"
    (tmp_path / "checkpoints").rename(moved)
    assert os.readlink(moved / "last") == "images-000000000002"
    assert os.readlink(moved / "best") == "images-000000000001"
    assert json.loads((moved / "best.json").read_text()) == {
        "folder": "images-000000000001", "metric": "loss", "value": 0.5,
    }  # fmt: skip
    best = Checkpoint(moved / "best")
    mark_best(moved, "images-000000000002", "loss", 0.1)
    kit.assert_whole(best, 1)  # not what the link points to now
    kit.assert_whole(Checkpoint(moved / "best"), 2)
    kit.assert_whole(Checkpoint(moved / "last"), 2)


def test_links_are_never_trusted(tmp_path: Path, kit: Any) -> None:
    kit.save(tmp_path, 1)
    kit.save(tmp_path, 2)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    for target in ("images-000000000001", "nowhere", "last", str(outside), "..", "."):
        (tmp_path / "last").unlink()
        (tmp_path / "last").symlink_to(target)
        kit.assert_whole(newest(tmp_path), 2)
        if target != "images-000000000001":
            with pytest.raises(CheckpointError):
                Checkpoint(tmp_path / "last")
    (tmp_path / "best").symlink_to(outside)
    kit.save(tmp_path, 3)
    assert outside.is_dir()
    assert os.readlink(tmp_path / "last") == "images-000000000003"
    assert kit.numbers(tmp_path) == [2, 3]


def test_a_folder_where_a_link_should_be_is_left_alone(tmp_path: Path, kit: Any) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "mine").touch()
    kit.save(tmp_path, 1)
    assert (tmp_path / "last" / "mine").exists()
    kit.save(tmp_path, 2)
    kit.assert_whole(newest(tmp_path), 2)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), NotImplementedError()])
def test_a_file_system_without_links_has_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kit: Any,
    error: Exception,
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for images in (1, 2, 3, 4):
        kit.save(tmp_path, images, Retention(), Best("loss", 0.5) if images == 1 else None)
    assert kit.listing(tmp_path) == ["best.json", *(f"images-{n:012d}" for n in (1, 3, 4))]
    assert not (tmp_path / "last").exists()
    assert not caplog.records


GOOD = {"folder": "images-000000000001", "metric": "loss", "value": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "3", "[" * 200_000, "\xff",
        *(json.dumps({k: v for k, v in GOOD.items() if k != name}) for name in GOOD),
        json.dumps(GOOD | {"folder": "images-000000000009"}), json.dumps(GOOD | {"folder": 3}),
        json.dumps(GOOD | {"folder": "../images-000000000001"}), json.dumps(GOOD | {"folder": "."}),
        json.dumps(GOOD | {"value": "small"}), json.dumps(GOOD | {"value": None}),
        json.dumps(GOOD | {"value": float("nan")}), json.dumps(GOOD | {"value": float("inf")}),
        json.dumps(GOOD | {"value": 10**400}),
    ],
)  # fmt: skip
def test_a_damaged_best_is_none_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kit: Any, content: str
) -> None:
    kit.save(tmp_path, 1)
    assert best_of(tmp_path) is None
    assert not caplog.records
    (tmp_path / "best.json").write_text(content, encoding="latin-1")
    assert best_of(tmp_path) is None
    assert "best.json: names no best checkpoint" in caplog.text
    kit.save(tmp_path, 2)
    kit.save(tmp_path, 3, Retention(), Best("loss", 0.1))
    assert best_of(tmp_path) == ("images-000000000003", "loss", 0.1)
    assert kit.numbers(tmp_path) == [2, 3]


def test_a_best_whose_file_is_damaged_is_still_kept_by_its_link(tmp_path: Path, kit: Any) -> None:
    kit.save(tmp_path, 1, Retention(), Best("loss", 0.5))
    (tmp_path / "best.json").write_text("{")
    for images in (2, 3, 4):
        kit.save(tmp_path, images)
    assert kit.numbers(tmp_path) == [1, 3, 4]


def test_only_a_checkpoint_with_a_finite_figure_can_be_the_best(tmp_path: Path, kit: Any) -> None:
    kit.save(tmp_path, 1)
    for name in ("images-000000000002", "last", "..", ""):
        with pytest.raises(CheckpointError, match="is no checkpoint and cannot be the best"):
            mark_best(tmp_path, name, "loss", 0.5)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"loss is (nan|inf), which is no finite number"):
            mark_best(tmp_path, "images-000000000001", "loss", value)
        with pytest.raises(ValueError, match=r"loss is (nan|inf), which is no finite number"):
            Best("loss", value)
    assert kit.listing(tmp_path) == ["images-000000000001"]
