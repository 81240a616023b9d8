"""A sweep: asks Optuna for values, runs a trial of train.py for each, tells what came of it.

The journal of Optuna is the only memory. A trial is in it, with its number and all its values, before it is
started, so that a sweep that was killed takes up what was running, with the same number, values and run
folder; `resume=true` then makes it the same trial to the bit. The values of trial k follow from the seed, k
and the trials that have ended, not from a generator that a kill would set back.
"""

import contextlib
import fcntl
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from models.registry import ConfigError
from models.stages.lock import LOCK
from scripts.sweeps.figures import Figure
from scripts.sweeps.runners import Job, Runner
from scripts.sweeps.space import Space, words_of

PROJECT = Path(__file__).resolve().parents[2]
#: Values that were had before are left out; after so many in a row the space is taken to be exhausted.
_REPEATS = 50
_NUMERICAL = 6
#: Seconds for a trial to notice that its sweep is gone.
_LETS_GO = 30.0
_COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Asked:
    """What a sweep is asked for.

    Args:
        space: what is varied.
        figures: what is looked for; several are a Pareto front.
        base: overrides of train.py that all trials share.
        trials: that are to end, completed or pruned.
        grid: whether every combination is tried, instead of what TPE proposes.
        seed: of the proposals.
        prune_after: images from which a trial that is behind is stopped; 0 never.
        keep: one in so many trials goes on at each pruning (ASHA, Li et al. 2020, arXiv 1810.05934).
        failures: trials that may fail before the sweep gives up.

    Raises:
        ConfigError: what cannot be done.
    """

    space: Space
    figures: Sequence[Figure]
    base: Sequence[str]
    trials: int
    grid: bool = False
    seed: int = 0
    prune_after: int = 0
    keep: int = 3
    failures: int = 3

    def __post_init__(self) -> None:
        if not self.figures:
            raise ConfigError("metrics is empty; name at least one, such as {diffusion.val_loss: minimize}")
        if self.prune_after and (len(self.figures) > 1 or not self.figures[0].of_training):
            raise ConfigError(
                "prune_after_images needs one metric that training tells on the way, such as "
                "diffusion.val_loss; set it to 0, or give that metric alone"
            )
        if min(self.trials, self.keep - 1, self.failures + 1) < 1:
            raise ConfigError("trials must be at least 1, keep_one_in at least 2 and failures at least 0")

    def identity(self) -> dict[str, Any]:
        """What makes two sweeps the same study, as JSON values."""
        return {
            "space": self.space.described,
            "metrics": {each.name: "maximize" if each.maximize else "minimize" for each in self.figures},
            "overrides": list(self.base),
            "sampler": "grid" if self.grid else "tpe",
            "seed": self.seed,
        }


class Sweep:
    """Runs a study in its folder.

    Args:
        folder: `journal.log`, a run folder and a log for each trial, the page.
        asked: what for.
        runner: who runs the trials.
        extra: overrides that say how to run and not what, such as `trainer.threads=1`.
        page: writes the page about the study, after every trial that ends.
        pause: seconds between two looks at the trials.
    """

    def __init__(
        self,
        folder: Path,
        asked: Asked,
        runner: Runner,
        extra: Sequence[str],
        page: Callable[[optuna.Study], None],
        pause: float = 1.0,
    ) -> None:
        self.folder = folder
        self.asked = asked
        self.runner = runner
        self.extra = list(extra)
        self.page = page
        self.pause = pause
        self.jobs: dict[int, tuple[Trial, Job]] = {}
        self.study = open_study(folder, asked)
        self._exhausted = False
        self._grid = asked.space.grid() if asked.grid else []
        if self._grid:
            for params in self._grid[: asked.trials]:
                self.study.enqueue_trial(params, skip_if_exists=True)

    def run(self) -> None:
        """Runs trials until there are enough; a signal stops those that run, and the same command goes on.

        Raises:
            ConfigError: a metric that no trial tells, or too many failed.
        """
        try:
            while self._fill():
                time.sleep(self.pause)
                self._look()
        finally:
            for _, job in self.jobs.values():
                job.stop()
        self.page(self.study)

    def _fill(self) -> bool:
        """Starts what there is room for; whether anything runs."""
        while len(self.jobs) < self.runner.parallel:
            trial = self._next()
            if trial is None:
                break
            job = self.runner.find(trial.number)
            if job is None or job.ended() is not None:
                job = self._start(trial)
            self.jobs[trial.number] = trial, job
        return bool(self.jobs)

    def _next(self) -> Trial | None:
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.number not in self.jobs:
                trial = Trial(self.study, frozen._trial_id)
                if "pruned" in frozen.user_attrs:  # killed after that was decided
                    self._tell(trial, TrialState.PRUNED)
                elif self._is_new(trial):
                    return trial
        for _ in range(_REPEATS):
            if self._exhausted or self._count() >= self._wanted():
                return None
            trial = self._ask()
            if self._is_new(trial):
                return trial
        self._exhausted = True
        print(f"nothing new was proposed {_REPEATS} times in a row: the space is exhausted", flush=True)
        return None

    def _ask(self) -> Trial:
        number = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = sampler_for(self.asked, number, self.runner.parallel)
        return self.study.ask()

    def _is_new(self, trial: Trial) -> bool:
        """Gives `trial` its values; False, and the trial is over, where another one had them before."""
        params = self.asked.space.suggest(trial)
        for other in self.study.get_trials(deepcopy=False):
            if other.number < trial.number and other.params == params and "repeats" not in other.user_attrs:
                trial.set_user_attr("repeats", other.number)
                self.study.tell(trial, state=TrialState.FAIL)
                return False
        return True

    def _count(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=(*_COUNTED, TrialState.RUNNING)))

    def _wanted(self) -> int:
        return min(self.asked.trials, len(self._grid)) if self.asked.grid else self.asked.trials

    def run_folder(self, number: int) -> Path:
        """Of trial `number`."""
        return self.folder / f"{number:03d}"

    def _start(self, trial: Trial) -> Job:
        _await_lock(self.run_folder(trial.number) / LOCK)
        place = [f"folder={self.folder}", f"name={trial.number:03d}", "resume=true"]
        words = [*self.asked.base, *words_of(trial.params), *self.extra, *place]
        command = [sys.executable, str(PROJECT / "train.py"), *words]
        print(f"trial {trial.number}: {' '.join(words_of(trial.params))}", flush=True)
        return self.runner.start(trial.number, command, self._log(trial.number))

    def _log(self, number: int) -> Path:
        return self.folder / f"{number:03d}.log"

    def _look(self) -> None:
        for number, (trial, job) in list(self.jobs.items()):
            code = job.ended()
            if code is None:
                self._maybe_prune(trial, job)
            elif not self._goes_on(trial, code):
                del self.jobs[number]
                self.page(self.study)

    def _maybe_prune(self, trial: Trial, job: Job) -> None:
        if not self.asked.prune_after:
            return
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        new = [p for p in self.asked.figures[0].points(self.run_folder(trial.number)) if p[0] not in known]
        for images, value in new:
            trial.report(value, images)
            if trial.should_prune():
                trial.set_user_attr("pruned", images)
                job.stop()
                return

    def _goes_on(self, trial: Trial, code: int) -> bool:
        """Tells what came of a trial whose job has ended with `code`; whether a job more was started."""
        run = self.run_folder(trial.number)
        if "pruned" in trial.user_attrs:
            self._tell(trial, TrialState.PRUNED)
            return False
        if code == _NUMERICAL:  # such values are no good, which is a result
            trial.set_user_attr("pruned", "not finite")
            self._tell(trial, TrialState.PRUNED)
            return False
        if code:
            self._failed(trial, code)
            return False
        if any(each.of_card for each in self.asked.figures) and not (run / "evaluation/card.json").exists():
            words = [f"checkpoint={run}", f"out={run / 'evaluation'}"]
            command = [sys.executable, str(PROJECT / "scripts" / "evaluate.py"), *words]
            job = self.runner.start(trial.number, command, self._log(trial.number))
            self.jobs[trial.number] = trial, job
            return True
        values = [each.value(run) for each in self.asked.figures]
        for figure, value in zip(self.asked.figures, values, strict=True):
            if value is None:
                raise ConfigError(
                    f"trial {trial.number} has ended and {run} tells no {figure.name}; look at its "
                    "metrics.jsonl and report.json, and name a figure that is there"
                )
        self._tell(trial, TrialState.COMPLETE, [value for value in values if value is not None])
        return False

    def _failed(self, trial: Trial, code: int) -> None:
        lines = self._log(trial.number).read_text(errors="replace").splitlines()
        trial.set_user_attr("failed", {"exit_code": code, "said": lines[-1][:300] if lines else ""})
        self._tell(trial, TrialState.FAIL)
        failed = [t for t in self.study.get_trials(deepcopy=False) if "failed" in t.user_attrs]
        if len(failed) > self.asked.failures:
            said = failed[-1].user_attrs["failed"]["said"]
            raise ConfigError(
                f"{len(failed)} trials failed, the last one with exit code {code} ({said}); look at "
                f"{self._log(trial.number)}"
            )

    def _tell(self, trial: Trial, state: TrialState, values: Sequence[float] | None = None) -> None:
        log = self._log(trial.number)
        same = [line.rpartition(" ")[2] for line in _lines(log) if "ranks with one configuration" in line]
        if same:
            trial.set_user_attr("config_sha256", same[-1])
        self.study.tell(trial, values, state)
        told = "" if values is None else ": " + ", ".join(f"{value:.6g}" for value in values)
        print(f"trial {trial.number} {state.name.lower()}{told}", flush=True)


def sampler_for(asked: Asked, number: int, parallel: int) -> BaseSampler:
    """What proposes the values of trial `number`: the same whenever it is asked after the same trials."""
    seed = (asked.seed * 1_000_003 + number) % 2**32
    if asked.grid:
        return RandomSampler(seed)  # all trials are in the queue
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=seed, n_startup_trials=max(4, asked.trials // 3), constant_liar=parallel > 1)


def open_study(folder: Path, asked: Asked) -> optuna.Study:
    """The study kept in `folder`, begun if it is not there.

    Raises:
        ConfigError: another study is kept there.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = folder / "journal.log"
    _mend(journal)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if asked.prune_after:
        pruner = optuna.pruners.SuccessiveHalvingPruner(asked.prune_after, asked.keep)
    directions = [
        StudyDirection.MAXIMIZE if each.maximize else StudyDirection.MINIMIZE for each in asked.figures
    ]
    storage = JournalStorage(JournalFileBackend(str(journal)))
    known = [study.study_name for study in optuna.get_all_study_summaries(storage)]
    if folder.name in known:
        study = optuna.load_study(study_name=folder.name, storage=storage, pruner=pruner)
    else:
        study = optuna.create_study(
            study_name=folder.name, storage=storage, pruner=pruner, directions=directions
        )
    before, now = study.user_attrs.get("asked"), json.loads(json.dumps(asked.identity()))
    if before is None:
        study.set_user_attr("asked", now)
    elif before != now:
        key = next(key for key in now if before.get(key) != now[key])
        raise ConfigError(
            f"{folder} holds another sweep ({key} was {before.get(key)}, now {now[key]}); give this one "
            "another name=..."
        )
    return study


def _mend(journal: Path) -> None:
    """Cuts off a last line that a kill left half written, after which Optuna would read nothing any more.

    A lock that a killed sweep has left is removed too: the folder's own lock (`locked`) is held.
    """
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        whole = journal.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            with journal.open("r+b") as file:
                file.truncate(end)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder of a sweep, which one process at a time works on.

    Raises:
        OSError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sweep.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"{folder}: another sweep.py works on it; wait for it, or give this one another name=..."
            ) from None
        yield


def best_of(study: optuna.Study) -> list[FrozenTrial]:
    """The best trial, or those of the Pareto front; none where none has completed."""
    with contextlib.suppress(ValueError):
        return list(study.best_trials) if len(study.directions) > 1 else [study.best_trial]
    return []


def _await_lock(lock: Path) -> None:
    """Waits until a trial of a sweep that was killed has let go of its run; it ends within a second."""
    deadline = time.monotonic() + _LETS_GO
    while lock.exists() and time.monotonic() < deadline:
        with lock.open("a") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []
