"""Makes pictures from a checkpoint and words; needs no lightning.

    python sample.py checkpoint=runs/landscapes prompt="a clear dawn over the sea, the sun on the left"
    python sample.py checkpoint=model.safetensors prompts_file=prompts.txt num_images=2 seed=7 output=pictures

The noise of picture k depends on the seed and on k alone. Matrix kernels change with the batch size, so that
a few values may differ by one level of 255 between batch sizes.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image

from conf.cli import main
from conf.schema import plain
from data.progress import Progress
from data.transforms import BadSample, decode_caption
from evaluation.report import contact_sheet
from models.pipeline import Sampling, load_pipeline
from models.registry import ConfigError, build


def sample(config: DictConfig) -> None:
    """Makes the pictures that the composed configuration describes: PNGs, a JSON record each, a sheet."""
    values = plain(config)
    prompts = read_prompts(values["prompt"], values["prompts_file"])
    for key in ("num_images", "batch_size", "num_steps"):
        if values[key] is not None and values[key] < 1:
            raise ConfigError(f"{key} is {values[key]}, but must be at least 1")
    if values["guidance_scale"] is not None and not math.isfinite(values["guidance_scale"]):
        raise ConfigError(
            f"guidance_scale is {values['guidance_scale']}, but must be a finite number, such as 3"
        )
    if values["checkpoint"] is None:
        raise ConfigError("checkpoint is not set; give a run's folder, such as checkpoint=runs/landscapes")
    checkpoint = Path(values["checkpoint"])
    device = choose_device(values["device"])
    pipeline, trained, sha256 = load_pipeline(checkpoint, device)
    sampling = choose_sampling(values, trained)
    size = values["size"] or pipeline.resolution
    pipeline.latent_side(size)
    output = Path(values["output"])
    output.mkdir(parents=True, exist_ok=True)

    jobs = [prompt for prompt in prompts for _ in range(values["num_images"])]
    with Progress("sampling", len(jobs)) as progress:
        images = pipeline(jobs, range(len(jobs)), sampling, size, values["batch_size"], progress.update)
    for k, (prompt, pixels) in enumerate(zip(jobs, images, strict=True)):
        record = {
            "prompt": prompt,
            "seed": sampling.seed,
            "index": k,
            "sampler": values["sampler"]["name"],
            "grid": values["grid"]["name"],
            "num_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "size": size,
            "checkpoint": str(checkpoint),
            "checkpoint_sha256": sha256,
        }
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(output / f"{k:05d}.png")
        (output / f"{k:05d}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    contact_sheet(images, jobs, columns=min(8, max(values["num_images"], 4))).save(
        output / "contact_sheet.png"
    )
    print(
        f"{len(jobs)} pictures and their records: {output}, all on one sheet: {output / 'contact_sheet.png'}"
    )


def read_prompts(prompt: Any, file: str | None) -> list[str]:
    """The prompts of the command line, or of a file with one a line; cleaned as training captions are.

    Raises:
        ConfigError: none given, both given, or not text.
    """
    if (prompt is None) == (file is None):
        raise ConfigError('give either prompt="..." or prompts_file=..., a text file with a prompt a line')
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"prompts_file: there is no file {path}")
        given: list[Any] = [line for line in path.read_bytes().splitlines() if line.strip()]
        if not given:
            raise ConfigError(f"prompts_file: {path} holds no prompt")
    else:
        given = prompt if isinstance(prompt, list) else [prompt]
    try:
        return [decode_caption(text if isinstance(text, bytes) else str(text).encode()) for text in given]
    except (BadSample, UnicodeEncodeError) as error:
        raise ConfigError(f"a prompt is not usable text: {error}") from None


def choose_device(name: str) -> torch.device:
    """The device to sample on; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: unknown, or a GPU is asked for and there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is '{name}', but must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but this machine has no usable GPU; use device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_sampling(values: dict[str, Any], trained: dict[str, Any]) -> Sampling:
    """How to sample: as asked for, else as the checkpoint was trained to be sampled."""
    defaults = trained["sampling"]
    scale, steps = values["guidance_scale"], values["num_steps"]
    return Sampling(
        float(defaults["guidance_scale"] if scale is None else scale),
        int(defaults["num_steps"] if steps is None else steps),
        build("sampler", values["sampler"]),
        build("grid", values["grid"]),
        seed=int(values["seed"]),
    )


if __name__ == "__main__":
    main("sample", sample)
