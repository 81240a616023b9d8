"""The diffusion stage: latents and captions in, a denoiser out; the text encoder is trained along with it.

Where the backbone takes a picture, a batch is of pairs: the stage learns to make the second picture of the
first and of an instruction (InstructPix2Pix, Brooks et al. 2023, arXiv 2211.09800).
"""

from collections.abc import Iterable

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import Batch
from models.autoencoder import Autoencoder
from models.conditioning import Conditioning
from models.diffusion.draws import Draws, Purpose
from models.diffusion.objective import Backbone, Objective
from models.loading import load_part
from models.pipeline import Pipeline
from models.stages.averages import Averaging
from models.stages.compute import Compute
from models.stages.dropout import check_dropout, without_picture, without_text
from models.stages.ema import Ema
from models.stages.encoding import is_frozen
from models.stages.guard import Guard
from models.stages.optim import OptimizerSettings
from models.stages.plan import Plan
from models.stages.sharded import Sharding, is_spread
from models.text_encoder import TextEncoder
from models.unet import UNet

#: The times and the noise of the held-out loss never change, so that its values compare between runs.
_VALIDATION_SEED = 1_000_003


class DiffusionStage(LightningModule):
    """Trains backbone and text encoder on the latents of a finished autoencoder.

    Args:
        autoencoder: frozen; its averaged weights.
        text_encoder: trained where it has parameters that require gradients.
        backbone: the denoiser's network.
        objective: the loss.
        conditioning_dropout: probability of training without the caption, which guidance needs; for pairs
            also that of training without the picture, half of it together.
        optimizer: its settings.
        plan: how long and in which portions.
        compute: where and in which precision.
        seed: of every random number.
        averaging: of the weights; by default with the plan's halflife.
    """

    name = "diffusion"
    #: Set by whoever trains.
    guard: Guard
    #: The guard computes loss and gradients in portions and applies them.
    automatic_optimization = False
    sharding: Sharding | None = None

    def __init__(
        self,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        backbone: UNet,
        objective: Objective,
        conditioning_dropout: float,
        optimizer: OptimizerSettings,
        plan: Plan,
        compute: Compute,
        seed: int,
        averaging: Averaging | None = None,
    ) -> None:
        super().__init__()
        check_dropout(conditioning_dropout, backbone)
        self.networks = nn.ModuleDict({"text_encoder": text_encoder, "backbone": backbone})
        self.text_encoder = text_encoder
        self.backbone = backbone
        self.objective = objective
        self.conditioning_dropout = conditioning_dropout
        self.optimizer_settings = optimizer
        self.plan = plan
        self.seed = seed
        self.images_seen = 0
        self.unlogged_losses: list[float] = []
        self.recent_losses: list[float] = []
        self.ema = Ema(self.networks, plan.ema_halflife_images, averaging)
        # In a list so that Lightning does not count the frozen autoencoder among what is trained.
        self._autoencoder = [autoencoder.eval().requires_grad_(False)]
        self.use(compute)

    def use(self, compute: Compute) -> None:
        """Computes in the given way from now on."""
        self.compute = compute
        for network in (self.networks, *self.ema.networks) if self.sharding is None else ():
            compute.place(network)
        compute.place(self._autoencoder[0])
        compute.set_blocks(self.networks)
        for each in (*self.ema.networks, self._autoencoder[0]):
            compute.set_kernels(each)
        self.empty_tokens = self.text_encoder.tokenize([""]).to(compute.device)
        self._stored_null: Conditioning | None = None
        self._backbone = compute.call(self.backbone)

    def configure_model(self) -> None:
        """Spreads weights and average over the ranks, if that is how to train and not done yet."""
        if self.sharding is not None and not is_spread(self.networks):
            for networks in (self.networks, *self.ema.networks):
                self.sharding.spread(networks.children())

    def load_autoencoder(self, tensors: dict[str, Tensor], label: str) -> None:
        """Takes the weights of a finished autoencoder; CheckpointError if they are of another shape."""
        load_part(self._autoencoder[0], "autoencoder", tensors, label)

    def training_step(self, batch: Batch, step: int) -> None:
        """Leaves the step to the guard."""
        self.guard.step(batch, self.trainer.optimizers[0])

    def mean_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self._loss(
            self.text_encoder, self._backbone, batch, self.seed, self.conditioning_dropout
        ).mean()

    def _loss(
        self, text_encoder: TextEncoder, backbone: Backbone, batch: Batch, seed: int, dropout: float
    ) -> Tensor:
        """Loss of each sample, float32 `[B]`; every random number is a function of `seed` and its index."""
        draws = Draws(seed, batch.indices)
        with self.compute.autocast():
            x0 = self._latents(batch, draws)
            conditioning, null = self._conditioning(text_encoder, batch)
            u = draws.uniform(Purpose.CONDITIONING_DROPOUT)
            told = conditioning.replace(without_text(u, dropout), null)
            if self.backbone.image_conditioning:
                told = told.with_image(
                    self._before(batch) * ~without_picture(u, dropout)[:, None, None, None]
                )
            return self.objective(backbone, x0, told, draws)

    @torch.no_grad()
    def _before(self, batch: Batch) -> Tensor:
        """The latents of the pictures to be edited, at their posterior's mean: one picture, one meaning."""
        if batch.before is None:
            raise ValueError("the backbone takes a picture and the batch has none; set data.before")
        autoencoder = self._autoencoder[0]
        moments = autoencoder.encode(self.compute.lay_out(batch.images_before)).float()
        return self.compute.lay_out(autoencoder.mode(moments))

    def _conditioning(self, text_encoder: TextEncoder, batch: Batch) -> tuple[Conditioning, Conditioning]:
        """That of the batch and that of the empty caption (B = 1), encoded, or from stored embeddings.

        Stored ones are padded to the context length whatever the batch, so that a compiled backbone sees one
        shape; the mask keeps the padding out of every attention.
        """
        if batch.text is None:
            tokens = torch.cat((batch.tokens, self.empty_tokens))  # one call encodes the null caption too
            return text_encoder(tokens).split_last()
        null = self._null_of_stored()
        tokens, mask, pooled = batch.text
        missing = max(0, null.tokens.shape[1] - tokens.shape[1])
        padded = F.pad(tokens.float(), (0, 0, 0, missing)), F.pad(mask, (0, missing))
        return Conditioning(*padded, pooled.float()).replace(~mask.any(1), null), null

    @torch.no_grad()
    def _null_of_stored(self) -> Conditioning:
        """The conditioning of the empty caption, encoded once; ValueError where the encoder is trained."""
        if self._stored_null is None:
            if not is_frozen(self.text_encoder):
                raise ValueError(
                    "stored text embeddings are those of a text encoder that stays as it is, but this one is "
                    "trained; train on the moments alone"
                )
            self._stored_null = self.text_encoder(self.empty_tokens)
        return self._stored_null

    @torch.no_grad()
    def _latents(self, batch: Batch, draws: Draws) -> Tensor:
        autoencoder = self._autoencoder[0]
        if batch.moments is None:
            moments = autoencoder.encode(self.compute.lay_out(batch.images)).float()
        else:
            moments = batch.moments.float()
        noise = draws.normal(Purpose.POSTERIOR, (moments.shape[1] // 2, *moments.shape[2:]))
        return self.compute.lay_out(autoencoder.sample(moments, noise))

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """The held-out `loss` of the averaged weights a sample, at times and noise that never change."""
        text_encoder, backbone = self._averaged()
        losses = [
            self._loss(text_encoder, backbone, batch.to(self.compute.device), _VALIDATION_SEED, 0.0)
            for batch in batches
        ]
        return {"loss": torch.cat([torch.zeros(0, device=self.compute.device), *losses])}

    def pipeline(self, resolution: int) -> Pipeline:
        """Makes pictures with the averaged weights."""
        text_encoder, backbone = self._averaged()
        return Pipeline(
            self._autoencoder[0], text_encoder, backbone, self.objective, resolution,
            autocast=self.compute.autocast,
        )  # fmt: skip

    def _averaged(self) -> tuple[TextEncoder, UNet]:
        text_encoder, backbone = self.ema.network["text_encoder"], self.ema.network["backbone"]
        assert isinstance(text_encoder, TextEncoder)
        assert isinstance(backbone, UNet)
        return text_encoder, backbone

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the trained networks."""
        return self.optimizer_settings.build(self.networks, self.compute.native)
