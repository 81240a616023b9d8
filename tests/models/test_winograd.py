"""Convolutions by tiles against the sum over the window: values, gradients, and where they are not used."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import kernels
from models.portions import on_threads
from models.winograd import FLOPS, Conv2d, Winograd

pytestmark = pytest.mark.skipif(kernels.kernels() is None, reason="no C++ compiler made the kernels here")


def made(*shape: int, number: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(number))
    return drawn.to(memory_format=torch.channels_last)


def layer(within: int = 64, out: int = 80, bias: bool = True) -> Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Conv2d(within, out, 3, padding=1, bias=bias).to(memory_format=torch.channels_last)


def outcome(conv: Conv2d, x: Tensor, up: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = x.detach().requires_grad_()
    conv.zero_grad()
    y = conv(x)
    y.backward(up)
    found = [y, *(each.grad for each in (x, *conv.parameters()))]
    return [each.detach().clone() for each in found if each is not None]


def error(mine: Tensor, true: Tensor) -> float:
    return float((mine - true).abs().max() / true.abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("samples", "height", "width"), [(16, 4, 4), (3, 8, 12)])
def test_it_is_the_convolution(samples: int, height: int, width: int, bias: bool) -> None:
    x, up = made(samples, 64, height, width), made(samples, 80, height, width, number=1)
    conv = layer(bias=bias)
    exact = outcome(conv.double(), x.double(), up.double())
    conv.float().native = True
    assert conv.suits(x)
    own = outcome(conv, x, up)
    assert len(own) == len(exact) == (4 if bias else 3)
    assert all(error(mine.double(), true) < 5e-6 for mine, true in zip(own, exact, strict=True))
    assert own[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("within", "out"), [(64, 80), (80, 64), (96, 256), (256, 64), (16, 96), (48, 16)])
def test_channels_in_panels_and_remainders(within: int, out: int) -> None:
    """Tiles beyond what a thread takes at a time, and rows and columns that fill no register."""
    x, up = made(7, within, 12, 12), made(7, out, 12, 12, number=1)
    conv = layer(within, out)
    exact = outcome(conv.double(), x.double(), up.double())
    conv.float().native = True
    own = outcome(conv, x, up)
    assert all(error(mine.double(), true) < 5e-6 for mine, true in zip(own, exact, strict=True))


def test_many_tiles_add_up_to_the_gradient_of_the_kernel() -> None:
    """More of them than are transformed together."""
    conv, x, up = layer(128, 256), made(10, 128, 16, 16), made(10, 256, 16, 16, number=1)
    exact = outcome(conv.double(), x.double(), up.double())
    conv.float().native = True
    own = outcome(conv, x, up)
    assert all(error(mine.double(), true) < 5e-6 for mine, true in zip(own, exact, strict=True))


def test_no_bit_depends_on_the_threads() -> None:
    conv, x, up = layer(), made(5, 64, 12, 12), made(5, 80, 12, 12, number=1)
    conv.native = True
    found = []
    for count in (1, 2, 3):
        with on_threads(count):
            found.append(outcome(conv, x, up))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_its_work_is_counted() -> None:
    conv, x = layer(64, 80, bias=False), made(4, 64, 8, 8).requires_grad_()
    conv.native = True
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        conv(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 36 * (4 * 4) * 64 * 80


def test_a_kernel_in_another_layout() -> None:
    conv, x, up = layer(64, 64), made(4, 64, 8, 8), made(4, 64, 8, 8, number=1)
    conv.native = True
    last = outcome(conv, x, up)
    found = outcome(conv.to(memory_format=torch.contiguous_format), x, up)
    assert conv.weight.is_contiguous()
    assert all(torch.equal(one, other) for one, other in zip(found, last, strict=True))


def test_an_input_without_gradient_gets_none() -> None:
    conv = layer()
    conv.native = True
    x = made(1, 64, 16, 16)
    conv(x).sum().backward()
    assert x.grad is None
    assert conv.weight.grad is not None


def test_a_frozen_kernel_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = layer().requires_grad_(False), made(2, 64, 16, 16).requires_grad_()
    conv.native = True
    monkeypatch.setattr(
        torch.ops.firstlight, "winograd_kernel_gradient", lambda *_: pytest.fail("it was made")
    )
    conv(x).sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is None


def test_what_is_not_finite_stays_so() -> None:
    conv, x = layer(), made(4, 64, 8, 8)
    conv.native = True
    x[0, 5, 1, 1] = float("nan")
    y = conv(x)
    assert not y[0, :, :4, :4].isfinite().any()
    assert y[0, :, 4:, 4:].isfinite().all()


def test_what_is_only_looked_at_goes_by_tiles_as_well() -> None:
    conv, x = layer(), made(4, 64, 8, 8)
    exact = conv(x).detach()
    conv.native = True
    with torch.no_grad():
        own = conv(x)
    assert not torch.equal(own, exact)
    torch.testing.assert_close(own, exact, atol=1e-5, rtol=0)


def test_where_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Winograd, "apply", lambda *_: pytest.fail("it was used"))
    conv, x = layer(), made(4, 64, 8, 8)
    conv(x)
    conv.native = True
    conv(x.contiguous())
    conv(made(8, 64, 6, 8))
    conv(made(3, 64, 8, 8))  # few tiles, for which the kernels are not worth transforming
    with torch.autocast("cpu", torch.bfloat16):
        conv(x)
    for other in (Conv2d(64, 64, 3, 2, 1), Conv2d(64, 64, 1), Conv2d(8, 64, 3, padding=1)):
        other.native = True
        other(made(4, other.in_channels, 8, 8))
