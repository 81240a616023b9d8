"""From pictures to figures: distances with their floors, adherence, variety, each from its own module.

Everything is computed from pictures and from the features that one network gives of them; what is compared
later, features and scores of every picture, is handed back beside the figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.landscapes import FACTORS
from evaluation.adherence import AdherenceJudge, class_ids
from evaluation.asks import Ask, Real
from evaluation.diversity import Variety, measure_real, measure_variety
from evaluation.features import FeatureNetwork, judge_features
from evaluation.metrics import frechet_distance
from models.portions import Portions

#: Pictures that the judge reads at a time.
_JUDGED = 32


@dataclass(frozen=True)
class Made:
    """The pictures of a checkpoint, uint8 `[N 3 H W]`.

    Args:
        asks: the prompts of `pictures`.
        pictures: one of each prompt.
        varied_asks: the prompts of `varied`.
        varied: `seeds` of each of these prompts, one prompt after another.
        seeds: how many.
    """

    asks: Sequence[Ask]
    pictures: Tensor
    varied_asks: Sequence[Ask]
    varied: Tensor
    seeds: int


@dataclass(frozen=True)
class Measured:
    """Figures by name, the features and scores behind them, and what people are shown.

    Args:
        metrics: name -> figure.
        features: name -> a row for each picture.
        alarms: a line for each thing that a person should look at.
        categories: class of prompts -> name -> figure.
        variety: of each prompt, the most alike first.
        by: what the figures depend on besides, in the card's words.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    variety: Variety | None = None
    by: dict[str, Any] = field(default_factory=dict)


def joined(parts: Sequence[Measured]) -> Measured:
    """All of them as one."""
    whole = Measured(variety=next((part.variety for part in parts if part.variety is not None), None))
    for part in parts:
        whole.metrics.update(part.metrics)
        whole.features.update(part.features)
        whole.categories.update(part.categories)
        whole.by.update(part.by)
        whole.alarms.extend(part.alarms)
    return whole


def distances(made: Tensor, real: Tensor) -> dict[str, float]:
    """How far features `[N D]` are from those of as many real pictures, by every measure there is."""
    return {"fd": frechet_distance(made, real)}


def with_floor(made: Tensor, held_out: Tensor, train: Tensor) -> dict[str, float]:
    """The distances of `made` from held-out pictures, and as `<name>_floor` those of training pictures.

    All are features `[N D]` of one N: a distance depends on the number of pictures.
    """
    floor = distances(train, held_out)
    return {**distances(made, held_out), **{f"{name}_floor": value for name, value in floor.items()}}


def measure_distances(network: FeatureNetwork, made: Made, held_out: Real, train: Real) -> Measured:
    """The distances of the made pictures from the held-out ones of the same prompts."""
    count = min(len(made.pictures), len(held_out.pictures), len(train.pictures))
    rows = {
        "made": network.features(made.pictures[:count]),
        "reference": network.features(held_out.pictures[:count]),
        "train": network.features(train.pictures[:count]),
    }
    return Measured(with_floor(rows["made"], rows["reference"], rows["train"]), rows)


def measure_adherence(judge: AdherenceJudge, made: Made) -> Measured:
    """The shares of pictures in which the judge of landscapes reads what the prompts say, each factor."""
    right = right_factors(judge, made.pictures, [ask.record for ask in made.asks])
    shares = {f"adherence_{name}": rows.float().mean().item() for name, rows in right.items()}
    categories: dict[str, dict[str, float]] = {}
    for name in right:
        if name == "all":
            continue
        for value in sorted({str(ask.record[name]) for ask in made.asks}):
            rows = torch.tensor([ask.record[name] == value for ask in made.asks])
            categories[f"{name}: {value}"] = {
                "pictures": int(rows.sum()),
                "adherence": right[name][rows].float().mean().item(),
                "all": right["all"][rows].float().mean().item(),
            }
    by = {"scorer": "judge", "scorer_sha256": judge_features(judge).sha256}
    return Measured(shares, {f"right_{n}": rows for n, rows in right.items()}, categories=categories, by=by)


def right_factors(
    judge: AdherenceJudge, pictures: Tensor, records: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Bool `[N]` for each factor, and "all": whether the judge reads in a picture what its record says."""

    def read(portion: Tensor) -> Tensor:
        predicted = judge.predict(portion.float() / 127.5 - 1)
        return torch.stack([predicted[name] for name in FACTORS], 1)

    right = Portions()(_JUDGED, read, pictures) == class_ids(records)
    return {**dict(zip(FACTORS, right.unbind(1), strict=True)), "all": right.all(1)}


def measure_variety_of(network: FeatureNetwork, made: Made, train: Real) -> Measured:
    """How varied many seeds of a prompt are beside training pictures of its class, and the alarm."""
    levels = measure_real(network.features(train.pictures), [a.of_class for a in train.asks], made.seeds)
    rows = network.features(made.varied)
    prompts = [ask.text for ask in made.varied_asks for _ in range(made.seeds)]
    classes = [ask.of_class for ask in made.varied_asks for _ in range(made.seeds)]
    variety = measure_variety(rows, prompts, classes, levels)
    figures = {f"variety_{name}": value for name, value in variety.summary().items()}
    figures["variety_vendi_ratio"] = figures["variety_vendi"] / figures["variety_vendi_real"]
    alarms = [variety_alarm(variety)] if variety.alarm else []
    return Measured(figures, {"varied": rows}, alarms, variety=variety)


def variety_alarm(variety: Variety) -> str:
    """The line that says which prompts' pictures repeat, and how much alike they are."""
    bad = [row for row in variety.rows if row.collapsed]
    named = ", ".join(f'"{row.prompt}" ({row.sameness:.0%} same)' for row in bad[:3])
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"variety: the pictures of {len(bad)} of {len(variety.rows)} prompts repeat: {named}{more}"
