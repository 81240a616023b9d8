"""Makers of small pictures and shards, shared by the tests of data reading."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.writer import write_shard

MakeImage = Callable[..., bytes]
MakeShard = Callable[..., Path]


def _image(number: int = 0, size: tuple[int, int] = (24, 16), form: str = "JPEG", **options: object) -> bytes:
    """A smooth picture whose colours depend on `number`."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [x * 255, y * 255, np.full_like(x, number * 37 % 256)]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_image() -> MakeImage:
    """Returns the bytes of a picture: make_image(number, size, form, **options of Image.save)."""
    return _image


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeShard:
    """Writes a shard of `count` captioned pictures, keys from `first` on, and returns its path."""

    def make(name: str = "00000.tar", count: int = 5, first: int = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = (
            (f"{i:05d}", {"jpg": _image(i), "txt": f"picture {i}".encode(), "json": b'{"label": "x"}'})
            for i in range(first, first + count)
        )
        write_shard(path, samples)
        return path

    return make
