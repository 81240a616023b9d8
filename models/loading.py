"""From files to networks and back: a run's folder or an exported file as a `Pipeline`, and the export itself.

Everything is verified before it is used: the SHA-256 of each file, the shape of each tensor, and that the
diffusion stage was trained on the latents of this very autoencoder. Names of parts come from the checkpoint's
JSON and are looked up in `models.registry`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.checkpoint import (
    Checkpoint,
    CheckpointError,
    fingerprint,
    load_single_file,
    newest,
    save_single_file,
)
from models.diffusion.guidance import Guidance
from models.diffusion.objective import Objective
from models.pipeline import Pipeline
from models.registry import ConfigError, build
from models.sampling import Sampling, Student
from models.text_encoder import TextEncoder
from models.tiny_decoder import TinyDecoder
from models.unet import UNet

#: Parts of a run's configuration that its pictures depend on, kept in every diffusion checkpoint.
MODEL_KEYS = (
    "autoencoder",
    "text_encoder",
    "backbone",
    "objective",
    "sampler",
    "grid",
    "guidance",
    "sampling",
    "resolution",
)
#: What a student's configuration has besides: `guidance_scale` and `decoder`, built in by distillation.
STUDENT_KEY = "student"
#: Stages whose checkpoints make pictures of prompts; a run that has both is sampled as the first says.
PICTURING = ("distillation", "diffusion")
EXPORT_FORMAT = "firstlight-1"


def load_pipeline(path: Path, device: torch.device) -> tuple[Pipeline, dict[str, Any], str]:
    """The pipeline at `path`, the configuration it was trained with, and the SHA-256 of its checkpoint.

    Args:
        path: a run's folder (its newest verified checkpoints are taken), one of its diffusion checkpoints, or
            a file that `export` wrote.
        device: where the networks go.

    Raises:
        CheckpointError: nothing there, damaged, or stages that do not belong together.
    """
    tensors, config, sha256 = read_model(path)
    try:
        networks = build_networks(config)
        objective: Objective = build("objective", config["objective"])
        resolution = int(config["resolution"])
        defaults = read_sampling(config)
        parts: dict[str, Any] = {
            group: config[group] for group in ("sampler", "grid", "guidance") if group in config
        }
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be built: {error}") from None
    for name, network in zip(("autoencoder", "text_encoder", "backbone"), networks, strict=True):
        load_part(network, name, tensors, f"{path}: {name}")
        ready(network, device)
    student = None
    if STUDENT_KEY in config:
        times = defaults.times(objective.schedule)
        student = read_student(config[STUDENT_KEY], tensors, networks[0], times, path, device)
    pipeline = Pipeline(*networks, objective, resolution, defaults=defaults, described=parts, student=student)
    return pipeline, config, sha256


def ready(network: torch.nn.Module, device: torch.device) -> None:
    """Puts `network` where and how it makes pictures."""
    network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def read_student(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    autoencoder: Autoencoder,
    times: Tensor,
    path: Path,
    device: torch.device,
) -> Student:
    """What the model of `tensors` was distilled for, as `values` of its configuration say.

    Raises:
        CheckpointError: its small decoder cannot be built, or is of another shape.
    """
    try:
        scale = float(values["guidance_scale"])
        decoder = build_decoder(values["decoder"], autoencoder)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its student cannot be built: {error}") from None
    if decoder is not None:
        load_part(decoder, "decoder", tensors, f"{path}: decoder")
        ready(decoder, device)
    return Student(scale, times, decoder)


def build_decoder(config: Mapping[str, Any] | None, autoencoder: Autoencoder) -> TinyDecoder | None:
    """The small decoder that `config` describes, with fresh weights; None where it is none.

    Raises:
        ConfigError: a value that cannot be used.
    """
    if config is None:
        return None
    decoder: TinyDecoder = build(
        "decoder", config, latent_channels=autoencoder.latent_channels, factor=autoencoder.factor
    )
    return decoder


def newest_picturing(run: Path) -> Checkpoint | None:
    """The newest verified checkpoint of the run in folder `run` that makes pictures, a student's first."""
    found = (newest(run / stage / "checkpoints") for stage in PICTURING)
    return next((checkpoint for checkpoint in found if checkpoint is not None), None)


def read_sampling(config: Mapping[str, Any]) -> Sampling:
    """How a run's pictures are made by default, as its configuration says.

    Raises:
        ConfigError: a value that cannot be used.
    """
    values = config["sampling"]
    guidance: Guidance = build("guidance", config["guidance"]) if "guidance" in config else Guidance()
    return Sampling(
        float(values["guidance_scale"]),
        int(values["num_steps"]),
        build("sampler", config["sampler"]),
        build("grid", config["grid"]),
        seed=0,
        guidance=guidance,
        image_guidance_scale=float(values.get("image_guidance_scale", Sampling.image_guidance_scale)),
    )


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The averaged weights of all three networks at `path`, their configuration, and a SHA-256 of them.

    Args:
        path: a run's folder (its newest verified checkpoints are taken) or a file that `export` wrote.

    Raises:
        CheckpointError: nothing there, damaged, or stages that do not belong together.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such run folder or file; train one with: python train.py")
    return _read_run(path) if path.is_dir() else _read_export(path)


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


def load_part(network: torch.nn.Module, name: str, tensors: Mapping[str, Tensor], label: str) -> None:
    """Puts those of `tensors` that are called `name.` and more into `network`, as `load_weights` does."""
    mine = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    load_weights(network, mine, label)


def load_weights(network: torch.nn.Module, tensors: dict[str, Tensor], label: str) -> None:
    """Puts `tensors` into `network`.

    Raises:
        CheckpointError: names or shapes differ; the message lists the first few.
    """
    mine, theirs = ({k: tuple(t.shape) for k, t in each.items()} for each in (network.state_dict(), tensors))
    require_shapes(mine, theirs, label)
    network.load_state_dict(tensors)


def require_shapes(
    mine: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], label: str
) -> None:
    """Compares names and shapes of a network's tensors, `mine`, with those of a checkpoint, `theirs`.

    Raises:
        CheckpointError: they differ; the message lists the first few.
    """
    wrong = [f"{k}: missing" for k in mine.keys() - theirs.keys()]
    wrong += [f"{k}: not in the network" for k in theirs.keys() - mine.keys()]
    wrong += [
        f"{k}: {theirs[k]} in the checkpoint, {mine[k]} in the network"
        for k in mine.keys() & theirs.keys()
        if mine[k] != theirs[k]
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:3])
        raise CheckpointError(
            f"{label}: the checkpoint is of another shape than the configuration ({len(wrong)} differences: "
            f"{shown}); use the configuration it was trained with, or another run name"
        )


def export(run: Path, target: Path, averages: Mapping[str, Tensor] | None = None) -> None:
    """Writes the averaged weights and the configuration of the run in folder `run` as one safetensors file.

    Args:
        run: its folder.
        target: the file.
        averages: taken instead of those of the run's diffusion stage; all of its tensors.

    Raises:
        CheckpointError: as `load_pipeline`.
        OSError: the target cannot be written.
    """
    tensors, config, sha256 = _read_run(run)
    if averages is not None:
        trained = {k: tuple(t.shape) for k, t in tensors.items() if not k.startswith("autoencoder.")}
        require_shapes(trained, {k: tuple(t.shape) for k, t in averages.items()}, str(run))
        tensors |= averages
    metadata = {"format": EXPORT_FORMAT, "config": json.dumps(config), "checkpoint_sha256": sha256}
    save_single_file(target, tensors, metadata)


def _read_run(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    whole = path.absolute()
    one = whole.parent.name == "checkpoints"  # one of a run's checkpoints, which may not be its newest
    run = whole.parents[2] if one else path
    diffusion = Checkpoint(path) if one else newest_picturing(run)
    autoencoder = newest(run / "autoencoder" / "checkpoints")
    if diffusion is None or autoencoder is None:
        missing = "diffusion" if diffusion is None else "autoencoder"
        raise CheckpointError(f"{path}: has no verified {missing} checkpoint; train it with: python train.py")
    if diffusion.document("state")["stage"] not in PICTURING:
        raise CheckpointError(f"{path}: is a checkpoint of another stage; give the run, or one of diffusion")
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
