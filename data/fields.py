"""From bytes to words and numbers: captions and records cleaned, a picture's size from its first bytes.

What can be known of a field without decoding pixels, and without torch, so that indexing starts at once.
Text is strict UTF-8, JSON strict and bounded; what cannot be used raises `BadSample`. Pixels are decoded by
`data.decoder`.
"""

import io
import json
import os
import re
import unicodedata
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap width and height
# C0 and C1 but for white space, bidirectional overrides and byte order marks: nothing of a caption's meaning.
CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


class BadSample(Exception):  # noqa: N818 - it is no error of the program
    """Says which field of one sample cannot be used, and why; the sample is replaced, the run goes on."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str]]:
        return BadSample, (self.field, self.reason)


def append_line(path: Path, line: str) -> None:
    """Appends a line in one write, so that lines of several processes do not mix; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)


def image_size(head: bytes) -> tuple[int, int]:
    """Returns (width, height) in pixels, upright, from an image's first bytes; (0, 0) if unknown.

    Nothing is decoded. `head` may be the whole file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(head), formats=FORMATS)
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
    except Exception:
        return 0, 0
    width, height = image.size
    return (height, width) if exif.get(ORIENTATION) in (5, 6, 7, 8) else (width, height)


def decode_caption(data: bytes, field: str = "txt", max_bytes: int = 1 << 14) -> str:
    """Returns a caption as clean text: NFC, no control characters, white space folded; may be "".

    A byte order mark is dropped. Raises BadSample for more than `max_bytes` bytes, and for other encodings.
    """
    if len(data) > max_bytes:
        raise BadSample(field, f"caption of {len(data)} bytes, at most {max_bytes} are read")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadSample(field, "UTF-16 text at byte 0; save it as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(field, f"no UTF-8 at byte {error.start} ({error.reason})") from error
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()  # what the rest would come to, in a third of the time
    return " ".join(unicodedata.normalize("NFC", CONTROLS.sub("", text)).split())


def decode_json(data: bytes, field: str = "json", max_bytes: int = 1 << 18) -> dict[str, Any]:
    """Returns the record a JSON field holds.

    Raises BadSample with the position for malformed JSON, and for more than `max_bytes` bytes, too deep
    nesting, repeated names, NaN and infinities, and anything but an object.
    """
    if len(data) > max_bytes:
        raise BadSample(field, f"JSON of {len(data)} bytes, at most {max_bytes} are read")
    try:
        record = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise BadSample(field, "JSON nested too deep") from error
    except ValueError as error:
        raise BadSample(field, f"bad JSON: {error}"[:200]) from error
    if not isinstance(record, dict):
        raise BadSample(field, f"JSON holds a {type(record).__name__}, not an object")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"name {next(n for n in names if names.count(n) > 1)!r} occurs twice in one object")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
