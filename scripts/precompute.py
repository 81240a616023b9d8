"""Encodes a dataset once, ahead of training: `python scripts/precompute.py RUN OUT`.

RUN is a run's folder whose autoencoder is trained, or an exported file. OUT gets a shard for each of the
dataset, with the same keys: the autoencoder's moments of --variants crops and mirrorings of each picture, and
with --text the embeddings of its caption, for a text encoder that is frozen. Pictures are treated as the
run's data options say, unless told otherwise. A picture that cannot be used is left out and named in
OUT/skipped.jsonl. Run it again after an interruption, or several times at once, on one machine or many that
share OUT: finished shards are kept, and no two processes make the same one.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from conf.schema import make
from data.cache import ShardCache
from data.datamodule import ShardData
from data.index import DataError, ShardIndex
from data.npy import DTYPES, encode_npy
from data.precompute import Decoding, LeftOut, Output, Picture, PictureReader, SourceShard, source_shards
from data.progress import Progress
from data.provenance import Preprocessing, Provenance, code_version
from data.writer import write_shard
from models.autoencoder import Autoencoder
from models.checkpoint import CheckpointError, newest
from models.loading import build_networks, load_part, load_pipeline
from models.registry import ConfigError, build
from models.stages.base import is_handed_over
from models.stages.encoding import (
    autoencoder_fingerprint,
    encode_captions,
    encode_images,
    is_frozen,
    text_identity,
)
from models.stages.launch import stay_with_parent
from models.text_encoder import TextEncoder

USAGE, DATA, CHECKPOINT, ENVIRONMENT, NUMERICAL, INTERRUPTED, TERMINATED = 2, 3, 4, 5, 6, 130, 143


def positive(text: str) -> int:
    """Returns a whole number above 0; raises argparse's error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(prog="precompute.py", description=description, epilog=notes)
    add, on_off = options.add_argument, argparse.BooleanOptionalAction
    add("run", type=Path, help="folder of a run whose autoencoder is trained, or an exported file")
    add("out", type=Path, help="folder the shards are written to")
    add("--shards", help="dataset of pictures (the run's own)")
    add(
        "--resolution", type=positive, help="pixels a side (as the run); for a larger run that begins with it"
    )
    add("--variants", type=positive, help="crops and mirrorings of each picture (1, with flips alone 2)")
    add("--flip", action=on_off, help="mirror half of the variants (as the run)")
    add("--random-crop", action=on_off, help="place each variant's crop at random (as the run)")
    add("--text", action="store_true", help="store the captions' embeddings too; for a frozen text encoder")
    add(
        "--dtype",
        choices=sorted(DTYPES),
        default="float32",
        help="what the numbers are stored as (%(default)s)",
    )
    add("--cache", type=Path, default="cache", help="folder for copies of remote shards (%(default)s)")
    add("--cache-gb", type=float, default=50.0, help="the most that they may take (%(default)s)")
    add(
        "--max-bad-fraction",
        type=float,
        default=1.0,
        help="of the pictures, that may be left out without an error (%(default)s)",
    )
    add("--batch-size", type=positive, default=32, help="pictures encoded at once (%(default)s)")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that decode, 0: this one (%(default)s)",
    )
    add("--quiet", action="store_true", help="progress and errors alone")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 usage, 3 data, 4 checkpoint, 5 file system, 6 numbers, 130 interrupted."""
    options = parser()
    args = options.parse_args(argv)
    if args.workers < 0:
        options.error("argument --workers: it must be 0 or more")
    try:
        precompute(args)
    except (DataError, CheckpointError, ConfigError, FloatingPointError) as error:
        print(f"precompute.py: {error}", file=sys.stderr)
        codes = {DataError: DATA, CheckpointError: CHECKPOINT, ConfigError: USAGE}
        return codes.get(type(error), NUMERICAL)
    except BrokenProcessPool:
        print(
            "precompute.py: a worker died, maybe of too little memory; use fewer --workers", file=sys.stderr
        )
        return ENVIRONMENT
    except OSError as error:
        where, why = error.filename or args.out, error.strerror or error
        print(f"precompute.py: {where}: {why}; check the disk, then run the same again", file=sys.stderr)
        return ENVIRONMENT
    except KeyboardInterrupt:
        print("precompute.py: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


@dataclass(frozen=True)
class Encoder:
    """The networks that encode, and what their output is stored as; `text_encoder` None leaves captions."""

    autoencoder: Autoencoder
    text_encoder: TextEncoder | None
    dtype: str
    batch_size: int

    def __call__(self, pictures: list[Picture]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yields each picture's key and fields; raises FloatingPointError for what `dtype` cannot hold."""
        if not pictures:
            return
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
        parts = [
            encode_images(self.autoencoder, part) for part in pixels.flatten(0, 1).split(self.batch_size)
        ]
        moments = torch.cat(parts).unflatten(0, pixels.shape[:2]).numpy()
        captioned = [picture.key for picture in pictures if picture.caption]
        texts = {}
        if self.text_encoder is not None and captioned:
            captions = [picture.caption for picture in pictures if picture.caption]
            texts = dict(zip(captioned, encode_captions(self.text_encoder, captions), strict=True))
        for picture, record in zip(pictures, moments, strict=True):
            fields = {"moments.npy": self.store(picture.key, record), **picture.copied}
            if picture.key in texts:
                states, pooled = texts[picture.key]
                fields["text.npy"] = self.store(picture.key, states)
                fields["pooled.npy"] = self.store(picture.key, pooled)
            yield picture.key, fields

    def store(self, key: str, values: np.ndarray) -> bytes:
        """Returns the file of an array in the type it is stored as."""
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype)
        if not np.isfinite(stored).all():
            remedy = "use --dtype float32" if np.isfinite(values).all() else "train the networks again"
            raise FloatingPointError(f"key {key!r}: its numbers are not finite in {self.dtype}; {remedy}")
        return encode_npy(stored)


def precompute(args: argparse.Namespace) -> None:
    """Makes the shards that are not done and that no other process is at work on, and says what is next."""
    device = rank_device()
    autoencoder, text_encoder, config = load_networks(args.run, args.text, device)
    run = config.get("run", {})
    data: ShardData = make("data", {"name": "shards", **run.get("data", {})})
    refuse_what_cannot_be_stored(run.get("data", {}), args)
    preprocessing = how_to_crop(args, data, int(run.get("seed", 0)))
    side, rest = divmod(preprocessing.resolution, autoencoder.factor)
    if rest:
        raise ConfigError(
            f"pictures of {preprocessing.resolution} pixels: no multiple of {autoencoder.factor}"
        )
    provenance = Provenance(
        autoencoder_fingerprint(autoencoder),
        dict(config["autoencoder"]),
        preprocessing,
        args.dtype,
        (2 * autoencoder.latent_channels, side, side),
        None if text_encoder is None else text_identity(text_encoder),
    )
    cache = ShardCache(args.cache, int(args.cache_gb * 1e9))
    shards, dataset = source_shards(args.shards or run_shards(run, data, preprocessing.resolution), cache)
    output = Output(args.out, provenance)
    output.prepare(shards, dataset, code_version())
    encoder = Encoder(autoencoder, text_encoder, args.dtype, args.batch_size)
    reader = PictureReader(preprocessing, cache)
    todo = [shard for shard in from_own_place(shards) if not output.is_done(shard)]
    kept = len(shards) - len(todo)
    with (
        Decoding(reader, args.workers, max(1, args.batch_size // preprocessing.variants)) as decoding,
        Progress("precomputing", sum(shard.header.count for shard in todo)) as progress,
    ):
        for shard in todo:
            with output.claim(shard) as mine:
                if mine:
                    make_shard(output, shard, decoding, encoder, progress.advance)
                else:
                    progress.advance(shard.header.count)
    done, samples, left_out = output.conclude(shards)
    if done == len(shards) and not samples:
        raise DataError(f"{args.out}: no picture could be used, see {args.out / 'skipped.jsonl'}")
    if left_out > args.max_bad_fraction * (samples + left_out):
        raise DataError(
            f"{args.out}: {left_out:,} of {samples + left_out:,} pictures could not be used, more than "
            f"--max-bad-fraction {args.max_bad_fraction:g}, see {args.out / 'skipped.jsonl'}"
        )
    if left_out:
        print(f"{left_out:,} left out, named in {args.out / 'skipped.jsonl'}")
    if not args.quiet:
        summary(args.out, done, samples, kept, len(shards))


def load_networks(
    path: Path, with_text: bool, device: torch.device
) -> tuple[Autoencoder, TextEncoder | None, dict[str, Any]]:
    """The averaged autoencoder at `path`, with `with_text` the frozen text encoder, and the configuration.

    Raises:
        CheckpointError: nothing trained there, or a text encoder whose output cannot be stored.
    """
    if path.is_file():
        pipeline, config, _ = load_pipeline(path, device)
        text_encoder = pipeline.text_encoder if with_text and fresh_text_encoder(path, config) else None
        return pipeline.autoencoder, text_encoder, config
    checkpoint = newest(path / "autoencoder" / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: holds no verified autoencoder checkpoint; train one with: "
            "python train.py stages=[autoencoder]"
        )
    config = checkpoint.document("config")
    wanted = config.get("run", {}).get("plan", {}).get("autoencoder", {}).get("images", 0)
    if checkpoint.images < wanted and not is_handed_over(checkpoint):
        raise CheckpointError(
            f"{checkpoint.folder}: the autoencoder has seen {checkpoint.images:,} of {wanted:,} images, so "
            "its moments would be of no use; finish it: python train.py resume=true stages=[autoencoder]"
        )
    autoencoder: Autoencoder = build("autoencoder", config["autoencoder"])
    load_part(autoencoder, "autoencoder", checkpoint.tensors("ema"), str(checkpoint.folder))
    place(autoencoder, device)
    if not with_text:
        return autoencoder, None, config
    text_encoder = fresh_text_encoder(path, config)
    place(text_encoder, device)
    return autoencoder, text_encoder, config


def fresh_text_encoder(path: Path, config: dict[str, Any]) -> TextEncoder:
    """The frozen text encoder that a run of `config` begins with, and ends with.

    Raises:
        CheckpointError: it is trained along with the backbone.
    """
    with torch.random.fork_rng(devices=[]):  # as train.py builds it, for one that has random weights
        torch.manual_seed(int(config.get("run", {}).get("seed", 0)))
        text_encoder = build_networks(config)[1]
    if not is_frozen(text_encoder):
        raise CheckpointError(
            f"{path}: its text encoder is trained along with the backbone, so stored embeddings would be of "
            "another one after the first step; leave out --text, or train with text_encoder=vit_b_32"
        )
    return text_encoder


def place(network: torch.nn.Module, device: torch.device) -> None:
    """Moves `network` to where it computes, frozen."""
    network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def rank_device() -> torch.device:
    """Returns this rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def how_to_crop(args: argparse.Namespace, data: ShardData, seed: int) -> Preprocessing:
    """Returns the run's preprocessing with what the command line changes.

    Raises:
        ConfigError: one variant cannot be what is asked for.
    """
    flip = data.flip if args.flip is None else args.flip
    random_crop = data.random_crop if args.random_crop is None else args.random_crop
    variants = args.variants or (2 if flip and not random_crop else 1)
    if variants == 1 and (flip or random_crop):
        asked = " and ".join(name for name, on in (("flip", flip), ("random_crop", random_crop)) if on)
        raise ConfigError(
            f"one variant has no {asked}: give --variants (2 or more), or --no-flip and --no-random-crop"
        )
    if variants > 1 and not (flip or random_crop):
        raise ConfigError(
            f"{variants} variants would be equal: give --flip or --random-crop, or --variants 1"
        )
    if flip and variants % 2:
        raise ConfigError(f"{variants} variants cannot be mirrored by half: give an even number")
    resolution = args.resolution or data.resolution
    return Preprocessing(resolution, random_crop, flip, tuple(data.background), variants, seed)


def refuse_what_cannot_be_stored(data: dict[str, Any], args: argparse.Namespace) -> None:
    """Raises ConfigError for options of the run's data that the shards to be written would ignore."""
    if data.get("buckets", 1) > 1:
        raise ConfigError(
            f"data.buckets is {data['buckets']}, but moments are stored of squares alone; use a run with 1"
        )
    if data.get("sources") and not args.shards:
        raise ConfigError("the run mixes several sources; precompute them one by one: --shards SOURCE")
    if args.text and set(data.get("captions") or {"txt": 1.0}) != {"txt"}:
        raise ConfigError(
            f"data.captions chooses among {', '.join(data['captions'])}, but --text stores the embeddings of "
            "txt alone; leave out --text"
        )


def run_shards(run: dict[str, Any], data: ShardData, resolution: int) -> str:
    """Returns where the run's pictures are, landscapes rendered at `resolution`; raises ConfigError where it
    does not say."""
    if data.shards is not None:
        return data.shards
    if "rendered" not in run:
        raise ConfigError("the run does not name its dataset; give --shards")
    return str(make("rendered", run["rendered"]).write(resolution, torch.get_num_threads()))


def from_own_place(shards: list[SourceShard]) -> list[SourceShard]:
    """Returns the shards in their order, each rank beginning at another one so that few are fought for."""
    rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    first = len(shards) * (rank % max(1, world_size)) // max(1, world_size)
    return shards[first:] + shards[:first]


def make_shard(
    output: Output, shard: SourceShard, decoding: Decoding, encoder: Encoder, advance: Callable[[int], None]
) -> None:
    """Makes one shard and its note."""
    left_out: list[LeftOut] = []

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for batch in decoding.batches(shard):
            left_out.extend(each for each in batch if isinstance(each, LeftOut))
            yield from encoder([each for each in batch if isinstance(each, Picture)])
            advance(len(batch))

    found = samples()
    first = next(found, None)
    made: ShardIndex | None = None
    if first is not None:
        made = write_shard(output.folder / shard.name, chain([first], found))
    output.finish(shard, made, left_out)


def summary(out: Path, done: int, samples: int, kept: int, shards: int) -> None:
    """Says what OUT holds now and what to type next."""
    kept_note = f", {kept} of them from before" if kept else ""
    print(f"{samples:,} pictures in {done} of {shards} shards{kept_note}: {out}")
    if done < shards:
        print("other processes are at work on the rest; where none is, run the same command again")
    else:
        print(f"next: python train.py data.precomputed={out} stages=[diffusion]")


def terminate(*_: object) -> None:
    """Ends the program as an interrupt does."""
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    stay_with_parent()
    sys.exit(main())
