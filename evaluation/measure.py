"""From pictures to figures: distances with their floors, adherence, variety, copies of training pictures.

Each comes from a module of its own; here they get their names and are put beside what real pictures measure.
What is compared later, features and scores of every picture, is handed back with the figures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.landscapes import FACTORS
from evaluation.asks import Ask, Real
from evaluation.diversity import Variety, measure_real, measure_variety
from evaluation.features import FeatureNetwork
from evaluation.memorization import FEWEST, OF, Memorization, calibrate, copies_sheet, find_copies
from evaluation.metrics import density_coverage, frechet_distance, kernel_distance, mmd, precision_recall
from evaluation.picture_index import PictureIndex
from evaluation.prompts import Prompt
from evaluation.retrieval import TextImageTower, ranks_among, retrieve
from evaluation.scorers import Scorer, category_means

#: More categories than this are not shown.
MAX_CATEGORIES = 200
#: Texts among which a picture's own is looked for, and how many there must be for that to say anything.
NAMES, FEWEST_NAMES = 100, 20


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
        copies: made pictures beside the training pictures that they copy.
        by: what the figures depend on besides, in the card's words.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    variety: Variety | None = None
    copies: Image.Image | None = None
    by: dict[str, Any] = field(default_factory=dict)


def joined(parts: Sequence[Measured]) -> Measured:
    """All of them as one."""
    whole = Measured(
        variety=next((part.variety for part in parts if part.variety is not None), None),
        copies=next((part.copies for part in parts if part.copies is not None), None),
    )
    for part in parts:
        whole.metrics.update(part.metrics)
        whole.features.update(part.features)
        whole.categories.update(part.categories)
        whole.by.update(part.by)
        whole.alarms.extend(part.alarms)
    return whole


def distances(made: Tensor, real: Tensor) -> dict[str, float]:
    """How far features `[N D]` are from those of as many real pictures, by every measure there is."""
    kernel, error = kernel_distance(made, real)
    precision, recall = precision_recall(made, real)
    density, coverage = density_coverage(made, real)
    return {
        "fd": frechet_distance(made, real), "kid": kernel, "kid_se": error, "mmd": mmd(made, real),
        "precision": precision, "recall": recall, "density": density, "coverage": coverage,
    }  # fmt: skip


def measure_distances(network: FeatureNetwork, made: Made, held_out: Real, train: Real) -> Measured:
    """The distances of the made pictures from the held-out ones of the same prompts.

    Beside each stands the floor, `<name>_floor`: what as many training pictures measure in their place. All
    sets are of one N, as a distance depends on it: that of the smallest.
    """
    count = min(len(made.pictures), len(held_out.pictures), len(train.pictures))
    rows = {
        "made": network.features(made.pictures[:count]),
        "reference": network.features(held_out.pictures[:count]),
        "train": network.features(train.pictures[:count]),
    }
    floor = distances(rows["train"], rows["reference"])
    figures = distances(rows["made"], rows["reference"])
    figures |= {f"{name}_floor": value for name, value in floor.items() if not name.endswith("_se")}
    return Measured(figures, rows, by={"distance_pictures": count})


def measure_adherence(scorer: Scorer, made: Made, real: Tensor | None) -> Measured:
    """What a scorer finds of the prompts in the made pictures, `adherence_<name>`, and in each category.

    Beside each figure stands `adherence_<name>_real`, that of the `real` pictures of the same prompts.
    """
    prompts = [Prompt(ask.text, ask.of_class, str(k), ask.record) for k, ask in enumerate(made.asks)]
    scores = scorer.score(made.pictures, prompts)
    figures = {f"adherence_{name}": _mean(values) for name, values in scores.items()}
    # Of how many prompts it could tell anything.
    known = np.stack([~np.isnan(values) for values in scores.values()]).any(0)
    figures["adherence_prompts"] = float(known.sum())
    if real is not None:
        of_real = scorer.score(real, prompts)
        figures |= {f"adherence_{name}_real": _mean(values) for name, values in of_real.items()}
    rows = {f"score_{name}": torch.from_numpy(values) for name, values in scores.items()}
    return Measured(figures, rows, categories=_categories(scores, prompts))


def measure_retrieval(tower: TextImageTower, made: Made) -> Measured:
    """How well prompts find their pictures among all the made ones, and pictures their prompts."""
    texts = [ask.text for ask in made.asks]
    found = retrieve(tower.embed_pictures(made.pictures), tower.embed_texts(texts), texts)
    figures = {}
    for way, each in (("text_to_image", found.text_to_image), ("image_to_text", found.image_to_text)):
        figures[f"adherence_{way}_recall_1"] = each.recall_1
        figures[f"adherence_{way}_recall_5"] = each.recall_5
        figures[f"adherence_{way}_median_rank"] = each.median_rank
    return Measured(figures)


def measure_names(tower: TextImageTower, made: Made, train: Real, real: Tensor | None) -> Measured:
    """How often a tower finds a picture's own prompt among 100 texts: text to picture to text.

    `adherence_named_first` and `adherence_named_in_five` are the shares in [0, 1] of pictures whose prompt
    comes first, and among the first five; `_real` beside them is that of the `real` pictures of the same
    prompts. The others are prompts of the evaluation, and training captions where these are fewer than 100;
    fewer where there are not so many different ones, as `names` says, and nothing is measured where there are
    less than 20.
    """
    texts = [ask.text for ask in made.asks]
    pool = list(dict.fromkeys([*texts, *(ask.text for ask in train.asks)]))[: max(NAMES, len(set(texts)))]
    if len(pool) < FEWEST_NAMES:
        return Measured()
    places = {text: k for k, text in enumerate(pool)}
    own, vectors = [places[text] for text in texts], tower.embed_texts(pool)
    figures, rows = {}, {}
    for mark, pictures in (("", made.pictures), ("_real", real)):
        if pictures is not None:
            ranks = ranks_among(tower.embed_pictures(pictures), vectors, own, NAMES)
            for name, last in (("named_first", 1), ("named_in_five", 5)):
                found = torch.from_numpy(ranks <= last).double()
                figures[f"adherence_{name}{mark}"] = float(found.mean())
                if not mark:
                    rows[f"score_{name}"] = found
    return Measured(figures, rows, by={"names": min(NAMES, len(pool))})


def _categories(scores: Mapping[str, np.ndarray], prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """The means of each category, and for landscapes those of each factor's members; none of too many."""
    if all(set(FACTORS) <= prompt.record.keys() for prompt in prompts):
        groups = [
            [Prompt(p.text, f"{name}: {p.record[name]}", p.id, p.record) for p in prompts] for name in FACTORS
        ]
    else:
        groups = [list(prompts)]
    found: dict[str, dict[str, float]] = {}
    for group in groups:
        counts: dict[str, int] = {}
        for prompt in group:
            counts[prompt.category] = counts.get(prompt.category, 0) + 1
        means = category_means(scores, group)
        found |= {each: {"prompts": counts[each], **means[each]} for each in sorted(means)}
    return found if 1 < len(found) <= MAX_CATEGORIES else {}


def _mean(values: np.ndarray) -> float:
    """The mean of the numbers among the values, whatever their order; NaN of none."""
    known = values[~np.isnan(values)].tolist()
    return math.fsum(known) / len(known) if known else math.nan


def measure_variety_of(network: FeatureNetwork, made: Made, train: Real) -> Measured:
    """How varied many seeds of a prompt are beside training pictures of its class, and the alarm.

    Prompts of a class that no training picture has are compared with all of these.
    """
    known = {ask.of_class for ask in train.asks}
    if all(ask.of_class in known for ask in made.varied_asks):
        of_train, of_made = [a.of_class for a in train.asks], [a.of_class for a in made.varied_asks]
    else:
        of_train, of_made = [""] * len(train.asks), [""] * len(made.varied_asks)
    levels = measure_real(network.features(train.pictures), of_train, made.seeds)
    rows = network.features(made.varied)
    prompts = [ask.text for ask in made.varied_asks for _ in range(made.seeds)]
    classes = [name for name in of_made for _ in range(made.seeds)]
    variety = measure_variety(rows, prompts, classes, levels)
    figures = {f"variety_{name}": value for name, value in variety.summary().items()}
    figures["variety_vendi_ratio"] = figures["variety_vendi"] / figures["variety_vendi_real"]
    alarms = [variety_alarm(variety)] if variety.alarm else []
    if variety.left_out:
        alarms.append(
            f"variety: {len(variety.left_out)} of {len(made.varied_asks)} prompts are left out, as fewer "
            "than 8 training pictures are of their class; give variety.class_field a field of fewer classes"
        )
    features = {"varied": rows, **_by_prompt(variety, made.varied_asks)}
    return Measured(figures, features, alarms, variety=variety)


def _by_prompt(variety: Variety, asks: Sequence[Ask]) -> dict[str, Tensor]:
    """What the means over prompts are made of, a row for each in their order; NaN for those left out."""
    of = {
        row.prompt: (row.sameness, row.made.different, row.made.vendi, row.made.distance)
        for row in variety.rows
    }
    table = torch.tensor([of.get(ask.text, (math.nan,) * 4) for ask in asks], dtype=torch.float64)
    names = ("sameness", "different", "vendi", "pairwise_distance")
    return {f"variety_{name}": column.clone() for name, column in zip(names, table.unbind(1), strict=True)}


def variety_alarm(variety: Variety) -> str:
    """The line that says which prompts' pictures repeat, and how much alike they are."""
    bad = [row for row in variety.rows if row.collapsed]
    named = ", ".join(f'"{row.prompt}" ({row.sameness:.0%} same)' for row in bad[:3])
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"variety: the pictures of {len(bad)} of {len(variety.rows)} prompts repeat: {named}{more}"


def measure_memorization(
    network: FeatureNetwork,
    made: Made,
    known_new: Tensor,
    index: PictureIndex,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """The copies of training pictures among the first 256 made ones, as many as the threshold is meant for.

    Calibrated on held-out pictures `known_new` uint8 `[M 3 H W]`; too few measure nothing.
    `progress` is told how many of both are done.
    """
    pictures = made.pictures[:OF]
    if len(known_new) < FEWEST:
        told = (
            f"memorization: not measured, as {len(known_new)} pictures are held out and {FEWEST} are needed"
        )
        return Measured(alarms=[told])
    threshold = calibrate(known_new, network, index, progress)
    done = len(known_new)
    found = find_copies(
        pictures, network, index, threshold, None if progress is None else lambda k: progress(done + k)
    )
    gaps = torch.empty(len(pictures), dtype=torch.float64)
    for match in found.matches:
        gaps[match.picture] = match.gap
    return Measured(
        {f"memorization_{name}": value for name, value in found.summary().items()},
        {"gaps": gaps},
        [memorization_alarm(found)] if found.copies else [],
        copies=copies_sheet(found, pictures, index),
        by={"memorization_pictures": len(pictures), "index": index.fingerprint()},
    )


def memorization_alarm(found: Memorization) -> str:
    """The line that says how many pictures are copies, and of which training pictures."""
    of = [match.by_pixels.place for match in found.copies]
    named = ", ".join(dict.fromkeys(f"{each.shard.rpartition('/')[2]} {each.key}" for each in of[:3]))
    return f"memorization: {len(of)} of {len(found.matches)} pictures copy training pictures, such as {named}"
