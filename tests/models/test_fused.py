"""The machine's own kernels against torch's operations: values, gradients, and where they are not used."""

import shutil
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from models import fused, kernels
from models.blocks import ResidualBlock
from models.fused import GatedGelu, Geglu, GroupNorm, NormSilu

C, GROUPS = 12, 4
needs_kernels = pytest.mark.skipif(kernels.kernels() is None, reason="no C++ compiler made the kernels here")


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def layout(request: pytest.FixtureRequest) -> torch.memory_format:
    return request.param


def made(*shape: int, number: int = 0, by: float = 1.0) -> Tensor:
    return by * torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def norm(number: int = 7) -> GroupNorm:
    layer = GroupNorm(GROUPS, C, eps=1e-5)
    layer.weight.data = 1 + made(C, number=number, by=0.3)
    layer.bias.data = made(C, number=number + 1, by=0.3)
    return layer


def modulations(kind: str) -> dict[str, Tensor]:
    if kind == "none":
        return {}
    names = ["before"] if kind == "before" else ["scale", "shift"]
    return {name: made(3, C, number=20 + i, by=0.5) for i, name in enumerate(names)}


def outcome(layer: torch.nn.Module, inputs: dict[str, Tensor], up: Tensor, **named: bool) -> list[Tensor]:
    """Output and gradients, of inputs and parameters, in float32."""
    inputs = {name: each.detach().clone().requires_grad_() for name, each in inputs.items()}
    layer.zero_grad()
    y = layer(**inputs, **named)
    y.backward(up.to(y.dtype))
    found = [y, *(each.grad for each in (*inputs.values(), *layer.parameters()))]
    assert all(each is not None for each in found)
    return [each.detach().float().clone() for each in found if each is not None]


@needs_kernels
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("kind", ["none", "before", "scale"])
def test_the_norm_is_the_one_of_torch(layout: torch.memory_format, kind: str, silu: bool) -> None:
    x = (3 + made(3, C, 5, 4)).contiguous(memory_format=layout)
    inputs, up, layer = {"x": x, **modulations(kind)}, made(3, C, 5, 4, number=3), norm()
    plain = outcome(layer, inputs, up, silu=silu)
    layer.native = True
    own = outcome(layer, inputs, up, silu=silu)
    for mine, theirs in zip(own, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)
    assert layer(x, silu=silu).is_contiguous(memory_format=layout)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_the_one_of_torch(dtype: torch.dtype) -> None:
    # All that a gate may hold: both tails, where the two factors cancel, and what overflows an exponential.
    gate = torch.cat([torch.linspace(-14, 14, 997), torch.tensor([0.0, -60.0, 300.0])])
    x = torch.cat([made(2, 1000, by=0.0) + 1.5, gate.expand(2, 1000)], dim=1).to(dtype)
    exact = outcome(Geglu(), {"x": x.double()}, torch.ones(2, 1000))
    layer = Geglu()
    layer.native = True
    own = outcome(layer, {"x": x}, torch.ones(2, 1000))
    precise = dtype == torch.float32
    for mine, true in zip(own, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5 if precise else 8e-3, atol=1e-6)


@needs_kernels
def test_in_bfloat16_the_norm_is_nearer_to_the_truth_than_torch(layout: torch.memory_format) -> None:
    x = (1 + made(3, C, 8, 8)).contiguous(memory_format=layout)
    inputs, up, layer = {"x": x, **modulations("scale")}, made(3, C, 8, 8, number=3), norm()
    exact = outcome(layer, inputs, up, silu=True)
    halves = {name: each.bfloat16() for name, each in inputs.items()}
    plain = outcome(layer, halves, up, silu=True)
    layer.native = True
    own = outcome(layer, halves, up, silu=True)
    for mine, theirs, true in zip(own, plain, exact, strict=True):
        assert (mine - true).square().mean() <= 1.05 * (theirs - true).square().mean()


@needs_kernels
def test_what_is_not_finite_stays_so(layout: torch.memory_format) -> None:
    layer, gate = norm(), Geglu()
    layer.native = gate.native = True
    for bad in (float("nan"), float("inf")):
        for dtype in (torch.float32, torch.bfloat16):
            x = made(1, C, 2, 2).to(dtype).contiguous(memory_format=layout)
            x[0, 3, 1, 0] = bad
            assert not layer(x, silu=True)[0, 3].isfinite().any()
            row = made(1, 8).to(dtype)
            row[0, 6] = bad
            assert not gate(row)[0, 2].isfinite()
            assert gate(row)[0, :2].isfinite().all()


@needs_kernels
def test_each_sample_is_computed_by_itself(layout: torch.memory_format) -> None:
    layer, gate = norm(), Geglu()
    layer.native = gate.native = True
    x = made(4, C, 6, 6).contiguous(memory_format=layout)
    alone = torch.cat([layer(x[i : i + 1].contiguous(memory_format=layout), silu=True) for i in range(4)])
    assert torch.equal(layer(x, silu=True), alone)
    rows = made(4, 5, 32)
    assert torch.equal(gate(rows), torch.cat([gate(row[None]) for row in rows]))


@needs_kernels
def test_two_threads_compute_the_same_bits() -> None:
    threads = torch.get_num_threads()
    layer = norm()
    layer.native = True
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            inputs = {"x": made(3, C, 8, 8), **modulations("scale")}
            found.append(outcome(layer, inputs, made(3, C, 8, 8, number=3), silu=True)[:-2])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were called."""
    made: list[str] = []
    real = fused._call
    monkeypatch.setattr(fused, "_call", lambda name, *rest: (made.append(name), real(name, *rest)))
    return made


def tangents(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@needs_kernels
def test_the_kernels_compute_what_is_only_looked_at_as_well(calls: list[str]) -> None:
    layer, gate = norm(), Geglu()
    layer.native = gate.native = True
    x, rows = made(2, C, 4, 4), made(3, 8)
    with torch.no_grad():
        found = layer(x), gate(rows)
    assert calls == ["norm_forward", "gate_forward"]
    layer.native = gate.native = False
    torch.testing.assert_close(found, (layer(x), gate(rows)))


@needs_kernels
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # torch's own, of its forward derivatives
def test_torch_computes_where_the_kernels_cannot(calls: list[str]) -> None:
    layer, gate = norm(), Geglu()
    layer.native = gate.native = True
    x, rows = made(2, C, 4, 4), made(3, 8)
    assert tangents(gate, rows).shape == (3, 4)
    assert torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1].shape == x.shape
    assert torch.func.vmap(gate)(rows).shape == (3, 4)
    assert calls == []
    layer(x)
    gate(rows)
    assert calls == ["norm_forward", "gate_forward"]


@needs_kernels
def test_second_derivatives_are_refused_and_not_wrong() -> None:
    x = made(3, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        torch.autograd.grad(GatedGelu.apply(x).sum(), x, create_graph=True)


@needs_kernels
def test_what_is_kept_for_the_backward_pass_is_the_input_alone() -> None:
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    x = made(2, C, 16, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        NormSilu.apply(x, None, torch.ones(C), torch.zeros(C), GROUPS, 1e-5, True)
    assert sum(size == x.numel() for size in sizes) == 1
    assert sum(sizes) < 1.1 * x.numel()


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert kernels.kernels.__wrapped__() is None


@needs_kernels
def test_a_compiler_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "FLAGS", ("--no-such-option",))
    assert kernels.kernels.__wrapped__() is None
    assert list((tmp_path / "firstlight").iterdir()) == []


@needs_kernels
def test_what_is_compiled_ahead_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there, compiled = kernels.kernels(), []
    assert there is not None

    def slowly(compiler: str, library: Path) -> None:
        compiled.append(threading.current_thread().name)
        time.sleep(0.3)
        shutil.copyfile(there._name, library)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "_compile", slowly)
    monkeypatch.setattr(kernels, "kernels", lru_cache(kernels.kernels.__wrapped__))
    kernels.compile_ahead()
    while not compiled:
        time.sleep(0.01)
    assert kernels.kernels() is not None
    assert compiled == ["kernels"]


def test_a_cache_that_others_may_write_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.cache_folder() == tmp_path / "firstlight"
    (tmp_path / "firstlight").chmod(0o777)
    assert kernels.cache_folder() is None


def test_room_is_kept_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_rooms", threading.local())
    small = kernels.room(100)
    assert kernels.room(50).data_ptr() == small.data_ptr()
    assert len(kernels.room(200)) == 200
    assert len(kernels.room(100)) == 200
    monkeypatch.setattr(kernels, "KEPT", 1000)
    assert len(kernels.room(1001)) == 1001
    assert len(kernels.room(100)) == 200


def test_room_is_of_floats_whatever_torch_makes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_rooms", threading.local())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            room = kernels.room(100)
    finally:
        torch.set_default_dtype(before)
    assert (room.dtype, room.device.type) == (torch.float32, "cpu")


@needs_kernels
@pytest.mark.parametrize("scale_shift", [True, False])
def test_native_layers_go_through_the_compiler_in_one_piece(scale_shift: bool) -> None:
    """Traced as `torch.compile` does, without the minute that its code takes to build."""
    block, gate = ResidualBlock(C, 2 * C, GROUPS, 1e-5, 8, scale_shift), Geglu()
    torch.nn.init.normal_(block.conv_out.weight, std=0.1)
    for layer in (*block.modules(), gate):
        layer.native = True

    def call(x: Tensor, time: Tensor) -> Tensor:
        return gate(block(x, time).permute(0, 2, 3, 1))

    def outcomes(call: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        x = made(2, C, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
        block.zero_grad()
        y = call(x, made(2, 8))
        y.square().sum().backward()
        return [y, x.grad, *(each.grad.clone() for each in block.parameters())]

    eager, compiled = outcomes(call), outcomes(torch.compile(call, backend="aot_eager", fullgraph=True))
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs)
