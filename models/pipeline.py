"""Prompts to pictures: text encoder, denoiser, guidance, sampler and decoder in their order.

Joins networks and mathematics, as `models.registry`, `sampling` and `loading` do. Training, `sample.py` and
the evaluation all make pictures through it, so they make the same ones; on a CPU, those on the way of a
training are the same to rounding, as its networks are native. Needs no lightning.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from models.autoencoder import Autoencoder
from models.canvas import composite, soften, to_latents
from models.conditioning import Conditioning
from models.diffusion.denoiser import Denoiser
from models.diffusion.draws import Draws, Purpose
from models.diffusion.editing import Tiled, inpaint, interpolate, resampled, slerp, start
from models.diffusion.guidance import Branch, ConditionalDenoiser, Denoise
from models.diffusion.objective import Objective
from models.portions import PIXELS, TEXTS, PortionedBackbone, Portions, rows_for
from models.registry import ConfigError, build, did_you_mean
from models.sampling import STRENGTH, Job, Sampling, Student
from models.text_encoder import TextEncoder
from models.unet import UNet

#: Latent columns of the other end that a ring's decoder sees.
RIM = 16
#: Told after every step: `(step number from 1, how the pictures look by now, uint8 [B 3 H W])`.
Preview = Callable[[int, Tensor], None]


class Pipeline:
    """Makes pictures.

        pipeline = Pipeline.from_checkpoint("runs/landscapes")
        pipeline("a clear dawn over the sea, the sun on the left", seed=7)[0].save("dawn.png")

    Args:
        autoencoder: decodes the latents.
        text_encoder: encodes the prompts.
        backbone: the denoiser's network.
        objective: whose schedule and parameterization the backbone was trained with.
        resolution: pixels a side that it was trained at.
        autocast: context in which the networks run.
        defaults: how its pictures are made where a call does not say.
        described: the parts of `defaults` as a configuration names them.
        student: what the backbone was distilled for, where it was.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        backbone: UNet,
        objective: Objective,
        resolution: int,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        defaults: Sampling | None = None,
        described: Mapping[str, Any] | None = None,
        student: Student | None = None,
    ) -> None:
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.backbone = backbone
        self.device = autoencoder.latent_mean.device
        self.portions = Portions(autocast) if self.device.type == "cpu" else None
        network = backbone if self.portions is None else PortionedBackbone(backbone, self.portions)
        self.denoiser = Denoiser(network, objective.schedule, objective.parameterization)
        self.edits = backbone.image_conditioning
        self.min_divisor = backbone.min_divisor
        self.resolution = resolution
        self.defaults = defaults
        self.described = dict(described or {})
        self.autocast = autocast
        self.weaker: Pipeline | None = None
        self.student = student
        self.full_decoder = False

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | torch.device = "auto") -> "Pipeline":
        """The pipeline of a run's folder, or of a file that `scripts/export.py` wrote.

        Raises:
            CheckpointError: nothing there, damaged, or stages that do not belong together.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        from models.loading import load_pipeline

        return load_pipeline(Path(path), torch.device(device))[0]

    def __call__(
        self, prompts: str | Sequence[str], num_images: int = 1, **options: Any
    ) -> list[Image.Image]:
        """`num_images` pictures of each prompt, one prompt after another.

        Args:
            prompts: one or several.
            num_images: of each.
            options: `size`, and fields of `Sampling` and `Job`: seed, num_steps, guidance_scale, sampler (an
                object or a name such as "heun"), negative_prompt, image and others; what is not given is as
                the checkpoint was trained to be sampled.

        Raises:
            ConfigError: an unknown option, or a value that cannot be used.
        """
        size = options.pop("size", None)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        given = {field.name: field.init for field in (*fields(Job)[2:], *fields(Sampling))}
        for name in options:
            if name not in given:
                raise ConfigError(f"there is no option '{name}'{did_you_mean(name, given)}")
        of_jobs = {field.name: options.pop(field.name) for field in fields(Job) if field.name in options}
        if self.defaults is None:
            raise ConfigError("this pipeline has no defaults; call generate with a Sampling")
        for group in ("sampler", "grid", "guidance"):
            if isinstance(options.get(group), str):
                options[group] = build(group, {"name": options[group]})
        for key in ("image", "mask", "before"):
            if of_jobs.get(key) is not None and not isinstance(of_jobs[key], Tensor):
                raise ConfigError(f"{key} is no tensor; bring a picture to size with data.pictures.fit")
        if self.edits and "before" not in of_jobs and "image" in of_jobs:
            of_jobs["before"] = of_jobs.pop("image")
        if of_jobs.get("image") is not None and of_jobs.get("mask") is None:
            options.setdefault("strength", STRENGTH)
        if of_jobs.get("other_prompt") and not of_jobs.get("share"):
            raise ConfigError("other_prompt has no part in the picture; give share as well, such as 0.5")
        each = [text for text in texts for _ in range(num_images)]
        jobs = [Job(text, k, **of_jobs) for k, text in enumerate(each)]
        made = self.generate(jobs, replace(self.defaults, **options), size)
        return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in made]

    @torch.no_grad()
    def generate(
        self,
        jobs: Sequence[Job],
        sampling: Sampling,
        size: int | tuple[int, int] | None = None,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
        preview: Preview | None = None,
    ) -> Tensor:
        """One picture a job, uint8 `[N 3 H W]` on the CPU.

        On a CPU a picture's bytes depend on its own job, on `sampling` and on `size` alone, neither on the
        batch it is made in nor on the pictures before it.

        Args:
            jobs: what to make, all alike in which pictures they come with.
            sampling: how to make them.
            size: pixels a side, or (width, height); None is that of the jobs' pictures, or else the training
                resolution.
            batch_size: pictures made at once.
            progress: told how many pictures are done.
            preview: told after every step how the pictures of the batch look.

        Raises:
            ConfigError: a size the networks cannot make, or jobs that are not alike or ask for what the
                checkpoint was not trained for.
            FloatingPointError: a picture is not finite.
        """
        latent_size = self.check(jobs, sampling, size)
        done = []
        for first in range(0, len(jobs), batch_size):
            some = list(jobs[first : first + batch_size])
            with self.autocast():
                done.append(self._batch(some, sampling, latent_size, preview))
            if progress is not None:
                progress(first + len(some))
        return torch.cat(done)

    def check(
        self, jobs: Sequence[Job], sampling: Sampling, size: int | tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """The size (h, w) of latents for `jobs`; raises ConfigError where `generate` would."""
        if not jobs:
            raise ConfigError("there is nothing to make: give at least one prompt")
        if any(job.kind != jobs[0].kind for job in jobs):
            raise ConfigError("the pictures that the jobs come with differ in kind or size; make them apart")
        if (jobs[0].before is not None) != self.edits:
            raise ConfigError(
                "this checkpoint edits pictures by instruction; give one with image=..."
                if self.edits
                else "this checkpoint was not trained to edit by instruction; give image and strength to "
                "start from a picture"
            )
        if jobs[0].image is None and sampling.strength < 1:
            raise ConfigError(f"strength is {sampling.strength}, but there is no image to start from")
        given = [part for part in (jobs[0].image, jobs[0].before) if part is not None]
        if size is None and given:
            size = (given[0].shape[2], given[0].shape[1])
        sampling.times(self.denoiser.schedule)
        if self.student is not None:
            self.student.check(sampling, self.denoiser.schedule)
        h, w = self.latent_size(size)
        if sampling.wrap and w * self.autoencoder.factor <= self.resolution:
            raise ConfigError(f"wrap closes pictures wider than {self.resolution} pixels; give a larger size")
        f = self.autoencoder.factor
        for part in given:
            if tuple(part.shape[1:]) != (h * f, w * f):
                raise ConfigError(
                    f"a picture of {part.shape[2]}x{part.shape[1]} for a size of {w * f}x{h * f}"
                )
        return h, w

    def _batch(
        self, jobs: list[Job], sampling: Sampling, size: tuple[int, int], preview: Preview | None
    ) -> Tensor:
        schedule, sampler = self.denoiser.schedule, sampling.sampler
        times = sampling.times(schedule)
        draws = Draws(sampling.seed, torch.tensor([job.index for job in jobs], device=self.device))
        shape = (self.autoencoder.latent_channels, *size)
        noise = draws.normal(Purpose.INITIAL_NOISE, shape)
        if sampling.variation:
            others = Draws(sampling.variation_seed, draws.indices).normal(Purpose.VARIATION_NOISE, shape)
            noise = slerp(noise, others, sampling.variation)
        denoise = self._guided(jobs, sampling)
        x0 = torch.zeros_like(noise)
        known, masks = self._stack([job.image for job in jobs]), self._stack([job.mask for job in jobs])
        if known is not None:
            x0 = self._latents(known)
        if masks is not None:
            masks = soften(masks[:, None].float(), sampling.feather)
            denoise = inpaint(denoise, x0, to_latents(masks, self.autoencoder.factor))
            sampler = resampled(sampler, sampling.repaint)

        def told(step: int, x: Tensor, x0: Tensor) -> None:
            if preview is not None:
                preview(step, to_uint8(self._decode(x0, sampling.wrap)).cpu())

        step_noise = partial(draws.normal, Purpose.STEP_NOISE, shape)
        x = start(schedule, x0, noise, times)
        images = self._decode(sampler(denoise, schedule, x, times, step_noise, told), sampling.wrap)
        if not torch.isfinite(images).all():
            raise FloatingPointError(
                "sampling gave numbers that are not finite; lower guidance_scale, or use a checkpoint from "
                "before its training diverged"
            )
        pixels = to_uint8(images)
        if known is not None and masks is not None:
            pixels = composite(pixels, known, masks)
        return pixels.cpu()

    def _guided(self, jobs: list[Job], sampling: Sampling) -> Denoise:
        """The denoiser of the jobs' prompts, guided as asked."""
        conditioning = self._told(jobs)
        window = self.resolution // self.autoencoder.factor

        def tiled(denoiser: ConditionalDenoiser) -> ConditionalDenoiser:
            return Tiled(denoiser, window, window // 2, sampling.wrap) if sampling.tiled else denoiser

        text, s = sampling.guidance_scale, sampling.image_guidance_scale
        before = self._stack([job.before for job in jobs])
        if before is not None:
            picture = self._latents(before)
            null = self._encode([job.negative_prompt for job in jobs])
            # Brooks et al. 2023 (arXiv 2211.09800), eq. 3, as weights of three branches.
            branches = [
                Branch(1 - s, null.with_image(torch.zeros_like(picture))),
                Branch(s - text, null.with_image(picture)),
                Branch(text, conditioning.with_image(picture)),
            ]
        elif self.weaker is not None:
            branches = [
                Branch(1 - text, self.weaker._told(jobs), tiled(self.weaker.denoiser)),
                Branch(text, conditioning),
            ]
        elif text == 1:
            branches = [Branch(1.0, conditioning)]
        else:
            null = self._encode([job.negative_prompt for job in jobs])
            branches = [Branch(1 - text, null), Branch(text, conditioning)]
        return sampling.guidance.combine(tiled(self.denoiser), branches)

    def guided_by(self, weaker: "Pipeline") -> None:
        """Guides by a smaller or earlier checkpoint on the same latents instead of by the empty prompt.

        Autoguidance (Karras et al. 2024, arXiv 2406.02507). Negative prompts have no part in it.

        Raises:
            ConfigError: `weaker` has another autoencoder or objective, or either edits by instruction.
        """
        mine, theirs = (each.autoencoder.state_dict() for each in (self, weaker))
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[key], theirs[key]) for key in mine):
            raise ConfigError("the weaker checkpoint has another autoencoder; take one of the same run")
        if self.student is not None:
            raise ConfigError(
                "a student has its guidance built in; sample its teacher with a weaker checkpoint"
            )
        if self.edits or weaker.edits:
            raise ConfigError("a checkpoint that edits by instruction is not guided by a weaker one")
        t = torch.linspace(0, 1, 101)
        ours, other = self.denoiser.schedule(t), weaker.denoiser.schedule(t)
        if not all(torch.equal(a, b) for a, b in zip(ours, other, strict=True)):
            raise ConfigError("the weaker checkpoint has another schedule; take one of the same run")
        self.weaker = weaker

    def _told(self, jobs: list[Job]) -> Conditioning:
        """The conditioning of the jobs' prompts, mixed with their other ones."""
        conditioning = self._encode([job.prompt for job in jobs])
        if not any(job.share for job in jobs):
            return conditioning
        others = self._encode([job.other_prompt for job in jobs])
        rows = torch.arange(len(jobs), device=self.device)[:, None]
        return Conditioning.cat(
            [
                interpolate(conditioning.take(row), others.take(row), job.share)
                for row, job in zip(rows, jobs, strict=True)
            ]
        )

    def _stack(self, parts: Sequence[Tensor | None]) -> Tensor | None:
        given = [part for part in parts if part is not None]
        return torch.stack(given).to(self.device) if given else None

    def _encode(self, prompts: list[str]) -> Conditioning:
        """The conditioning of the prompts, each different one encoded once."""
        texts = list(dict.fromkeys(prompts))
        rows = torch.tensor([texts.index(prompt) for prompt in prompts], device=self.device)
        if self.portions is None:
            return self.text_encoder.encode(texts).take(rows)
        tokens = self.text_encoder.tokenize(texts)
        made: list[Conditioning] = []

        def states(tokens: Tensor) -> Tensor:
            made.append(self.text_encoder(tokens))
            return made[-1].tokens

        for few in tokens.split(TEXTS):  # one portion at a time, as each gives three tensors
            self.portions(TEXTS, states, few)
        return Conditioning.cat(made).take(rows)

    def _latents(self, images: Tensor) -> Tensor:
        """The normalised latents `[B C h w]` of pictures uint8 `[B 3 H W]`: the mean of their posterior."""
        pixels = images.to(self.device).float() / 127.5 - 1
        moments = self._in_portions(self.autoencoder.encode, pixels, pixels.shape[2:]).float()
        return self.autoencoder.sample(moments, torch.zeros_like(moments[:, : moments.shape[1] // 2]))

    def _decode(self, latents: Tensor, wrap: bool) -> Tensor:
        """Pictures float32 `[B 3 H W]` in about [-1, 1]; `wrap` decodes a ring, whose ends meet."""
        f, rim = self.autoencoder.factor, min(RIM, latents.shape[3]) if wrap else 0
        if wrap:
            latents = functional.pad(latents, (rim, rim, 0, 0), "circular")
        sides = (latents.shape[2] * f, latents.shape[3] * f)
        images = self._in_portions(self._decoder(), latents, sides).float()
        return images[..., rim * f : images.shape[3] - rim * f]

    def _decoder(self) -> Callable[[Tensor], Tensor]:
        """What turns latents into pictures: a student's small decoder, where it has one and it is wanted."""
        small = None if self.student is None or self.full_decoder else self.student.decoder
        return self.autoencoder.decode if small is None else small

    def decode_fully(self) -> None:
        """Decodes with the autoencoder's decoder from now on, though a student brought a smaller one.

        Raises:
            ConfigError: there is no other one.
        """
        if self.student is None or self.student.decoder is None:
            raise ConfigError(
                "full_decoder has no effect here: the checkpoint has no decoder but the autoencoder's; "
                "leave it out"
            )
        self.full_decoder = True

    def _in_portions(self, network: Callable[[Tensor], Tensor], x: Tensor, sides: Sequence[int]) -> Tensor:
        return network(x) if self.portions is None else self.portions(rows_for(PIXELS, *sides), network, x)

    def latent_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Latent positions (h, w) of a picture of `size` pixels: a side, or (width, height).

        Raises:
            ConfigError: a side is not a multiple of what autoencoder and backbone halve it by.
        """
        size = self.resolution if size is None else size
        width, height = (size, size) if isinstance(size, int) else size
        for side in (width, height):
            check_size("size", side, self.autoencoder, self.min_divisor)
        return height // self.autoencoder.factor, width // self.autoencoder.factor


def check_size(label: str, size: int, autoencoder: Autoencoder, min_divisor: int) -> None:
    """Raises ConfigError where pictures of `size` pixels cannot be halved as often as the networks do it."""
    step = autoencoder.factor * min_divisor
    if size < step or size % step:
        low = max(size // step, 1) * step
        raise ConfigError(
            f"{label} is {size}, but autoencoder and backbone need a multiple of {step}; the nearest are "
            f"{low} and {low + step}"
        )


def to_uint8(images: Tensor) -> Tensor:
    """Pictures `[B 3 H W]` in [-1, 1] as uint8, clipped and rounded to the nearest level."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
