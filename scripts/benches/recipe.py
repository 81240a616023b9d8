"""What diffusers' text-to-image training does, as a plain loop: what `bench.py quality` compares ours with.

The facts are those of diffusers' train_text_to_image example: UNet2DConditionModel predicts the noise of a
DDPM schedule of 1,000 scaled-linear betas at whole timesteps drawn uniformly, by mean squared error; AdamW
(0.9, 0.999, weight decay 0.01 on all), constant learning rate after a warm-up, gradients clipped to norm 1,
an average of the weights; autoencoder and text encoder run in every step, on pixels and tokens.

Where that recipe cannot be followed from nothing, it is given what helps it: the text encoder is of the same
kind as ours and trained along (there are nobody's weights), captions are dropped 10 % of the time (guidance
needs it), the network modulates by scale and shift and sees the pooled text (diffusers' switches that ours
uses too), the warm-up is ten steps, no more than a short budget bears, the average's halflife is a tenth of
the images so far, and AdamW is one fused kernel. Its text is not masked, as in Stable Diffusion.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import Batch
from models.autoencoder import Autoencoder
from models.conditioning import Conditioning
from models.diffusers_layout import unet_from_diffusers
from models.diffusion.schedules import LinearSchedule
from models.registry import build
from models.stages.compute import Compute
from models.stages.ema import Ema
from models.text_encoder import TextEncoder
from scripts.benches.step_arms import GRADIENT_CLIP, Theirs

TIMESTEPS = 1000
CAPTION_DROPOUT = 0.1
WARMUP_IMAGES = 320


class Patched(nn.Module):
    """diffusers' UNet on patches of p x p latents, which lie in the channels; as it is with p = 1."""

    def __init__(self, theirs: Theirs, patch_size: int) -> None:
        super().__init__()
        self.theirs = theirs
        self.patch_size = patch_size

    def forward(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output = self.theirs(F.pixel_unshuffle(x, self.patch_size), timesteps, conditioning)
        return F.pixel_shuffle(output, self.patch_size)


class Recipe:
    """The loop: a step at a time, and the averaged weights as our networks name them.

    Args:
        backbone: name and options of the UNet of ours that diffusers' is built like; no position map.
        autoencoder: frozen, with the normalisation of its latents.
        text_encoder: trained along; without a mask of its padding.
        lr: learning rate after the warm-up.
        seed: of the weights of the UNet, the noise, the timesteps and the captions that are dropped.
        compute: where and in which precision.

    Raises:
        ValueError: a text encoder that masks its padding, which diffusers' network would not see.
        ConfigError: diffusers is not installed.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        lr: float,
        seed: int,
        compute: Compute,
    ) -> None:
        if text_encoder.mask_padding:
            raise ValueError("the recipe's text is not masked; give a text encoder with mask_padding=false")
        patch_size = int(backbone.get("patch_size", 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = build(
                "backbone",
                {**backbone, "patch_size": 1},
                latent_channels=autoencoder.latent_channels * patch_size**2,
                conditioning_dim=text_encoder.dim,
            )
            network = Patched(Theirs(unet), patch_size)
        self.networks = nn.ModuleDict({"text_encoder": text_encoder, "backbone": network})
        self.text_encoder, self.network = text_encoder, network
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        # A halflife that is never reached: it stays at the tenth of the images seen that `Ema` allows.
        self.ema = Ema(self.networks, halflife_images=2**40)
        for each in (self.networks, self.autoencoder, *self.ema.networks):
            compute.place(each)
        self.compute = compute
        self.call = compute.call(network)
        self.parameters = [p for p in self.networks.parameters() if p.requires_grad]
        self.lr = lr
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8, fused=True
        )
        self.schedule = LinearSchedule()
        self.rng = torch.Generator().manual_seed(seed)
        self.empty = text_encoder.tokenize([""]).to(compute.device)
        self.images_seen = 0

    def step(self, batch: Batch) -> float:
        """Makes one training step and returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.images_seen + 1) / (WARMUP_IMAGES + 1))
        loss = self.loss(batch.to(self.compute.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.images_seen += len(batch)
        self.ema.update(self.networks, self.images_seen, len(batch))
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """The mean squared error of the predicted noise, a float32 scalar."""
        B, compute = len(batch), self.compute
        timesteps = torch.randint(TIMESTEPS, (B,), generator=self.rng)
        dropped = torch.rand(B, generator=self.rng) < CAPTION_DROPOUT
        alpha, sigma = (
            each[:, None, None, None].to(compute.device)
            for each in self.schedule(self.schedule.discrete_time(timesteps))
        )
        with compute.autocast():
            with torch.no_grad():
                moments = self.autoencoder.encode(compute.lay_out(batch.images)).float()
                latents = self.autoencoder.sample(moments, self._noise(self.autoencoder.mode(moments)))
            noise = self._noise(latents)
            tokens = torch.where(dropped[:, None].to(compute.device), self.empty, batch.tokens)
            x_t = compute.lay_out(alpha * latents + sigma * noise)
            predicted = self.call(x_t, timesteps.to(compute.device), self.text_encoder(tokens))
        return F.mse_loss(predicted.float(), noise)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights of text encoder and UNet, named as our networks of `backbone` name them."""
        network = self.ema.network["backbone"]
        assert isinstance(network, Patched)
        text = self.ema.network["text_encoder"].state_dict()
        unet = unet_from_diffusers(network.theirs.network.state_dict())
        return {
            **{f"text_encoder.{key}": tensor for key, tensor in text.items()},
            **{f"backbone.{key}": tensor for key, tensor in unet.items()},
        }

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.rng).to(like.device)
