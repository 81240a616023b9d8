"""Where and in which precision a run computes, and why.

On a GPU that is bfloat16 autocast and `torch.compile`; on a CPU that multiplies bfloat16 (AMX, AVX512-BF16)
it is bfloat16, elsewhere float32; channels-last on all of them. Weights, optimizer and loss stay float32
everywhere.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.attention import has_tiles
from models.blocks import Attention, Block
from models.feed_forward import FeedForward
from models.float8 import Linear
from models.fused import Geglu, GroupNorm
from models.kernels import kernels
from models.registry import ConfigError
from models.stages.faults import NotFinite
from models.winograd import Conv2d

#: Of the first GPUs that multiply 8 bits.
FP8_CAPABILITY = (8, 9)
#: Seconds of eager training from which on compiling on a CPU is tried: it takes one to two minutes.
COMPILE_PAYS_AFTER = 1200
#: FLOPs of a training step that a CPU thread has at least; with fewer, threads wait longer than they compute.
FLOPS_A_THREAD = 1e9


class Precision(Enum):
    """What the networks multiply in; `auto` chooses. `fp8` is bfloat16 but for the blocks' linear layers."""

    auto = "auto"
    fp32 = "float32"
    bf16 = "bfloat16"
    fp8 = "float8"


class Switch(Enum):
    """On, off, or chosen for the machine; `blocks` compiles each kind of block instead of whole networks."""

    auto = "auto"
    on = "on"
    off = "off"
    blocks = "blocks"


class Reduce(Enum):
    """How gradients are added up: as fast as it goes, or in one order whatever the ranks."""

    fast = "fast"
    tree = "tree"


class Accelerator(Enum):
    """The device a run trains on; `auto` takes a GPU where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Strategy(Enum):
    """How ranks share a model: with `ddp` (and `auto`) each has all of it, with `fsdp` they share one, with
    `hsdp` each group of `shards` ranks shares one."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


class TrainerOptions:
    """How to compute.

    Args:
        accelerator: the device.
        precision: what the networks multiply in.
        compile: whether the networks go through `torch.compile`.
        threads: CPU threads of each process; 0 shares out the cores this process may use, of which a stage
            trains on as many as have a GFLOP of its step each, and is one thread under `reduce=tree`, as the
            last bits may depend on how many there are.
        devices: processes that train together on this machine, each with its share of every batch.
        accumulate: micro-batches that a process computes one after another for one step; of the same global
            batch, in less memory.
        reduce: how gradients are added up: `fast`, or `tree`, in one order, for the same bits on 1, 2, 4, ...
            processes.
        micro_batch: images whose gradients are a leaf of the tree; 0 is an eighth of the global batch, or
            what comes next to it. The bits depend on it.
        check_ranks_every_images: the processes compare their weights so often; 0 is never.
        strategy: whether each of them has all of the model or a part.
        shards: with `strategy=hsdp`, the processes that one model is spread over.
        checkpoint_activations: whether each block is computed again in the backward pass instead of kept.
        timeout: seconds after which a process that does not answer the others ends the run.
        connect_timeout: the same while the processes meet at the start.
        hang_seconds: without the end of a step until every process writes down where it stands; 0 is never.
        not_finite: what follows a loss or gradient that is not finite.
        spike_zscore: standard deviations above the recent losses from which a loss is told; 0 is never.
        rewind_spikes: whether such a loss also takes the weights back to the last checkpoint.
        trace: whether each step's samples and exact losses are written down.
    """

    def __init__(
        self,
        accelerator: Accelerator = Accelerator.auto,
        precision: Precision = Precision.auto,
        compile: Switch = Switch.auto,
        threads: int = 0,
        devices: int = 1,
        accumulate: int = 1,
        reduce: Reduce = Reduce.fast,
        micro_batch: int = 0,
        check_ranks_every_images: int = 10_000,
        strategy: Strategy = Strategy.auto,
        shards: int = 0,
        checkpoint_activations: bool = False,
        timeout: float = 1800.0,
        connect_timeout: float = 300.0,
        hang_seconds: float = 600.0,
        not_finite: NotFinite = NotFinite.stop,
        spike_zscore: float = 0.0,
        rewind_spikes: bool = False,
        trace: bool = False,
    ) -> None:
        if threads < 0:
            raise ValueError(f"threads is {threads}, but must be 0 or more")
        if devices < 1:
            raise ValueError(f"devices is {devices}, but must be at least 1")
        if accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}, but must be at least 1")
        if micro_batch < 0:
            raise ValueError(f"micro_batch is {micro_batch}, but must be 0 or more")
        if micro_batch and reduce is not Reduce.tree:
            raise ValueError(
                f"micro_batch is {micro_batch}, but is an option of reduce=tree; give accumulate instead"
            )
        if check_ranks_every_images < 0:
            raise ValueError(f"check_ranks_every_images is {check_ranks_every_images}, but must be 0 or more")
        for name, seconds in {"timeout": timeout, "connect_timeout": connect_timeout}.items():
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} is {seconds}, but must be a positive number of seconds")
        if not (math.isfinite(hang_seconds) and hang_seconds >= 0):
            raise ValueError(f"hang_seconds is {hang_seconds}, but must be 0 or a positive number of seconds")
        if shards < 0:
            raise ValueError(f"shards is {shards}, but must be 0 or more")
        if not (math.isfinite(spike_zscore) and spike_zscore >= 0):
            raise ValueError(f"spike_zscore is {spike_zscore}, but must be 0 or a positive number")
        self.accelerator = accelerator
        self.precision = precision
        self.compile = compile
        self.threads = threads
        self.devices = devices
        self.accumulate = accumulate
        self.reduce = reduce
        self.micro_batch = micro_batch
        self.check_ranks_every_images = check_ranks_every_images
        self.strategy = strategy
        self.shards = shards
        self.checkpoint_activations = checkpoint_activations
        self.timeout = timeout
        self.connect_timeout = connect_timeout
        self.hang_seconds = hang_seconds
        self.not_finite = not_finite
        self.spike_zscore = spike_zscore
        self.rewind_spikes = rewind_spikes
        self.trace = trace


@dataclass(frozen=True)
class Compute:
    """A decided way to compute; `reason` says why in a few words."""

    device: torch.device
    bf16: bool
    channels_last: bool
    compiled: bool
    reason: str
    #: What is compiled are blocks instead of whole networks; blocks are computed again in the backward pass.
    by_block: bool = False
    recompute: bool = False
    #: The linear layers of transformers multiply in 8 bits while they are trained.
    fp8: bool = False
    #: Norms, gates, the blocks' attention and, not compiled, 3x3 convolutions and feed-forwards go through
    #: the machine's own kernels, in what is trained and in what a training has besides.
    native: bool = False
    #: CPU threads of each process in training; 0 is as many as torch has.
    threads: int = 0

    def document(self) -> dict[str, Any]:
        """What to compute alike takes, as JSON values; without the reason."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "reason"}
        return values | {"device": self.device.type}

    @classmethod
    def read(cls, document: Mapping[str, Any], reason: str) -> Self:
        """What `document` made, on this machine; what an older version did not write is off."""
        values = {field.name: document[field.name] for field in fields(cls) if field.name in document}
        return cls(**values | {"device": torch.device(document["device"]), "reason": reason})

    def autocast(self) -> AbstractContextManager[None]:
        """The context every network call runs in."""
        if self.bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def place(self, network: nn.Module) -> None:
        """Moves `network` to the device and into the memory layout."""
        network.to(self.device).to(memory_format=self._format)

    def lay_out(self, images: Tensor) -> Tensor:
        """`images` or latents `[B C H W]` in the memory layout of the networks."""
        return images.contiguous(memory_format=self._format)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, compiled where this is the way to compute."""
        return torch.compile(function, dynamic=False) if self.compiled and not self.by_block else function

    def call(self, network: nn.Module) -> Callable[..., Any]:
        """What to call for the output of `network`, hooks and all, or its forward pass compiled as a whole.

        Never the network itself: a stage that kept one would take it for another of its parts.
        """
        return self.wrap(network.forward) if self.compiled and not self.by_block else network.__call__

    def set_blocks(self, networks: nn.Module) -> None:
        """Lets every block and layer of the trained `networks` compute in this way."""
        blocks = [module for module in networks.modules() if isinstance(module, Block)]
        compiled = self.compiled and self.by_block
        if compiled:
            # One compiled program serves blocks of one kind and shape; there may be as many as blocks.
            allow_shapes(len(blocks))
        self.set_kernels(networks)
        for module in networks.modules():
            if isinstance(module, Linear):
                module.float8 = self.fp8
        for block in blocks:
            block.recompute = self.recompute
            block.compiled = torch.compile(block.run, dynamic=False) if compiled else None

    def set_kernels(self, networks: nn.Module) -> None:
        """Lets every layer of `networks`, trained or not, go through the machine's own kernels or torch's."""
        native = self.native and kernels() is not None  # on a rank without a compiler there are none
        for module in networks.modules():
            if isinstance(module, GroupNorm | Geglu | Conv2d | FeedForward):
                module.native = native
            if isinstance(module, Attention):
                module.native = native and has_tiles(torch.bfloat16 if self.bf16 else torch.float32)

    @property
    def _format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        precision = "bfloat16 autocast" if self.bf16 else "float32"
        precision += ", float8 linears" if self.fp8 else ""
        layout = "channels-last" if self.channels_last else "channels-first"
        compiled = f"compiled{' by the block' if self.by_block else ''}" if self.compiled else "eager"
        compiled += ", own kernels" if self.native else ""
        compiled += f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        how = f"{precision}, {layout}, {compiled}{', blocks recomputed' if self.recompute else ''}"
        return f"{self.device.type}, {how}" + (f" ({self.reason})" if self.reason else "")


def choose(options: TrainerOptions, before: Compute | None = None) -> Compute:
    """The way to compute by what the machine has; the clock has no say, so that two runs of a seed are alike.

    Channels-last everywhere; on a GPU bfloat16 and compiled, on a CPU bfloat16 where it multiplies that, else
    float32. Norms, gates, the blocks' attention and feed-forwards and 3x3 convolutions go through kernels
    compiled for the machine where it can compile them.

    Args:
        options: what the user fixed.
        before: how the run computed until it was stopped; kept, so that resuming changes no bit.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    device = device_of(options)
    on_gpu = device.type == "cuda"
    instructions = "GPU" if on_gpu else _bf16_instructions()
    fp8 = options.precision is Precision.fp8
    if fp8 and not (on_gpu and torch.cuda.get_device_capability() >= FP8_CAPABILITY):
        raise ConfigError(
            "trainer.precision is fp8, which needs a GPU of compute capability 8.9 or more (Ada, Hopper, "
            "Blackwell); use trainer.precision=bf16"
        )
    asked = _asks_bf16(options)
    way = Compute(
        device,
        bf16=instructions is not None if asked is None else asked,
        channels_last=True,
        compiled=options.compile in (Switch.blocks, Switch.on) or (options.compile is Switch.auto and on_gpu),
        reason=f"{instructions} found" if instructions else "",
        # What gathers the weights of a model that is spread stands between its blocks.
        by_block=options.compile is Switch.blocks or options.strategy in (Strategy.fsdp, Strategy.hsdp),
        recompute=options.checkpoint_activations,
        fp8=fp8,
        native=not on_gpu and kernels() is not None,
    )
    if before is None or not _is_kept(options, before):
        return way
    return replace(
        way,
        bf16=before.bf16,
        channels_last=before.channels_last,
        compiled=before.compiled if options.compile is Switch.auto else way.compiled,
        reason="as before the stop",
        native=way.native and before.native,
    )


def decide(
    options: TrainerOptions,
    step_seconds: Callable[[Compute], float],
    steps: int,
    before: Compute | None = None,
) -> tuple[Compute, float]:
    """The way to compute the training steps of a stage on this machine, and seconds a step.

    It is what `choose` says. Compiling the networks is tried on a CPU where the run is long enough to earn
    back the minutes it takes, and kept where it is faster; not under `reduce=tree`, which promises bits. What
    is not compiled is timed again before and after, so that a moment in which the machine was busy does not
    decide.

    Args:
        options: what the user fixed.
        step_seconds: times a training step computed in a given way.
        steps: how many of them are to come.
        before: how the run computed until it was stopped; kept, so that resuming changes no bit.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    way = choose(options, before)
    may_compile = (
        options.compile is Switch.auto
        and options.reduce is not Reduce.tree
        and not way.compiled
        and not (before is not None and _is_kept(options, before))
        and any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    )
    seconds, best, how = step_seconds(way), way, "timed once"
    if may_compile and seconds * steps > COMPILE_PAYS_AFTER:
        seconds, how = min(seconds, step_seconds(way)), "timed twice"
        if seconds * steps > COMPILE_PAYS_AFTER:
            compiled = replace(way, compiled=True)
            faster = step_seconds(compiled)
            seconds, how = min(seconds, step_seconds(way)), "faster than compiled"
            if faster < seconds:
                seconds, best, how = faster, compiled, "faster than eager"
    return replace(best, reason=f"{way.reason}, {how}" if way.reason else how), seconds


def _asks_bf16(options: TrainerOptions) -> bool | None:
    """Whether the user fixed bfloat16 (or less) or float32; None where neither."""
    fixed = {Precision.fp32: False, Precision.bf16: True, Precision.fp8: True}
    return fixed.get(options.precision)


def _is_kept(options: TrainerOptions, before: Compute) -> bool:
    """Whether a run may go on as it computed before the stop."""
    return before.device == device_of(options) and _asks_bf16(options) in (None, before.bf16)


def device_of(options: TrainerOptions) -> torch.device:
    """The kind of device that training computes on.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    on_gpu = torch.cuda.is_available() and options.accelerator is not Accelerator.cpu
    if options.accelerator is Accelerator.cuda and not on_gpu:
        raise ConfigError(
            "trainer.accelerator is cuda, but this machine has no usable GPU; use trainer.accelerator=cpu"
        )
    return torch.device("cuda" if on_gpu else "cpu")


def seconds_a_call(call: Callable[[], object], device: torch.device, budget: float = 2.0) -> float:
    """Median wall seconds of `call` after two warm-up calls, within about `budget` seconds."""
    for _ in range(2):
        call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < 15 and time.perf_counter() - began < budget):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def set_threads(options: TrainerOptions, local_size: int = 1) -> None:
    """Fixes the number of CPU threads torch computes with in each of `local_size` processes."""
    share = 1 if options.reduce is Reduce.tree else max(1, len(os.sched_getaffinity(0)) // local_size)
    torch.set_num_threads(options.threads or share)


def threads_for(options: TrainerOptions, flops: float, before: int = 0) -> int:
    """CPU threads for a stage with `flops` FLOPs a step and process: as many as torch has, if they have work.

    The rest of the machine is left to what runs beside the training. 0, all that torch has, where the number
    is given or no CPU trains; `before`, of the run until it was stopped, as far as there are so many.
    """
    if options.threads or device_of(options).type != "cpu":
        return 0
    return max(1, min(torch.get_num_threads(), before or int(flops / FLOPS_A_THREAD)))


def allow_shapes(count: int) -> None:
    """Lets a compiled network be compiled once for each of `count` shapes of pictures, however many."""
    if count < 4:
        return  # torch's own limit is enough, and asking for it loads the compiler
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * count + 2)


def _bf16_instructions() -> str | None:
    """The CPU's instructions that multiply bfloat16 natively; None where it has none."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX512-BF16"
    return None
