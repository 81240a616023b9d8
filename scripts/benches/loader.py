"""How fast batches of pictures come, next to bare decoding and to plain webdataset; and batches of moments.

Four arms take turns on the same pictures, each with as many processes: ours, as training loads; the ceiling,
which decodes and crops and does nothing else; plain webdataset with Pillow; and ours again, for the A/A
ratio. Then precomputed moments are read in this process, next to plain copies of the same bytes.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.datamodule import ShardData
from data.index import IMAGE_FIELDS
from data.opening import find_shards
from data.progress import Progress
from data.shards import ShardDataset
from scripts.benches.findings import Findings, cell
from scripts.benches.loader_arms import BATCH, ceiling, ours
from scripts.benches.loader_moments import SHAPE, moments_arms
from scripts.benches.measuring import (
    Arm,
    Lap,
    Ratio,
    check_rounds,
    cpu,
    cpu_ms,
    interleave,
    machine,
    peak_rss,
    rate,
    ratio,
    wall,
)
from scripts.benches.pictures import write_pictures

WANTED = {"decode_ratio": 0.75, "webdataset_ratio": 3.0, "moments_ratio": 0.5}
#: What is told -> (whose speed, divided by whose).
RATIOS = {
    "decode_ratio": ("ours", "ceiling"),
    "webdataset_ratio": ("ours", "plain"),
    "aa": ("ours again", "ours"),
}
COPIES = ("pread", "mapped")  # moments are told against the faster one
ERRORS = {"decode_ratio": "aa", "webdataset_ratio": "aa", "moments_ratio": "moments_aa"}
MOMENTS_ROUNDS = 5  # of moments for each of pictures: they are short
SHARDS_EACH = 4  # made for each process
RECORD_BYTES = 4 * math.prod(SHAPE)

Laps = dict[str, list[Lap]]


def loader(
    images: int = 2000, side: int = 256, workers: int = 2, rounds: int = 12, shards: Path | None = None
) -> Findings:
    """Returns how fast pictures are loaded, next to the decoder alone and to plain webdataset.

    Args:
        images: pictures a round, rounded up to whole batches of 64 for each process.
        side: pixels a side that pictures are made.
        workers: processes of each arm.
        rounds: of each arm, an even number.
        shards: folder of WebDataset tars with pictures and captions, instead of made ones.
    """
    if min(images, side, workers) < 1:
        raise ValueError(f"images={images}, side={side}, workers={workers}; all must be at least 1")
    check_rounds(rounds)
    images = BATCH * workers * math.ceil(images / BATCH / workers)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if shards is None:
            shards = write_pictures(folder / "pictures", images, SHARDS_EACH * workers)
        options = ShardData(str(shards), side, val_fraction=0.0, workers=workers, cache=str(folder / "cache"))
        train, val = options.open(seed=0)
        told = {
            "images": images,
            "rounds": rounds,
            "workers": workers,
            "side": side,
            "batch": BATCH,
            **machine(),
        }
        told["source"] = _source(train)
        with _arms(train, val, shards, images, workers) as arms:
            laps = _pictures(arms, images, rounds)
            memory = {arm.name: peak_rss(arm.pids()) for arm in arms}
        arms = moments_arms(folder / "moments")
        laps |= interleave(arms, MOMENTS_ROUNDS * rounds)
        for arm in arms:
            arm.close()
    return _findings(laps, memory, told)


@contextmanager
def _arms(
    train: ShardDataset, val: ShardDataset, shards: Path, images: int, workers: int
) -> Iterator[list[Arm]]:
    """The four arms; ours and ours again stand as far apart as ours and any other."""
    # Imported here: the processes of the other arms import what this module does.
    from scripts.benches.loader_plain import plain

    arms: list[Arm] = []
    try:
        arms.append(ours("ours", train, val, images, workers))
        arms.append(ceiling(train, images, workers))
        arms.append(plain(find_shards(str(shards)), train.crop.resolution, images, workers))
        arms.append(ours("ours again", train, val, images, workers))
        yield arms
    finally:
        for arm in arms:
            arm.close()


def _pictures(arms: Sequence[Arm], images: int, rounds: int) -> Laps:
    with Progress("loading", len(arms) * (rounds + 1) * images) as progress:
        return interleave(arms, rounds, advance=progress.advance)


def _source(train: ShardDataset) -> dict[str, Any]:
    """Returns the size of the first picture, and the mean of the bytes of the first hundred."""
    sizes, first = [], None
    for position in range(min(100, train.views[0].counts[0])):
        index, row = train.views[0].sample(0, position)
        name = next(field for field in IMAGE_FIELDS if index.extent(row, field))
        extent = index.extent(row, name)
        assert extent is not None
        sizes.append(extent.size)
        first = first or index.image_size(row)
    return {"size": list(first or (0, 0)), "bytes": round(sum(sizes) / max(1, len(sizes)))}


def _findings(laps: Laps, memory: dict[str, float | None], told: dict[str, Any]) -> Findings:
    copy = max(COPIES, key=lambda name: rate(laps[name]))
    pairs = {
        **RATIOS,
        "moments_ratio": ("moments", copy),
        **{f"moments_{name}_ratio": ("moments", name) for name in COPIES if name != copy},
        "moments_aa": ("moments again", "moments"),
    }
    by_wall = {name: ratio(laps[over], laps[under], wall) for name, (over, under) in pairs.items()}
    by_cpu = {name: ratio(laps[over], laps[under], cpu) for name, (over, under) in pairs.items()}
    loading = [name for name in laps if name in memory]
    copying = [name for name in laps if name not in memory]
    figures = {
        **told,
        "images_per_second": {name: round(rate(laps[name]), 1) for name in loading},
        "images_per_round": {name: laps[name][0].units for name in loading},
        "gigabytes_per_second": {name: round(rate(laps[name]) * RECORD_BYTES / 1e9, 3) for name in copying},
        "cpu_ms": {name: _rounded(cpu_ms(laps[name]), 4) for name in laps},
        "cpu_ratios": {name: None if each is None else round(each.value, 4) for name, each in by_cpu.items()},
        "peak_rss_mb": {name: _rounded(each, 1) for name, each in memory.items()},
        "record_bytes": RECORD_BYTES,
        "moments_copy": copy,
    }
    rows = [("", "images/s", "CPU ms/image", "peak MB")]
    rows += [
        (name, cell(rate(laps[name])), cell(cpu_ms(laps[name]), ".2f"), cell(memory[name]))
        for name in loading
    ]
    rows += [("", "GB/s", "CPU µs/record", "")]
    rows += [
        (
            name,
            cell(rate(laps[name]) * RECORD_BYTES / 1e9, ".2f"),
            cell(_micro(cpu_ms(laps[name])), ".1f"),
            "",
        )
        for name in copying
    ]
    ratios: dict[str, Ratio] = {name: each for name, each in by_wall.items() if each is not None}
    return Findings("loader", figures, rows, ratios, WANTED, ERRORS)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _micro(milli: float | None) -> float | None:
    return None if milli is None else 1000 * milli
