"""Did the model keep training pictures? The nearest one of each made picture, and whether it is a copy.

Two distances: that of features, and that of blurred thumbnails at the best of 100 shifts and both
orientations. That a picture is near says little by itself: two calm seas at noon look alike, and nobody
copied. What tells is the gap: how much nearer a picture is to its training picture than either of them is to
any other real picture, in a geometric mean of both distances in which pixels weigh three quarters
(Carlini et al. 2023, arXiv 2301.13188, sec. 4.2, divide by the distance to neighbours for the same reason).
Other real pictures are the rest of the training pictures and the held-out ones, so that a training set of
eight pictures can be told from the many that are possible.
A copy has a gap of about a half or less, a picture of its own about 1.

How small a gap must be is calibrated on pictures that nobody can have copied: held-out real ones. Their gaps
give the lower tail, and the threshold lies where 256 such pictures would raise 0.05 false alarms.

    index = PictureIndex.build([train_view], network, folder, resolution=64)
    calibration = calibrate(held_out, network, index)
    found = find_copies(made, network, index, calibration)
    found.copies[0].by_pixels.place.key, copies_sheet(found, made, index).save("copies.png")

Numbers are functions of the pictures and the index, not of order or threads: pixels are summed in integers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaluation.features import FeatureNetwork
from evaluation.picture_index import PictureIndex, Place, Traits, look
from evaluation.pixel_distance import pixel_distances
from evaluation.report import contact_sheet

#: Candidates by each of: features, features mirrored, thumbnails, thumbnails mirrored.
CANDIDATES = 10
#: False alarms that the threshold allows in 256 pictures of a model that copies nothing.
FALSE_ALARMS, OF = 0.05, 256
#: Fewer held-out pictures than this tell nothing of the tail of their gaps.
FEWEST = 64
#: Nearer than this by pixels, two training pictures are one picture that occurs twice.
TWIN = 0.04
#: The share of held-out gaps that the tail is fitted to; gaps below the other are of copies, and left out.
_TAIL, _LEAKED = 0.1, 0.25
#: What pixels weigh in the gap; features tell less of copies, since most networks learn to ignore details.
_PIXELS = 0.75
_TINY = 1e-9
#: Queries that are compared with a portion at once; for memory alone.
_QUERIES = 256


@dataclass(frozen=True)
class Neighbour:
    """A training picture: its `number` in the index, its place, and how far it is."""

    number: int
    place: Place
    distance: float


@dataclass(frozen=True)
class Match:
    """What is nearest to picture `picture`, by pixels and features; `gap` is that of the nearest by pixels.

    The distance by pixels is 0 for the same thumbnails and about 1 for unrelated ones; that by features is
    Euclidean. `copied`: the gap is below the threshold.
    """

    picture: int
    by_pixels: Neighbour
    by_features: Neighbour
    gap: float
    copied: bool


@dataclass(frozen=True)
class Threshold:
    """The `gap` below which a picture is a copy, and the held-out pictures that it was calibrated on.

    `lowest` of their gaps; `leaked` of them are copies of training pictures themselves, and were left out.
    """

    gap: float
    held_out: int
    lowest: float
    leaked: int
    false_alarms: float = FALSE_ALARMS
    of_pictures: int = OF


@dataclass(frozen=True)
class Calibration:
    """The `threshold`, and the traits of the held-out pictures `real`, which others are compared with too."""

    threshold: Threshold
    real: Traits


@dataclass(frozen=True)
class Memorization:
    """A match for each picture, the smallest gap first, and the threshold."""

    matches: tuple[Match, ...]
    threshold: Threshold

    @property
    def copies(self) -> tuple[Match, ...]:
        """The matches whose picture was copied."""
        return tuple(match for match in self.matches if match.copied)

    def summary(self) -> dict[str, float]:
        """Figures for a card: the copies, the smallest and the median gap, the threshold."""
        gaps = [match.gap for match in self.matches]
        return {
            "copies": float(len(self.copies)),
            "smallest_gap": min(gaps, default=math.nan),
            "median_gap": float(np.median(gaps)) if gaps else math.nan,
            "gap_threshold": self.threshold.gap,
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole as JSON values."""
        matches = [asdict(match) for match in self.matches]
        return {"summary": self.summary(), "threshold": asdict(self.threshold), "matches": matches}


def calibrate(
    held_out: Tensor,
    network: FeatureNetwork,
    index: PictureIndex,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """The threshold from the gaps of real pictures `held_out` uint8 `[M 3 H W]` that are not in the index.

    The logarithms of the lowest tenth of the gaps fall off exponentially below that quantile; where the fit
    leaves 0.05 of 256 pictures lies the threshold. Held-out pictures whose gap is below a quarter are copies
    of training pictures, as duplicates in a data set are, and do not count.

    Args:
        held_out: at least 64; some hundred are better.
        network: that of the index.
        index: of the training pictures.
        progress: called with the number of pictures that are done.

    Raises:
        ValueError: too few pictures.
    """
    real = look(held_out, network)
    matches = _matches(held_out, network, _Search(index, real), 0.0, progress, held_out=True)
    return Calibration(threshold_of([match.gap for match in matches]), real)


def threshold_of(gaps: Sequence[float]) -> Threshold:
    """The threshold from the gaps of held-out pictures; raises ValueError for too few."""
    honest = [gap for gap in sorted(gaps) if gap >= _LEAKED]
    if len(honest) < FEWEST:
        raise ValueError(
            f"{len(honest)} held-out pictures that are no copies, but {FEWEST} are needed to tell what a "
            "copy is; hold more out"
        )
    logs = [math.log(gap) for gap in honest]
    tail = logs[: max(1, round(_TAIL * len(logs)))]
    edge = logs[len(tail)]
    rate = math.fsum(edge - each for each in tail) / len(tail)
    allowed = FALSE_ALARMS / OF
    gap = math.exp(edge - rate * math.log(len(tail) / len(logs) / allowed))
    return Threshold(gap, len(honest), honest[0], len(gaps) - len(honest))


def find_copies(
    pictures: Tensor,
    network: FeatureNetwork,
    index: PictureIndex,
    calibration: Calibration,
    progress: Callable[[int], None] | None = None,
) -> Memorization:
    """The nearest training pictures of `pictures` uint8 `[N 3 H W]`, the most copied first.

    Args:
        pictures: made by the model.
        network: that of the index.
        index: of the training pictures.
        calibration: as `calibrate` gives it, on the same index.
        progress: called with the number of pictures that are done.
    """
    threshold, search = calibration.threshold, _Search(index, calibration.real)
    matches = _matches(pictures, network, search, threshold.gap, progress)
    return Memorization(tuple(sorted(matches, key=lambda match: (match.gap, match.picture))), threshold)


def copies_sheet(
    found: Memorization, pictures: Tensor, index: PictureIndex, shown: int = 16
) -> Image.Image | None:
    """Copies beside their training pictures, read from the shards, with shard and key; None of none.

    `pictures` are those that `found` is about, uint8 `[N 3 H W]`.
    """
    images, captions = [], []
    for match in found.copies[:shown]:
        made, place = pictures[match.picture], match.by_pixels.place
        real = index.picture(match.by_pixels.number)[None].float()
        fitted = F.interpolate(real, made.shape[1:], mode="bilinear", antialias=True)[0]
        images += [made, fitted.round().clamp(0, 255).to(torch.uint8)]
        shard = place.shard.rpartition("/")[2]
        captions += [f"made {match.picture}, gap {match.gap:.2f}", f"{shard} {place.key}"]
    return contact_sheet(torch.stack(images), captions) if images else None


def _matches(
    pictures: Tensor,
    network: FeatureNetwork,
    search: "_Search",
    threshold: float,
    progress: Callable[[int], None] | None,
    held_out: bool = False,
) -> list[Match]:
    """A match of each picture, in their order; `held_out` ones are those of `search`, but not their own."""
    made, mirrored = look(pictures, network), network.features(pictures.flip(-1))
    threads, index = torch.get_num_threads(), search.index
    torch.set_num_threads(1)
    try:
        near, beside = search.candidates(made, [made.features, mirrored])
        pool = _Pool(search, near)
        nearest = [pool.nearest(made.take([i]), mirrored[i], numbers) for i, numbers in enumerate(near)]
        chosen = sorted({by_pixels for by_pixels, _ in nearest})
        traits = pool.take(chosen)
        both = zip(*search.candidates(traits, [traits.features]), strict=True)
        around = {number: [*one, *other] for number, (one, other) in zip(chosen, both, strict=True)}
        pool = _Pool(search, [*near, *beside, *around.values()])
        matches = []
        for i, (by_pixels, by_features) in enumerate(nearest):
            others = {*near[i], *beside[i], *around[by_pixels]} - {by_pixels, *([len(index) + i] * held_out)}
            picture = made.take([i]), mirrored[i]
            gap, pixels, features = pool.gap(*picture, by_pixels, by_features, sorted(others))
            one = Neighbour(by_pixels, index.place(by_pixels), pixels)
            other = Neighbour(by_features, index.place(by_features), features)
            matches.append(Match(i, one, other, gap, gap < threshold))
            if progress is not None:
                progress(i + 1)
        return matches
    finally:
        torch.set_num_threads(threads)


class _Search:
    """The pictures that are searched: those of an index, and numbered after them held-out ones, `real`."""

    def __init__(self, index: PictureIndex, real: Traits) -> None:
        self.index = index
        self.real = real

    def traits(self, numbers: Sequence[int]) -> Traits:
        """The traits of some pictures, whose numbers rise."""
        inside = [number for number in numbers if number < len(self.index)]
        held_out = self.real.take([number - len(self.index) for number in numbers[len(inside) :]])
        if not inside:
            return held_out
        found = self.index.traits(inside)
        thumbnails = torch.cat([found.thumbnails, held_out.thumbnails])
        return Traits(torch.cat([found.features, held_out.features]), thumbnails)

    def candidates(
        self, traits: Traits, features: Sequence[Tensor]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The numbers, rising, of the training pictures and of the held-out ones nearest to each.

        By thumbnails, mirrored too, and by features; `features` `[Q D]` are those to search by. Only what is
        found here is compared exactly.
        """
        held_out = [(len(self.index), self.real)]
        return _nearest(self.index.portions(), traits, features), _nearest(held_out, traits, features)


def _nearest(
    portions: Iterable[tuple[int, Traits]], traits: Traits, features: Sequence[Tensor]
) -> list[list[int]]:
    probes = [(each, False) for each in features]
    probes += [(_coarse(each), True) for each in (traits.thumbnails, traits.thumbnails.flip(-1))]
    best = [torch.full((len(traits), 0), -math.inf) for _ in probes]
    numbers = [torch.zeros(len(traits), 0, dtype=torch.int64) for _ in probes]
    for start, portion in portions:
        coarse = _coarse(portion.thumbnails)
        for k, (probe, by_thumbnails) in enumerate(probes):
            rows = coarse if by_thumbnails else portion.features
            scores = torch.cat([2 * some @ rows.T - rows.square().sum(1) for some in probe.split(_QUERIES)])
            top = scores.topk(min(CANDIDATES, len(rows)))
            best[k] = torch.cat([best[k], top.values], 1)
            numbers[k] = torch.cat([numbers[k], top.indices + start], 1)
            kept = best[k].topk(min(CANDIDATES, best[k].shape[1])).indices
            best[k], numbers[k] = best[k].gather(1, kept), numbers[k].gather(1, kept)
    return [sorted(set(row)) for row in torch.cat(numbers, 1).tolist()]


def _coarse(thumbnails: Tensor) -> Tensor:
    """Thumbnails of half the side, without their means, of length 1: float32 `[N D]`."""
    small = F.avg_pool2d(thumbnails.float(), 2)
    return F.normalize((small - small.mean((2, 3), keepdim=True)).flatten(1), dim=1)


class _Pool:
    """The traits of all candidates, and the distances of a picture to some of them."""

    def __init__(self, search: _Search, candidates: Sequence[Sequence[int]]) -> None:
        numbers = sorted({number for each in candidates for number in each})
        self._row = {number: row for row, number in enumerate(numbers)}
        self._traits = search.traits(numbers)

    def take(self, numbers: Sequence[int]) -> Traits:
        return self._traits.take([self._row[number] for number in numbers])

    def pixels(self, one: Traits, numbers: Sequence[int]) -> Tensor:
        return pixel_distances(one.thumbnails[0], self.take(numbers).thumbnails)

    def features(self, rows: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        """The least of the distances float64 `[K]` of the features `rows` `[D]` to those of candidates."""
        others = self.take(numbers).features.double()
        each = [(others - row.double()).square().sum(1).sqrt() for row in rows]
        return torch.stack(each).amin(0)

    def nearest(self, made: Traits, mirrored: Tensor, numbers: Sequence[int]) -> tuple[int, int]:
        """The candidates nearest by pixels and by features."""
        pixels, features = self.pixels(made, numbers), self.features([made.features[0], mirrored], numbers)
        return numbers[int(pixels.argmin())], numbers[int(features.argmin())]

    def gap(
        self, made: Traits, mirrored: Tensor, chosen: int, by_features: int, candidates: Sequence[int]
    ) -> tuple[float, float, float]:
        """(gap to the `chosen` one, distance to it by pixels, distance by features to `by_features`).

        `candidates` are other real pictures near the picture or near the chosen one.
        """
        real = self.take([chosen])
        between = self.pixels(real, candidates)
        others = [number for number, far in zip(candidates, between.tolist(), strict=True) if far >= TWIN]
        both = [made.features[0], mirrored]
        pixels = float(self.pixels(made, [chosen])[0])
        features = float(self.features(both, [chosen])[0])
        least = float(self.features(both, [by_features])[0])
        if not others:
            return 1.0, pixels, least
        by_pixels = min(float(self.pixels(made, others).min()), float(between[between >= TWIN].min()))
        to_real = self.features([real.features[0]], others)
        by_others = min(float(self.features(both, others).min()), float(to_real.min()))
        ratio, other = pixels / max(by_pixels, _TINY), features / max(by_others, _TINY)
        gap = ratio**_PIXELS * other ** (1 - _PIXELS)
        return gap, pixels, least
