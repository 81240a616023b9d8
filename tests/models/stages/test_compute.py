"""How to compute is decided by timing, within what the user fixed, and kept when a run goes on."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.blocks import Attention, ResidualBlock, TransformerBlock
from models.float8 import Linear
from models.registry import ConfigError
from models.stages import compute as module
from models.stages.compute import (
    Accelerator,
    Compute,
    Precision,
    Reduce,
    Switch,
    TrainerOptions,
    decide,
    set_threads,
    threads_for,
)


@pytest.fixture(autouse=True)
def _a_cpu_with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "_bf16_instructions", lambda: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(module, "kernels", lambda: None)


class Timer:
    """Seconds a step, made up; remembers what was timed."""

    def __init__(self, seconds: Callable[[Compute], float]) -> None:
        self.seconds = seconds
        self.asked: list[Compute] = []

    def __call__(self, way: Compute) -> float:
        self.asked.append(way)
        return self.seconds(way)


def test_the_clock_chooses_neither_precision_nor_layout() -> None:
    for seconds in (lambda way: 1 - 0.5 * way.bf16 + 0.1 * way.channels_last, lambda way: 1.0 + way.bf16):
        timer = Timer(seconds)
        way, _ = decide(TrainerOptions(), timer, steps=1)
        assert (way.bf16, way.channels_last, way.compiled) == (False, True, False)
        assert len(timer.asked) == 1
    assert str(way) == "cpu, float32, channels-last, eager (timed once)"


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_fixed_precision_is_kept(precision: Precision) -> None:
    worst = Timer(lambda way: 9.0 if way.bf16 == (precision is Precision.bf16) else 1.0)
    way, _ = decide(TrainerOptions(precision=precision), worst, 1)
    assert way.bf16 == (precision is Precision.bf16)
    assert all(asked.bf16 == way.bf16 for asked in worst.asked)


def test_compiling_only_where_it_pays() -> None:
    timer = Timer(lambda way: 0.25 if way.compiled else 1.0)
    assert not decide(TrainerOptions(), timer, 1000)[0].compiled
    assert not any(way.compiled for way in timer.asked)
    way, seconds = decide(TrainerOptions(), timer, 2000)
    assert (way.compiled, seconds) == (True, 0.25)
    exact = TrainerOptions(reduce=Reduce.tree)
    assert not decide(exact, timer, 10**6)[0].compiled
    slower = Timer(lambda way: 2.0 if way.compiled else 1.0)
    assert not decide(TrainerOptions(), slower, 2000)[0].compiled
    assert [way.compiled for way in slower.asked] == [False, False, True, False]


@pytest.mark.parametrize(
    ("eager", "compiled", "reason"),
    [
        ([1.0, 0.5], None, "timed twice"),  # the run is not long enough after all
        ([1.0, 1.0, 0.6], 0.7, "faster than compiled"),
        ([1.0, 1.0, 1.0], 0.7, "faster than eager"),
    ],
)
def test_a_busy_moment_does_not_decide(eager: list[float], compiled: float | None, reason: str) -> None:
    """The machine is busy for the first one or two of those that are timed."""
    left = list(eager)
    timer = Timer(lambda way: compiled if way.compiled and compiled else left.pop(0))
    way, seconds = decide(TrainerOptions(), timer, 2000)
    assert not left
    assert any(asked.compiled for asked in timer.asked) == (compiled is not None)
    assert seconds == min([*eager, *([] if compiled is None else [compiled])])
    assert way.compiled == (seconds == compiled)
    assert way.reason == reason


def test_compiling_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(lambda way: 5.0 if way.compiled else 1.0)
    assert decide(TrainerOptions(compile=Switch.on), timer, 1)[0].compiled
    assert all(way.compiled for way in timer.asked)
    assert not decide(TrainerOptions(compile=Switch.off), Timer(lambda way: 1.0), 10**6)[0].compiled
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert not decide(TrainerOptions(), Timer(lambda way: 1.0), 10**6)[0].compiled


def test_native_bfloat16_is_a_matter_of_course(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_bf16_instructions", lambda: "AMX")
    timer = Timer(lambda way: 1.0 + way.bf16)
    way, _ = decide(TrainerOptions(), timer, 1)
    assert way.bf16
    assert way.channels_last
    assert way.reason.startswith("AMX found")
    assert len(timer.asked) == 1  # a choice by the clock would not be the same twice
    monkeypatch.setattr(module, "_bf16_instructions", lambda: "AVX512-BF16")
    assert decide(TrainerOptions(), timer, 1)[0] == replace(way, reason="AVX512-BF16 found, timed once")


@pytest.mark.parametrize("compiled", [True, False])
def test_a_resumed_run_computes_as_before(compiled: bool) -> None:
    before = Compute(torch.device("cpu"), False, True, compiled, "")
    timer = Timer(lambda way: 1.0 - 0.5 * way.bf16 + 0.5 * way.channels_last)
    way, _ = decide(TrainerOptions(), timer, 10**6, before)
    assert (way.bf16, way.channels_last, way.compiled) == (False, True, compiled)
    assert len(timer.asked) == 1
    assert decide(TrainerOptions(precision=Precision.bf16), timer, 1, before)[0].bf16
    wider = Compute(torch.device("cpu"), True, False, False, "")  # of a machine that multiplies bfloat16
    way, _ = decide(TrainerOptions(), timer, 1, wider)
    assert (way.bf16, way.channels_last) == (True, False)
    assert not decide(TrainerOptions(compile=Switch.off), timer, 1, before)[0].compiled


def test_own_kernels_are_used_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(lambda way: 1.0)
    assert not decide(TrainerOptions(), timer, 1)[0].native
    monkeypatch.setattr(module, "kernels", object)
    way, _ = decide(TrainerOptions(), timer, 1)
    assert way.native
    assert "own kernels" in str(way)
    without = Compute(torch.device("cpu"), False, True, False, "")
    assert not decide(TrainerOptions(), timer, 1, without)[0].native  # or resuming would change the last bits
    network = ResidualBlock(8, 8, 4, 1e-5)
    way.set_blocks(network)
    assert network.norm_in.native
    without.set_blocks(network)
    assert not network.norm_in.native
    monkeypatch.setattr(module, "kernels", lambda: None)  # a rank on a machine without a compiler
    way.set_blocks(network)
    assert not network.norm_in.native


@pytest.mark.parametrize("bf16", [True, False])
def test_attention_is_native_where_there_are_tiles_of_its_type(
    monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    monkeypatch.setattr(module, "kernels", object)
    monkeypatch.setattr(module, "has_tiles", lambda dtype: dtype == torch.float32)
    way, layer = Compute(torch.device("cpu"), bf16, True, False, "", native=True), Attention(8, 2, 8)
    way.set_blocks(nn.ModuleList([layer]))
    assert layer.native is not bf16


def test_no_gpu_to_ask_for() -> None:
    with pytest.raises(ConfigError, match=r"use trainer.accelerator=cpu"):
        decide(TrainerOptions(accelerator=Accelerator.cuda), Timer(lambda way: 1.0), 1)


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(TrainerOptions(threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="threads is -1"):
        TrainerOptions(threads=-1)


def test_small_steps_are_not_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    auto, given = TrainerOptions(), TrainerOptions(threads=4)
    found = [threads_for(auto, flops) for flops in (0, 1.9e9, 2.1e9, 1e12)]
    assert found == [1, 1, 2, 4]
    assert threads_for(auto, 1e12, before=3) == 3  # or the last bits would change
    assert threads_for(auto, 0, before=8) == 4
    assert threads_for(given, 0) == 0
    monkeypatch.setattr(module, "device_of", lambda _: torch.device("cuda"))
    assert threads_for(auto, 0) == 0
    assert ", 1 thread" in str(Compute(torch.device("cpu"), False, True, False, "", threads=1))


def test_autocast_and_layout() -> None:
    way = Compute(torch.device("cpu"), True, True, False, "")
    network = torch.nn.Conv2d(2, 4, 3)
    way.place(network)
    images = way.lay_out(torch.zeros(2, 2, 8, 8))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert network.weight.is_contiguous(memory_format=torch.channels_last)
    with way.autocast():
        assert network(images).dtype is torch.bfloat16
    assert network.weight.dtype is torch.float32


def test_eight_bits_are_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    options = TrainerOptions(precision=Precision.fp8)
    with pytest.raises(ConfigError, match="needs a GPU of compute capability"):
        decide(options, Timer(lambda way: 1.0), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(ConfigError, match="needs a GPU of compute capability"):
        decide(options, Timer(lambda way: 1.0), 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    way = decide(options, Timer(lambda way: 1.0), 1)[0]
    assert (way.fp8, way.bf16) == (True, True)


def test_blocks_compute_as_they_are_told() -> None:
    network = TransformerBlock(32, 2, 32)
    way = Compute(torch.device("cpu"), True, False, False, "", recompute=True, fp8=True)
    way.set_blocks(network)
    layers = [module for module in network.modules() if isinstance(module, Linear)]
    assert network.recompute
    assert len(layers) == 10
    assert all(layer.float8 for layer in layers)
    assert Compute.read(way.document(), "") == way
    Compute(torch.device("cpu"), True, False, False, "").set_blocks(network)
    assert not network.recompute
    assert not any(layer.float8 for layer in layers)
