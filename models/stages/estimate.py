"""What training would need, computed without allocating anything: parameters, FLOPs, memory, traffic.

The networks are built of fake tensors (torch's FakeTensorMode: shapes and types, no storage), one training
step of one sample is walked through them, and everything is counted on the way. `preflight` measures on this
machine what this page only computes, for any number of devices and for models that do not fit here.

What is counted: float32 weights, gradients, AdamW's two moments and the average, each divided by the devices
that share them; frozen networks whole; activations kept for the backward pass; what is gathered for a
moment; buffers of DDP. What is not: the allocator's waste and the library's own memory (a few GiB on a GPU).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.autoencoder import Autoencoder
from models.blocks import ResidualBlock, SpatialTransformer
from models.conditioning import Conditioning
from models.loading import build_networks
from models.registry import ConfigError, build
from models.stages.encoding import is_frozen
from models.text_encoder import TextBlock, TextEncoder
from models.unet import UNet

_FLOAT = 4
#: Float32 copies that a rank holds of its share: weights, gradients, AdamW's two moments, the average.
_COPIES = 5
#: What is gathered, recomputed and sharded as one piece.
BLOCKS = (ResidualBlock, SpatialTransformer, TextBlock)
#: Memory of common accelerators in GiB, of which a tenth is left to the allocator and the libraries.
CARDS, _USABLE = (8, 12, 16, 24, 40, 48, 80, 141, 192), 0.9
#: Of an H200: dense bfloat16 FLOP a second by its data sheet, the share of them that NVIDIA's MLPerf Training
#: v4.0 submission for Stable Diffusion 2 reached, and an assumed price of an hour in dollars. docs/scaling.md
#: has the sources.
PEAK, MFU, HOURLY = 989e12, 0.314, 3.0


@dataclass(frozen=True)
class Layout:
    """How `replicas` x `shards` ranks hold a model: each replica is spread over its shards.

    `replicas` 1 is FSDP, `shards` 1 is DDP, and neither is HSDP (Zhao et al. 2023, arXiv 2304.11277).
    """

    replicas: int
    shards: int

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.replicas * self.shards

    @property
    def name(self) -> str:
        """As `trainer.strategy` names it."""
        if self.shards == 1:
            return "ddp" if self.replicas > 1 else "one device"
        return "fsdp" if self.replicas == 1 else f"hsdp {self.replicas}x{self.shards}"

    def traffic(self, parameters: int) -> float:
        """Bytes that a rank sends in a step, as rings do it.

        Inside a replica, parameters are gathered for each pass and gradients scattered: 3 (S-1)/S of them.
        Between replicas the shards' gradients are summed: 2 (R-1)/R of P/S.
        """
        R, S = self.replicas, self.shards
        within, between = 3 * (S - 1) / S, 2 * (R - 1) / R / S
        return (within + between) * parameters * _FLOAT


@dataclass(frozen=True)
class Anatomy:
    """What one sample costs, by counting.

    Args:
        trained: parameters that are trained.
        frozen: parameters that are not.
        block: parameters of the largest block.
        flops: of one sample's training step, by network; forward alone where it is frozen.
        activations: bytes kept for the backward pass of one sample.
        recomputed: the same with activation checkpointing: every block's inputs, and one block whole.
    """

    trained: int
    frozen: int
    block: int
    flops: Mapping[str, float]
    activations: float
    recomputed: float

    def memory(self, layout: Layout, samples: int, checkpointing: bool) -> float:
        """Peak bytes of a rank that walks `samples` at a time."""
        states = _COPIES * self.trained * _FLOAT / layout.shards
        gathered = 2 * self.block * _FLOAT if layout.shards > 1 else 0  # one in use, the next on its way
        buckets = self.trained * _FLOAT if layout.shards == 1 and layout.replicas > 1 else 0
        kept = self.recomputed if checkpointing else self.activations
        return states + self.frozen * _FLOAT + gathered + buckets + kept * samples


def dissect(values: Mapping[str, Any], bf16: bool) -> Anatomy:
    """What a sample of the run that the configuration `values` describes costs in its diffusion stage.

    Args:
        values: the run's configuration; weights of a frozen text tower need not be there.
        bf16: whether activations are kept in bfloat16.

    Raises:
        ConfigError: networks that cannot be built.
    """
    config = copy.deepcopy(dict(values))
    if "allow_random" in config["text_encoder"]:
        config["text_encoder"] |= {"pretrained": None, "allow_random": True}
    with FakeTensorMode():
        autoencoder, text_encoder, backbone = build_networks(config)
        side = int(values["data"]["resolution"])
        latent = side // autoencoder.factor
        if side % (autoencoder.factor * backbone.min_divisor):
            raise ConfigError(
                f"data.resolution is {side}, but must be a multiple of "
                f"{autoencoder.factor * backbone.min_divisor}"
            )
        precomputed = values["data"]["precomputed"] is not None
        flops = {} if precomputed else {"autoencoder": coding_flops(autoencoder, side)[0]}
        kept = _Kept((text_encoder, backbone), bf16)
        with FlopCounterMode(display=False) as counter, kept:
            conditioning = text_encoder(torch.zeros(1, text_encoder.context_length, dtype=torch.int64))
            told = float(counter.get_total_flops())
            _step(backbone, conditioning, latent)
        whole = float(counter.get_total_flops())
    if is_frozen(text_encoder):
        flops |= {"text encoder": told, "backbone": whole - told}
    else:  # backwards twice as much as forwards, as everywhere in matrix products
        flops |= {"text encoder": 3 * told, "backbone": whole - 3 * told}
    networks = [text_encoder, backbone]
    trained = sum(p.numel() for n in networks for p in n.parameters() if p.requires_grad)
    total = sum(p.numel() for n in (*networks, autoencoder) for p in n.parameters())
    blocks = [m for n in networks for m in n.modules() if isinstance(m, BLOCKS)]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    return Anatomy(trained, total - trained, largest, flops, kept.total, kept.recomputed)


def coding_flops(autoencoder: Autoencoder, side: int) -> tuple[float, float]:
    """FLOPs of one picture's moments, and of decoding one; `side` in pixels."""
    latents = torch.zeros(1, autoencoder.latent_channels, *(2 * [side // autoencoder.factor]))
    found = []
    for code, given in ((autoencoder.encode, torch.zeros(1, 3, side, side)), (autoencoder.decode, latents)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            code(given)
        found.append(float(counter.get_total_flops()))
    return found[0], found[1]


def show_autoencoder(values: Mapping[str, Any], images: int, devices: int) -> None:
    """Prints what the autoencoder stage of `images` costs, and what the moments of a million pictures do."""
    with FakeTensorMode():
        autoencoder = build("autoencoder", values["autoencoder"])
        encoding, decoding = coding_flops(autoencoder, int(values["data"]["resolution"]))
    halves = 1 / 4 if values["reconstruction"].get("half_size_weight") else 0  # decoded at half the side too
    parameters = sum(p.numel() for p in autoencoder.parameters())
    step = 3 * (encoding + (1 + halves) * decoding)
    print(
        f"Autoencoder stage: {parameters / 1e6:,.1f} M parameters; {step / 1e9:,.1f} GFLOP an image. "
        f"{in_hours(step * images, images, devices)} Moments of a million pictures: "
        f"{device_hours(encoding * 1e6):.2g} device-hours."
    )


def device_hours(flops: float) -> float:
    """Hours of an H200 for so many FLOPs, at the published MFU."""
    return flops / (PEAK * MFU) / 3600


def in_hours(flops: float, images: int, devices: int) -> str:
    """What so many FLOPs for so many images take, in words."""
    hours = device_hours(flops)
    shared = f", {_long(hours / devices)} on {devices}" if devices > 1 else ""
    return (
        f"For {images:,} images {flops:.3g} FLOP: {_long(hours)} of an H200 at {MFU:.1%} of "
        f"{PEAK / 1e12:,.0f} TFLOP/s (assumed){shared}; ${hours * HOURLY:,.2f} at ${HOURLY:g} an hour."
    )


def _long(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.2g} minutes"


def _step(backbone: UNet, conditioning: Conditioning, latent: int) -> None:
    x = torch.zeros(1, backbone.latent_channels, latent, latent)
    if backbone.image_conditioning:
        conditioning = conditioning.with_image(x)
    backbone(x, torch.zeros(1), conditioning).float().square().mean().backward()


class _Kept:
    """Counts the bytes that a forward pass keeps for its backward pass, in all and block by block.

    Fake tensors are walked in float32, where the attention of torch keeps no scores, as the kernels of GPUs
    do; with `bf16` its bytes count half. A tensor that two operations keep is one.
    """

    def __init__(self, networks: tuple[TextEncoder, UNet], bf16: bool) -> None:
        self.networks = networks
        self.scale = 0.5 if bf16 else 1.0
        self._own = {_identity(p) for n in networks for p in n.parameters()}
        self._sizes: dict[int, int] = {}
        self._inside: set[int] | None = None
        self._in_blocks: set[int] = set()
        self._inputs, self._largest = 0, 0
        self._alive: list[Tensor] = []  # so that no identity is given twice
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Kept":
        for network in self.networks:
            for module in network.modules():
                if isinstance(module, BLOCKS):
                    self._hooks.append(module.register_forward_pre_hook(self._enter))
                    self._hooks.append(module.register_forward_hook(self._leave))
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._saving.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._saving.__exit__()
        for hook in self._hooks:
            hook.remove()
        self._alive.clear()

    def _keep(self, tensor: Tensor) -> Tensor:
        place = _identity(tensor)
        if place not in self._own:
            self._sizes.setdefault(place, tensor.untyped_storage().nbytes())
            self._alive.append(tensor)
            if self._inside is not None:
                self._inside.add(place)
        return tensor

    def _enter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inside = set()
        self._inputs += inputs[0].untyped_storage().nbytes()

    def _leave(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert self._inside is not None
        self._largest = max(self._largest, sum(self._sizes[place] for place in self._inside))
        self._in_blocks |= self._inside
        self._inside = None

    @property
    def total(self) -> float:
        """Bytes kept in all."""
        return sum(self._sizes.values()) * self.scale

    @property
    def recomputed(self) -> float:
        """Bytes kept where blocks keep their inputs alone and are walked again one at a time."""
        outside = sum(size for place, size in self._sizes.items() if place not in self._in_blocks)
        return min(self.total, (outside + self._inputs + self._largest) * self.scale)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def layouts(devices: int, shards: int) -> list[Layout]:
    """What `devices` ranks can be: DDP, FSDP, and HSDP in groups of `shards` (0: a machine's 8, else half).

    Raises:
        ConfigError: shards that do not divide the devices.
    """
    if devices == 1:
        return [Layout(1, 1)]
    if shards > 1 and devices % shards:
        raise ConfigError(f"trainer.shards is {shards}, but does not divide {devices} devices")
    group = shards or (8 if devices > 8 and devices % 8 == 0 else devices // 2)
    hybrid = [Layout(devices // group, group)] if 1 < group < devices and devices % group == 0 else []
    return [Layout(devices, 1), Layout(1, devices), *hybrid]


def show_estimate(anatomy: Anatomy, given: list[Layout], batch: int, accumulate: int, images: int) -> None:
    """Prints what a sample costs, and what each layout asks of a rank, with and without checkpointing.

    Args:
        anatomy: of the model.
        given: the layouts to compare, of as many ranks each.
        batch: images a step over all ranks.
        accumulate: portions in which a rank walks its share.
        images: of the whole stage.

    Raises:
        ConfigError: a batch that cannot be shared out.
    """
    ranks = given[0].ranks
    portions = ranks * accumulate
    if batch % portions:
        low = batch // portions * portions
        nearest = f"{low} and {low + portions}" if low else f"{portions}"
        raise ConfigError(
            f"plan.diffusion.batch_size is {batch}, but must divide by {ranks} devices x {accumulate} "
            f"portions; nearest: {nearest}"
        )
    samples = batch // ranks // accumulate
    total = sum(anatomy.flops.values())
    print(
        f"Diffusion stage: {anatomy.trained / 1e6:,.1f} M parameters trained, {anatomy.frozen / 1e6:,.1f} M "
        f"frozen; {total / 1e9:,.1f} GFLOP an image ("
        + ", ".join(f"{name} {value / 1e9:,.1f}" for name, value in anatomy.flops.items())
        + f"). {in_hours(total * images, images, ranks)}"
    )
    table = Table(
        title=f"{ranks} devices, {batch} images a step, {samples} at a time on each", title_justify="left"
    )
    for heading in ("strategy", "activations", "memory a device", "smallest card", "sent a step by each"):
        table.add_column(heading)
    for layout in given:
        for checkpointing in (False, True):
            memory = anatomy.memory(layout, samples, checkpointing)
            sent = layout.traffic(anatomy.trained)
            table.add_row(
                layout.name,
                "recomputed" if checkpointing else "kept",
                f"{memory / 2**30:,.2f} GiB",
                smallest_card(memory),
                f"{sent / 2**30:,.2f} GiB" if sent else "-",
            )
    Console(width=110, soft_wrap=False).print(table)


def smallest_card(memory: float) -> str:
    """The smallest common accelerator that holds `memory` bytes, with a tenth to spare."""
    fits = [card for card in CARDS if memory <= _USABLE * card * 2**30]
    return f"{fits[0]} GB" if fits else "none"
