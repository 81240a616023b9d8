"""What a worker hands over is its own, whatever is filled next; full shared memory is an error at once."""

import os
import pickle

import pytest
import torch

from data.handover import Handover, share


@pytest.fixture
def in_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process take itself for a loader's worker."""
    monkeypatch.setattr("data.handover.get_worker_info", lambda: "a worker")


def test_in_the_main_process_what_is_filled_is_given() -> None:
    handover = Handover()
    one, two = handover.room((2, 3)), handover.room((2, 3))
    assert one.data_ptr() != two.data_ptr()
    assert handover.give(one) is one
    assert not one.is_shared()


def test_a_worker_fills_one_memory_and_gives_another(in_worker: None) -> None:
    handover, given = Handover(), []
    for value in range(5):
        room = handover.room((value + 1, 3, 1001))
        given.append(handover.give(room.fill_(value)))
    small = handover.room((1, 3, 1001))
    assert small.data_ptr() == room.data_ptr()
    for value, each in enumerate(given):
        assert each.is_shared()
        assert each.is_contiguous()
        assert each.shape == (value + 1, 3, 1001)
        assert (each == value).all()
    assert pickle.loads(pickle.dumps(handover))._kept is None


def test_a_short_write_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda handle, data, offset: real(handle, data[:4000], offset))
    values = torch.arange(10_000).to(torch.uint8).view(4, 2500)
    assert torch.equal(share(values), values)


def test_full_shared_memory_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(RuntimeError, match="unable to allocate shared memory: No space left on device"):
        share(torch.zeros(10, dtype=torch.uint8))
