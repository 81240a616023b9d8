"""Procedural landscapes with light: the embedded data set, drawn from nothing but a seed and an index.

Four factors are known for every picture (time, terrain, side of the light, sky), the caption states them,
and they can be read from the picture, so a model trained on it can be judged without people: see
`evaluation.adherence`. Scene `index` of seed `seed` is a pure function of the two; shards of any size,
written by any number of processes, hold the same bytes.

    scene = draw_scene(seed=0, index=42)
    render(scene, 64), caption(scene), factors(scene)
    render(dataclasses.replace(scene, time=Time.NIGHT), 64)   # the same place, at night
    write_landscapes(Path("shards/train"), count=20_000, resolution=64, seed=0, workers=2)
"""

import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from data.landscape_captions import PATTERNS, caption
from data.landscape_painter import render
from data.landscape_scenes import FACTORS, Light, Scene, Sky, Terrain, Time, draw_scene, factors
from data.shard_index import DataError, current_index, write_atomic
from data.writer import write_shard

__all__ = [
    "FACTORS",
    "LANDSCAPES_VERSION",
    "PATTERNS",
    "Light",
    "Scene",
    "Sky",
    "Terrain",
    "Time",
    "caption",
    "draw_scene",
    "encode",
    "factors",
    "render",
    "write_landscapes",
]

LANDSCAPES_VERSION = 1  # grows whenever the same (seed, index) would give another picture or caption
_PLAN = "landscapes.json"


def encode(scene: Scene, resolution: int) -> tuple[str, dict[str, bytes]]:
    """The key and the fields jpg (quality 95, 4:4:4), txt and json of `scene`, for `write_shard`."""
    buffer = io.BytesIO()
    Image.fromarray(render(scene, resolution)).save(buffer, "JPEG", quality=95, subsampling=0)
    record = {
        **factors(scene),
        "seed": scene.seed,
        "index": scene.index,
        "width": resolution,
        "height": resolution,
    }
    return f"landscape-{scene.index:08d}", {
        "jpg": buffer.getvalue(),
        "txt": caption(scene).encode(),
        "json": json.dumps(record).encode(),
    }


def _samples(seed: int, indices: range, resolution: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index in indices:
        yield encode(draw_scene(seed, index), resolution)


def _write(path: Path, seed: int, indices: range, resolution: int) -> int:
    """Writes one shard; returns how many pictures it holds."""
    write_shard(path, _samples(seed, indices, resolution))
    return len(indices)


def _finished(path: Path, count: int) -> bool:
    try:
        return current_index(path).count == count
    except DataError:
        return False


def _check_plan(folder: Path, plan: dict[str, int], names: set[str]) -> None:
    """Records what `folder` holds, or raises DataError where it already holds something else."""
    path = folder / _PLAN
    others = sorted(shard.name for shard in folder.glob("*.tar") if shard.name not in names)
    if path.exists():
        found = json.loads(path.read_text())
        if found != plan:
            raise DataError(
                f"{path}: made with {found}, not with {plan}; choose an empty folder or delete this one"
            )
    elif any(folder.glob("*.tar")):
        raise DataError(f"{folder}: holds shards but no {_PLAN}, so not landscapes; choose an empty folder")
    if others:
        raise DataError(
            f"{folder}: holds {len(others)} shards more than asked for, such as {others[0]}; delete them"
        )
    write_atomic(path, (json.dumps(plan) + "\n").encode())


def write_landscapes(
    folder: Path,
    count: int,
    resolution: int,
    seed: int,
    shard_size: int = 1024,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """The shards `000000.tar` ... written to `folder`: scenes 0 to `count` - 1 of `seed`, WebDataset layout.

    Each sample is `landscape-<index>` with `.jpg`, `.txt` (the caption) and `.json` (factors, seed, index,
    width, height). `workers` processes write whole shards; 0 writes them in this process. The bytes do not
    depend on it. A shard that is there with a valid index is kept, so a stopped run goes on where it was.
    `progress` is called with the number of pictures of every shard that is finished. Raises DataError where
    the folder holds anything else, ValueError for a count or shard size below 1.
    """
    if count < 1 or shard_size < 1:
        raise ValueError(f"write_landscapes: count {count} and shard_size {shard_size} must be 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, shard_size)
    jobs = [
        (folder / f"{number:06d}.tar", range(start, min(start + shard_size, count)))
        for number, start in enumerate(starts)
    ]
    plan = {"version": LANDSCAPES_VERSION, "seed": seed, "resolution": resolution, "shard_size": shard_size}
    _check_plan(folder, plan, {path.name for path, _ in jobs})
    report = progress if progress is not None else lambda done: None
    todo = []
    for path, indices in jobs:
        if _finished(path, len(indices)):
            report(len(indices))
        else:
            todo.append((path, indices))
    if min(workers, len(todo)) < 2:  # starting a process takes seconds
        for path, indices in todo:
            report(_write(path, seed, indices, resolution))
    else:
        # Spawned, not forked: the caller may hold threads of torch, which a fork would leave locked.
        with ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn")) as pool:
            pending = [pool.submit(_write, path, seed, indices, resolution) for path, indices in todo]
            for done in as_completed(pending):
                report(done.result())
    return [path for path, _ in jobs]
