"""How fast ways of training learn: the same images, the same frozen autoencoder, one change at a time.

An arm is a list of overrides of `train.py`, a line of YAML: `muon: [optimizer/diffusion=muon]`. The first one
is what the others are compared with. Each is trained for every seed on the moments of the same pictures, in
the loop of `scripts/bench.py overhead`, whose weights are those of `train.py` to the bit, and is judged with
held-out captions by the landscapes judge. A seed gives an arm the same first weights, order and noise as the
others, so that differences are taken seed by seed. Results are kept as lines of JSON: what is there is not
trained again, so an interrupted measurement goes on, and one with more arms or seeds adds to it.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from conf.cli import composed
from conf.schema import make
from data.batch import Batch
from data.datamodule import ShardData
from data.json_lines import read_json_lines
from data.progress import Progress
from data.shard_index import write_atomic
from data.shards import ShardDataset
from evaluation.adherence import AdherenceJudge, load_judge, score
from evaluation.metrics import frechet_distance
from evaluation.report import judge_folder
from models.autoencoder import Autoencoder
from models.checkpoint import CheckpointError, fingerprint, newest
from models.loading import build_networks, load_part, read_sampling
from models.registry import ConfigError
from models.sampling import Job
from models.stages.compute import choose, set_threads
from models.stages.diffusion import DiffusionStage
from models.stages.encoding import encode_images
from models.text_encoder import TextEncoder
from scripts.benches.findings import Findings, cell
from scripts.benches.measuring import machine
from scripts.benches.overhead import Bare, make_stage

#: Pictures of which the moments are made at once.
ENCODED = 64
#: What is told of an arm: figure -> how it is printed; and what is compared with the baseline's.
FIGURES = {"all": ".1%", "factors": ".1%", "fd": ".1f", "val_loss": ".4f", "cpu_ms_a_step": ".0f"}
COMPARED = ("all", "factors", "fd", "val_loss")
#: Keys of the configuration that decide what an arm learns.
DECIDES = (
    *("seed", "autoencoder", "text_encoder", "backbone", "objective", "conditioning_dropout", "ema"),
    *("optimizer", "plan", "data", "rendered", "sampler", "grid", "guidance", "sampling"),
)


def learning(
    arms: str = "scripts/benches/learning.yaml",
    run: str = "runs/landscapes",
    folder: str = "runs/learning",
    images: int = 8_192,
    seeds: int = 2,
    pictures: int = 256,
    threads: int = 1,
) -> Findings:
    """Returns how well each arm has learnt after `images` training images, and how far from the first arm.

    Args:
        arms: a YAML file, name -> list of overrides of train.py; the first arm is the baseline.
        run: a run whose autoencoder is trained; the judge is looked for beside it.
        folder: of the results and of the moments.
        images: the horizon; an arm may have another one by an override of plan.diffusion.images.
        seeds: of each arm, counted from 0.
        pictures: made from held-out captions.
        threads: of torch.
    """
    if min(images, seeds, pictures, threads) < 1:
        raise ValueError("images, seeds, pictures and threads must be at least 1")
    asked = read_arms(Path(arms))
    common = [f"trainer.threads={threads}", f"plan.diffusion.images={images}"]
    values = {
        (name, seed): composed("train", *common, *words, f"seed={seed}")
        for name, words in asked.items()
        for seed in range(seeds)
    }
    first = next(iter(values.values()))
    set_threads(make("trainer", first["trainer"]))
    bench = Bench.open(Path(run), Path(folder), first, images, pictures)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
    for seed in range(seeds):
        for name in asked:
            results[name].append(bench.result(name, values[name, seed]))
    return _findings(results, {"images": images, "seeds": seeds, "pictures": pictures, **machine()})


def read_arms(path: Path) -> dict[str, list[str]]:
    """The arms of a YAML file; raises ConfigError where it is none of arms."""
    try:
        arms = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not (isinstance(arms, dict) and arms and all(_is_arm(words) for words in arms.values())):
        raise ConfigError(f"{path}: must hold lines such as muon: [optimizer/diffusion=muon]")
    return {str(name): list(words) for name, words in arms.items()}


def _is_arm(words: object) -> bool:
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


@dataclass(frozen=True)
class Bench:
    """What all arms share.

    Args:
        autoencoder: its averaged weights, by name.
        moments: of training pictures, float32 `[N 2C h w]`.
        captions: of those.
        held_out: captions and moments that are not trained on.
        records: what the held-out captions say.
        judge: of pictures.
        real: its features of the held-out pictures, `[M D]`.
        results: the file of results.
        identity: of all this.
    """

    autoencoder: dict[str, Tensor]
    moments: Tensor
    captions: list[str]
    held_out: Batch
    records: list[dict[str, Any]]
    judge: AdherenceJudge
    real: Tensor
    results: Path
    identity: str

    @classmethod
    def open(cls, run: Path, out: Path, values: dict[str, Any], images: int, pictures: int) -> "Bench":
        """Reads what is there, and encodes the pictures where that is not done yet.

        Raises:
            CheckpointError: there is no trained autoencoder, or another one than the configuration describes.
            JudgeError: there is no judge.
        """
        checkpoint = newest(run / "autoencoder" / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(f"{run}: there is no trained autoencoder; make one with: python train.py")
        judge = load_judge(judge_folder(run))
        data: ShardData = make("data", values["data"])
        if not data.is_given:
            shards = make("rendered", values["rendered"]).write(data.resolution, 1)
            data = replace(data, shards=str(shards))
        train, val = data.open(seed=0)
        tensors, (autoencoder, text_encoder, _) = checkpoint.tensors("ema"), build_networks(values)
        load_part(autoencoder.eval(), "autoencoder", tensors, str(run))
        count, held_out = min(images, len(train)), [val[k] for k in range(min(pictures, len(val)))]
        told = f"{fingerprint(tensors)} {train.fingerprint()} {val.fingerprint()} {count} {len(held_out)}"
        identity = hashlib.sha256(told.encode()).hexdigest()
        out.mkdir(parents=True, exist_ok=True)
        kept = out / f"{identity[:16]}.safetensors"
        if not kept.exists():
            _encode(autoencoder, train, count, kept)
        with safe_open(kept, "pt") as file:
            moments, captions = file.get_tensor("moments"), json.loads(file.metadata()["captions"])
        pixels = torch.stack([sample.pixels for sample in held_out])
        return cls(
            tensors, moments, captions,
            _batch(encode_images(autoencoder, pixels), [s.caption for s in held_out],
                   torch.arange(len(held_out)), text_encoder),
            [sample.record for sample in held_out], judge, judge.embed(pixels.float() / 127.5 - 1),
            out / "results.jsonl", identity,
        )  # fmt: skip

    def result(self, name: str, values: dict[str, Any]) -> dict[str, float]:
        """The figures of an arm with the configuration `values`, kept or measured now."""
        told = {key: values[key] for key in DECIDES} | {"bench": self.identity}
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        lines = read_json_lines(self.results)
        known: dict[str, dict[str, float]] = {entry["key"]: entry["figures"] for entry in lines}
        if key not in known:
            known[key] = self.measure(name, values)
            lines.append({"arm": name, "seed": values["seed"], "figures": known[key], "key": key})
            write_atomic(self.results, "".join(json.dumps(line) + "\n" for line in lines).encode())
        return known[key]

    def measure(self, name: str, values: dict[str, Any]) -> dict[str, float]:
        """Trains an arm to its horizon, and makes pictures."""
        stage = make_stage(values, make("plan/diffusion", values["plan"]["diffusion"]), int(values["seed"]))
        stage.load_autoencoder(self.autoencoder, "the autoencoder")
        plan, seed = stage.plan, int(values["seed"])
        rows = order(len(self.moments), plan.steps * plan.batch_size, seed).split(plan.batch_size)
        stage.use(choose(make("trainer", values["trainer"])))
        loop, seconds = Bare(stage), 0.0
        with Progress(f"{name}, seed {seed}", plan.images) as progress:
            for step, row in enumerate(rows):
                seen = torch.arange(plan.batch_size) + step * plan.batch_size  # noise is new in each epoch
                batch = _batch(self.moments[row], [self.captions[k] for k in row], seen, stage.text_encoder)
                began = time.process_time()
                loop.step(batch)
                seconds += time.process_time() - began
                progress.update(stage.images_seen)
        return self._judged(stage, values) | {"cpu_ms_a_step": 1000 * seconds / plan.steps}

    def _judged(self, stage: DiffusionStage, values: dict[str, Any]) -> dict[str, float]:
        """How well the pictures that the averaged weights make are what the captions say."""
        pipeline = stage.pipeline(int(values["data"]["resolution"]))
        jobs = [Job(caption, k) for k, caption in enumerate(self.held_out.captions)]
        pictures = pipeline.generate(jobs, read_sampling(values)).float() / 127.5 - 1
        shares = score(self.judge, pictures, self.records)
        loss = stage.validate([self.held_out])["loss"].mean()
        return {
            **shares,
            "factors": fmean(share for name, share in shares.items() if name != "all"),
            "fd": frechet_distance(self.judge.embed(pictures), self.real),
            "val_loss": float(loss),
        }


def order(pictures: int, images: int, seed: int) -> Tensor:
    """Which of the `pictures` are the `images` of a run, int64: each once before any comes again."""
    rng = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(pictures, generator=rng) for _ in range(-(-images // pictures))]
    return torch.cat(epochs)[:images]


def _batch(moments: Tensor, captions: list[str], indices: Tensor, text_encoder: TextEncoder) -> Batch:
    count = len(captions)
    pixels = torch.empty(count, 0, dtype=torch.uint8)
    return Batch(pixels, text_encoder.tokenize(captions), indices, captions, [""] * count, moments=moments)


def _encode(autoencoder: Autoencoder, train: ShardDataset, count: int, file: Path) -> None:
    """Writes moments and captions of the first `count` pictures."""
    moments, captions = [], []
    with Progress("encoding pictures", count) as progress:
        for first in range(0, count, ENCODED):
            samples = [train[k] for k in range(first, min(first + ENCODED, count))]
            moments.append(encode_images(autoencoder, torch.stack([sample.pixels for sample in samples])))
            captions += [sample.caption for sample in samples]
            progress.update(len(captions))
    content = save({"moments": torch.cat(moments).contiguous()}, {"captions": json.dumps(captions)})
    write_atomic(file, content)


def _findings(results: Mapping[str, Sequence[Mapping[str, float]]], told: dict[str, Any]) -> Findings:
    baseline = next(iter(results))
    rows: list[Sequence[str]] = [("", *FIGURES, *(f"{figure}, difference" for figure in COMPARED))]
    document: dict[str, Any] = {}
    for name, found in results.items():
        means = {figure: fmean(each[figure] for each in found) for figure in found[0]}
        apart = {
            figure: difference([each[figure] for each in found], [each[figure] for each in results[baseline]])
            for figure in COMPARED
        }
        document[name] = {"means": means, "differences": apart, "seeds": found}
        shown = [
            f"{format(mean, FIGURES[figure])} +- {cell(error, FIGURES[figure])}"
            for figure, (mean, error) in apart.items()
        ]
        rows.append((name, *(format(means[figure], form) for figure, form in FIGURES.items()), *shown))
    notes = [f"differences are from {baseline}, seed by seed, with their standard errors"]
    return Findings("learning", told | {"arms": document}, rows, {}, {}, {}, notes=notes)


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """The mean difference of pairs, and its standard error, which one pair does not have."""
    pairs = [one - other for one, other in zip(values, others, strict=True)]
    return fmean(pairs), stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
