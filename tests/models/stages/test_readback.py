"""What comes back from the device is what was there, and reading it is no wait."""

import pytest
import torch

from models.stages.readback import Readback
from scripts.benches.reads import Reads


def test_the_numbers_come_back() -> None:
    with Reads() as reads:
        assert Readback(torch.tensor([[1.5, 2.5], [0.1, float("inf")]], dtype=torch.float64)).values() == [
            [1.5, 2.5], [0.1, float("inf")],
        ]  # fmt: skip
    assert reads.count == 0


def test_every_way_to_read_is_counted() -> None:
    x = torch.tensor([1.0, 0.0])
    ways = [
        x.tolist, x.cpu, x.nonzero, x[0].item, lambda: float(x[0]), lambda: bool(x[1]), lambda: x[x > 0],
        lambda: x.masked_select(x > 0), lambda: torch.equal(x, x), lambda: x.masked_fill_(x > 0, x[0].item()),
    ]  # fmt: skip
    for number, way in enumerate(ways):
        with Reads() as reads:
            way()
        assert reads.count == 1, number
    with Reads() as reads:
        x.new_full((), 3.0).add_(x[0]).isfinite().all().logical_not().float()
    assert reads.count == 0


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_to_begin() -> None:
    numbers = torch.arange(6.0, device="cuda").view(2, 3)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        back = Readback(numbers)
        values = back.values()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert values == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
