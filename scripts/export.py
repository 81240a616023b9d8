"""Writes a trained model as one file: `python scripts/export.py RUN [OUT.safetensors]`.

The file holds the averaged weights of all three networks and the configuration they are built from;
`sample.py checkpoint=OUT.safetensors` makes the same pictures from it as from the run. With `--diffusers
FOLDER` backbone and autoencoder are written in diffusers' form instead, as FOLDER/unet and FOLDER/vae.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from models.checkpoint import CheckpointError, save_single_file
from models.diffusers_layout import (
    autoencoder_config,
    autoencoder_to_diffusers,
    unet_config,
    unet_to_diffusers,
)
from models.loading import export, load_pipeline

CHECKPOINT, ENVIRONMENT, INTERRUPTED = 4, 5, 130


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(prog="export.py", description=description, epilog=notes)
    add = options.add_argument
    add("run", type=Path, help="folder of a trained run, such as runs/landscapes")
    add("out", type=Path, nargs="?", help="the file to write (RUN/model.safetensors)")
    add("--diffusers", type=Path, metavar="FOLDER", help="write FOLDER/unet and FOLDER/vae for diffusers")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 wrong option, 4 checkpoint, 5 file system, 130 interrupted."""
    options = parser()
    args = options.parse_args(argv)
    if args.diffusers is not None and args.out is not None:
        options.error("give OUT or --diffusers FOLDER, not both")
    try:
        if args.diffusers is not None:
            export_diffusers(args.run, args.diffusers)
        else:
            export_file(args.run, args.out if args.out is not None else args.run / "model.safetensors")
    except CheckpointError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return CHECKPOINT
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
        print(f"export.py: {text}; check that the folder exists and can be written", file=sys.stderr)
        return ENVIRONMENT
    except KeyboardInterrupt:
        print("export.py: interrupted; nothing that was there is changed", file=sys.stderr)
        return INTERRUPTED
    return 0


def export_file(run: Path, out: Path) -> None:
    """Writes one file, and says what to type next.

    Raises:
        CheckpointError: the run has no model, or a damaged one.
        OSError: the file cannot be written.
    """
    export(run, out)
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, weights and configuration")
    print(f'next: python sample.py checkpoint={out} prompt="..."')


def export_diffusers(run: Path, folder: Path) -> None:
    """Writes `folder/unet` and `folder/vae`.

    Args:
        run: a run's folder, or a file that `export_file` wrote.
        folder: made where it is missing.

    Raises:
        CheckpointError: as `export_file`, or a backbone or autoencoder that diffusers cannot hold.
        OSError: a file cannot be written.
    """
    pipeline, _, _ = load_pipeline(run, torch.device("cpu"))
    unet, autoencoder = pipeline.backbone, pipeline.autoencoder
    try:
        backbone_config = unet_config(unet, pipeline.resolution // autoencoder.factor)
        backbone_tensors = unet_to_diffusers(unet.state_dict())
        config = autoencoder_config(autoencoder, pipeline.resolution)
    except ValueError as error:
        raise CheckpointError(f"{run}: {error}") from None
    write(folder / "unet", "UNet2DConditionModel", backbone_config, backbone_tensors)
    write(folder / "vae", "AutoencoderKL", config, autoencoder_to_diffusers(autoencoder.state_dict()))
    print(f"{folder / 'unet'} and {folder / 'vae'}: load them with diffusers' from_pretrained")


def write(folder: Path, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a model of diffusers: its weights, and the configuration of its class `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_single_file(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": name, **config}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
