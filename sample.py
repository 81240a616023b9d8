"""Makes pictures from a checkpoint and words; needs no lightning.

    python sample.py checkpoint=runs/landscapes prompt="a clear dawn over the sea, the sun on the left"
    python sample.py checkpoint=model.safetensors prompts_file=prompts.txt num_images=2 seed=7 output=pictures
    python sample.py checkpoint=runs/landscapes prompt="a cloudy noon over hills" image=photo.png strength=0.6
    python sample.py verify=samples/00000.png

On a CPU a picture's bytes depend on its prompt, its number, the seed and the settings alone: not on the
batch, the pictures before it, an interruption, or how many processes share the work (RANK and WORLD_SIZE, as
torchrun sets them). The same command goes on where it was interrupted.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from conf.cli import main
from conf.schema import plain
from data.credentials import Signer, read_credentials
from data.index import DataError
from data.pictures import Look, PictureFormat, encode_picture, read_mask, read_picture, read_record
from evaluation.gallery import make
from evaluation.request import MAX_PICTURES, Given, Source, clean, make_work, too_long
from models.loading import load_pipeline
from models.registry import ConfigError


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
    weaker_sha256 = None
    if values["guide_checkpoint"] is not None:
        weaker, _, weaker_sha256 = load_pipeline(Path(values["guide_checkpoint"]), device)
        pipeline.guided_by(weaker)
    if values["full_decoder"]:
        pipeline.decode_fully()
    source = Source(pipeline, str(values["checkpoint"]), sha256, weaker_sha256)
    work = make_work(values, prompts, source, read_given(values), look, signer)
    warning = too_long(work)
    if warning:
        print(f"sample.py: {warning}", file=sys.stderr)
    output = Path(values["output"]) if values["output"] else work.default_folder()
    sheet = make(work, output, values["batch_size"], values["overwrite"])
    if sheet is not None:
        made = (
            "1 picture and its record"
            if len(work.jobs) == 1
            else f"{len(work.jobs):,} pictures and their records"
        )
        print(f"{made}: {output}, all on one sheet: {sheet}")


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


def read_given(values: Mapping[str, Any]) -> Given:
    """The picture and the mask that are asked for; raises DataError for a file that cannot be used."""
    if values["image"] is None:
        if values["mask"] is not None:
            raise ConfigError("mask needs a picture; give image=... as well")
        return Given()
    image = read_picture(Path(values["image"]), "image")
    return Given(image, None if values["mask"] is None else read_mask(Path(values["mask"]), image))


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


if __name__ == "__main__":
    main("sample", sample)
