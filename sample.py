"""Makes pictures from a checkpoint and words; needs no lightning.

    python sample.py checkpoint=runs/landscapes prompt="a clear dawn over the sea, the sun on the left"
    python sample.py checkpoint=model.safetensors prompts_file=prompts.txt num_images=2 seed=7 output=pictures
    python sample.py checkpoint=runs/landscapes prompt="a cloudy noon over hills" image=photo.png strength=0.6
    python sample.py verify=samples/00000.png

On a CPU a picture's bytes depend on its prompt, its number, the seed and the settings alone: not on the
batch, the pictures before it, an interruption, or how many processes share the work (RANK and WORLD_SIZE, as
torchrun sets them). The same command goes on where it was interrupted.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from conf.cli import main
from conf.schema import plain
from data.credentials import Signer, read_credentials
from data.fields import BadSample, decode_caption
from data.index import DataError
from data.pictures import (
    Look,
    PictureFormat,
    as_mask,
    encode_picture,
    fit,
    read_mask,
    read_picture,
    read_record,
)
from evaluation.gallery import Work, make
from models.canvas import extended
from models.loading import load_pipeline
from models.pipeline import Pipeline
from models.registry import ConfigError, build
from models.sampling import STRENGTH, Job, Sampling

VERSION = "0.1.0"
MAX_PICTURES = 1_000_000
#: Sides of a picture in one piece and of a tiled one, as multiples of the training resolution.
MAX_WHOLE, MAX_TILED = 8, 64


def sample(config: DictConfig) -> None:
    """Makes the pictures that the composed configuration describes: files, a JSON record each, a sheet."""
    values = plain(config)
    if values["verify"] is not None:
        verify(Path(str(values["verify"])))
        return
    check_numbers(values)
    prompts = read_prompts(values["prompt"], values["prompts_file"])
    if values["checkpoint"] is None:
        raise ConfigError("checkpoint is not set; give a run's folder, such as checkpoint=runs/landscapes")
    look, signer = read_look(values)
    device = choose_device(values["device"])
    pipeline, _, sha256 = load_pipeline(Path(values["checkpoint"]), device)
    if values["guide_checkpoint"] is not None:
        weaker, _, weaker_sha256 = load_pipeline(Path(values["guide_checkpoint"]), device)
        pipeline.guided_by(weaker)
    sampling = choose_sampling(values, pipeline)
    size = read_size(values["size"], sampling.tiled, pipeline)
    start = read_start(values, pipeline, size)
    jobs = make_jobs(values, prompts, start)
    refuse_idle(values, sampling, pipeline)
    warn_of_long_prompts([text for job in jobs for text in job.texts], pipeline)

    common = {
        "version": VERSION,
        "torch": torch.__version__,
        "device": device.type,
        "checkpoint": str(values["checkpoint"]),
        "checkpoint_sha256": sha256,
        **({} if values["guide_checkpoint"] is None else {"guide_checkpoint_sha256": weaker_sha256}),
        **describe(values, sampling, pipeline),
        **start.record,
        "size": list(start.size or size),
    }
    work = Work(pipeline, sampling, start.size or size, jobs, common, look, signer)
    pipeline.check(jobs, sampling, work.size)
    output = Path(values["output"]) if values["output"] else work.default_folder()
    sheet = make(work, output, values["batch_size"], values["overwrite"])
    if sheet is not None:
        made = "1 picture and its record" if len(jobs) == 1 else f"{len(jobs):,} pictures and their records"
        print(f"{made}: {output}, all on one sheet: {sheet}")


@dataclass(frozen=True)
class Start:
    """What jobs start from: parts of each `Job`, what the records say of it, and the size it fixes."""

    parts: Mapping[str, Tensor]
    record: Mapping[str, Any]
    size: tuple[int, int] | None


def verify(path: Path) -> None:
    """Prints what made a picture; raises DataError where it holds no record, or was changed since."""
    record, intact = read_record(path)
    credentials = read_credentials(path)
    print(json.dumps(record, indent=2, ensure_ascii=False))
    if credentials is not None:
        problems = "".join(f"; {problem}" for problem in credentials["problems"])
        print(f"Content credentials: {credentials['state']}, signed by {credentials['issuer']}{problems}")
    if not intact or (credentials is not None and credentials["state"] == "Invalid"):
        raise DataError(f"verify: {path} was changed after it was made; its record tells of other pixels")
    print(f"{path}: its pixels are those it was made with.")


# --- what is asked for --------------------------------------------------------------------------------------


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for counts out of range."""
    for key, most in (("num_images", MAX_PICTURES), ("batch_size", 4_096)):
        if not 1 <= values[key] <= most:
            raise ConfigError(f"{key} is {values[key]}, but must be from 1 to {most:,}")


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
        if not given:
            raise ConfigError('prompt is an empty list; give prompt="..."')
    return [clean(text, "a prompt") for text in given]


def clean(text: Any, label: str) -> str:
    """A text as training captions are: NFC, no control characters, white space folded."""
    try:
        return decode_caption(text if isinstance(text, bytes) else str(text).encode())
    except (BadSample, UnicodeEncodeError) as error:
        raise ConfigError(f"{label} is not usable text: {error}") from None


def warn_of_long_prompts(prompts: Sequence[str], pipeline: Pipeline) -> None:
    """Says which prompts are longer than the text encoder reads: their ends have no effect."""
    dropped = pipeline.text_encoder.tokenizer.dropped(list(dict.fromkeys(prompts)))
    if any(dropped):
        limit = pipeline.text_encoder.context_length - 2
        long, most = sum(map(bool, dropped)), max(dropped)
        print(
            f"sample.py: {long} of the prompts are longer than the {limit} tokens that are read; up to "
            f"{most} tokens at the end have no effect",
            file=sys.stderr,
        )


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


def choose_sampling(values: Mapping[str, Any], pipeline: Pipeline) -> Sampling:
    """How to sample: as asked for, else as the checkpoint was trained to be sampled."""
    assert pipeline.defaults is not None
    given = {f.name: values[f.name] for f in fields(Sampling) if values.get(f.name) is not None}
    for group in ("sampler", "grid", "guidance"):
        if group in given:
            given[group] = build(group, given[group])
    if values["image"] is not None and values["mask"] is None and not any(values["extend"]):
        given.setdefault("strength", 1.0 if pipeline.edits else STRENGTH)
    return replace(pipeline.defaults, **given)


def describe(values: Mapping[str, Any], sampling: Sampling, pipeline: Pipeline) -> dict[str, Any]:
    """The settings of `sampling` as JSON values; parts by what was asked for, or by the checkpoint's own."""
    parts = {
        group: values[group] if values[group] is not None else pipeline.described.get(group)
        for group in ("sampler", "grid", "guidance")
    }
    numbers = {f.name: getattr(sampling, f.name) for f in fields(Sampling) if f.name not in (*parts, "seed")}
    return {**parts, **numbers}


def read_look(values: Mapping[str, Any]) -> tuple[Look, Signer | None]:
    """How files are written, and who signs them if anybody."""
    if values["format"] not in PictureFormat.__members__:
        raise ConfigError(f"format is '{values['format']}', but must be png, jpg or webp")
    try:
        look = Look(
            PictureFormat[values["format"]], values["quality"], clean(values["watermark"], "watermark")
        )
        if values["certificate"] is None:
            if values["private_key"] is not None:
                raise ConfigError("private_key is given without certificate; give both PEM files, or neither")
            return look, None
        if values["private_key"] is None:
            raise ConfigError("certificate is given without private_key; give both PEM files, or neither")
        signer = Signer(Path(values["certificate"]), Path(values["private_key"]), values["algorithm"])
        signer.sign(encode_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), Look(), {}), ".png", {})
        return look, signer
    except ValueError as error:
        raise ConfigError(str(error)) from None


def read_size(size: Any, tiled: bool, pipeline: Pipeline) -> tuple[int, int]:
    """(width, height) in pixels of `size`: a number, [width, height], or nothing for the training size.

    Raises:
        ConfigError: not a size, or one that is too large or that the networks cannot make.
    """
    given = [pipeline.resolution] if size is None else size if isinstance(size, list) else [size]
    if len(given) not in (1, 2) or not all(type(side) is int for side in given):
        raise ConfigError(f"size is {size}, but must be a number of pixels, such as 64, or [width,height]")
    most = pipeline.resolution * (MAX_TILED if tiled else MAX_WHOLE)
    if max(given) > most:
        larger = "" if tiled else f"; with tiled=true up to {pipeline.resolution * MAX_TILED}"
        raise ConfigError(f"size is {size}, but a side of at most {most} pixels is made{larger}")
    pipeline.latent_size((given[0], given[-1]))
    return given[0], given[-1]


def read_start(values: Mapping[str, Any], pipeline: Pipeline, size: tuple[int, int]) -> Start:
    """The picture that the jobs start from, brought to size, its mask or margins; or nothing.

    Raises:
        ConfigError: options that do not go together.
        DataError: a file that cannot be used.
    """
    if values["image"] is None:
        for key in ("mask", "extend"):
            if values[key] not in (None, [0, 0, 0, 0]):
                raise ConfigError(f"{key} needs a picture; give image=... as well")
        return Start({}, {}, None)
    if pipeline.edits and (values["mask"] is not None or any(values["extend"]) or values["strength"]):
        raise ConfigError(
            "this checkpoint edits by instruction: mask, extend and strength are for others; give image alone"
        )
    whole = read_picture(Path(values["image"]), "image")
    image = fit(whole, *size)
    record = {"image_sha256": digest(image)}
    if any(values["extend"]):
        image, mask = read_margins(values, image, pipeline)
        size = (image.shape[2], image.shape[1])
        return Start({"image": image, "mask": mask}, {**record, "extend": values["extend"]}, size)
    if values["mask"] is not None:
        mask = as_mask(read_mask(Path(values["mask"]), whole), *size)
        return Start({"image": image, "mask": mask}, {**record, "mask_sha256": digest(mask)}, size)
    return Start({"before" if pipeline.edits else "image": image}, record, size)


def read_margins(values: Mapping[str, Any], image: Tensor, pipeline: Pipeline) -> tuple[Tensor, Tensor]:
    """The canvas around `image` and the mask of what is painted; raises ConfigError."""
    if values["mask"] is not None:
        raise ConfigError("give either mask or extend, not both")
    if len(values["extend"]) != 4:
        raise ConfigError("extend is pixels left, top, right, bottom, such as extend=[0,0,64,0]")
    left, top, right, bottom = values["extend"]
    if min(values["extend"]) >= 0:  # else `extended` says which is negative
        _, h, w = image.shape
        read_size([w + left + right, h + top + bottom], bool(values["tiled"]), pipeline)
    try:
        return extended(image, left, top, right, bottom)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def refuse_idle(values: Mapping[str, Any], sampling: Sampling, pipeline: Pipeline) -> None:
    """Raises ConfigError for an option that would have no effect beside the others."""
    masked = values["mask"] is not None or any(values["extend"])
    idle = {
        "feather": "there is no mask or extend" if not masked else "",
        "repaint": "there is no mask or extend" if not masked else "",
        "variation_seed": "variation is 0" if sampling.variation == 0 else "",
        "image_guidance_scale": "this checkpoint edits no pictures" if not pipeline.edits else "",
        "other_prompt": "the first of num_images=1 is the prompt itself" if values["num_images"] == 1 else "",
        "negative_prompt": (
            "guidance_scale is 1" if sampling.guidance_scale == 1 and not pipeline.edits
            else "guide_checkpoint takes its place" if values["guide_checkpoint"] is not None else ""
        ),
    }  # fmt: skip
    for key, why in idle.items():
        if values[key] not in (None, "") and why:
            raise ConfigError(f"{key} has no effect here: {why}; leave it out")


def digest(tensor: Tensor) -> str:
    """The SHA-256, in hex, of a picture's or mask's values."""
    return hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest()


def make_jobs(values: Mapping[str, Any], prompts: Sequence[str], start: Start) -> list[Job]:
    """The jobs of the prompts in order, `num_images` each; with `other_prompt` these lead over to it."""
    negative = clean(values["negative_prompt"], "negative_prompt")
    count = values["num_images"]
    if len(prompts) * count > MAX_PICTURES:
        raise ConfigError(
            f"{len(prompts) * count:,} pictures are asked for, at most {MAX_PICTURES:,} are made"
        )
    other, shares = "", [0.0] * count
    if values["other_prompt"] is not None:
        other = clean(values["other_prompt"], "other_prompt")
        if not other:
            raise ConfigError("other_prompt is empty; give the prompt that the pictures should lead to")
        shares = [k / max(count - 1, 1) for k in range(count)]
    jobs: list[Job] = []
    for number, prompt in enumerate(prompts):
        for share in shares:
            # On the way from one prompt to the other only the prompt changes, so the noise stays.
            index = number if other else len(jobs)
            jobs.append(Job(prompt, index, negative, other, share, **start.parts))
    return jobs


if __name__ == "__main__":
    main("sample", sample)
