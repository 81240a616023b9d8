"""Pictures decoded strictly: what a viewer would show, as upright RGB, or `BadSample`.

Only JPEG, PNG and WebP are opened, never by content sniffing into other decoders (no EPS, so no Ghostscript).
The header's size is checked before a pixel is decoded. EXIF orientation is applied, alpha composited, 16 bits
scaled, an embedded colour profile converted to sRGB. A profile that names itself sRGB is not converted, nor
one that littleCMS refuses, nor a gray one. Of an animation the first frame is taken. Needs no torch. Use:
`image = Decoder()(data, "jpg", side=64)`.
"""

import hashlib
import io
import warnings
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from data.fields import FORMATS, ORIENTATION, BadSample

# First bytes of what is often found under an image's name.
KINDS = (
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"II+\0", "image/tiff"),
    (b"MM\0+", "image/tiff"),
    (b"%!PS", "application/postscript"),
    (b"%PDF", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"<?xml", "text/xml"),
    (b"<svg", "image/svg+xml"),
    (b"<!doctype html", "text/html"),
    (b"<html", "text/html"),
    (b"{", "application/json"),
    (b"[", "application/json"),
)
# First bytes of what is read, but for WebP, whose size stands between its two words.
OURS = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"))


class Decoder:
    """Decodes an image field to an upright RGB picture, or raises BadSample.

    Refused from the header: more than `max_pixels`, a side below `min_side` pixels, a long side of more than
    `max_aspect` short ones. `background` (R, G, B), 0 to 255, is what transparent pixels are laid on.
    """

    def __init__(
        self,
        max_pixels: int = 1 << 26,
        min_side: int = 8,
        max_aspect: float = 16.0,
        background: tuple[int, ...] = (255, 255, 255),
    ) -> None:
        if len(background) != 3 or not all(0 <= value <= 255 for value in background):
            raise ValueError(
                f"background={background}; it must be three numbers from 0 to 255, as 255,255,255"
            )
        self.max_pixels = max_pixels
        self.min_side = min_side
        self.max_aspect = max_aspect
        self.background = background

    def __call__(self, data: bytes, field: str = "image", side: int = 0) -> Image.Image:
        """Returns the picture in mode RGB; given `side`, a JPEG may come smaller, but at least 1.5*side.

        Raises BadSample for anything that is not a whole, allowed picture.
        """
        if not data:
            raise BadSample(field, "empty file (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
                self._check_size(image, field)
                if side:
                    # Only JPEG can: its decoder then skips frequencies that the resize would drop. Half again
                    # as many pixels are left for that: 50 dB from the whole one, in two thirds of the time.
                    image.draft("RGB", _draft_size(image.size, -(-3 * side // 2)))
                image.load()
                return self._finish(image)
            except BadSample:
                raise
            except Image.UnidentifiedImageError as error:
                raise BadSample(field, _why_unidentified(data)) from error
            except Image.DecompressionBombError as error:
                raise BadSample(field, f"more than {self.max_pixels} pixels: {error}") from error
            except Exception as error:
                # Pillow's decoders raise a dozen types for damaged files; each is the same to a training run.
                raise BadSample(field, f"damaged: {error!r}"[:200]) from error

    def _check_size(self, image: Image.Image, field: str) -> None:
        width, height = image.size
        if width * height > self.max_pixels:
            raise BadSample(field, f"{width}x{height} is more than max_pixels={self.max_pixels}")
        if min(width, height) < self.min_side:
            raise BadSample(field, f"{width}x{height} has a side below min_side={self.min_side}")
        if max(width, height) > self.max_aspect * min(width, height):
            raise BadSample(field, f"{width}x{height} is longer than max_aspect={self.max_aspect:g}")

    def _finish(self, image: Image.Image) -> Image.Image:
        """Returns the loaded picture in sRGB, on the background, upright."""
        profile = image.info.get("icc_profile")
        orientation = _orientation(image)
        if image.mode == "CMYK":
            image = _convert_profile(image, profile) or image.convert("RGB")
        else:
            image = _to_rgb(image, self.background)
            image = _convert_profile(image, profile) or image
        return image if orientation in (None, 1) else _upright(image, orientation)


def _draft_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Returns the size with `short` as the shorter side, rounded up."""
    least = min(size)
    return -(-size[0] * short // least), -(-size[1] * short // least)


def _why_unidentified(data: bytes) -> str:
    """Returns why no decoder took the data: it is something else, or one of ours with a damaged header."""
    ours = "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
    ours = next((kind for magic, kind in OURS if data.startswith(magic)), ours)
    if ours is not None:
        return f"damaged: begins as {ours}, but its header cannot be read"
    return f"not an image ({_kind(data)}); JPEG, PNG and WebP are read"


def _kind(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    for magic, kind in KINDS:
        if start.startswith(magic.lower()) or data.startswith(magic):
            return kind
    if data[4:8] == b"ftyp":
        return "image/" + data[8:12].decode("ascii", "replace").strip()
    return f"unknown, starts with {data[:8].hex(' ')}"


def _orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:
        return None  # damaged EXIF is no reason to lose a good picture
    return value if isinstance(value, int) else None


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Returns the picture turned as EXIF says; values outside 1 to 8 turn nothing."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _to_rgb(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Returns any mode but CMYK as RGB: 16 bits scaled to 8, transparency laid on the background."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Returns a 16-bit gray picture as 8 bits: 65535 becomes 255, and a transparent value becomes alpha."""
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    gray = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _convert_profile(image: Image.Image, profile: object) -> Image.Image | None:
    """Returns the RGB or CMYK picture in sRGB, None where its profile is not used."""
    if not isinstance(profile, bytes) or not profile or b"sRGB" in profile or b"s\0R\0G\0B" in profile:
        return None
    transform = _transform(_Profile(profile), image.mode)
    return ImageCms.applyTransform(image, transform) if transform else None


class _Profile:
    """A colour profile that hashes fast, so that a shard's thousand equal profiles are opened once."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.digest = hashlib.blake2b(data, digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Profile) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@lru_cache(maxsize=32)
def _transform(profile: _Profile, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile.data))
        if source.profile.xcolor_space.strip() != mode:
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
