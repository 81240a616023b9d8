"""Our UNet and diffusers' with the same weights, the training step that both make, and proof that they agree.

Both learn the same targets from the same batches with the same optimizer; `Theirs` gives diffusers' network
the interface of ours, so that there is one training step and not two that may differ.
"""

import warnings
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.conditioning import Conditioning
from models.diffusers_layout import unet_config, unet_to_diffusers
from models.registry import ConfigError, build
from models.stages.compute import Compute
from models.stages.optim import AdamW
from models.unet import UNet

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
GRADIENT_CLIP = 1.0


class NotEqualError(ArithmeticError):
    """The two networks do not compute the same, so that there is nothing to compare."""


@dataclass(frozen=True)
class Problem:
    """What is trained on what.

    Args:
        backbone: name and options of the UNet, as a configuration has them.
        width: of the text states.
        length: tokens of a text.
        side: of the latents.
        latent_channels: of the latents.
    """

    backbone: dict[str, Any]
    width: int
    length: int
    side: int
    latent_channels: int = 4

    def unet(self) -> UNet:
        """Our network, every weight drawn from a seed of its own.

        Zero-initialised branches are drawn too: they would hide a wrong name, and half of the gradients.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network: UNet = build(
                "backbone",
                self.backbone,
                latent_channels=self.latent_channels,
                conditioning_dim=self.width,
            )
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.ndim < 2:
                        parameter.add_(0.1 * torch.randn_like(parameter))
                    else:
                        parameter.normal_(std=parameter[0].numel() ** -0.5)
        return network

    def batch(self, size: int, number: int) -> "Batch":
        """`size` samples of noise; `number` says which."""
        rng = torch.Generator().manual_seed(number)
        shape = (size, self.latent_channels, self.side, self.side)
        conditioning = Conditioning(
            torch.randn(size, self.length, self.width, generator=rng),
            torch.ones(size, self.length, dtype=torch.bool),
            torch.randn(size, self.width, generator=rng),
        )
        c_noise = 1000 * torch.rand(size, generator=rng)
        return Batch(
            torch.randn(shape, generator=rng), c_noise, conditioning, torch.randn(shape, generator=rng)
        )

    def flops(self, network: nn.Module) -> float:
        """FLOPs of a sample's forward and backward pass through `network`, which lies on the meta device."""
        # Here, as counting is no part of a step, whose memory is measured with what is imported.
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        batch = self.batch(1, 0).to(torch.device("meta"))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss(network(*batch.inputs), batch).backward()
        return float(counter.get_total_flops())

    def document(self) -> dict[str, Any]:
        """The problem as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Noisy latents `[B C h w]`, noise levels `[B]`, what the texts say, and targets `[B C h w]`."""

    x: Tensor
    c_noise: Tensor
    conditioning: Conditioning
    target: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Conditioning]:
        """What a network takes."""
        return self.x, self.c_noise, self.conditioning

    def to(self, device: torch.device) -> Self:
        """This batch on `device`."""
        tensors = self.x.to(device), self.c_noise.to(device), self.conditioning.to(device)
        return type(self)(*tensors, self.target.to(device))

    def lay_out(self, compute: Compute) -> Self:
        """This batch where and in the memory layout in which `compute` computes."""
        x, target = (compute.lay_out(each.to(compute.device)) for each in (self.x, self.target))
        return type(self)(x, self.c_noise.to(compute.device), self.conditioning.to(compute.device), target)


class Theirs(nn.Module):
    """diffusers' UNet2DConditionModel of the configuration of `unet`, called as ours is.

    It gets no mask of the text, as nobody's training gives it one: the texts here have no padding.

    Raises:
        ConfigError: diffusers is not installed.
        ValueError: it has no such network.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from diffusers import UNet2DConditionModel
        except ImportError as error:
            raise ConfigError(
                f"diffusers is what ours is compared with, but: {error}; install the extra `dev`"
            ) from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network: Any = UNet2DConditionModel(**unet_config(unet))
        self.network: nn.Module = network
        self.pooled = unet.pooled_embedding is not None

    def take(self, unet: UNet) -> Self:
        """Itself, with the weights of `unet`."""
        self.network.load_state_dict(unet_to_diffusers(unet.state_dict()))
        return self

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(
            x,
            c_noise,
            encoder_hidden_states=conditioning.tokens,
            class_labels=conditioning.pooled if self.pooled else None,
            return_dict=False,
        )[0]


def loss(output: Tensor, batch: Batch) -> Tensor:
    """The mean squared error, in float32."""
    return F.mse_loss(output.float(), batch.target)


class Steps:
    """Makes training steps: forward, loss, backward, gradient norm, fused AdamW, gradients dropped.

    Args:
        network: that is trained.
        compute: how.
        batches: walked round and round.
    """

    def __init__(self, network: nn.Module, compute: Compute, batches: list[Batch]) -> None:
        compute.place(network)
        compute.set_blocks(network)
        self.compute = compute
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = AdamW(lr=1e-4).build(network)
        self._call = compute.call(network)
        self._batches = [batch.lay_out(compute) for batch in batches]
        self._made = 0

    def step(self) -> int:
        """Makes one, waits until it is done, and returns its number of samples."""
        batch = self._batches[self._made % len(self._batches)]
        self._made += 1
        with self.compute.autocast():
            output = self._call(*batch.inputs)
        loss(output, batch).backward()
        nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()
        return len(batch.c_noise)


def parity(ours: UNet, theirs: Theirs, batch: Batch) -> dict[str, float]:
    """The largest errors of output and gradients, relative to the largest value of each tensor.

    Both compute in float32 on the CPU, where nothing rounds to less.

    Raises:
        NotEqualError: output or a gradient, by diffusers' name, differs by more than is allowed.
    """
    outputs = []
    for network in (ours, theirs):
        output = network(*batch.inputs)
        loss(output, batch).backward()
        outputs.append(output.detach())
    mine = unet_to_diffusers({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    their = {name: p.grad for name, p in theirs.network.named_parameters() if p.grad is not None}
    if mine.keys() != their.keys():
        raise NotEqualError(f"gradients of one network alone: {sorted(mine.keys() ^ their.keys())[:3]}")
    errors = {name: _error(mine[name], gradient) for name, gradient in their.items()}
    output, worst = _error(*outputs), max(errors, key=lambda name: errors[name])
    for network in (ours, theirs):
        network.zero_grad(set_to_none=True)
    if not output <= OUTPUT_TOLERANCE:
        raise NotEqualError(
            f"our output is {output:.1e} from diffusers' of the same weights, {OUTPUT_TOLERANCE:g} allowed: "
            "nothing is timed"
        )
    if not errors[worst] <= GRADIENT_TOLERANCE:
        raise NotEqualError(
            f"our gradient of {worst} is {errors[worst]:.1e} from diffusers', {GRADIENT_TOLERANCE:g} "
            "allowed: nothing is timed"
        )
    return {"output": output, "gradient": errors[worst]}


def _error(one: Tensor, other: Tensor) -> float:
    """The largest difference beside the largest value; NaN stays NaN, which no tolerance allows."""
    return float((one - other).abs().max() / other.abs().max())
