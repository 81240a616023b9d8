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
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from data.landscape_captions import PATTERNS, caption, read_factors
from data.landscape_painter import render
from data.landscape_scenes import FACTORS, Light, Scene, Sky, Terrain, Time, draw_scene, factors
from data.rendering import RenderPlan, render_as_told, write_rendered

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
    "jpeg",
    "read_factors",
    "render",
    "write_landscapes",
]

LANDSCAPES_VERSION = 1  # grows whenever the same (seed, index) would give another picture or caption


def jpeg(scene: Scene, resolution: int) -> bytes:
    """The render of `scene` as a JPEG of quality 95, 4:4:4."""
    buffer = io.BytesIO()
    Image.fromarray(render(scene, resolution)).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def encode(scene: Scene, resolution: int) -> tuple[str, dict[str, bytes]]:
    """The key and the fields jpg, txt and json of `scene`, for `write_shard`."""
    record = {
        **factors(scene),
        "seed": scene.seed,
        "index": scene.index,
        "width": resolution,
        "height": resolution,
    }
    return f"landscape-{scene.index:08d}", {
        "jpg": jpeg(scene, resolution),
        "txt": caption(scene).encode(),
        "json": json.dumps(record).encode(),
    }


def _sample(seed: int, index: int, resolution: int) -> tuple[str, dict[str, bytes]]:
    return encode(draw_scene(seed, index), resolution)


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
    the folder holds anything else, ValueError for a count or shard size below 1, OSError where nothing can be
    written or a process dies. A folder that was begun with another `shard_size` keeps that.
    """
    plan = RenderPlan("landscapes", LANDSCAPES_VERSION, seed, resolution, shard_size)
    return write_rendered(folder, _sample, plan, count, workers, progress)


if __name__ == "__main__":
    render_as_told(_sample)
