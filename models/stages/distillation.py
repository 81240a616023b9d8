"""The distillation stage: a trained model in, a student out that makes pictures in a few unguided steps.

Student and teacher share the text encoder, which stays as it is. Beside the backbone a small decoder may be
trained, to decode as the autoencoder does what the teacher painted; the two share nothing.
"""

import copy
from collections.abc import Iterable

import torch
from lightning import LightningModule
from torch import Tensor, nn

from data.batch import Batch
from models.autoencoder import Autoencoder
from models.conditioning import Conditioning
from models.diffusion.distillation import Lesson
from models.diffusion.draws import Draws, Purpose
from models.diffusion.objective import Backbone
from models.loading import load_part
from models.pipeline import Pipeline
from models.sampling import Student
from models.stages.averages import Averaging
from models.stages.compute import Compute
from models.stages.ema import Ema
from models.stages.guard import Guard
from models.stages.losses import psnr_db
from models.stages.optim import OptimizerSettings
from models.stages.plan import Plan
from models.stages.sharded import Sharding
from models.text_encoder import TextEncoder
from models.tiny_decoder import TinyDecoder
from models.unet import UNet

#: The noise of the held-out loss never changes, so that its values compare between runs.
_VALIDATION_SEED = 1_000_003


class DistillationStage(LightningModule):
    """Trains the backbone of a student, and a small decoder where there is one.

    Args:
        autoencoder: frozen; its averaged weights.
        text_encoder: frozen, of teacher and student.
        backbone: the student's network; the teacher's is a frozen one like it, see `load_teacher`.
        decoder: learns to decode as the autoencoder does, or None.
        lesson: what is to be learnt.
        optimizer: its settings.
        plan: how long and in which portions; an image is a caption with noise.
        compute: where and in which precision.
        seed: of every random number.
        averaging: of the weights; by default with the plan's halflife.
    """

    name = "distillation"
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
        decoder: TinyDecoder | None,
        lesson: Lesson,
        optimizer: OptimizerSettings,
        plan: Plan,
        compute: Compute,
        seed: int,
        averaging: Averaging | None = None,
    ) -> None:
        super().__init__()
        networks: dict[str, nn.Module] = {"text_encoder": text_encoder, "backbone": backbone}
        if decoder is not None:
            networks["decoder"] = decoder
        self.networks = nn.ModuleDict(networks)
        self.text_encoder = text_encoder.requires_grad_(False)
        self.backbone = backbone
        self.decoder = decoder
        self.lesson = lesson
        self.optimizer_settings = optimizer
        self.plan = plan
        self.seed = seed
        self.images_seen = 0
        self.unlogged_losses: list[float] = []
        self.recent_losses: list[float] = []
        self.ema = Ema(self.networks, plan.ema_halflife_images, averaging)
        # In lists so that Lightning does not count what is frozen among what is trained.
        self._autoencoder = [autoencoder.eval().requires_grad_(False)]
        self._teacher = [copy.deepcopy(backbone).eval().requires_grad_(False)]
        self.use(compute)

    def use(self, compute: Compute) -> None:
        """Computes in the given way from now on."""
        self.compute = compute
        for network in (self.networks, *self.ema.networks, self._autoencoder[0], self._teacher[0]):
            compute.place(network)
        compute.set_blocks(self.networks)
        for network in (*self.ema.networks, self._autoencoder[0], self._teacher[0]):
            compute.set_kernels(network)
        self.empty_tokens = self.text_encoder.tokenize([""]).to(compute.device)
        self._backbone = compute.call(self.backbone)
        self._teach = compute.call(self._teacher[0])

    def configure_model(self) -> None:
        """Nothing: each rank has all of the networks."""

    def load_autoencoder(self, tensors: dict[str, Tensor], label: str) -> None:
        """Takes the weights of a finished autoencoder; CheckpointError if they are of another shape."""
        load_part(self._autoencoder[0], "autoencoder", tensors, label)

    def load_teacher(self, tensors: dict[str, Tensor], label: str) -> None:
        """Takes the weights of the teacher's backbone; CheckpointError if they are of another shape."""
        load_part(self._teacher[0], "backbone", tensors, label)

    def training_step(self, batch: Batch, step: int) -> None:
        """Leaves the step to the guard."""
        self.guard.step(batch, self.trainer.optimizers[0])

    def mean_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        losses, decoded, wanted = self._losses(self._backbone, self.decoder, batch, self.seed)
        if decoded is None or wanted is None:
            return losses.mean()
        return losses.mean() + (decoded - wanted).square().mean()

    def _losses(
        self, backbone: Backbone, decoder: nn.Module | None, batch: Batch, seed: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The student's loss of each sample `[B]`; pictures by both decoders, float32 `[B 3 H W]`, or None.

        Every random number is a function of `seed` and the sample's index.
        """
        autoencoder, draws = self._autoencoder[0], Draws(seed, batch.indices)
        h, w = (side // autoencoder.factor for side in batch.pixels.shape[2:])
        noise = draws.normal(Purpose.NOISE, (autoencoder.latent_channels, h, w))
        with self.compute.autocast():
            conditioning, null = self._conditioning(batch)
            teacher = self.lesson.teacher(self._teach, conditioning, null)
            losses, x0 = self.lesson(backbone, teacher, conditioning, self.compute.lay_out(noise))
            if decoder is None:
                return losses, None, None
            with torch.no_grad():
                wanted = autoencoder.decode(x0).float()
            return losses, decoder(x0).float(), wanted

    @torch.no_grad()
    def _conditioning(self, batch: Batch) -> tuple[Conditioning, Conditioning]:
        """That of the batch and that of the empty caption (B = 1)."""
        return self.text_encoder(torch.cat((batch.tokens, self.empty_tokens))).split_last()

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Held-out figures of the averaged weights, one number a sample: `loss`, and `decoder_psnr_db`.

        The latter is between the pictures of the small decoder and the autoencoder's, where there is one.
        """
        device, network = self.compute.device, self.ema.network
        decoder = None if self.decoder is None else network["decoder"]
        none = torch.zeros(0, device=device)
        losses, psnrs = [none], [none]
        for batch in batches:
            loss, decoded, wanted = self._losses(
                network["backbone"], decoder, batch.to(device), _VALIDATION_SEED
            )
            losses.append(loss)
            if decoded is not None and wanted is not None:
                psnrs.append(psnr_db(decoded, wanted.clamp(-1, 1)))
        found = {"loss": torch.cat(losses)}
        return found if decoder is None else found | {"decoder_psnr_db": torch.cat(psnrs)}

    def pipeline(self, resolution: int) -> Pipeline:
        """Makes pictures with the averaged weights."""
        network = self.ema.network
        text_encoder, backbone = network["text_encoder"], network["backbone"]
        decoder = None if self.decoder is None else network["decoder"]
        assert isinstance(text_encoder, TextEncoder)
        assert isinstance(backbone, UNet)
        assert decoder is None or isinstance(decoder, TinyDecoder)
        return Pipeline(
            self._autoencoder[0], text_encoder, backbone, self.lesson.objective, resolution,
            autocast=self.compute.autocast,
            student=Student(self.lesson.guidance_scale, self.lesson.times, decoder),
        )  # fmt: skip

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the trained networks."""
        return self.optimizer_settings.build(self.networks, self.compute.native)
