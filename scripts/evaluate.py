"""Evaluates a checkpoint: samples a prompt set, measures the pictures, writes a card and a report.

    python scripts/evaluate.py checkpoint=runs/landscapes
    python scripts/evaluate.py checkpoint=runs/mine prompts=prompts.jsonl pictures=1000 devices=2
    python scripts/evaluate.py checkpoint=runs/flowers scorer=classifier variety.class_field=label
    python scripts/evaluate.py --help                  every key with its value

The folder `out` gets `card.json`, `features.safetensors`, `report.html` and the pictures. The same command
goes on where it was interrupted. On a CPU two evaluations of one checkpoint give the same card to the last
digit, also when several processes share the sampling (`devices=2`, or RANK and WORLD_SIZE as torchrun sets
them).
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import DictConfig

from conf.cli import main
from conf.schema import make, plain
from data.datamodule import ShardData
from data.pictures import Look
from data.progress import Progress
from evaluation.asks import FEWEST as LEAST
from evaluation.asks import (
    Ask,
    Real,
    RealData,
    file_sha256,
    open_real,
    prompts_sha256,
    read_suite,
    varied,
)
from evaluation.card import METRICS_VERSION, Card, write_card, write_features
from evaluation.card_page import write_page
from evaluation.code import code_version
from evaluation.diversity import FEWEST
from evaluation.folder import PICTURES, RUN, await_pictures, await_request, begin, rank, write_json
from evaluation.gallery import Work, fill
from evaluation.judges import Judges, open_judges
from evaluation.measure import (
    Made,
    Measured,
    joined,
    measure_adherence,
    measure_distances,
    measure_memorization,
    measure_names,
    measure_retrieval,
    measure_variety_of,
)
from evaluation.memorization import OF
from evaluation.picture_index import PictureIndex
from evaluation.request import too_long
from models.loading import load_pipeline, newest_picturing
from models.pipeline import Pipeline
from models.registry import ConfigError, build
from models.sampling import Job, Sampling
from models.stages.launch import launch, stay_with_parent

#: Keys that say how and where to compute, not what.
_HOW = ("out", "index", "devices", "device", "batch_size", "nice", "overwrite", "debug")


@dataclass(frozen=True)
class Checkpoint:
    """What is evaluated: its pipeline, configuration and SHA-256, where it lies, and how far it was trained.

    `home` is the folder its evaluations go into, `name` what it is called.
    """

    pipeline: Pipeline
    config: Mapping[str, Any]
    sha256: str
    home: Path
    name: str
    images: int | None


def evaluate(config: DictConfig) -> None:
    """Evaluates the checkpoint that the composed configuration names, or makes one process's share of it."""
    began, values = time.perf_counter(), plain(config)
    check(values)
    if values["devices"] > 1 and "RANK" not in os.environ:
        sys.exit(launch(values["devices"], "evaluate", "the same command"))
    stay_with_parent()
    os.nice(values["nice"])
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    checkpoint = open_checkpoint(Path(values["checkpoint"]), choose_device(values["device"]))
    sampling, made_by = choose_sampling(values, checkpoint)
    name = request_name(values, made_by)
    values["index"] = values["index"] or str(checkpoint.home / "evaluation" / "index")
    out = Path(values["out"] or checkpoint.home / "evaluation" / f"{checkpoint.name}-{name[:8]}")
    if rank():
        await_request(out, name)
    real = open_data(values, checkpoint)
    asks, origin = choose_asks(values, real)
    chosen = varied(asks, values["variety"]["prompts"])
    work = make_work(checkpoint, sampling, made_by, [*asks, *repeated(values, chosen)])
    if rank():
        fill(work, out / PICTURES, values["batch_size"])
        return
    train, judge = real.train(), values["judge"]
    judges = open_judges(
        values["features"],
        values["features_file"],
        values["scorer"],
        values["scorer_file"],
        checkpoint.home.parent,
        judge and Path(judge),
        train,
    )
    told = {"prompts": origin, **describe_asks(asks, chosen, values), **describe_real(real, train)}
    told |= judges.described
    begin(out, {"request": name, **told, **made_by}, values["overwrite"])
    warn(too_long(work))
    fill(work, out / PICTURES, values["batch_size"])
    pictures = await_pictures(work, out / PICTURES)
    made = Made(asks, pictures[: len(asks)], chosen, pictures[len(asks) :], values["variety"]["seeds"])
    measured = measure(values, judges, made, real, train)
    sha256 = write_features(out, measured.features)
    card = Card(measured.metrics, {**told, **measured.by}, made_by, tuple(measured.alarms), sha256)
    reference = real.held_out if values["prompts"] is None else None
    write_page(out, f"Evaluation of {checkpoint.home.name}", card, made, reference, measured)
    path = write_card(out, card)
    write_json(out / RUN, {"checkpoint": values["checkpoint"], "seconds": time.perf_counter() - began})
    print(f"{summary(checkpoint, card)}; card: {path}")


# --- what is asked for --------------------------------------------------------------------------------------


def check(values: Mapping[str, Any]) -> None:
    """Raises ConfigError for keys that are missing, out of range, or have no effect beside the others."""
    if values["checkpoint"] is None:
        raise ConfigError("checkpoint is not set; give a run's folder, such as checkpoint=runs/landscapes")
    limits = {
        "pictures": (LEAST, 1_000_000), "batch_size": (1, 4_096), "devices": (1, 256), "nice": (0, 19)
    }  # fmt: skip
    for key, (least, most) in limits.items():
        if not least <= values[key] <= most:
            raise ConfigError(f"{key} is {values[key]}, but must be from {least} to {most:,}")
    variety = values["variety"]
    if not 0 <= variety["prompts"] <= 100_000:
        raise ConfigError(f"variety.prompts is {variety['prompts']}, but must be from 0 to 100,000")
    if not FEWEST <= variety["seeds"] <= 10_000:
        raise ConfigError(f"variety.seeds is {variety['seeds']}, but must be from {FEWEST} to 10,000")
    if values["features"] == "judge" and values["features_file"] is not None:
        raise ConfigError("features_file has no effect with features=judge; leave it out, or name a network")
    if values["features"] != "judge" and values["features_file"] is None:
        raise ConfigError(f"features={values['features']} needs its weights; give features_file=...")


def open_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """The checkpoint at `path`: a run's newest, one of its checkpoints, or an exported file.

    Raises:
        CheckpointError: nothing there, damaged, or without a diffusion stage.
    """
    whole = path.absolute()
    one = whole.parent.name == "checkpoints"
    home = whole.parents[2] if one else whole if whole.is_dir() else whole.parent
    last = newest_picturing(path) if path.is_dir() and not one else None
    pipeline, config, sha256 = load_pipeline(path if last is None else last.folder, device)
    found = whole if one else None if last is None else last.folder
    images = None if found is None else int(found.name.rpartition("-")[2])
    name = path.stem if images is None else str(images)
    return Checkpoint(pipeline, config, sha256, _shown(home), name, images)


def _shown(path: Path) -> Path:
    """A path as short as it can be said from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def choose_device(name: str) -> torch.device:
    """The device to sample on; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: unknown, or a GPU is asked for and there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is '{name}', but must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but this machine has no usable GPU; use device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_sampling(values: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[Sampling, dict[str, Any]]:
    """How to sample, as asked for or as the checkpoint was trained to be, and the card's words for it."""
    pipeline = checkpoint.pipeline
    assert pipeline.defaults is not None
    groups = {key: values[key] for key in ("sampler", "grid", "guidance") if values[key] is not None}
    given = {key: values[key] for key in ("num_steps", "guidance_scale") if values[key] is not None}
    built = {group: build(group, description) for group, description in groups.items()}
    sampling = replace(pipeline.defaults, seed=values["seed"], **given, **built)
    size = pipeline.resolution if values["size"] is None else values["size"]
    pipeline.latent_size(size)
    parts = {key: groups.get(key, pipeline.described.get(key)) for key in ("sampler", "grid", "guidance")}
    return sampling, {
        "checkpoint_sha256": checkpoint.sha256,
        "images_seen": checkpoint.images,
        **parts,
        "num_steps": sampling.num_steps,
        "guidance_scale": sampling.guidance_scale,
        "image_guidance_scale": sampling.image_guidance_scale if pipeline.edits else None,
        "size": size,
        "seed": sampling.seed,
        "code": code_version(),
        "torch": torch.__version__,
        "device": pipeline.device.type,
    }


def request_name(values: Mapping[str, Any], made_by: Mapping[str, Any]) -> str:
    """A hash of all that the command asks for; the same command has the same one, here and on every rank."""
    asked = {key: value for key, value in values.items() if key not in _HOW}
    if values["prompts"] is not None and Path(values["prompts"]).is_file():
        asked["prompts"] = file_sha256(Path(values["prompts"]))
    asked["checkpoint"] = None  # its hash is in `made_by`, and where it lies says nothing
    return hashlib.sha256(json.dumps([asked, made_by], sort_keys=True).encode()).hexdigest()


def open_data(values: Mapping[str, Any], checkpoint: Checkpoint) -> RealData:
    """The real pictures that the run was trained with, and held out.

    Raises:
        ConfigError: the checkpoint does not say where they are, and neither does `shards`.
        DataError: they cannot be read.
    """
    run = checkpoint.config.get("run")
    if run is None:
        if values["shards"] is None:
            raise ConfigError(f"{values['checkpoint']} does not tell its data; give shards=...")
        data = ShardData(values["shards"], resolution=checkpoint.pipeline.resolution)
    else:
        data = make("data", run["data"])
        if values["shards"] is not None:
            data = replace(data, shards=values["shards"], sources={})
        elif not data.is_given:
            data = replace(data, shards=str(rendered(run, data.resolution)))
    divisor = checkpoint.pipeline.autoencoder.factor * checkpoint.pipeline.min_divisor
    return open_real(data, divisor, values["pictures"], values["variety"]["class_field"])


def rendered(run: Mapping[str, Any], resolution: int) -> Path:
    """The folder of the landscapes that a run was trained on, rendered where they are missing."""
    data_set = make("rendered", run["rendered"])
    with Progress("rendering landscapes", data_set.images + data_set.held_out) as progress:
        return Path(data_set.write(resolution, torch.get_num_threads(), progress.advance))


def choose_asks(values: Mapping[str, Any], real: RealData) -> tuple[Sequence[Ask], str]:
    """The prompts, and what they are from: captions of held-out samples, or a file of prompts."""
    asks: Sequence[Ask] = real.held_out.asks
    origin = "held-out captions"
    if values["prompts"] is not None:
        if any(ask.before is not None for ask in asks):
            raise ConfigError("prompts: this checkpoint edits pictures, which prompts alone do not give")
        asks, origin = read_suite(Path(values["prompts"]), values["pictures"])
    if len(asks) < values["pictures"]:
        warn(
            f"there are {len(asks):,} prompts, so {len(asks):,} pictures are made, not {values['pictures']:,}"
        )
    return asks, origin


def warn(text: str) -> None:
    """Says something beside the results, if anything, once for all processes."""
    if text and not rank():
        print(f"evaluate.py: {text}", file=sys.stderr)


def repeated(values: Mapping[str, Any], chosen: Sequence[Ask]) -> list[Ask]:
    """Each of the prompts whose variety is measured as often as there are seeds."""
    return [ask for ask in chosen for _ in range(values["variety"]["seeds"])]


def make_work(
    checkpoint: Checkpoint, sampling: Sampling, made_by: Mapping[str, Any], asks: Sequence[Ask]
) -> Work:
    """The pictures to make: number k is that of ask k, with noise of its own."""
    jobs = [Job(ask.text, k, before=ask.before) for k, ask in enumerate(asks)]
    size = (int(made_by["size"]),) * 2
    checkpoint.pipeline.check(jobs, sampling, size)
    return Work(checkpoint.pipeline, sampling, size, jobs, made_by, Look(), None)


# --- what is measured ---------------------------------------------------------------------------------------


def measure(values: Mapping[str, Any], judges: Judges, made: Made, real: RealData, train: Real) -> Measured:
    """All figures that there are for these prompts."""
    parts, held_out, given = [], real.held_out, values["prompts"] is not None
    if not given:
        parts.append(measure_distances(judges.network, made, held_out, train))
    if judges.scorer is not None:
        parts.append(measure_adherence(judges.scorer, made, None if given else held_out.pictures))
    if judges.tower is not None:
        parts.append(measure_retrieval(judges.tower, made))
        parts.append(measure_names(judges.tower, made, train, None if given else held_out.pictures))
    if made.varied_asks:
        parts.append(measure_variety_of(judges.network, made, train))
    if values["memorization"]:
        index = PictureIndex.build(
            real.train_set.views,
            judges.network,
            Path(values["index"]),
            train.pictures.shape[-1],
            real.train_set.reader.cache,
        )
        total = len(real.known_new.pictures) + min(len(made.pictures), OF)
        with Progress("looking for copies", total) as progress:
            parts.append(
                measure_memorization(judges.network, made, real.known_new.pictures, index, progress.update)
            )
    return joined(parts)


def describe_asks(asks: Sequence[Ask], chosen: Sequence[Ask], values: Mapping[str, Any]) -> dict[str, Any]:
    """The card's words for the prompts."""
    return {
        "metrics_version": METRICS_VERSION,
        "pictures": len(asks),
        "prompts_sha256": prompts_sha256(asks),
        "variety_prompts": len(chosen),
        "variety_prompts_sha256": prompts_sha256(chosen),
        "variety_seeds": values["variety"]["seeds"],
    }


def describe_real(real: RealData, train: Real) -> dict[str, Any]:
    """The card's words for the real pictures."""
    return {
        "reference_pictures": len(real.held_out.pictures),
        "reference_sha256": real.held_out.sha256,
        "known_new_sha256": real.known_new.sha256,
        "reference_dataset": real.val_set.fingerprint(),
        "train_pictures": len(train.pictures),
        "train_sha256": train.sha256,
        "train_dataset": real.train_set.fingerprint(),
    }


def summary(checkpoint: Checkpoint, card: Card) -> str:
    """One line with the figures a person looks for first."""
    figures, parts = card.metrics, []
    if "fd" in figures:
        parts.append(f"FD {figures['fd']:.2f} (floor {figures['fd_floor']:.2f})")
    if "adherence_all" in figures:
        parts.append(f"adherence {figures['adherence_all']:.1%}")
    if "adherence_retrieved" in figures:
        parts.append(f"prompts found again {figures['adherence_retrieved']:.1%}")
    if "adherence_named_in_five" in figures:
        parts.append(
            f"among the first five of {card.measured['names']} names {_beside(figures, 'named_in_five')}"
        )
    if "adherence_class" in figures:
        parts.append(f"class of the prompt recognised {_beside(figures, 'class')}")
    if "variety_different" in figures:
        real, seeds = figures["variety_different_real"], card.measured["variety_seeds"]
        parts.append(f"{figures['variety_different']:.1f} of {seeds} different (real {real:.1f})")
    if "memorization_copies" in figures:
        parts.append(f"{figures['memorization_copies']:.0f} copies of training pictures")
    parts += list(card.alarms)
    told, count = ", ".join(parts), card.measured["pictures"]
    return f"{checkpoint.home.name} at {checkpoint.name}: {told}; {count:,} pictures"


def _beside(figures: Mapping[str, float], name: str) -> str:
    """A share, and that of real pictures in brackets where there is one."""
    real = figures.get(f"adherence_{name}_real")
    return f"{figures[f'adherence_{name}']:.1%}" + ("" if real is None else f" (real {real:.1%})")


if __name__ == "__main__":
    main("evaluate", evaluate)
