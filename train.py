"""Trains a text-to-image model: composes the configuration, says what it will cost, runs the stages.

python train.py                                   landscapes, rendered by the project: two stages, pictures
python train.py experiment=flowers                another whole run
python train.py data.shards=PATH stages=[autoencoder]
python train.py base=runs/landscapes name=finer   begins with the networks of another run
python train.py trainer.devices=2                 two processes, each with half of every batch
python train.py launcher=slurm launcher.nodes=4  a batch job that saves, requeues itself and goes on
python train.py plan=true devices=64 backbone=sd2 what that would need: memory, FLOPs, traffic
python train.py --help                            groups, and every key with its value
"""

import copy
import logging
import os
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from conf.cli import main
from conf.schema import StageName, make, plain
from data.batch import Batch
from data.datamodule import DataModule, Precompute, ShardData, changes
from data.index import DataError
from data.loader import start_server
from data.moments import MomentsDataset
from data.progress import Progress
from data.shards import ShardDataset
from evaluation.report import contact_sheet, judge_folder, kept_judge, make_report
from models.checkpoint import Checkpoint, CheckpointError, fingerprint, newest
from models.diffusion.distillation import Distillation, Lesson
from models.kernels import compile_ahead, kernels
from models.loading import (
    MODEL_KEYS,
    PICTURING,
    STUDENT_KEY,
    build_decoder,
    build_networks,
    load_pipeline,
    newest_picturing,
    read_sampling,
)
from models.pipeline import check_size, to_uint8
from models.registry import ConfigError, build
from models.sampling import Job
from models.stages.agreement import require_same_config
from models.stages.ahead import Ahead, reads_moments
from models.stages.base import TAKEN, Base, apart, is_handed_over, same_autoencoder
from models.stages.beside import Beside
from models.stages.cluster import Launcher, adopt_step
from models.stages.compute import (
    Compute,
    Precision,
    TrainerOptions,
    allow_shapes,
    device_of,
    set_threads,
)
from models.stages.depends import differences
from models.stages.division import divide
from models.stages.dropout import check_dropout
from models.stages.effort import Effort
from models.stages.encoding import is_frozen, text_identity
from models.stages.estimate import dissect, layouts, show_autoencoder, show_estimate
from models.stages.evaluations import evaluations_of
from models.stages.heap import keep_heap
from models.stages.launch import launch, run_command, stay_with_parent
from models.stages.lessons import check_student, plan_lesson
from models.stages.lock import run_lock
from models.stages.preflight import Cost, preflight, require_disk, show
from models.stages.ranks import Ranks
from models.stages.session import Session
from models.stages.sharded import Sharding, shards_of
from models.stages.stage import Stage, restore_compute, restore_networks

if TYPE_CHECKING:
    from models.stages.distillation import DistillationStage

#: What evaluates checkpoints while a run trains.
EVALUATE = Path(__file__).resolve().parent / "scripts" / "evaluate.py"
#: What encodes pictures ahead of the diffusion stage.
PRECOMPUTE = EVALUATE.with_name("precompute.py")
#: What trains the judge of landscapes, behind all other work; its folder follows.
JUDGE = (sys.executable, str(EVALUATE.with_name("judge.py")), "--nice=10")
#: Seconds that a finished training waits for it; training it anew takes about 60.
JUDGE_PATIENCE = 120.0
#: What a run's configuration says of each stage's CPU threads, as the preflight decided that began it.
THREADS_KEY = "threads"
#: Held-out pictures made for the report, and training pictures the latents' normalisation is measured on.
REPORT_PICTURES = 256
NORMALISATION_IMAGES = 1_024


def train(config: DictConfig) -> None:
    """Runs what the composed configuration describes, in stages that each leave a verified checkpoint."""
    began, values = time.perf_counter(), plain(config)
    options = make("trainer", values["trainer"])
    if values["estimate"]:
        estimate(values, options)
        return
    stay_with_parent()
    adopt_step(os.environ)
    launcher: Launcher = make("launcher", values["launcher"])
    if launcher.takes(HydraConfig.get().overrides.task, run_folder(values)):
        return
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        run_apart(run_folder(values))
        return
    if options.devices > 1 and "RANK" not in os.environ:
        check_division(values, options, options.devices)
        sys.exit(launch(options.devices))
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks.join(options.timeout, options.connect_timeout))
        if not ranks.first:
            logging.getLogger().setLevel(logging.ERROR)
        same = require_same_config(values, ranks)
        check_division(values, options, ranks.size)
        run = Run(values, ranks)
        pids = [int(pid) for (pid,) in ranks.gather([os.getpid()])]
        if ranks.first:
            stack.enter_context(run_lock(run.folder, pids))
        run.say(f"Firstlight: run {run.folder.name} into {run.folder}")
        if ranks.size > 1:
            run.say(f"{ranks.size} ranks with one configuration, SHA-256 {same[:16]}")
        run.open_data()
        stages = run.prepare()
        judge = run.train_judge(stages)
        if judge is not None:
            stack.enter_context(judge)
        for stage in stages:
            run.fit(stage)
        if judge is not None:
            run.await_judge(judge)
        if ranks.first:
            run.report(bool(stages), began)
        ranks.wait()


def run_apart(folder: Path) -> None:
    """Runs this job of `--multirun` as a command of its own, which has its own processes and memory.

    In one process, ranks would be launched with the parent's command, which names all jobs: each rank would
    then train with other values, in silence.

    Raises:
        ConfigError: the command was started as ranks already, by torchrun or srun.
        OSError: the job ended in error.
    """
    if "RANK" in os.environ:
        raise ConfigError(
            "--multirun under torchrun would train every rank with other values; use python train.py "
            "--multirun trainer.devices=N ..., or python scripts/sweep.py, which start the ranks of each job"
        )
    kept = [word for word in HydraConfig.get().overrides.task if not word.startswith(("name=", "folder="))]
    words = [*kept, f"folder={folder.parent}", f"name={folder.name}"]
    print(f"--multirun: {shlex.join(words)}", flush=True)
    code = run_command([sys.executable, str(Path(__file__).resolve()), *words])
    if code in (130, 143):
        sys.exit(code)
    if code:
        raise OSError(f"--multirun: {' '.join(words)} ended with exit code {code}; the others were not begun")


def check_division(values: dict[str, Any], options: TrainerOptions, size: int) -> None:
    """Refuses a batch that `size` ranks and their micro-batches do not divide, before anything is built.

    Raises:
        ConfigError: naming the numbers and the nearest that work.
    """
    for name in values["stages"]:
        plan = make(f"plan/{name}", values["plan"][name])
        divide(f"plan.{name}", plan.batch_size, size, options)


def estimate(values: dict[str, Any], options: TrainerOptions) -> None:
    """Prints what the stages would take, and what diffusion needs on `trainer.devices` devices, by strategy.

    Raises:
        ConfigError: networks, a resolution or a batch that do not fit together.
    """
    plan = make("plan/diffusion", values["plan"]["diffusion"])
    anatomy = dissect(values, options.precision is not Precision.fp32)
    given = layouts(options.devices, options.shards)
    if StageName.autoencoder.name in values["stages"]:
        images = make("plan/autoencoder", values["plan"]["autoencoder"]).images
        show_autoencoder(values, images, options.devices)
    show_estimate(anatomy, given, plan.batch_size, options.accumulate, plan.images)


class Run:
    """One run: the parts its configuration describes, all built and checked before anything is written.

    Args:
        values: the configuration as plain values.
        ranks: the processes that train together.

    Raises:
        ConfigError: a value cannot be used.
    """

    def __init__(self, values: dict[str, Any], ranks: Ranks) -> None:
        self.values = values
        self.ranks = ranks
        self.names = [name for name in StageName if name.name in values["stages"]]
        if not self.names:
            raise ConfigError("stages is empty; give autoencoder, diffusion, or both; or distillation")
        self.trainer = make("trainer", values["trainer"])
        self.plans = {name: make(f"plan/{name.name}", values["plan"][name.name]) for name in StageName}
        self.optimizers = {
            name: make(f"optimizer/{name.name}", values["optimizer"][name.name]) for name in StageName
        }
        self.averaging = make("ema", values["ema"])
        self.loss = make("reconstruction", values["reconstruction"])
        self.distillation: Distillation = make("distillation", values["distillation"])
        self.data: ShardData = make("data", values["data"])
        self.rendered = None if self.data.is_given else make("rendered", values["rendered"])
        set_threads(self.trainer, ranks.local_size)
        if device_of(self.trainer).type == "cpu":
            keep_heap()
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
            torch.manual_seed(int(values["seed"]))
            self.networks = build_networks(values)
            self.decoder = build_decoder(values["decoder"], self.networks[0])
        check_size("data.resolution", self.data.resolution, self.networks[0], self.networks[2].min_divisor)
        self.objective = build("objective", values["objective"])
        try:
            check_dropout(float(values["conditioning_dropout"]), self.networks[2])
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.networks[2].image_conditioning != bool(self.data.before):
            raise ConfigError(
                f"backbone.image_conditioning is {self.networks[2].image_conditioning} and data.before is "
                f"{self.data.before!r}, but a backbone that takes a picture is trained on pairs, and no "
                "other is; set both or neither"
            )
        if values["base"] is not None and StageName.autoencoder in self.names and len(self.names) == 1:
            raise ConfigError("base is given, but stages leaves nothing to train from it; add diffusion")
        #: Ranks that each model is spread over, and how, once there is one to spread.
        self.shards = shards_of(self.trainer, ranks.size)
        whole = [name.name for name in self.names if not self.optimizers[name].takes_parts]
        if self.shards > 1 and whole:
            raise ConfigError(
                f"{', '.join(f'optimizer.{name}' for name in whole)}: works on whole matrices, and "
                f"trainer.strategy={self.trainer.strategy.name} spreads them over the ranks; use "
                "trainer.strategy=ddp, or "
                + " ".join(f"optimizer/{name}=adamw optimizer.{name}.lr=1e-3" for name in whole)
            )
        self.sharding: Sharding | None = None
        if self.data.workers < 0:
            raise ConfigError(f"data.workers is {self.data.workers}, but must be 0 or more")
        self.sampling = read_sampling(values)
        self.sampling.times(self.objective.schedule)  # refused now rather than after the training
        self.distils = StageName.distillation in self.names
        if self.distils and len(self.names) > 1:
            raise ConfigError(
                "stages: distillation is a run of its own, which learns from base=RUN; give "
                "stages=[distillation]"
            )
        if self.distils:
            check_student(self.networks[2], self.sampling, self.objective, self.distillation, self.shards)
        self.config = {key: values[key] for key in MODEL_KEYS if key in values}
        self.config |= {"resolution": self.data.resolution, "run": values}
        #: What the student is to learn, once its teacher is known.
        self.lesson: Lesson | None = None
        self.folder = run_folder(values)
        self.session = Session(
            self.folder,
            self.config,
            self.trainer,
            make("logger", values["logger"]),
            make("keep", values["keep"]),
            ranks,
            evaluations=evaluations_of(self.folder, EVALUATE, make("evaluation", values["evaluation"])),
        )
        self.checkpoints: dict[StageName, Checkpoint | None] = {}
        self.efforts: dict[StageName, Effort] = {}
        #: SHA-256 of the base, where the run begins with one.
        self.base: str | None = None
        self.moments: tuple[MomentsDataset, MomentsDataset] | None = None

    def say(self, text: str) -> None:
        """Prints a line, once for all ranks."""
        if self.ranks.first:
            print(text, flush=True)

    def open_data(self) -> None:
        """Opens the shards, rendering them first where the run has none of its own.

        Raises:
            DataError: a shard is missing or damaged, or there is nothing to train on.
            OSError: the run's folder cannot be written.
        """
        options = self.data
        seed = int(self.values["seed"])
        try:
            if self.rendered is not None:
                total = self.rendered.images + self.rendered.held_out
                if not self.ranks.first:
                    self.ranks.wait()
                with Progress("rendering landscapes", total, shown=self.ranks.first) as progress:
                    shards = self.rendered.write(
                        options.resolution, torch.get_num_threads() * self.ranks.local_size, progress.advance
                    )
                if self.ranks.first:
                    self.ranks.wait()
                options = replace(options, shards=str(shards))
            autoencoder, _, backbone = self.networks
            #: Where the pictures are, of a run that has them from one place.
            self.shards_read = options.shards or ""
            self.train_set, self.val_set = options.open(
                seed, self.folder / "bad_samples.jsonl", autoencoder.factor * backbone.min_divisor
            )
        except ValueError as error:
            raise ConfigError(f"data: {error}") from None
        if len(self.train_set) < self.ranks.size:
            raise ConfigError(
                f"{options.shards or 'data.sources'}: {len(self.train_set)} training samples are fewer than "
                f"the {self.ranks.size} ranks; train on fewer ranks, or add samples"
            )
        if not len(self.val_set):
            raise DataError(
                f"{options.shards}: no sample is held out; raise data.val_fraction or add samples"
            )

    def open_moments(self) -> None:
        """Opens the moments that the diffusion stage is to read instead of pictures, where there are any.

        They are given, or made now if the autoencoder is trained and making them pays.

        Raises:
            CheckpointError: the autoencoder that should have made them is not there, or not finished.
            DataError: something else made them.
            OSError: they cannot be written.
        """
        if StageName.diffusion not in self.names or self.moments is not None:
            return
        options, done = self.data, self.newest(StageName.autoencoder)
        if done is None or not self.is_done(StageName.autoencoder, done):
            if options.precomputed is None:
                return
            raise CheckpointError(
                f"{self.folder}: data.precomputed is set, but the autoencoder is not trained yet; run "
                f"stages=[autoencoder], then scripts/precompute.py {self.folder} {options.precomputed}"
            )
        if options.precomputed is None:
            on_cpu = device_of(self.trainer).type == "cpu"
            own = Ahead(PRECOMPUTE, self.folder, self.shards_read, options, self.ranks, on_cpu, self.say)
            if not self.has_moments(own, done):
                return
            options = replace(options, precomputed=str(own.folder), precompute=Precompute.off)
        text_encoder = self.networks[1]
        self.moments = options.open_moments(
            int(self.values["seed"]),
            fingerprint(done.tensors("ema")),
            text_identity(text_encoder) if is_frozen(text_encoder) else None,
            self.folder / "bad_samples.jsonl",
        )

    def has_moments(self, own: Ahead, done: Checkpoint) -> bool:
        """Whether the diffusion stage reads the run's `own` moments, of its autoencoder `done`.

        Before the stage has begun they are made here, if that pays; then it goes on as it began.
        """
        begun, samples = self.newest(StageName.diffusion), len(self.train_set)
        if begun is not None:
            return own.go_on(begun, self.is_done(StageName.diffusion, begun))
        if not self.data.encodes_ahead(samples, self.plans[StageName.diffusion].images):
            return False
        self.check_same(StageName.autoencoder, done)
        # The command builds the text encoder that the autoencoder's checkpoint names.
        same = done.document("config")["text_encoder"] == self.config["text_encoder"]
        return own.make(self.networks[0], samples, same and is_frozen(self.networks[1]))

    def data_for(self, name: StageName) -> DataModule:
        """Batches of the size a stage wants."""
        tokenizer = self.networks[1].tokenizer
        pictures: tuple[ShardDataset | MomentsDataset, ShardDataset | MomentsDataset]
        pictures = (self.train_set, self.val_set)
        train, val = self.moments if name is StageName.diffusion and self.moments else pictures
        data = DataModule(
            train, val, tokenizer, self.plans[name].batch_size,
            self.data.workers, self.data.worker_timeout, tokenizer.dropped,
        )  # fmt: skip
        allow_shapes(len(data.shapes))
        return data

    def prepare(self) -> list[Stage]:
        """The stages that are still to be trained, restored to where they stopped, after the preflight.

        Raises:
            CheckpointError: the folder holds a run that this configuration does not continue.
        """
        stages: list[Stage] = []
        base = self.open_base()
        if base is not None and self.distils:
            self.lesson = plan_lesson(base, self.sampling, self.objective, self.distillation)
            scale, decoder = self.lesson.guidance_scale, self.values["decoder"]
            self.config[STUDENT_KEY] = {"guidance_scale": scale, "decoder": decoder}
        self.open_moments()
        for name in self.names:
            checkpoint = self.newest(name)
            self.checkpoints[name] = checkpoint
            if checkpoint is not None:
                self.check_same(name, checkpoint)
                if self.is_done(name, checkpoint):
                    seen = f"{checkpoint.images:,} images seen"
                    told = "taken from the base" if is_handed_over(checkpoint) else seen
                    self.say(f"stage {name.name}: done, {told} ({checkpoint.folder})")
                    continue
                if not self.values["resume"]:
                    raise CheckpointError(
                        f"{checkpoint.folder}: stage {name.name} was stopped there, short of "
                        f"{self.plans[name].images:,} images; go on with resume=true, or give another name"
                    )
            stages.append(self.build_stage(name))
        for stage in stages:
            checkpoint = self.checkpoints[StageName[stage.name]]
            if base is not None and checkpoint is None:
                base.start(stage)
            if base is not None and self.lesson is not None:
                base.teach(cast("DistillationStage", stage))
            self.spread(stage)
            if checkpoint is not None:
                restore_networks(stage, checkpoint)
        self.config[THREADS_KEY] = kept = self.kept_threads()
        costs = [self.cost(stage) for stage in stages]
        self.config[THREADS_KEY] = {cost.stage: cost.compute.threads for cost in costs} | kept
        self.efforts = {StageName[cost.stage]: cost.effort for cost in costs}
        if costs and self.ranks.first:
            show(costs, require_disk(self.folder, costs))
        return stages

    def spread(self, stage: Stage) -> None:
        """Leaves of the weights this rank's part, where ranks share a model."""
        if self.shards > 1:
            if self.sharding is None:
                self.sharding = Sharding(self.shards, self.ranks.size, device_of(self.trainer))
            stage.sharding = self.sharding
            stage.configure_model()

    def open_base(self) -> Base | None:
        """The networks this run begins with; None where it is given none, or has begun.

        The base's autoencoder becomes a checkpoint of this run.

        Raises:
            CheckpointError: a base that cannot be used, or another one than the run began with.
        """
        given, last = self.values["base"], StageName.distillation if self.distils else StageName.diffusion
        mine, begun = (self.newest(name) for name in (StageName.autoencoder, last))
        if begun is not None and (not self.distils or self.is_done(last, begun)):
            return None
        if given is None:
            if self.distils:
                raise ConfigError(
                    "base is not set, but stage distillation learns from a trained model all the time; give "
                    "base=RUN, such as base=runs/landscapes"
                )
            if mine is not None and is_handed_over(mine) and StageName.diffusion in self.names:
                raise CheckpointError(
                    f"{mine.folder} came from a base, and the networks that go with it are not there yet; "
                    "give the same base=... again, or give this run another name=..."
                )
            return None
        base = Base.open(Path(given), self.values)
        if mine is None:
            if self.ranks.first:
                folder = self.folder / StageName.autoencoder.name / "checkpoints"
                base.hand_over_autoencoder(folder, self.config)
            self.ranks.wait()
        elif not same_autoencoder(mine, base):
            raise CheckpointError(
                f"{mine.folder} is another autoencoder than that of base={given}; "
                "give this run another name=..."
            )
        if begun is not None and begun.document("state")["base"] != base.sha256:
            raise CheckpointError(
                f"{begun.folder} was taught by another checkpoint than the newest of base={given}; give that "
                "one, as runs/NAME/diffusion/checkpoints/images-..., or give this run another name=..."
            )
        self.base = base.sha256
        self.say(f"{'learns from' if self.distils else 'begins with the networks of'} {given}")
        return base

    def is_done(self, name: StageName, checkpoint: Checkpoint) -> bool:
        """Whether nothing is left to train of the stage that `checkpoint` is of."""
        return checkpoint.images >= self.plans[name].images or is_handed_over(checkpoint)

    def newest(self, name: StageName) -> Checkpoint | None:
        """The last verified checkpoint of a stage, the same one on every rank."""
        mine = newest(self.folder / name.name / "checkpoints") if self.ranks.first else None
        folder = self.ranks.share(None if mine is None else str(mine.folder))
        return mine if mine is not None or folder is None else Checkpoint(Path(folder))

    def cost(self, stage: Stage) -> Cost:
        """What is left of `stage` costs, as the first rank measured it; all compute in that way then.

        Kernels of our own serve where every rank has them: what ranks compute for themselves, as Muon does,
        would differ in its last bits.
        """
        cost = self.measured(stage)
        if device_of(self.trainer).type != "cpu":
            return cost
        found = all(found for (found,) in self.ranks.gather([float(kernels() is not None)]))
        compute = replace(cost.compute, native=cost.compute.native and found)
        stage.use(compute)
        return replace(cost, compute=compute)

    def measured(self, stage: Stage) -> Cost:
        """The cost by the first rank's preflight, and its way to compute in use on all ranks."""
        if self.ranks.first or stage.sharding is not None:
            before = restore_compute(self.checkpoints[StageName[stage.name]])
            data = self.data_for(StageName[stage.name])
            kept = self.config[THREADS_KEY].get(stage.name) or (0 if before is None else before.threads)
            cost = preflight(stage, data.probe, self.session, before, kept)
            if stage.sharding is None:
                self.ranks.share([cost.compute.document(), cost.compute.reason])
            return cost
        compute = Compute.read(*self.ranks.share(None))
        stage.use(compute)
        division = divide(f"plan.{stage.name}", stage.plan.batch_size, self.ranks.size, self.trainer)
        return Cost(stage.name, 0, 0.0, division, 0, 0, 0.0, 0.0, 0.0, compute)

    def kept_threads(self) -> dict[str, int]:
        """CPU threads of each stage, by the preflight that began this run; none where it begins now."""
        begun = (self.newest(name) for name in StageName)
        mine = [each for each in begun if each is not None and not is_handed_over(each)]
        kept = (each.document("config").get(THREADS_KEY, {}) for each in mine)
        return {name: count for each in kept for name, count in each.items() if count}

    def check_same(self, name: StageName, checkpoint: Checkpoint) -> None:
        """Refuses to go on from a checkpoint that was made with other settings or other data.

        Raises:
            CheckpointError: naming the first few keys that differ.
        """
        state, was = checkpoint.document("state"), checkpoint.document("config")["run"]
        handed_over, given = is_handed_over(checkpoint), self.values["base"]
        differ = (
            apart(was, self.values, TAKEN[:1]) if handed_over else differences(name.name, was, self.values)
        )
        if given is not None and name is not StageName.autoencoder and was.get("base") != given:
            differ.append(f"base was {was.get('base')}, now {given}")
        data = self.data_for(name).train
        # A finished stage may have read moments that are deleted by now: nothing needs them any more.
        done = self.is_done(name, checkpoint)
        gone = done and isinstance(data, ShardDataset) and reads_moments(checkpoint)
        if not (handed_over or gone) and state["dataset"] != data.fingerprint():
            found = changes(state["data"], data.describe()) if "data" in state else []
            told = "the shards hold other samples" + "".join(f"; {change}" for change in found[:5])
            if not self.data.allow_change:
                differ.append(f"{told}; if that is meant, data.allow_change=true goes on with them")
            else:
                self.say(f"{checkpoint.folder}: {told}; goes on with them, as data.allow_change says")
        if differ:
            shown = "; ".join(differ[:3]) + (f"; and {len(differ) - 3} more" if len(differ) > 3 else "")
            raise CheckpointError(
                f"{checkpoint.folder} was made with other settings ({shown}); "
                "use those again, or give this run another name=..."
            )

    def train_judge(self, stages: list[Stage]) -> Beside | None:
        """A process that trains the judge of the pictures beside `stages`.

        None where there is a judge, none is needed, or no core would be idle: the report then trains it.
        """
        makes_pictures = any(stage.name in PICTURING for stage in stages)
        if self.rendered is None or not makes_pictures or not self.ranks.first:
            return None
        compute, folder = stages[0].compute, judge_folder(self.folder)
        busy = (compute.threads or torch.get_num_threads()) if compute.device.type == "cpu" else 1
        if len(os.sched_getaffinity(0)) <= busy * self.ranks.local_size or kept_judge(folder) is not None:
            return None
        try:
            return Beside([*JUDGE, str(folder)], log=self.folder / "judge.log")
        except OSError as error:
            self.say(f"the judge is not trained beside ({error}), but for the report")
            return None

    def await_judge(self, judge: Beside) -> None:
        """Waits for the judge, which has mostly ended long before; what has none trains it for the report."""
        if judge.code is None:
            self.say("waiting for the judge of landscapes, which takes about a minute")
            judge.wait(JUDGE_PATIENCE)
            if judge.code is None:
                self.say(f"it is not done after {JUDGE_PATIENCE:g} s, and is trained for the report")
        if judge.code:
            self.say(
                f"the judge was not trained beside (exit code {judge.code}, {self.folder / 'judge.log'})"
            )
        judge.stop()

    def build_stage(self, name: StageName) -> Stage:
        """The stage, with fresh weights."""
        if self.data.workers:
            start_server()  # which imports beside this process
        if device_of(self.trainer).type == "cpu":
            compile_ahead()
        # Imported here because lightning takes seconds, which --help and --cfg need not wait for.
        from models.stages.autoencoder import AutoencoderStage
        from models.stages.diffusion import DiffusionStage
        from models.stages.distillation import DistillationStage

        autoencoder, text_encoder, backbone = self.networks
        seed, here = int(self.values["seed"]), Compute(torch.device("cpu"), False, False, False, "")
        if name is StageName.autoencoder:
            return AutoencoderStage(
                autoencoder, self.loss, self.optimizers[name], self.plans[name], here, seed
            )
        if name is StageName.distillation:
            assert self.lesson is not None
            return DistillationStage(
                copy.deepcopy(autoencoder), text_encoder, backbone, self.decoder, self.lesson,
                self.optimizers[name], self.plans[name], here, seed, self.averaging,
            )  # fmt: skip
        return DiffusionStage(
            copy.deepcopy(autoencoder),  # frozen, and filled once the autoencoder is trained
            text_encoder,
            backbone,
            self.objective,
            float(self.values["conditioning_dropout"]),
            self.optimizers[name],
            self.plans[name],
            here,
            seed,
            self.averaging,
        )

    def fit(self, stage: Stage) -> None:
        """Trains `stage` to the end of its plan, with pictures on the way."""
        from models.stages.autoencoder import AutoencoderStage
        from models.stages.diffusion import DiffusionStage
        from models.stages.distillation import DistillationStage
        from models.stages.fit import Work, fit

        name = StageName[stage.name]
        if name is StageName.diffusion:
            self.open_moments()  # the autoencoder may have been trained only now
        data = self.data_for(name)
        fingerprints: dict[str, Any] = {
            "dataset": data.train.fingerprint(),
            "data": data.train.describe(),
        }
        first = self.held_out(16)
        if isinstance(stage, DiffusionStage | DistillationStage):
            tensors = self.averaged_autoencoder()
            stage.load_autoencoder(tensors, str(self.folder))
            fingerprints["autoencoder"] = fingerprint(tensors)
            before = self.checkpoints[name]
            base = self.base if before is None else before.document("state").get("base")
            if base is not None:
                fingerprints["base"] = base
            if before is not None and before.document("state")["autoencoder"] != fingerprints["autoencoder"]:
                raise CheckpointError(
                    f"{before.folder} was trained on the latents of another autoencoder than this run's; "
                    "give this run another name=..., or restore the autoencoder"
                )
        assert isinstance(stage, AutoencoderStage | DiffusionStage | DistillationStage)

        def show_pictures(images_seen: int) -> Path:
            if isinstance(stage, AutoencoderStage):
                pictures = to_uint8(stage.pictures(first)).cpu()
            else:
                pipeline = stage.pipeline(self.data.resolution)
                pairs = [None] * len(first) if first.before is None else first.before
                told = zip(first.captions, pairs, strict=True)
                jobs = [Job(caption, k, before=before) for k, (caption, before) in enumerate(told)]
                pictures = pipeline.generate(jobs, self.sampling)
            path = self.folder / stage.name / "pictures" / f"{images_seen:012d}.png"
            return save_sheet(path, pictures) if self.ranks.first else path

        def finish() -> None:
            if isinstance(stage, AutoencoderStage):
                stop = stage.images_seen + NORMALISATION_IMAGES
                stage.finish(data.train_loader(stage.images_seen, stop))

        work = Work(
            stage, data, fingerprints, self.checkpoints[name], finish, show_pictures, self.efforts[name]
        )
        fit(work, self.session)

    def averaged_autoencoder(self) -> dict[str, Tensor]:
        """The weights of the finished autoencoder of this run.

        Raises:
            CheckpointError: there is none, or it was made with other settings.
        """
        checkpoint = self.newest(StageName.autoencoder)
        if checkpoint is None:
            raise CheckpointError(
                f"{self.folder}: the diffusion stage needs a trained autoencoder and there is none; "
                "run both stages, or stages=[autoencoder] first"
            )
        self.check_same(StageName.autoencoder, checkpoint)
        return checkpoint.tensors("ema")

    def held_out(self, count: int) -> Batch:
        """The first `count` held-out samples, as one batch."""
        count = min(count, len(self.val_set))
        return self.data_for(StageName.autoencoder).held_out(count)  # of pictures, which have captions

    def report(self, trained: bool, began: float) -> None:
        """Makes the pictures and figures of what there is, and says where they are and what to type next.

        Args:
            trained: whether this command trained anything; a report that is there is kept otherwise.
            began: `time.perf_counter()` when the command began.
        """
        run = self.folder
        if newest_picturing(run) is None:
            print(f"\nThe autoencoder is trained: {run / 'autoencoder' / 'pictures'}")
            print("Next: python train.py with the same settings and stages=[diffusion]")
            return
        if trained or not (run / "report.json").exists():
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            pipeline, config, _ = load_pipeline(run, device)
            samples = [self.val_set[i] for i in range(min(REPORT_PICTURES, len(self.val_set)))]
            make_report(run, pipeline, self.sampling, samples, self.rendered is not None, began, config)
        print(f"\nPictures of held-out prompts: {run / 'contact_sheet.png'}")
        print(f"Report: {run / 'report.html'} (figures: {run / 'report.json'})")
        first = self.val_set[0]
        image = ""
        if first.before is not None:
            image = f" image={run / 'before.png'}"
            Image.fromarray(first.before.permute(1, 2, 0).numpy()).save(run / "before.png")
        print(f'Next: python sample.py checkpoint={run}{image} prompt="{first.caption}"')


def run_folder(values: dict[str, Any]) -> Path:
    """The folder of a run: `folder/name`, where the name is by default the experiment's."""
    hydra = HydraConfig.get()
    experiment = str(hydra.runtime.choices["experiment"])
    name = values["name"] or experiment
    places = [values["data"]["shards"] or "", *values["data"]["sources"]]
    given = any(
        word.lstrip("+").startswith(("data.shards=", "data.sources")) for word in hydra.overrides.task
    )
    if values["name"] is None and given:
        name = "-".join([experiment, *(Path(place).stem for place in places if place)])
    if hydra.mode is RunMode.MULTIRUN:
        name = f"{name}/{hydra.job.override_dirname.replace('/', '-') or hydra.job.num}"
    return Path(values["folder"]) / name


def save_sheet(path: Path, pictures: Tensor) -> Path:
    """Writes pictures uint8 `[N 3 H W]` as a sheet to `path`, and returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures).save(path)
    return path


if __name__ == "__main__":
    main("train", train)
