"""Do all pictures of a prompt look alike? How varied they are, beside real pictures of the same class.

Many seeds of one prompt are compared with as many real pictures whose captions say the same: the class, such
as "dawn/sea/left/clear". Two figures are standard, the Vendi score on cosine similarities and the mean
pairwise distance. Both hardly see that half of the pictures repeat, on features that have much in common, so
the sameness is read from a Vendi score whose kernel has the width of the real pictures themselves: it counts
different pictures, from 1 to N.

    levels = measure_real(network.features(real), classes_of_real, count=16)
    variety = measure_variety(network.features(made), prompts, classes, levels)
    variety.alarm, variety.rows[0].prompt, made[list(variety.rows[0].pictures)]

The alarm is calibrated on the real pictures, class by class. It fires for a prompt whose pictures are no more
varied than the most varied of 100 sets in which a quarter of the N are different real pictures and the rest
repeats them. A generator that is less varied than any set of real pictures, but repeats nothing, as guidance
makes them, is called narrow instead.

Numbers do not depend on the order of the pictures or on the number of threads, to the last digit.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.index import key_hash
from models.portions import one_thread

#: Sets drawn of the real pictures of a class, and of a prompt's where it has more than are compared.
SUBSETS = 100
#: Fewer pictures than this, on either side, are not compared.
FEWEST = 4
#: One of so many pictures is different in the sets that the alarm is calibrated on, but at least 2 are.
_QUARTER = 4
_TINY = 1e-12


@dataclass(frozen=True)
class Spread:
    """How varied N pictures are: `different` and `vendi` count pictures, 1 to N; `distance` is in features.

    `different` is the Vendi score with a Gaussian kernel as wide as half the distance of real pictures of the
    class, `vendi` that with cosine similarity, `distance` the mean Euclidean distance of two pictures.
    """

    different: float
    vendi: float
    distance: float


@dataclass(frozen=True)
class Level:
    """How varied the real pictures of a class are: the mean of `real` over sets of `count` of `pictures`.

    `width` is that of the Gaussian kernel; `narrow` is how many `different` pictures the least varied set
    has, `collapsed` the most that sets reach of which a quarter are different and the others repeat them.
    """

    count: int
    pictures: int
    width: float
    real: Spread
    narrow: float
    collapsed: float


@dataclass(frozen=True)
class PromptVariety:
    """One prompt's pictures, by their numbers, beside the real pictures of its class.

    `sameness` is 1 - (different - 1) / (real different - 1), within [0, 1]: 0 as varied as the real pictures,
    1 all the same. `narrow`: less varied than any set of real pictures; `collapsed`: pictures repeat.
    """

    prompt: str
    of_class: str
    pictures: tuple[int, ...]
    made: Spread
    level: Level
    sameness: float
    narrow: bool
    collapsed: bool


@dataclass(frozen=True)
class Variety:
    """All prompts that could be compared, the most alike first; `left_out` are those that could not."""

    rows: tuple[PromptVariety, ...]
    left_out: tuple[str, ...]

    @property
    def alarm(self) -> bool:
        """Whether the pictures of any prompt repeat."""
        return any(row.collapsed for row in self.rows)

    def summary(self) -> dict[str, float]:
        """Means over the prompts, for a card or a chart; NaN where there is no prompt.

        The shares in [0, 1] of prompts that are `narrow` and `collapsed` stand beside.
        """
        values = {
            "sameness": [row.sameness for row in self.rows],
            "different": [row.made.different for row in self.rows],
            "different_real": [row.level.real.different for row in self.rows],
            "vendi": [row.made.vendi for row in self.rows],
            "vendi_real": [row.level.real.vendi for row in self.rows],
            "pairwise_distance": [row.made.distance for row in self.rows],
            "pairwise_distance_real": [row.level.real.distance for row in self.rows],
            "narrow": [float(row.narrow) for row in self.rows],
            "collapsed": [float(row.collapsed) for row in self.rows],
        }
        return {name: _mean(each) for name, each in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """The whole as JSON values."""
        rows = [asdict(row) for row in self.rows]
        return {
            "alarm": self.alarm, "summary": self.summary(), "rows": rows, "left_out": list(self.left_out)
        }  # fmt: skip


def vendi_score(kernel: Tensor, order: float = 1.0) -> float:
    """The effective number of different pictures, from 1 (all the same) to N, of their similarities `[N N]`.

    exp of the Renyi entropy of `order` of the eigenvalues of K / N; order 1 is Shannon's (Friedman and Dieng
    2023, arXiv 2210.02410, def. 3.1; other orders: Pasarkar and Dieng 2023, arXiv 2310.12952). A high order
    looks at what is frequent, a low one at what is rare. The diagonal of K is 1.

    Raises:
        ValueError: a negative order, or no pictures.
    """
    return float(_vendi(kernel.double()[None], order)[0])


def cosine_kernel(features: Tensor) -> Tensor:
    """Cosine similarities float64 `[... N N]` of features `[... N D]`."""
    unit = F.normalize(features.double(), dim=-1)
    return unit @ unit.mT


def gaussian_kernel(distances: Tensor, width: float) -> Tensor:
    """exp(-d^2 / (2 width^2)), float64 `[... N N]`, of distances of the same shape and unit as `width`."""
    return (-distances.double().square() / (2 * width**2)).exp()


def measure_real(
    features: Tensor, classes: Sequence[str], count: int, seed: int = 0, subsets: int = SUBSETS
) -> dict[str, Level]:
    """How varied sets of `count` real pictures are, for each class that has at least 8 of them.

    Sets are drawn without repetition; where a class has fewer than 2 `count` pictures they hold half of them,
    since larger ones would hardly differ. Draws depend on `seed` and the class alone.

    Args:
        features: of real pictures, `[M D]`.
        classes: of each, M.
        count: pictures that are made of a prompt.
        seed: of the draws.
        subsets: sets drawn.

    Raises:
        ValueError: fewer than 4 pictures or 2 sets, not a class for each picture, features that are not
            finite.
    """
    if count < FEWEST or subsets < 2:
        raise ValueError(f"count {count}, subsets {subsets}; take at least {FEWEST} and 2")
    _check(features, classes)
    levels = {}
    with one_thread():
        for name, numbers in _grouped(classes).items():
            if len(numbers) >= 2 * FEWEST:
                levels[name] = _level(_sorted(features[numbers]), name, count, seed, subsets)
    return levels


def measure_variety(
    features: Tensor, prompts: Sequence[str], classes: Sequence[str], levels: Mapping[str, Level]
) -> Variety:
    """How varied the pictures of each prompt are beside the real ones of its class, the most alike first.

    Of a prompt with more pictures than its level counts, drawn sets are measured and averaged.

    Args:
        features: of made pictures, `[N D]`, from the network that made those of `levels`.
        prompts: of each, N; pictures of one prompt differ by their seed.
        classes: of each prompt, N; a key of `levels`.
        levels: as `measure_real` gives them.

    Raises:
        ValueError: not a prompt and a class for each picture, a prompt in two classes, features that are not
            finite.
    """
    _check(features, prompts)
    _check(features, classes)
    rows, left_out = [], []
    with one_thread():
        for prompt, numbers in _grouped(prompts).items():
            of = {classes[number] for number in numbers}
            if len(of) > 1:
                raise ValueError(f"prompt {prompt!r} is in classes {sorted(of)}; give it one")
            level = levels.get(min(of))
            if level is None or len(numbers) < level.count:
                left_out.append(prompt)
            else:
                rows.append(_row(prompt, min(of), numbers, _sorted(features[numbers]), level))
    rows.sort(key=lambda row: (-row.sameness, row.prompt))
    return Variety(tuple(rows), tuple(sorted(left_out)))


def _level(rows: Tensor, name: str, count: int, seed: int, subsets: int) -> Level:
    count = min(count, len(rows) // 2)
    drawn = _draw(len(rows), count, subsets, name, seed)
    pairs = torch.triu_indices(count, count, 1)
    width = max(float(_distances(rows[drawn])[:, pairs[0], pairs[1]].median()) / 2, _TINY)
    real = _spreads(rows[drawn], width)
    # The first quarter of each set, over and over.
    repeated = drawn[:, torch.arange(count) % max(2, count // _QUARTER)]
    return Level(
        count,
        len(rows),
        width,
        _average(real),
        narrow=float(real[:, 0].min()),
        collapsed=float(_spreads(rows[repeated], width)[:, 0].max()),
    )


def _row(prompt: str, of_class: str, numbers: Sequence[int], rows: Tensor, level: Level) -> PromptVariety:
    whole = len(rows) == level.count
    drawn = torch.arange(level.count)[None] if whole else _draw(len(rows), level.count, SUBSETS, prompt, 0)
    made = _average(_spreads(rows[drawn], level.width))
    share = (made.different - 1) / max(level.real.different - 1, _TINY)
    return PromptVariety(
        prompt, of_class, tuple(numbers), made, level,
        sameness=1 - min(max(share, 0.0), 1.0),
        narrow=made.different < level.narrow,
        collapsed=made.different <= level.collapsed,
    )  # fmt: skip


def _spreads(sets: Tensor, width: float) -> Tensor:
    """(different, vendi, distance) float64 `[S 3]` of sets of features float64 `[S n D]`."""
    n, distances = sets.shape[1], _distances(sets)
    different, vendi = _vendi(gaussian_kernel(distances, width)), _vendi(cosine_kernel(sets))
    return torch.stack([different, vendi, distances.sum((1, 2)) / (n * (n - 1))], 1)


def _distances(sets: Tensor) -> Tensor:
    """Euclidean distances `[S n n]` within sets of features `[S n D]`; exactly 0 of equal ones."""
    return torch.cdist(sets, sets, compute_mode="donot_use_mm_for_euclid_dist")


def _vendi(kernels: Tensor, order: float = 1.0) -> Tensor:
    """The Vendi scores float64 `[S]` of kernels float64 `[S N N]`."""
    if order < 0 or not kernels.shape[-1]:
        raise ValueError(f"order {order} of {kernels.shape[-1]} pictures; take at least 0 and one picture")
    shares = torch.linalg.eigvalsh(kernels / kernels.shape[-1]).clamp(min=0)
    shares = shares / shares.sum(-1, keepdim=True)
    if order == 1:
        return torch.special.entr(shares).sum(-1).exp()
    if math.isinf(order):
        return 1 / shares.amax(-1)
    # Rounding leaves crumbs where an eigenvalue is 0, and a low order would count them.
    powers = shares.pow(order).where(shares > _TINY, 0.0)
    return powers.sum(-1).pow(1 / (1 - order))


def _draw(pictures: int, count: int, subsets: int, name: str, seed: int) -> Tensor:
    """Numbers int64 `[subsets count]` below `pictures`, none twice in a row of them."""
    rng = np.random.default_rng([seed, key_hash(name)])
    return torch.from_numpy(np.stack([rng.permutation(pictures)[:count] for _ in range(subsets)]))


def _average(spreads: Tensor) -> Spread:
    different, vendi, distance = (_mean(column) for column in spreads.T.tolist())
    return Spread(different, vendi, distance)


def _mean(values: Sequence[float]) -> float:
    """The mean, whatever the order of the values; NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan


def _grouped(names: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        groups[name].append(number)
    return dict(groups)


def _sorted(features: Tensor) -> Tensor:
    """The rows as float64 in an order of their own, so that nothing depends on the one they came in."""
    rows = features.double().numpy()
    return torch.from_numpy(rows[np.lexsort(rows.T[::-1])])


def _check(features: Tensor, names: Sequence[str]) -> None:
    if features.ndim != 2 or len(features) != len(names):
        raise ValueError(
            f"features are {tuple(features.shape)} for {len(names)} names; give [N D] and N names"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features hold values that are not finite; look for a damaged network")
