"""Feed-forwards of some rows at a time against their layers: values, gradients, where they are not used."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import feed_forward, kernels
from models.feed_forward import FLOPS, FeedForward, RowsTogether
from models.portions import on_threads

pytestmark = pytest.mark.skipif(kernels.kernels() is None, reason="no C++ compiler made the kernels here")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "LEAST", 2 * 64 * 48)  # of the smallest input here


def made(*shape: int, number: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def layer(width: int = 48) -> FeedForward:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FeedForward(width)


def outcome(feed: FeedForward, x: Tensor, up: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = x.detach().requires_grad_()
    feed.zero_grad()
    y = feed(x)
    y.backward(up)
    found = [y, *(each.grad for each in (x, *feed.parameters()))]
    return [each.detach().clone() for each in found if each is not None]


def error(mine: Tensor, true: Tensor) -> float:
    return float((mine - true).abs().max() / true.abs().max())


@pytest.mark.parametrize(
    ("samples", "length", "width"), [(2, 64, 48), (1, 431, 16), (3, 700, 16), (2, 100, 80), (40, 64, 32)]
)
def test_it_is_the_layers_one_by_one(samples: int, length: int, width: int) -> None:
    """Rows that fill no piece, in one slice and several; widths of whole panels and remainders."""
    feed, x, up = layer(width), made(samples, length, width), made(samples, length, width, number=1)
    exact = outcome(feed.double(), x.double(), up.double())
    feed.float().native = True
    assert feed.suits(x)
    own = outcome(feed, x, up)
    assert len(own) == len(exact) == 6
    assert all(error(mine.double(), true) < 2e-6 for mine, true in zip(own, exact, strict=True))


def test_no_bit_depends_on_the_threads() -> None:
    feed, x, up = layer(), made(5, 700, 48), made(5, 700, 48, number=1)
    feed.native = True
    found = []
    for count in (1, 2, 3):
        with on_threads(count):
            found.append(outcome(feed, x, up))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_it_keeps_its_input_and_its_weights_alone() -> None:
    feed, x = layer(), made(2, 64, 48).requires_grad_()
    feed.native = True
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        feed(x)
    given = (x, feed.expand.weight, feed.expand.bias, feed.contract.weight)
    assert sorted(kept) == sorted(each.data_ptr() for each in given)


def test_its_work_is_counted_as_that_of_the_layers() -> None:
    feed, x, counts = layer(), made(2, 64, 48).requires_grad_(), []
    for native in (True, False):
        feed.native = native
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            feed(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 2 * 64 * 3 * 48 * 192


def test_what_is_not_finite_stays_so() -> None:
    feed, x = layer(), made(2, 64, 48)
    feed.native = True
    x[0, 5, 1] = float("nan")
    y = feed(x)
    assert not y[0, 5].isfinite().any()
    assert y[0, :5].isfinite().all()
    assert y[1].isfinite().all()


def test_a_gradient_that_is_not_dense() -> None:
    feed, x = layer(), made(2, 64, 48)
    feed.native = True
    up = made(1, 1, 48).expand(2, 64, 48)
    assert all(
        torch.equal(one, two)
        for one, two in zip(outcome(feed, x, up), outcome(feed, x, up.contiguous()), strict=True)
    )


def test_it_refuses_a_second_derivative() -> None:
    feed, x = layer(), made(2, 64, 48).requires_grad_()
    feed.native = True
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(feed(x).sum(), x, create_graph=True)


def test_what_is_only_looked_at_goes_by_rows_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    feed, x = layer(), made(2, 64, 48)
    exact = feed(x).detach()
    feed.requires_grad_(False).native = True
    used: list[int] = []
    real = RowsTogether.apply
    monkeypatch.setattr(RowsTogether, "apply", lambda *given: used.append(1) or real(*given))
    with torch.no_grad():
        assert error(feed(x), exact) < 1e-5
    assert used == [1]


def test_where_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowsTogether, "apply", lambda *_: pytest.fail("it was used"))
    feed, x = layer(), made(2, 64, 48)
    feed.native = True
    feed(made(2, 48, 64).transpose(1, 2))
    feed(made(1, 100, 48))  # so small that what lies inside stays in a cache
    with torch.autocast("cpu", torch.bfloat16):
        feed(x)
    for width in (24, 208):  # no multiple of 16, and so wide that sums of gradients would take much memory
        other = layer(width)
        other.native = True
        other(made(4, 64, width))
    feed.contract.requires_grad_(False)  # whose gradients nobody wants
    feed(x)
    feed.double()(x.double())
