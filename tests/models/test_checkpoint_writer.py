"""Saves beside the training: what is written is what was there at the call, failures are counted and told."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import checkpoint as module
from models.checkpoint import Best, Checkpoint, Retention, best_of, newest
from models.checkpoint_writer import CheckpointWriter, Retry, SaveError, snapshot

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CheckpointWriter]:
    made = CheckpointWriter(tmp_path, retry_images=100, max_failures=3)
    yield made
    made.close()


class Gate:
    """Lets writes through when it is open, and counts how many wait or run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.writers: list[threading.Thread] = []
        real = module.save_file

        def save_file(*args: Any) -> None:
            self.writers.append(threading.current_thread())
            self.reached.set()
            assert self.open.wait(10)
            real(*args)

        monkeypatch.setattr(module, "save_file", save_file)


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def settle(writer: CheckpointWriter) -> None:
    """Waits for the save in flight without taking note of it."""
    assert writer._flying is not None
    writer._flying[1].exception(timeout=10)


# --- what is written ----------------------------------------------------------------------------------------


def test_training_goes_on_at_once_and_what_it_changes_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any, writer: CheckpointWriter
) -> None:
    gate = Gate(monkeypatch)
    tensors, documents = kit.content(7)
    assert writer.save(7, tensors, documents) is None
    assert gate.reached.wait(10)
    for named in tensors.values():
        for tensor in named.values():
            tensor.fill_(99)
    documents["state"]["images_seen"] = 99
    documents["config"]["backbone"]["name"] = "changed"
    tensors["weights"]["new"] = torch.zeros(1)
    writer.check()
    assert newest(tmp_path) is None
    gate.open.set()
    writer.close()
    kit.assert_whole(newest(tmp_path), 7)
    assert {each.name for each in gate.writers} == {"checkpoint_0"}


def test_no_thread_stays_behind_a_save(
    monkeypatch: pytest.MonkeyPatch, kit: Any, writer: CheckpointWriter
) -> None:
    """An idle one that has computed in parallel slows every later step of a training on several threads."""
    gate = Gate(monkeypatch)
    writer.save(1, *kit.content(1))
    assert gate.reached.wait(10)
    gate.open.set()
    settle(writer)
    gate.writers[0].join(10)
    assert not gate.writers[0].is_alive()


def test_without_a_thread_to_be_had_it_is_a_failed_save(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kit: Any,
    writer: CheckpointWriter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        assert writer.save(1, *kit.content(1)) is None
    assert "can't start new thread (failure 1 of 3 in a row); training goes on" in caplog.text
    assert writer.due(101)
    writer.save(101, *kit.content(101))
    writer.close()
    kit.assert_whole(newest(tmp_path), 101)


def test_one_is_in_flight_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any, writer: CheckpointWriter
) -> None:
    gate = Gate(monkeypatch)
    writer.save(1, *kit.content(1))
    assert gate.reached.wait(10)
    opener = threading.Timer(0.1, gate.open.set)
    opener.start()
    writer.save(2, *kit.content(2))  # waits, for the buffers are still being written
    assert gate.open.is_set()
    kit.assert_whole(Checkpoint(tmp_path / "images-000000000001"), 1)
    assert writer.save(3, *kit.content(3), wait=True) == tmp_path / "images-000000000003"
    assert kit.numbers(tmp_path) == [2, 3]
    kit.assert_whole(Checkpoint(tmp_path / "images-000000000002"), 2)
    assert gate.writers[-2:] == [threading.current_thread()] * 2  # in place
    opener.join()


def test_the_buffers_are_used_again_where_they_fit() -> None:
    rows = torch.arange(12.0).reshape(3, 4)
    first = snapshot({"weights": {"a": rows, "b": rows}, "ema": {"a": rows}}, {})
    second = snapshot(
        {"weights": {"a": rows + 1, "b": rows.T}, "ema": {"a": rows.bfloat16(), "c": rows}}, first
    )
    assert second["weights"]["a"] is first["weights"]["a"]
    assert first["weights"]["a"].equal(rows + 1)
    assert second["weights"]["b"].equal(rows.T)
    assert second["ema"]["a"].dtype == torch.bfloat16
    assert len({t.data_ptr() for named in second.values() for t in named.values()}) == 4
    assert "c" not in first["ema"]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_tensor_is_copied_in_any_mode(mode: Any) -> None:
    layer = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    odd = {
        "step": torch.tensor(3),
        "row": torch.arange(10.0)[::3],
        "turned": torch.zeros(2, 5).T,
        "none": torch.empty(0, 2),
        "flag": torch.tensor([True]),
        "spread": torch.ones(1).expand(4),
    }
    buffers: dict[str, Any] = {}
    for enter in (mode, torch.enable_grad, mode):
        with enter():
            tensors = {"weights": dict(layer.named_parameters()) | odd}
            buffers = snapshot(tensors, buffers)
            for name, tensor in tensors["weights"].items():
                copy = buffers["weights"][name]
                assert copy.equal(tensor)
                assert copy.is_contiguous()
                assert not copy.requires_grad
                assert not copy.is_inference()
                assert (
                    copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
                    or not copy.numel()
                )


def test_retention_and_the_best_are_passed_on(tmp_path: Path, kit: Any) -> None:
    writer = CheckpointWriter(tmp_path, Retention(last=3, every_images=5))
    for images in (1, 2, 5, 6, 7, 8, 9):
        writer.save(images, *kit.content(images), best=Best("loss", 0.5) if images == 2 else None)
    writer.close()
    assert kit.numbers(tmp_path) == [2, 5, 7, 8, 9]
    assert best_of(tmp_path) == ("images-000000000002", "loss", 0.5)


# --- failures -----------------------------------------------------------------------------------------------


def test_a_failure_is_a_warning_and_is_tried_again_later_and_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kit: Any
) -> None:
    writer = CheckpointWriter(tmp_path, retry_images=100)
    writer.save(1_000, *kit.content(1_000), wait=True)
    assert not writer.due(10**9)
    monkeypatch.setattr(module, "save_file", full)
    attempts, images = [], 2_000
    while len(attempts) < 4:
        if images == 2_000 or writer.due(images):
            attempts.append(images)
            writer.save(images, *kit.content(images))
            settle(writer)
        writer.check()
        images += 50
    assert attempts == [2_000, 2_100, 2_300, 2_700]
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 4  # one a failure
    assert "images-000000002700: could not be written: [Errno 28] No space left" in warnings[3]
    assert "MiB are free" in warnings[3]
    assert warnings[3].endswith("(failure 4 of 5 in a row); training goes on")
    assert kit.listing(tmp_path) == ["images-000000001000"]
    kit.assert_whole(newest(tmp_path), 1_000)
    monkeypatch.undo()
    assert not writer.due(3_499)
    assert writer.due(3_500)
    writer.save(3_500, *kit.content(3_500))
    settle(writer)
    assert not writer.due(10**9)
    assert writer.retry.failures == 0
    kit.assert_whole(newest(tmp_path), 3_500)
    writer.close()


def test_too_many_failures_in_a_row_are_an_error_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any, writer: CheckpointWriter
) -> None:
    monkeypatch.setattr(module, "save_file", full)
    for images in (1, 2, 3):
        writer.check()
        writer.save(images, *kit.content(images))
        settle(writer)
    for _ in range(2):
        with pytest.raises(SaveError, match=r"0003: could not .* No space .*\(failure 3 of 3 in a row\)$"):
            writer.check()
        with pytest.raises(SaveError, match="failure 3 of 3"):
            writer.save(4, *kit.content(4))
    monkeypatch.undo()
    writer.save(5, *kit.content(5), wait=True)  # a last attempt is always made
    writer.check()
    kit.assert_whole(newest(tmp_path), 5)


def test_a_save_in_place_raises_at_once_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kit: Any,
    writer: CheckpointWriter,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(SaveError, match=r"No space left on device; .*\(failure 1 of 3 in a row\)"):
        writer.save(50, *kit.content(50), wait=True)
    assert not caplog.records
    assert (writer.due(149), writer.due(150)) == (False, True)
    assert isinstance(SaveError("x"), OSError)


@pytest.mark.parametrize("method", ["check", "due", "save"])
def test_a_fault_of_the_program_is_raised_at_the_next_call(
    monkeypatch: pytest.MonkeyPatch, kit: Any, writer: CheckpointWriter, method: str
) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("broken")

    monkeypatch.setattr(module, "save_file", broken)
    writer.save(1, *kit.content(1))
    settle(writer)
    with pytest.raises(TypeError, match="broken"):
        getattr(writer, method)(*{"check": (), "due": (5,), "save": (2, *kit.content(2))}[method])
    writer.check()  # once


def test_documents_that_are_no_json_are_the_callers_fault(
    tmp_path: Path, kit: Any, writer: CheckpointWriter
) -> None:
    for wait in (True, False):
        with pytest.raises(TypeError, match="not JSON serializable"):
            writer.save(1, kit.content(1)[0], {"state": {"path": tmp_path}}, wait)
    writer.save(1, *kit.content(1), wait=True)
    assert kit.listing(tmp_path) == ["images-000000000001"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TypeError("broken")])
def test_closing_waits_tells_and_does_not_raise(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    kit: Any,
    error: Exception,
) -> None:
    caplog.set_level(logging.WARNING)
    writer, gate = CheckpointWriter(tmp_path), Gate(monkeypatch)
    writer.save(1, *kit.content(1))
    opener = threading.Timer(0.05, gate.open.set)
    opener.start()
    writer.close()
    kit.assert_whole(newest(tmp_path), 1)
    opener.join()

    def failing(*_: Any) -> None:
        raise error

    writer = CheckpointWriter(tmp_path)
    monkeypatch.setattr(module, "save_file", failing)
    writer.save(2, *kit.content(2))
    writer.close()
    writer.close()
    assert [str(error) in caplog.text, len(caplog.records)] == [True, 1]


def test_retries_are_counted_in_images() -> None:
    retry = Retry(first_images=10, limit=4)
    assert not retry.due(10**9)
    for images, at in ((5, 15), (15, 35), (40, 80), (80, 160)):
        assert not retry.exhausted
        retry.failed(images)
        assert (retry.due(at - 1), retry.due(at)) == (False, True)
    assert retry.exhausted
    retry.succeeded()
    assert (retry.exhausted, retry.due(10**9), retry.failures) == (False, False, 0)
    for wrong in ((0, 5), (10, 0), (-1, 1)):
        with pytest.raises(ValueError, match="must be above 0"):
            Retry(*wrong)
