"""Plain shards of photograph-like pictures, made for measuring: landscapes, enlarged, with texture laid on.

Enlarged pictures alone are too smooth: their JPEG files are a fraction of a photograph's and decode too fast.
Grain at three scales brings them to about two bits a pixel, as cameras write. A few hundred distinct ones are
made and repeated under other keys. Use: `write_pictures(folder, count=2048, shards=8)`.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data.landscapes import caption, draw_scene, render
from data.writer import write_shard

SIZE = (1024, 768)  # width, height
DISTINCT = 256
RENDERED = 256  # pixels a side before enlarging
QUALITY = 90
#: (pixels, standard deviation in levels of 256) of the grains.
GRAINS = ((1, 4.0), (2, 6.0), (4, 8.0))


def write_pictures(folder: Path, count: int, shards: int, distinct: int = DISTINCT) -> Path:
    """Returns `folder` after writing `count` pictures and captions into `shards` tars of like size."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = list(_fields(min(count, distinct)))
    ends = [count * number // shards for number in range(shards + 1)]
    for number in range(shards):
        samples = ((f"{i:08d}", fields[i % len(fields)]) for i in range(ends[number], ends[number + 1]))
        write_shard(folder / f"{number:05d}.tar", samples)
    return folder


def _fields(count: int) -> Iterator[dict[str, bytes]]:
    rng = np.random.default_rng(0)
    grain = np.sum([_grain(rng, *each) for each in GRAINS], axis=0)
    width, height = SIZE
    for number in range(count):
        scene = draw_scene(0, number)
        large = Image.fromarray(render(scene, RENDERED)).resize((width, width), Image.Resampling.BICUBIC)
        top = (width - height) // 2
        smooth = np.asarray(large.crop((0, top, width, top + height)), np.float32)
        y, x = rng.integers(0, height, 2)
        pixels = smooth + grain[y : y + height, x : x + width, None]
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
        yield {"jpg": buffer.getvalue(), "txt": caption(scene).encode()}


def _grain(rng: np.random.Generator, pixels: int, deviation: float) -> np.ndarray:
    """Returns noise of one scale, float32 and larger than a picture, so that it can be shifted."""
    width, height = SIZE[0] + SIZE[1], 2 * SIZE[1]
    noise = rng.normal(0, deviation, (height // pixels, width // pixels)).astype(np.float32)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
