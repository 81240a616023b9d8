"""Prompts to pictures: text encoder, denoiser, guidance, sampler and decoder in their order.

The one place besides `models.registry` that joins networks and mathematics. Training, `sample.py` and the
evaluation all make pictures through it, so they make the same ones. Needs no lightning.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.checkpoint import CheckpointError, fingerprint, load_single_file, newest, save_single_file
from models.diffusion.denoiser import Denoiser
from models.diffusion.draws import Draws, Purpose
from models.diffusion.guidance import classifier_free
from models.diffusion.objective import Objective
from models.diffusion.samplers import Grid, Sampler
from models.registry import ConfigError, build
from models.text_encoder import TextEncoder
from models.unet import UNet

#: Parts of a run's configuration that its pictures depend on, kept in every diffusion checkpoint.
MODEL_KEYS = (
    "autoencoder",
    "text_encoder",
    "backbone",
    "objective",
    "sampler",
    "grid",
    "sampling",
    "resolution",
)
EXPORT_FORMAT = "firstlight-1"


@dataclass(frozen=True)
class Sampling:
    """How pictures are made from noise.

    Args:
        guidance_scale: 1 = conditional only; any finite number.
        num_steps: denoiser steps, at least 1.
        sampler: how to integrate.
        grid: the times to visit.
        seed: of the noise.

    Raises:
        ConfigError: a number out of range.
    """

    guidance_scale: float
    num_steps: int
    sampler: Sampler
    grid: Grid
    seed: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise ConfigError(
                f"guidance_scale is {self.guidance_scale}, but must be a finite number, such as 3"
            )
        if self.num_steps < 1:
            raise ConfigError(f"num_steps is {self.num_steps}, but must be at least 1")


class Pipeline:
    """Makes pictures.

    Args:
        autoencoder: decodes the latents.
        text_encoder: encodes the prompts.
        backbone: the denoiser's network.
        objective: whose schedule and parameterization the backbone was trained with.
        resolution: pixels a side that it was trained at.
        autocast: context in which the networks run.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        backbone: UNet,
        objective: Objective,
        resolution: int,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.denoiser = Denoiser(backbone, objective.schedule, objective.parameterization)
        self.min_divisor = backbone.min_divisor
        self.resolution = resolution
        self.autocast = autocast

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        indices: Sequence[int],
        sampling: Sampling,
        size: int | None = None,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """One picture a prompt, uint8 `[N 3 H W]` on the CPU.

        The noise of a picture depends on `sampling.seed` and its own entry of `indices` alone, neither on the
        batch it is made in nor on the pictures before it.

        Args:
            prompts: texts; an empty one is the unconditional model.
            indices: number of each picture.
            sampling: how to make them.
            size: pixels a side; None is the training resolution.
            batch_size: pictures made at once.
            progress: told how many pictures are done.

        Raises:
            ConfigError: a size the networks cannot make.
            FloatingPointError: a picture is not finite.
        """
        side = self.latent_side(self.resolution if size is None else size)
        done = []
        for start in range(0, len(prompts), batch_size):
            stop = min(start + batch_size, len(prompts))
            done.append(self._batch(list(prompts[start:stop]), list(indices[start:stop]), sampling, side))
            if progress is not None:
                progress(stop)
        return torch.cat(done)

    def _batch(self, prompts: list[str], indices: list[int], sampling: Sampling, side: int) -> Tensor:
        schedule = self.denoiser.schedule
        times = sampling.grid(schedule, sampling.num_steps)
        numbers = torch.tensor(indices, device=self.autoencoder.latent_mean.device)
        shape = (self.autoencoder.latent_channels, side, side)
        noise = Draws(sampling.seed, numbers).normal(Purpose.INITIAL_NOISE, shape)
        with self.autocast():
            conditioning, null = self.text_encoder.encode([*prompts, ""]).split_last()
            guided = classifier_free(
                self.denoiser, conditioning, null.expand(len(prompts)), sampling.guidance_scale
            )
            x = float(schedule(times[:1]).sigma) * noise
            images = self.autoencoder.decode(sampling.sampler(guided, schedule, x, times, None)).float()
        if not torch.isfinite(images).all():
            raise FloatingPointError(
                "sampling gave numbers that are not finite; lower guidance_scale, or use a checkpoint from "
                "before its training diverged"
            )
        return to_uint8(images).cpu()

    def latent_side(self, size: int) -> int:
        """Latent positions a side of a picture of `size` pixels.

        Raises:
            ConfigError: `size` is not a multiple of what autoencoder and backbone halve it by.
        """
        check_size("size", size, self.autoencoder, self.min_divisor)
        return size // self.autoencoder.factor


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


def load_pipeline(path: Path, device: torch.device) -> tuple[Pipeline, dict[str, Any], str]:
    """The pipeline at `path`, the configuration it was trained with, and the SHA-256 of its checkpoint.

    Args:
        path: a run's folder (its newest verified checkpoints are taken) or a file that `export` wrote.
        device: where the networks go.

    Raises:
        CheckpointError: nothing there, damaged, or stages that do not belong together.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such run folder or file; train one with: python train.py")
    tensors, config, sha256 = _read_run(path) if path.is_dir() else _read_export(path)
    try:
        networks = build_networks(config)
        objective: Objective = build("objective", config["objective"])
        resolution = int(config["resolution"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be built: {error}") from None
    for name, network in zip(("autoencoder", "text_encoder", "backbone"), networks, strict=True):
        mine = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        load_weights(network, mine, f"{path}: {name}")
        network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return Pipeline(*networks, objective, resolution), config, sha256


def build_networks(config: dict[str, Any]) -> tuple[Autoencoder, TextEncoder, UNet]:
    """Autoencoder, text encoder and backbone that `config` describes, with fresh weights."""
    autoencoder: Autoencoder = build("autoencoder", config["autoencoder"])
    text_encoder: TextEncoder = build("text_encoder", config["text_encoder"])
    backbone: UNet = build(
        "backbone",
        config["backbone"],
        latent_channels=autoencoder.latent_channels,
        conditioning_dim=text_encoder.dim,
    )
    return autoencoder, text_encoder, backbone


def load_weights(network: torch.nn.Module, tensors: dict[str, Tensor], label: str) -> None:
    """Puts `tensors` into `network`.

    Raises:
        CheckpointError: names or shapes differ; the message lists the first few.
    """
    mine = network.state_dict()
    wrong = [f"{k}: missing" for k in mine.keys() - tensors.keys()]
    wrong += [f"{k}: not in the network" for k in tensors.keys() - mine.keys()]
    wrong += [
        f"{k}: {tuple(tensors[k].shape)} in the checkpoint, {tuple(mine[k].shape)} in the network"
        for k in mine.keys() & tensors.keys()
        if mine[k].shape != tensors[k].shape
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:3])
        raise CheckpointError(
            f"{label}: the checkpoint is of another shape than the configuration ({len(wrong)} differences: "
            f"{shown}); use the configuration it was trained with, or another run name"
        )
    network.load_state_dict(tensors)


def export(run: Path, target: Path) -> None:
    """Writes the averaged weights and the configuration of the run in folder `run` as one safetensors file.

    Raises:
        CheckpointError: as `load_pipeline`.
        OSError: the target cannot be written.
    """
    tensors, config, sha256 = _read_run(run)
    metadata = {"format": EXPORT_FORMAT, "config": json.dumps(config), "checkpoint_sha256": sha256}
    save_single_file(target, tensors, metadata)


def _read_run(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    diffusion = newest(path / "diffusion" / "checkpoints")
    autoencoder = newest(path / "autoencoder" / "checkpoints")
    if diffusion is None or autoencoder is None:
        missing = "diffusion" if diffusion is None else "autoencoder"
        raise CheckpointError(f"{path}: has no verified {missing} checkpoint; train it with: python train.py")
    config = diffusion.document("config")
    tensors = {**autoencoder.tensors("ema"), **diffusion.tensors("ema")}
    mine = {k: v for k, v in tensors.items() if k.startswith("autoencoder.")}
    if fingerprint(mine) != diffusion.document("state")["autoencoder"]:
        raise CheckpointError(
            f"{path}: the diffusion checkpoint was trained on the latents of another autoencoder; train it "
            "again with: python train.py stages=[diffusion]"
        )
    return tensors, config, diffusion.sha256


def _read_export(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    tensors, metadata, sha256 = load_single_file(path)
    if metadata.get("format") != EXPORT_FORMAT:
        raise CheckpointError(
            f"{path}: not a model exported by scripts/export.py (no format {EXPORT_FORMAT!r})"
        )
    try:
        config = json.loads(metadata["config"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration is damaged ({error!r})") from None
    return tensors, config, metadata.get("checkpoint_sha256", sha256)
