"""The autoencoder stage: pictures in, the same pictures out, through a few latent channels."""

from collections.abc import Iterable

import torch
from lightning import LightningModule
from torch import Tensor, nn

from data.batch import Batch
from models.autoencoder import Autoencoder
from models.diffusion.draws import Draws, Purpose
from models.stages.compute import Compute
from models.stages.ema import Ema
from models.stages.guard import Guard
from models.stages.losses import ReconstructionLoss, half, psnr_db
from models.stages.optim import OptimizerSettings
from models.stages.plan import Plan
from models.stages.sharded import Sharding, is_spread


class AutoencoderStage(LightningModule):
    """Trains the autoencoder; afterwards its latents are normalised to mean 0 and deviation 1 a channel.

    Args:
        autoencoder: the network.
        loss: distance of the pixels plus the KL term, and the distance at half size.
        optimizer: its settings.
        plan: how long and in which portions.
        compute: where and in which precision.
        seed: of every random number.
    """

    name = "autoencoder"
    #: Set by whoever trains.
    guard: Guard
    #: The guard computes loss and gradients in portions and applies them.
    automatic_optimization = False
    sharding: Sharding | None = None

    def __init__(
        self,
        autoencoder: Autoencoder,
        loss: ReconstructionLoss,
        optimizer: OptimizerSettings,
        plan: Plan,
        compute: Compute,
        seed: int,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({"autoencoder": autoencoder})
        self.autoencoder = autoencoder
        self.loss = loss
        self.optimizer_settings = optimizer
        self.plan = plan
        self.seed = seed
        self.images_seen = 0
        self.unlogged_losses: list[float] = []
        self.recent_losses: list[float] = []
        self.ema = Ema(self.networks, plan.ema_halflife_images)
        self.use(compute)

    def use(self, compute: Compute) -> None:
        """Computes in the given way from now on."""
        self.compute = compute
        if self.sharding is None:
            for network in (self.networks, self.ema.network):
                compute.place(network)
        compute.set_blocks(self.networks)
        compute.set_kernels(self.ema.network)
        self._encode = compute.wrap(self.autoencoder.encode)
        self._decode = compute.wrap(self.autoencoder.decode)

    def configure_model(self) -> None:
        """Spreads weights and average over the ranks, if that is how to train and not done yet."""
        if self.sharding is not None and not is_spread(self.networks):
            for network in (self.autoencoder, self._averaged()):
                # It is called by its parts, `encode` and `decode`, which know nothing of each other.
                self.sharding.spread(network.children())

    def training_step(self, batch: Batch, step: int) -> None:
        """Leaves the step to the guard."""
        self.guard.step(batch, self.trainer.optimizers[0])

    def mean_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        draws = Draws(self.seed, batch.indices)
        images = self.compute.lay_out(batch.images)
        with self.compute.autocast():
            moments = self._encode(images).float()
            noise = draws.normal(Purpose.POSTERIOR, (moments.shape[1] // 2, *moments.shape[2:]))
            latents = self.autoencoder.sample(moments, noise)
            decoded = self._decode(latents)
            small = self._decode(half(latents)) if self.loss.half_size_weight else None
        losses = self.loss(decoded, images, self.autoencoder.kl(moments), latents[0].numel())
        return (losses if small is None else losses + self.loss.at_half_size(small, images)).mean()

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Of the averaged weights, a sample: `loss` (distance of the pixels) and `psnr_db`."""
        network = self._averaged()
        losses, psnrs = ([torch.zeros(0, device=self.compute.device)] for _ in range(2))
        for batch in batches:
            images, decoded = self._reconstruct(network, batch)
            no_kl = torch.zeros(len(images), device=images.device)
            losses.append(self.loss(decoded, images, no_kl, 1))
            psnrs.append(psnr_db(decoded, images))
        return {"loss": torch.cat(losses), "psnr_db": torch.cat(psnrs)}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> Tensor:
        """Held-out images above their reconstructions, float32 `[2B 3 H W]` in [-1, 1]."""
        images, decoded = self._reconstruct(self._averaged(), batch)
        return torch.cat((images, decoded.clamp(-1, 1)))

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch]) -> None:
        """Sets the normalisation of the latents from `batches`, for the weights and their average."""
        network = self._averaged()
        means = []
        for batch in batches:
            with self.compute.autocast():
                moments = network.encode(self.compute.lay_out(batch.to(self.compute.device).images))
            means.append(moments.float().chunk(2, 1)[0].movedim(1, 0).flatten(1))
        values = torch.cat(means, 1)
        for each in (network, self.autoencoder):
            each.set_normalisation(values.mean(1), values.std(1).clamp(min=1e-4))

    def _averaged(self) -> Autoencoder:
        network = self.ema.network["autoencoder"]
        assert isinstance(network, Autoencoder)
        return network

    def _reconstruct(self, network: Autoencoder, batch: Batch) -> tuple[Tensor, Tensor]:
        images = self.compute.lay_out(batch.to(self.compute.device).images)
        with self.compute.autocast():
            decoded = network.decode(network.mode(network.encode(images).float()))
        return images, decoded.float()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the trained networks."""
        return self.optimizer_settings.build(self.networks, self.compute.native)
