"""The running average of the weights, whose halflife is counted in images."""

import copy

import torch
from torch import nn

from models.stages.sharded import local

#: The halflife never exceeds this share of the images seen, so that the random first weights fade early.
_RAMP = 0.1


class Ema:
    """An exponential moving average of a network's weights, kept as a second network in evaluation mode.

    Args:
        network: the one that is trained; it is copied.
        halflife_images: images until a weight's share in the average has halved.
    """

    def __init__(self, network: nn.ModuleDict, halflife_images: int) -> None:
        #: The averaged network: never compiled, no gradients.
        self.network: nn.ModuleDict = copy.deepcopy(network)
        self.network.eval().requires_grad_(False)
        self.halflife_images = halflife_images

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Moves the average towards `network` after a step that brought the count to `images_seen`."""
        halflife = max(min(self.halflife_images, _RAMP * images_seen), 1e-8)
        towards = 1 - 0.5 ** (batch_size / halflife)
        mine, theirs = ([local(p) for p in each.parameters()] for each in (self.network, network))
        torch._foreach_lerp_(mine, theirs, towards)  # of weights that are spread, each rank averages its part
        for buffer, other in zip(self.network.buffers(), network.buffers(), strict=True):
            buffer.copy_(other)
