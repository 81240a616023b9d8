"""Perceptual hashes: copies are near, other pictures far, flat ones have none."""

import io

import numpy as np
import pytest
from PIL import Image

from data.fields import BadSample
from data.phash import perceptual_hash


def scene(seed: int, side: int = 256) -> Image.Image:
    """A picture of a few soft blobs."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    gray = np.zeros((side, side))
    for _ in range(200):
        cx, cy, size, height = generator.uniform([0, 0, 0.0005, -1], [1, 1, 0.01, 1])
        gray += height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / size)
    gray = (gray - gray.min()) / np.ptp(gray) * 255
    return Image.fromarray(np.repeat(gray.astype(np.uint8)[..., None], 3, -1))


def coded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_resized_and_recompressed_copies_are_near_and_others_far() -> None:
    images = [scene(seed) for seed in range(20)]
    hashes = [perceptual_hash(coded(image)) for image in images]
    for seed, image in enumerate(images):
        small = image.resize((100, 100), Image.Resampling.LANCZOS)
        for copy in (coded(image, "JPEG", quality=60), coded(small), coded(image, "WEBP", quality=70)):
            assert (perceptual_hash(copy) ^ hashes[seed]).bit_count() <= 4
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 4


def test_flat_pictures_have_none_and_damaged_ones_are_refused() -> None:
    assert perceptual_hash(coded(Image.new("RGB", (40, 30), (200, 10, 10)))) == 0
    with pytest.raises(BadSample):
        perceptual_hash(coded(scene(0), "JPEG")[:500])
