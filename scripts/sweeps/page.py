"""The page about a study: parallel coordinates, what mattered, every trial, and the best one as a file.

`study.html`, `study.json` and `best.yaml` in the sweep's folder, written anew after every trial.
"""

import base64
import html
import io
import json
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from conf.cli import FOLDER
from data.arrays import write_atomic
from scripts.sweeps.driver import best_of
from scripts.sweeps.space import words_of

matplotlib.use("Agg")
from matplotlib import pyplot

#: What train.py composes where no experiment is named.
_EXPERIMENT = "landscapes"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
        color: #1c2430; background: #fbfaf7 }}
 h1, h2 {{ font-weight: 600 }} h2 {{ margin-top: 2.5rem }} img {{ max-width: 100%; height: auto }}
 table {{ border-collapse: collapse; display: block; overflow-x: auto }}
 td, th {{ padding: .3rem 1rem .3rem 0; text-align: left; font-variant-numeric: tabular-nums }}
 tr.best {{ font-weight: 600 }} pre {{ background: #f0eee8; padding: 1rem; overflow: auto }}
</style></head><body>
<h1>{title}</h1><p>{summary}</p>
{sections}
</body></html>
"""


class StudyPage:
    """Writes the page of a study.

    Args:
        folder: of the sweep.
        names: of its metrics.
        base: overrides that all trials share.
        extra: overrides that say how they are run.
    """

    def __init__(self, folder: Path, names: Sequence[str], base: Sequence[str], extra: Sequence[str]) -> None:
        self.folder = folder
        self.names = list(names)
        self.base = list(base)
        self.extra = list(extra)

    def __call__(self, study: optuna.Study) -> None:
        """Writes it as the study is now."""
        trials = [t for t in study.get_trials() if "repeats" not in t.user_attrs]
        best, importance = best_of(study), importances(study, self.names)
        document = {
            "sweep": self.folder.name,
            "metrics": dict(zip(self.names, (d.name.lower() for d in study.directions), strict=True)),
            "trials": [self._row(trial) for trial in trials],
            "best": [trial.number for trial in best],
            "importance": importance,
        }
        write_atomic(self.folder / "study.json", (json.dumps(document, indent=1) + "\n").encode())
        sections = []
        if best:
            text = self.best_yaml(best[0])
            write_atomic(self.folder / "best.yaml", text.encode())
            sections += [f"<h2>Best</h2><pre>{html.escape(text)}</pre>"]
        done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
        if len(done) > 1:
            sections += [f"<h2>Trials as lines</h2>{_picture(coordinates(done, self.names, study), 'lines')}"]
        for name, shares in importance.items():
            rows = "".join(
                f"<tr><td>{html.escape(key)}</td><td><meter min=0 max=1 value={share:.4f}></meter></td>"
                f"<td>{share:.0%}</td></tr>"
                for key, share in shares.items()
            )
            sections.append(f"<h2>What mattered for {html.escape(name)}</h2><table>{rows}</table>")
        sections.append(f"<h2>Trials</h2>{self._table(trials, best)}")
        counts = {state.name.lower(): sum(t.state is state for t in trials) for state in TrialState}
        summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        page = _PAGE.format(
            title=html.escape(f"Sweep {self.folder.name}"), summary=summary, sections="\n".join(sections)
        )
        write_atomic(self.folder / "study.html", page.encode())

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        began, ended = trial.datetime_start, trial.datetime_complete
        return {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "params": trial.params,
            "values": trial.values,
            "seconds": (ended - began).total_seconds() if began and ended else None,
            "command": self.command(trial),
            **trial.user_attrs,
        }

    def command(self, trial: FrozenTrial) -> str:
        """The command that makes this trial alone, as another run."""
        words = [*self.base, *words_of(trial.params), *self.extra, f"name={self.folder.name}-{trial.number}"]
        return shlex.join(["python", "train.py", *words])

    def best_yaml(self, trial: FrozenTrial) -> str:
        """A file for conf/experiment/ that holds what the best trial was made with."""
        head = [
            "# @package _global_",
            f"# The best of sweep {self.folder.name}, trial {trial.number}: "
            + ", ".join(f"{n} {v:.6g}" for n, v in zip(self.names, trial.values or [], strict=True)),
            f"# Put it into conf/experiment/ as {self.folder.name}.yaml, then:",
            f"#   python train.py experiment={self.folder.name} {shlex.join(self.extra)}".rstrip(),
            "# The same without the file:",
            f"#   {self.command(trial)}",
        ]
        given = [word.partition("=")[2] for word in self.base if word.startswith("experiment=")]
        defaults: list[Any] = [given[-1] if given else _EXPERIMENT]  # else it would take that one's place
        values: Any = OmegaConf.create({})
        for word in [*self.base, *words_of(trial.params)]:
            key, _, text = word.lstrip("+").partition("=")
            if key == "experiment":
                continue
            if (FOLDER / key).is_dir():
                defaults.append({f"override /{key}": text})
            else:
                values = OmegaConf.merge(values, OmegaConf.from_dotlist([f"{key}={text}"]))
        body = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults}))
        return "\n".join(head) + "\n" + body + (OmegaConf.to_yaml(values) if len(values) else "")

    def _table(self, trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial]) -> str:
        keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
        first = {trial.number for trial in best}
        heading = "".join(f"<th>{html.escape(word)}</th>" for word in ("trial", "state", *self.names, *keys))
        rows = []
        for trial in trials:
            values = trial.values or [None] * len(self.names)
            said = str(trial.user_attrs.get("failed", trial.user_attrs.get("pruned", "")))
            cells = [str(trial.number), f"{trial.state.name.lower()} {said}".strip(), *map(_cell, values)]
            cells += [_cell(trial.params.get(key)) for key in keys]
            marked = " class=best" if trial.number in first else ""
            rows.append(f"<tr{marked}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
        return f"<table><tr>{heading}</tr>{''.join(rows)}</table>"


def importances(study: optuna.Study, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each metric, the share of its variation among good trials that each key explains.

    PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255); nothing where too few trials completed.
    """
    done = [t for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
    if len(done) < 4 or len(done[0].params) < 2:
        return {}
    found = {}
    for k, name in enumerate(names):

        def reached(trial: FrozenTrial, k: int = k) -> float:
            return float(trial.values[k])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                shares = optuna.importance.get_param_importances(
                    study,
                    evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                    target=reached,
                )
            except (RuntimeError, ValueError):  # all alike
                continue
        found[name] = {key: float(share) for key, share in shares.items()}
    return found


def coordinates(trials: Sequence[FrozenTrial], names: Sequence[str], study: optuna.Study) -> bytes:
    """A PNG with an axis for each key and metric and a line for each trial, the better the darker."""
    keys = list(trials[0].params)
    columns, labels = [], []
    for key in keys:
        how = trials[0].distributions[key]
        values = [trial.params[key] for trial in trials]
        if isinstance(how, CategoricalDistribution):
            places = np.array([how.choices.index(value) for value in values], float)
            ends = [str(how.choices[0]), str(how.choices[-1])]
        else:
            numbers = np.array(values, float)
            assert isinstance(how, IntDistribution | FloatDistribution)
            places = np.log(numbers) if how.log else numbers
            ends = [f"{numbers.min():.3g}", f"{numbers.max():.3g}"]
        columns.append(places)
        labels.append((key, *ends))
    for k, name in enumerate(names):
        reached = np.array([(trial.values or [0.0])[k] for trial in trials])
        columns.append(reached)
        labels.append((name, f"{reached.min():.4g}", f"{reached.max():.4g}"))
    rank = columns[len(keys)].argsort().argsort() / max(len(trials) - 1, 1)
    rank = rank if study.directions[0].name == "MAXIMIZE" else 1 - rank
    figure, axis = pyplot.subplots(figsize=(max(6.0, 1.9 * len(columns)), 3.8))
    heights = np.stack([_unit(column) for column in columns], 1)
    for row, good in sorted(zip(heights, rank, strict=True), key=lambda pair: pair[1]):
        axis.plot(row, color=pyplot.get_cmap("YlGnBu")(0.25 + 0.7 * good), lw=1 + 1.2 * good)
    for x, (label, low, high) in enumerate(labels):
        axis.axvline(x, color="#888", lw=0.8)
        axis.text(x, -0.06, f"{low}\n{label}", ha="center", va="top", fontsize=8)
        axis.text(x, 1.04, high, ha="center", va="bottom", fontsize=8)
    axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()


def _unit(column: np.ndarray) -> np.ndarray:
    spread = column.max() - column.min()
    return (column - column.min()) / spread if spread > 0 else np.full_like(column, 0.5)


def _picture(data: bytes, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
