"""The running averages of the weights, which count in images."""

import copy

import torch
from torch import nn

from models.stages.averages import Averaging, HalflifeAverage
from models.stages.sharded import local


class Ema:
    """Moving averages of a network's weights, each kept as another network in evaluation mode.

    Args:
        network: the one that is trained; it is copied.
        halflife_images: images until a weight's share in the average has halved.
        averaging: which averages, and how; by default the one of that halflife.
    """

    def __init__(
        self, network: nn.ModuleDict, halflife_images: int, averaging: Averaging | None = None
    ) -> None:
        self.averaging = HalflifeAverage() if averaging is None else averaging
        self.halflife_images = halflife_images
        #: The averaged networks: never compiled, no gradients.
        self.networks = [copy.deepcopy(network) for _ in range(max(1, len(self.averaging.sigma_rel)))]
        for each in self.networks:
            each.eval().requires_grad_(False)

    @property
    def network(self) -> nn.ModuleDict:
        """The average that makes pictures and is measured: the first."""
        return self.networks[0]

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Moves the averages towards `network` after a step that brought the count to `images_seen`."""
        shares = self.averaging.towards(images_seen, batch_size, self.halflife_images)
        for average, towards in zip(self.networks, shares, strict=True):
            # Of weights that are spread over ranks each averages its part.
            mine, theirs = ([local(p) for p in each.parameters()] for each in (average, network))
            torch._foreach_lerp_(mine, theirs, towards)
            for buffer, other in zip(average.buffers(), network.buffers(), strict=True):
                buffer.copy_(other)

    def named(self) -> dict[str, nn.ModuleDict]:
        """The averaged networks by the names of their files."""
        return {"ema" if i == 0 else f"ema_{i}": network for i, network in enumerate(self.networks)}
